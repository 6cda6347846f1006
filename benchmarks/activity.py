"""What penalties of activations cost: memory, compilation and time, against the same model without.

A transformer of 24 layers: memory under scan and remat with a penalty of every block, also where
the model stores what is penalized; compilation unrolled, with a penalty of every dense layer; and
two of its layers, as wide, for the time of a step. The penalty is first checked against what the
model stores, or against Flax's own capture of the outputs.

`python -m benchmarks.activity`, in the environment of `benchmarks.aot`, prints the memory on
accelerators that are not there.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

from ._report import Row
from ._timing import compilations, interleaved, ratios, summary


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a transformer and of its batch."""

    layers: int = 24
    width: int = 512
    heads: int = 8
    batch: int = 8
    tokens: int = 256


ELSEWHERE = ("TPU v5e", "H200")
SMOKE = Size(layers=3, width=16, heads=2, batch=2, tokens=8)


class Block(nn.Module):
    """A transformer block that may store its output, as models do to penalize it outside."""

    size: Size
    store: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Return the block's output, as a carry."""
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.size.heads, name="attention")(h)
        h = nn.relu(nn.Dense(4 * self.size.width, name="up")(nn.LayerNorm(name="norm_2")(x)))
        x = x + nn.Dense(self.size.width, name="down")(h)
        if self.store:
            self.sow("intermediates", "out", x)
        return x, None


class Scanned(nn.Module):
    """Blocks under scan and remat. They list no axis for what is penalized: none is needed."""

    size: Size
    store: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last block's output."""
        axes: Any = {"params": 0} | ({"intermediates": 0} if self.store else {})
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes=axes,
            split_rngs={"params": True},
            length=self.size.layers,
        )
        return blocks(self.size, self.store, name="blocks")(x, None)[0]


class Unrolled(nn.Module):
    """Blocks one after the other."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the last block's output."""
        for i in range(self.size.layers):
            x, _ = Block(self.size, name=f"block_{i}")(x)
        return x


def plain(model: nn.Module) -> Callable[..., Any]:
    """Return a loss without a penalty."""

    def loss(params: Any, x: jax.Array) -> Any:
        return jnp.mean(jnp.square(model.apply({"params": params}, x)))

    return loss


def penalized(model: nn.Module, rules: Any, *, strict: bool = True) -> Callable[..., Any]:
    """Return the same loss and the penalty of what its modules put out."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, terms = jr.activity(rules, strict=strict)(model.apply)({"params": params}, x)
        return jnp.mean(jnp.square(y)) + terms.total

    return loss


def stored(model: nn.Module) -> Callable[..., Any]:
    """Return the loss that is written without jaxreg: store all activations, then penalize them."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, state = model.apply({"params": params}, x, mutable=["intermediates"])
        (out,) = state["intermediates"]["blocks"]["out"]
        return jnp.mean(jnp.square(y)) + 1e-3 * jnp.sum(jnp.abs(out)) / len(x)

    return loss


def captured(model: nn.Module) -> Callable[..., Any]:
    """Return a loss with a penalty of all dense layers' outputs, as Flax captures them."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, state = model.apply(
            {"params": params}, x, capture_intermediates=lambda module, _: is_dense(module)
        )
        outs = jax.tree.leaves(state["intermediates"])
        return jnp.mean(jnp.square(y)) + 1e-3 * sum(jnp.sum(jnp.abs(h)) for h in outs) / len(x)

    return loss


def shapes(model: nn.Module, size: Size) -> tuple[Any, Any]:
    """Return the shapes of the parameters and of a batch."""
    x = jax.ShapeDtypeStruct((size.batch, size.tokens, size.width), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"], x


def drawn(model: nn.Module, size: Size) -> tuple[Any, Any]:
    """Return parameters and a batch."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) / size.width**0.5, leaf.dtype)

    return jax.tree.map(draw, shapes(model, size))


def check(losses: dict[str, Callable[..., Any]], baseline: str, arguments: Any) -> None:
    """Raise if jaxreg's loss is not that of the baseline."""
    found, expected = (jax.jit(losses[name])(*arguments) for name in ("jr.activity", baseline))
    if not abs(found - expected) <= 1e-5 * expected:
        raise AssertionError(f"the penalized loss is {found}, and that of {baseline} {expected}")


def memory_losses(size: Size) -> dict[str, Callable[..., Any]]:
    """Return losses of the scanned model: without, with, and with stored activations."""
    return {
        "without": plain(Scanned(size)),
        "jr.activity": penalized(Scanned(size), {"blocks": jr.L1(1e-3)}),
        "stored": stored(Scanned(size, store=True)),
    }


