"""On an NVIDIA GPU: is a regularized step slower than an unregularized one, and how much?

Checks numbers against float64 before it times what they are of, and the kernels' against XLA's at
the shapes that are timed. Then times, interleaved in one process, a language model's cross-entropy
with z-loss, AdamW with and without a penalty, many small leaves, the sparse autoencoder's step, a
dense layer, its product alone; and PyTorch's autoencoder where PyTorch is installed. Short calls
are queued: the GPU is waited for once in a round. The kernels of `jaxreg.ops` take a Hopper GPU; on
others it times XLA alone and says so.

Run:
    python -m benchmarks.gpu [--rounds N] [--smoke] [--tune FILE]

With `--tune` the kernels take the fastest of up to 13 tilings of each shape, which the file then
keeps. In `jaxreg/ops/tuned.json` it decides what `implementation=None` runs.

Writes `benchmarks/results/gpu-NAME.json`, where NAME is the device's, row by row, and prints them.
"""

import argparse
import contextlib
import faulthandler
import functools
import importlib.util
import json
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr
from benchmarks import linear_cross_entropy
from benchmarks._report import Row
from benchmarks._timing import interleaved, ratios, summary

RESULTS = Path(__file__).parent / "results"
BATCH, HIDDEN = 8192, 16384
WIDTHS = (512, 1024, 256, 4096)
PENALTY = jr.L1(1e-3)
BF16: Any = jnp.bfloat16
LONGEST = 200
"""Seconds after which a row that is not done ends the program: a kernel may hang."""


def operands(batch: int, width: int, hidden: int, dtype: Any = BF16) -> list[jax.Array]:
    """Return x, an encoder's and a decoder's weights and biases."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, width), dtype)
    w = jax.random.normal(keys[1], (width, hidden), dtype) / width**0.5
    v = jax.random.normal(keys[2], (hidden, width), dtype) / hidden**0.5
    return [x, w, jnp.zeros(hidden, dtype), v, jnp.zeros(width, dtype)]


def autoencoder(
    *operands: Any, penalty: Any, implementation: str | None, activation: Any = jax.nn.relu
) -> jax.Array:
    """Return the loss of a sparse autoencoder."""
    x, w, b, v, c = operands
    if penalty is None:
        y, value = activation(x @ w + b) @ v + c, jnp.float32(0)
    else:
        y, _, value = jr.ops.mlp(
            *operands,
            activation=activation,
            penalty=penalty,
            implementation=implementation,
        )
    return jnp.mean(jnp.square((y - x).astype(jnp.float32))) + value


def layer(x: Any, w: Any, b: Any, *, penalty: Any, implementation: str | None) -> Any:
    """Return a dense layer's output, and its penalty."""
    if penalty is None:
        return jax.nn.relu(x @ w + b), jnp.float32(0)
    return jr.ops.dense(
        x, w, b, activation=jax.nn.relu, penalty=penalty, implementation=implementation
    )


def product(x: Any, w: Any, *, penalty: Any, implementation: str | None) -> Any:
    """Return the product alone; with the penalty, what the kernel's own costs."""
    if penalty is None:
        return x @ w
    return jr.ops.dense(x, w, penalty=penalty, implementation=implementation)


def check(implementation: str, batch: int, width: int, hidden: int) -> None:
    """Raise if the implementation's loss or gradient is off, of the formula's in float64."""
    narrow = operands(batch, width, hidden)
    step = jax.jit(
        jax.value_and_grad(
            functools.partial(autoencoder, penalty=PENALTY, implementation=implementation),
            argnums=(1, 2, 3),
        )
    )
    got = step(*narrow)
    x, w, b, v, c = (np.asarray(a, np.float64) for a in narrow)
    z = x @ w + b
    h = np.maximum(z, 0)
    error = h @ v + c - x
    dy = 2 * error / error.size
    dz = (dy @ v.T + float(np.asarray(PENALTY.strength)) / len(x)) * (z > 0)
    loss = np.mean(error**2) + float(np.asarray(PENALTY.strength)) * np.abs(h).sum() / len(x)
    assert_close(got, (loss, (x.T @ dz, dz.sum(0), h.T @ dy)))


def assert_close(got: Any, expected: Any) -> None:
    """Raise if a number is off by 3 % of its array's largest entry."""

    @jax.jit
    def error(a: Any, e: Any) -> Any:
        a, e = a.astype(jnp.float32), e.astype(jnp.float32)
        return jnp.max(jnp.abs(a - e)) / jnp.max(jnp.abs(e))

    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        off = float(error(a, jnp.asarray(e)))
        if not off <= 0.03:
            raise AssertionError(f"an array of shape {np.shape(e)} is off by {off}")


