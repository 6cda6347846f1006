"""What penalties of activations cost: memory, compilation and time, against the same model without.

python -m benchmarks.activity                 # on this machine's CPU
python -m benchmarks.activity --aot           # memory for an H200 and a TPU v5e; see benchmarks.aot
python -m benchmarks.activity --smoke         # tiny shapes, to see that it runs
"""

import argparse
import dataclasses
import functools
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

from ._timing import interleaved, ratios, summary


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


def shapes(model: nn.Module, size: Size) -> tuple[Any, Any]:
    """Return the shapes of the parameters and of a batch."""
    x = jax.ShapeDtypeStruct((size.batch, size.tokens, size.width), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"], x


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


def memory(size: Size, measure: Callable[..., int]) -> dict[str, Any]:
    """Measure the losses' temporary memory, and each as a ratio to the first."""
    arguments = shapes(Scanned(size), size)
    found = {name: measure(loss, arguments) for name, loss in memory_losses(size).items()}
    return {k: {"bytes": v, "ratio": v / found["without"]} for k, v in found.items()}


def aot_temporary(device: str) -> Callable[..., int]:
    """Return a measure of temporary memory on a device that is not there."""
    from .aot import report

    def measure(loss: Callable[..., Any], arguments: Any) -> int:
        return int(report(jax.value_and_grad(loss), arguments, device)["temporary"])

    return measure


def unrolled_losses(size: Size) -> dict[str, Callable[..., Any]]:
    """Return losses of the unrolled model: without, and with a penalty on each of its Dense."""
    rules = {re.compile(r".*/(up|down|query|key|value|out)"): jr.L1(1e-3)}
    return {"without": plain(Unrolled(size)), "jr.activity": penalized(Unrolled(size), rules)}


def compilation(size: Size, rounds: int) -> dict[str, Any]:
    """Return the seconds that tracing and compiling the unrolled gradient take, and ratios."""
    arguments = shapes(Unrolled(size), size)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, loss in unrolled_losses(size).items():
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(jax.value_and_grad(loss)).lower(*arguments)
            traced = time.perf_counter()
            lowered.compile()
            seconds.setdefault(name, []).append((traced - start, time.perf_counter() - traced))
    both = {name: np.array(times) for name, times in seconds.items()}
    total = {name: times.sum(1) for name, times in both.items()}
    return {
        "layers": size.layers,
        "trace_s": {name: summary(times[:, 0]) for name, times in both.items()},
        "compile_s": {name: summary(times[:, 1]) for name, times in both.items()},
        "ratio": summary(total["jr.activity"] / total["without"]),
        "trace_ratio": summary(both["jr.activity"][:, 0] / both["without"][:, 0]),
    }


def step(size: Size, rounds: int) -> dict[str, Any]:
    """Return the seconds of a gradient step of the unrolled model, and the ratio round by round."""
    model = Unrolled(size)
    params_shape, x_shape = shapes(model, size)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) / size.width**0.5, leaf.dtype)

    params, x = jax.tree.map(draw, params_shape), draw(x_shape)
    runs = {}
    for name, loss in unrolled_losses(size).items():
        program = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
        runs[name] = functools.partial(program, params, x)
    check(size, params, x, runs)
    seconds = interleaved(runs, rounds)
    return {
        "seconds": {name: summary(times) for name, times in seconds.items()},
        "ratio": ratios(seconds, "jr.activity", "without"),
    }


def check(size: Size, params: Any, x: jax.Array, runs: dict[str, Callable[[], Any]]) -> None:
    """Raise unless the penalty is that of the activations, taken from Flax's own capture."""
    _, state = Unrolled(size).apply(
        {"params": params}, x, capture_intermediates=lambda module, _: is_dense(module)
    )
    outputs = jax.tree.leaves(state["intermediates"])
    expected = sum(1e-3 * float(jnp.sum(jnp.abs(out))) / len(x) for out in outputs)
    found = float(runs["jr.activity"]()[0] - runs["without"]()[0])
    if abs(found - expected) > 1e-4 * expected:
        raise AssertionError(f"the penalty is {found}, and by hand {expected}")


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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aot", action="store_true", help="memory on devices that are not here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    size = SMOKE if options.smoke else Size()
    result: dict[str, Any] = {"jax": jax.__version__, "size": dataclasses.asdict(size)}
    if options.aot:
        result["memory"] = {name: memory(size, aot_temporary(name)) for name in ELSEWHERE}
    else:
        small = dataclasses.replace(size, batch=2, tokens=16, width=min(size.width, 64))
        short = dataclasses.replace(size, layers=2)
        result |= {
            "machine": platform.processor() or platform.machine(),
            "memory": {"CPU": memory(size, temporary)},
            "compilation": compilation(small, 2 if options.smoke else 5),
            "step": step(short, 2 if options.smoke else options.rounds),
            "same_text_where_no_rule_matches": same_text(SMOKE),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
