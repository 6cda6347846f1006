"""Cross-entropy with z-loss of a linear layer: in chunks, against the logits held or recomputed.

    python -m benchmarks.linear_cross_entropy --json linear_cross_entropy.json
    python -m benchmarks.linear_cross_entropy --compiled      # in the environment of benchmarks.aot

The first times values with gradients on this machine, in one process, interleaved, after it has
checked each against float64. The second compiles a language model's shape for accelerators that
are not there, and reads what memory the program takes besides its inputs and outputs.

The baselines are what one writes by hand: `logits` holds them in float32; `recompute` is a scan
over chunks under `jax.checkpoint`.
"""

import argparse
import functools
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

from ._timing import interleaved, summary

Shape = tuple[int, int, int]  # tokens, features, words
TIMED: Shape = (1024, 512, 32768)
COMPILED: Shape = (8192, 4096, 131072)
SMOKE: Shape = (32, 8, 300)
Z_LOSS = 1e-4


def sums(hidden: Any, weight: Any, labels: Any, z_loss: float) -> Any:
    """Return the sum over tokens, as one writes it."""
    logits = jax.lax.dot(hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(lse - label_logits) + z_loss * jnp.sum(jnp.square(lse))


def held(hidden: Any, weight: Any, labels: Any, z_loss: float = Z_LOSS) -> Any:
    """Return the mean, with all logits at once."""
    return sums(hidden, weight, labels, z_loss) / len(labels)


def recomputed(hidden: Any, weight: Any, labels: Any, *, chunk: int) -> Any:
    """Scan over chunks, whose logits the backward pass computes again."""
    n = len(labels) // chunk

    @jax.checkpoint
    def of_chunk(h: Any, y: Any) -> Any:
        return sums(h, weight, y, Z_LOSS)

    chunks = hidden.reshape(n, chunk, -1), labels.reshape(n, chunk)
    total, _ = jax.lax.scan(lambda s, c: (s + of_chunk(*c), None), jnp.float32(0), chunks)
    return total / len(labels)


def ours(hidden: Any, weight: Any, labels: Any, *, z_loss: float = Z_LOSS, **options: Any) -> Any:
    """Return jaxreg's."""
    dtype = hidden.dtype
    return jr.ops.linear_cross_entropy(
        hidden, weight, labels, z_loss=z_loss, dtype=dtype, **options
    ).total


def data(shape: Shape) -> tuple[Any, Any, Any]:
    """Return hidden states, a kernel, and labels."""
    tokens, features, words = shape
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(tokens, features)).astype(np.float32)
    weight = (rng.normal(size=(features, words)) / features**0.5).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(weight), jnp.asarray(rng.integers(0, words, tokens))