def runnable(*shapes: tuple[int, int, int]) -> list[str]:
    """Return the implementations that run here, numbers checked.

    Args:
        *shapes: batches, widths and hidden features.
    """
    for shape in shapes:
        check("xla", *shape)
    try:
        for shape in shapes:
            check("mosaic_gpu", *shape)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        print(f"no kernel here: {error!r}"[:500], flush=True)
        return ["xla"]
    return ["xla", "mosaic_gpu"]


def variants(
    function: Callable[..., Any], arguments: list[jax.Array], implementations: list[str]
) -> dict[str, Callable[[], Any]]:
    """Return what is compared: without the penalty, and with it by each implementation."""
    settings = {"without": (None, None)} | {i: (PENALTY, i) for i in implementations}
    jitted = {
        name: jax.jit(functools.partial(function, penalty=p, implementation=i))
        for name, (p, i) in settings.items()
    }
    return {name: functools.partial(f, *arguments) for name, f in jitted.items()}


def steps(*operands: Any, **settings: Any) -> Any:
    """Return the autoencoder's loss and gradient."""
    f = functools.partial(autoencoder, **settings)
    return jax.value_and_grad(f, argnums=(1, 2, 3, 4))(*operands)


def layer_steps(x: Any, w: Any, b: Any, *, penalty: Any, implementation: str | None) -> Any:
    """Return the gradient of a loss of the layer's output, and its penalty."""

    def loss(w: Any, b: Any) -> Any:
        a, value = layer(x, w, b, penalty=penalty, implementation=implementation)
        return jnp.mean(jnp.square(a.astype(jnp.float32))) + value

    return jax.value_and_grad(loss, argnums=(0, 1))(w, b)


OPTIMIZERS = {
    "AdamW, 1.07e9 parameters": ([(16384, 8192)] * 8, [(1024, 1024)] * 4),
    "AdamW, 200 small leaves": ([(256, 256)] * 200, [(64, 64)] * 20),
}


def optimizers(name: str, smoke: bool) -> dict[str, Callable[[], Any]]:
    """Return AdamW ± a coupled penalty, over large leaves or over many small ones."""
    adamw = optax.adamw(1e-3)
    chains = {
        "without": adamw,
        "xla": optax.chain(jr.add_penalty_gradient(jr.kernel(jr.L2(1e-4))), adamw),
    }
    params = [{"kernel": jnp.ones(shape)} for shape in OPTIMIZERS[name][smoke]]
    updates = {}
    for label, tx in chains.items():

        def update(params: Any, state: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        updates[label] = functools.partial(jax.jit(update), params, tx.init(params))
    return updates


def cross_entropies(tokens: int, features: int, words: int) -> dict[str, Callable[[], Any]]:
    """Return the cross-entropy with z-loss and its gradients: logits held, recomputed, and ours."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, features), BF16)
    weight = jax.random.normal(keys[1], (features, words), BF16) / features**0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, words)
    losses = {
        # No product has float32 factors: the cotangents of such logits are in bfloat16, too.
        "held, bfloat16": functools.partial(linear_cross_entropy.held, dtype=BF16),
        "held": linear_cross_entropy.held,
        "recomputed": functools.partial(linear_cross_entropy.recomputed, chunk=tokens // 8),
        "jaxreg": linear_cross_entropy.ours,
    }
    return {
        name: functools.partial(
            jax.jit(linear_cross_entropy.with_gradient(loss)), hidden, weight, labels
        )
        for name, loss in losses.items()
    }


def check_cross_entropies() -> None:
    """Raise if one is off."""
    for call in cross_entropies(512, 256, 1024).values():
        arrays = [np.asarray(a, np.float64) for a in call.args[:2]]
        assert_close(
            call(),
            linear_cross_entropy.by_float64(*arrays, call.args[2], linear_cross_entropy.Z_LOSS),
        )


def torch_steps(batch: int, width: int, hidden: int) -> dict[str, Callable[[], Any]]:
    """Return PyTorch's step with L1, eager and compiled."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    def leaf(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    x, w, b, v, c = (
        leaf(*s) for s in ((batch, width), (hidden, width), (hidden,), (width, hidden), (width,))
    )
    x.requires_grad_(False)

    def loss() -> Any:
        h = torch.relu(torch.nn.functional.linear(x, w, b))
        y = torch.nn.functional.linear(h, v, c)
        return ((y - x).float() ** 2).mean() + 1e-3 * h.float().abs().sum() / batch

    # What JAX waits for.
    queue = types.SimpleNamespace(block_until_ready=torch.cuda.synchronize)

    def step(loss: Any) -> Callable[[], Any]:
        def run() -> Any:
            torch.autograd.grad(loss(), [w, b, v, c])
            return queue

        return run

    return {"torch eager": step(loss), "torch.compile": step(torch.compile(loss))}