def temporary(loss: Callable[..., Any], arguments: Any) -> int:
    """Return the bytes of temporary memory that a gradient needs on this machine."""
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def memory(size: Size, measure: Callable[..., int]) -> Iterator[Row]:
    """Yield the temporary memory of the losses with a penalty over that of the loss without."""
    check(memory_losses(SMOKE), "stored", drawn(Scanned(SMOKE), SMOKE))
    arguments = shapes(Scanned(size), size)
    found = {name: measure(loss, arguments) for name, loss in memory_losses(size).items()}
    for name, target in {"jr.activity": "≤ 1.02", "stored": None}.items():
        what = f"temporary memory, {size.layers} layers under scan and remat: {name} ÷ without"
        yield Row.exactly(what, found[name] / found["without"], target, bytes=found)


def aot_temporary(device: str) -> Callable[..., int]:
    """Return a measure of temporary memory on a device that is not there."""
    from .aot import compiled_for

    def measure(loss: Callable[..., Any], arguments: Any) -> int:
        # The parameters' memory may be reused, as a training step's is.
        program = compiled_for(jax.value_and_grad(loss), arguments, device, donate=(0,))
        return int(program.memory_analysis().temp_size_in_bytes)

    return measure


def unrolled_losses(size: Size) -> dict[str, Callable[..., Any]]:
    """Return losses of the unrolled model: without, and with a penalty on each of its Dense."""
    rules = {re.compile(r".*/(up|down|query|key|value|out)"): jr.L1(1e-3)}
    return {
        "without": plain(Unrolled(size)),
        "jr.activity": penalized(Unrolled(size), rules),
        "captured": captured(Unrolled(size)),
    }


def compilation(size: Size, rounds: int) -> Iterator[Row]:
    """Yield the ratio of the times to trace and compile the unrolled gradient."""
    arguments, losses = drawn(Unrolled(size), size), unrolled_losses(size)
    check(losses, "captured", arguments)

    def compiled(loss: Callable[..., Any]) -> Any:
        return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()

    programs = {name: functools.partial(compiled, loss) for name, loss in losses.items()}
    seconds = compilations(programs, rounds)
    for name, target in {"jr.activity": "≤ 1.10", "captured": None}.items():
        what = f"trace and compile, {size.layers} layers, every Dense: {name} ÷ without"
        yield Row(what, ratios(seconds, name, "without"), target)


def step(size: Size, rounds: int) -> Iterator[Row]:
    """Yield the ratio of the times of a gradient step of the unrolled model."""
    arguments, losses = drawn(Unrolled(size), size), unrolled_losses(size)
    check(losses, "captured", arguments)
    runs = {}
    for name, loss in losses.items():
        program = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        runs[name] = functools.partial(program, *arguments)
    seconds = interleaved(runs, rounds)
    details = {"seconds": {name: summary(times) for name, times in seconds.items()}}
    for name, target in {"jr.activity": "≤ 1.03", "captured": None}.items():
        what = f"step of width {size.width}, every Dense: {name} ÷ without"
        yield Row(what, ratios(seconds, name, "without"), target, details)


def is_dense(module: nn.Module) -> bool:
    """Return whether this is one of the penalized modules."""
    return isinstance(module, nn.Dense | nn.DenseGeneral)


def same_text(size: Size) -> bool:
    """Return whether an activity without a match compiles to the text of the bare model."""
    arguments = shapes(Scanned(size), size)
    losses = plain(Scanned(size)), penalized(Scanned(size), {"none": jr.L1(1.0)}, strict=False)
    texts = {program_text(jax.value_and_grad(loss), arguments) for loss in losses}
    return len(texts) == 1


def program_text(function: Callable[..., Any], arguments: Any) -> str:
    """Return the compiled program, without where in the Python code it comes from."""
    compiled = jax.jit(lambda *args: function(*args)).lower(*arguments).compile()
    text = re.sub(r", metadata={[^}]*}", "", compiled.as_text())
    return re.sub(
        r"^(FileNames|FunctionNames|FileLocations|StackFrames)$.*?^$", "", text, flags=re.M | re.S
    )


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios."""
    size = SMOKE if smoke else Size()
    yield from memory(size, temporary)
    small = dataclasses.replace(size, batch=2, tokens=16, width=min(size.width, 64))
    yield from compilation(small, min(rounds, 5))
    yield from step(dataclasses.replace(size, layers=2), rounds)
    if not same_text(SMOKE):
        raise AssertionError("a rule that matches nothing changes the compiled program")
    yield Row.exactly("a rule that matches nothing ÷ bare, by compiled text", 1.0, "≤ 1.00")


def main() -> None:
    """Print the memory on devices that are not there."""
    for device in ELSEWHERE:
        for row in memory(Size(), aot_temporary(device)):
            print(device, row.line(), row.details, flush=True)


if __name__ == "__main__":
    main()