def with_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the value and the gradients by both factors."""
    return jax.value_and_grad(loss, (0, 1))


def products(text: str) -> int:
    """Return how many matrix products a program for the CPU has; none is in two of its loops."""
    return len(re.findall(r" dot\(|__onednn\$matmul|runtime_matmul|\"__cpu\$gemm", text))


def check(found: Any, exact: Any, name: str) -> float:
    """Return the largest error relative to the largest entry, of value and gradients."""
    errors = [
        float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    ]
    if max(errors) > 1e-4:
        raise AssertionError(f"{name} is off by {errors}")
    return max(errors)


def timed(shape: Shape, chunk: int, rounds: int) -> dict[str, Any]:
    """Time values with gradients, and values, on this machine."""
    arrays = data(shape)
    losses = {
        "logits": held,
        "recompute": functools.partial(recomputed, chunk=chunk),
        "jaxreg": functools.partial(ours, chunk=chunk),
        "jaxreg, default chunk": ours,
        "jaxreg, no z-loss": functools.partial(ours, chunk=chunk, z_loss=0.0),
    }
    with jax.enable_x64():
        double = [x.astype(jnp.float64) if jnp.isrealobj(x) and x.ndim == 2 else x for x in arrays]
        few = slice(0, min(64, shape[0]))  # float64 logits of some tokens are enough
        exact = {z: by_float64(double[0][few], double[1], arrays[2][few], z) for z in (Z_LOSS, 0.0)}
    programs, rows = {}, {}
    for name, loss in losses.items():
        part = loss if name != "recompute" else functools.partial(recomputed, chunk=few.stop)
        found = jax.jit(with_gradient(part))(arrays[0][few], arrays[1], arrays[2][few])
        error = check(found, exact[0.0 if "no z-loss" in name else Z_LOSS], name)
        start = time.perf_counter()
        program = jax.jit(with_gradient(loss)).lower(*arrays).compile()
        rows[name] = {
            "largest_error": error,
            "compile_s": time.perf_counter() - start,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "matrix_products": products(program.as_text()),
        }
        programs[name] = functools.partial(program, *arrays)
        programs[f"{name}: value"] = functools.partial(
            jax.jit(loss).lower(*arrays).compile(), *arrays
        )
    seconds = interleaved(programs, rounds)
    for name, row in rows.items():
        row["seconds"] = summary(seconds[name])
        row["value_seconds"] = summary(seconds[f"{name}: value"])
        for baseline in ("logits", "recompute", "jaxreg, no z-loss"):
            row[f"÷ {baseline}"] = summary(np.divide(seconds[name], seconds[baseline]))
    return {"shape": shape, "chunk": chunk, "rows": rows}


def by_float64(hidden: Any, weight: Any, labels: Any, z_loss: float) -> Any:
    """Return the value and the gradients by the formula, in NumPy."""
    h, w, y = (np.asarray(x) for x in (hidden, weight, labels))
    z = h @ w
    largest = z.max(axis=1, keepdims=True)
    lse = largest + np.log(np.exp(z - largest).sum(axis=1, keepdims=True))
    tokens = np.arange(len(y))
    value = np.mean(lse[:, 0] - z[tokens, y] + z_loss * lse[:, 0] ** 2)
    slope = np.exp(z - lse) * (1 + 2 * z_loss * lse)
    slope[tokens, y] -= 1
    slope /= len(y)
    return value, (slope @ w.T, h.T @ slope)


def growth(shape: Shape, chunk: int) -> list[dict[str, Any]]:
    """Read the temporary memory of programs for this machine, as the shape grows."""
    tokens, features, words = shape
    rows = []
    for t, c, v in (
        (tokens, chunk, words),
        (2 * tokens, chunk, words),
        (4 * tokens, chunk, words),
        (tokens, 2 * chunk, words),
        (tokens, chunk, 2 * words),
    ):
        arrays = (
            jax.ShapeDtypeStruct((t, features), jnp.float32),
            jax.ShapeDtypeStruct((features, v), jnp.float32),
            jax.ShapeDtypeStruct((t,), jnp.int32),
        )
        row: dict[str, Any] = {"tokens": t, "chunk": c, "words": v}
        for name, loss in (("logits", held), ("jaxreg", functools.partial(ours, chunk=c))):
            memory = jax.jit(with_gradient(loss)).lower(*arrays).compile().memory_analysis()
            row[name] = memory.temp_size_in_bytes
        rows.append(row)
    return rows


def compiled(shape: Shape, chunk: int) -> list[dict[str, Any]]:
    """Read the temporary memory of programs for devices that are not there."""
    from .aot import DEVICES, report

    tokens, features, words = shape
    rows = []
    for device in DEVICES:
        for weight in (jnp.bfloat16, jnp.float32):
            arrays = (
                jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16),
                jax.ShapeDtypeStruct((features, words), weight),
                jax.ShapeDtypeStruct((tokens,), jnp.int32),
            )
            losses = {
                "logits": held,
                "recompute": functools.partial(recomputed, chunk=chunk),
                "jaxreg": functools.partial(ours, chunk=chunk),
                "jaxreg, twice the chunk": functools.partial(ours, chunk=2 * chunk),
            }
            if weight == jnp.bfloat16:
                losses["jaxreg, gradient_dtype=bfloat16"] = functools.partial(
                    ours, chunk=chunk, gradient_dtype=jnp.bfloat16
                )
            baseline = None
            for name, loss in losses.items():
                # The first two arguments are donated: neither of the arrays is.
                function = functools.partial(_without_two, with_gradient(loss))
                cost = report(function, ((), (), *arrays), device)
                baseline = baseline or cost
                row = {"device": device, "weight": str(jnp.dtype(weight)), "loss": name, **cost}
                row["÷ logits"] = cost["temporary"] / baseline["temporary"]
                rows.append(row)
                print(
                    f"{device:8} {row['weight']:9} {name:34} {cost['temporary'] / 1e9:7.3f} GB"
                    f" {row['÷ logits']:6.3f} ÷ logits",
                    flush=True,
                )
    return rows


def _without_two(function: Any, _: Any, __: Any, *arrays: Any) -> Any:
    return function(*arrays)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="for devices that are not there")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--chunk", type=int, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    result: dict[str, Any] = {"jax": jax.__version__}
    if options.compiled:
        shape, chunk = (SMOKE, 8) if options.smoke else (COMPILED, 1024)
        result["compiled"] = compiled(shape, options.chunk or chunk)
    else:
        shape, chunk = (SMOKE, 8) if options.smoke else (TIMED, 256)
        rounds, chunk = 2 if options.smoke else options.rounds, options.chunk or chunk
        result |= {
            "device": jax.devices()[0].device_kind,
            "machine": platform.processor() or platform.machine(),
            "timed": timed(shape, chunk, rounds),
            "growth": growth(shape, chunk),
        }
        print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