def main() -> None:
    """Check, time, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="see `jaxreg.ops.tuned`")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 2
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.smoke:
        sys.exit(
            f"benchmarks.gpu times an NVIDIA GPU; JAX finds {device.device_kind!r} here. Install"
            " `jax[cuda13]` on a machine with a GPU. What XLA and the kernels compile to without"
            " one: `python -m benchmarks.aot`."
        )
    failed = _run(device, options)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the program where this takes longer, and say where it was."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _run(device: jax.Device, options: argparse.Namespace) -> list[str]:
    """Time and write each row, and return the names of those that failed."""
    # The widths that matter most come first, in case that the time is up before the last.
    batch, hidden, widths = (512, 1024, (256,)) if options.smoke else (BATCH, HIDDEN, WIDTHS)
    rows: list[dict[str, Any]] = []
    settings = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxreg": jr.__version__,
        "rounds": options.rounds,
    }
    file = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.device_kind.lower())}.json"

    def timed(functions: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        for f in functions.values():  # compiles
            jax.block_until_ready(f())
        if "mosaic_gpu" in functions:  # with the tiles that are timed
            assert_close(functions["mosaic_gpu"](), functions["xla"]())
        seconds = interleaved(functions, options.rounds, queued=device.platform == "gpu")
        baseline, *others = seconds
        relative = {k: ratios(seconds, k, baseline) for k in others}
        return {k: summary(v) for k, v in seconds.items()} | {f"÷ {baseline}": relative}

    def row(name: str, build: Callable[[], dict[str, Callable[[], Any]]]) -> None:
        start = time.perf_counter()
        try:
            with _ended_after(LONGEST):
                found = timed(build())
        except Exception as error:  # the others can be timed still
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        took = time.perf_counter() - start
        rows.append({"case": name, "took": took, **found})
        cells = []
        for key, value in found.items():
            if key.startswith("÷"):
                cells += [f"{k} {key} {Row(k, r).shown(options.rounds)}" for k, r in value.items()]
            elif key != "error":
                cells.append(f"{key} {value['median'] * 1e6:,.0f} µs")
        print(f"{name}: {'; '.join(cells) or found['error']} ({took:.0f} s)", flush=True)
        if not options.smoke:
            file.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")

    def entropies() -> dict[str, Callable[[], Any]]:
        check_cross_entropies()
        return cross_entropies(*shape)

    # What needs no kernel first: a kernel that fails may leave the device unusable.
    shape = linear_cross_entropy.SMOKE if options.smoke else linear_cross_entropy.COMPILED
    row("cross-entropy, {} tokens, {} features, {} words".format(*shape), entropies)
    for name in OPTIMIZERS:
        row(name, functools.partial(optimizers, name, options.smoke))
    # Several tiles for each warpgroup, and in each way that these share a product. Before the
    # tuning, which is for the shapes that are timed.
    shapes = [(512, 256, 1024)] if options.smoke else [(2048, 256, HIDDEN), (2048, 1024, HIDDEN)]
    failed, implementations = [], ["xla"]
    try:
        with _ended_after(LONGEST):
            implementations = runnable(*shapes)
    except Exception:  # what needs no kernel can be timed still
        traceback.print_exc()
        failed.append("the check of the numbers")
    settings["implementations"] = implementations
    tuning = contextlib.nullcontext()
    if options.tune:
        tuning = jr.ops.tuned(options.tune, measure=True)
    with tuning:
        for width in widths:

            def of(function: Any, count: int | None = None, width: int = width) -> Any:
                arguments = operands(batch, width, hidden)[:count]
                return variants(function, arguments, implementations)

            row(f"SAE step, D {width}", functools.partial(of, steps))
            if width == 512:  # its kernels also store, and load, what comes before the activation
                gelu = functools.partial(steps, activation=jax.nn.gelu)
                row(f"SAE step with GELU, D {width}", functools.partial(of, gelu))
            row(f"product, D {width}", functools.partial(of, product, 2))
            row(f"dense, D {width}, forward", functools.partial(of, layer, 3))
            row(f"dense, D {width}, step", functools.partial(of, layer_steps, 3))
        # Last: its compiler takes long.
        if not options.smoke and importlib.util.find_spec("torch"):
            row(
                "SAE step, D 512, and PyTorch",
                lambda: of(steps, width=512) | torch_steps(batch, 512, hidden),
            )
    return failed + [found["case"] for found in rows if "error" in found]


if __name__ == "__main__":
    main()
