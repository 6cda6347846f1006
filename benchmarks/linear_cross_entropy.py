"""Cross-entropy with z-loss of a linear layer: in chunks, against the logits held or recomputed.

Values with gradients are timed after each was checked against float64, and the temporary memory of
the programs is read. The baselines are what one writes by hand: *held* has all logits in float32;
*recomputed* is a scan over chunks under `jax.checkpoint`.

`python -m benchmarks.linear_cross_entropy`, in the environment of `benchmarks.aot`, compiles a
language model's shape for accelerators that are not there, and prints the programs' memory.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary

Shape = tuple[int, int, int]  # tokens, features, words
TIMED: Shape = (1024, 512, 32768)
COMPILED: Shape = (8192, 4096, 131072)
SMOKE: Shape = (32, 8, 300)
Z_LOSS = 1e-4


def sums(hidden: Any, weight: Any, labels: Any, z_loss: float, dtype: Any = jnp.float32) -> Any:
    """Return the sum over tokens, as one writes it; `dtype` is that of the logits that are held."""
    logits = jax.lax.dot(hidden, weight.astype(hidden.dtype), preferred_element_type=dtype)
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(lse - label_logits) + z_loss * jnp.sum(jnp.square(lse))


def held(
    hidden: Any, weight: Any, labels: Any, z_loss: float = Z_LOSS, dtype: Any = jnp.float32
) -> Any:
    """Return the mean, with all logits at once."""
    return sums(hidden, weight, labels, z_loss, dtype) / len(labels)


def recomputed(hidden: Any, weight: Any, labels: Any, *, chunk: int) -> Any:
    """Scan over chunks, whose logits the backward pass computes again."""
    n = len(labels) // chunk

    @jax.checkpoint
    def of_chunk(h: Any, y: Any) -> Any:
        return sums(h, weight, y, Z_LOSS)

    chunks = hidden.reshape(n, chunk, -1), labels.reshape(n, chunk)
    total, _ = jax.lax.scan(lambda s, c: (s + of_chunk(*c), None), jnp.float32(0), chunks)
    return total / len(labels)


def three_products(hidden: Any, weight: Any, *, chunk: int) -> Any:
    """Return a chunk's products of the value and both gradients, and nothing else of them."""

    def of_chunk(_: Any, h: Any) -> Any:
        logits = h @ weight
        # The last chunk's only: to add them up is a pass over them in each.
        by_weight = jax.lax.optimization_barrier(h.T) @ logits
        return by_weight, logits @ weight.T

    return jax.lax.scan(of_chunk, weight, hidden.reshape(-1, chunk, hidden.shape[-1]))


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


def timed(shape: Shape, chunk: int, rounds: int) -> Iterator[Row]:
    """Yield the ratios of times of values with gradients, of memory, and the matrix products."""
    arrays = data(shape)
    losses = {
        "held": held,
        "recomputed": functools.partial(recomputed, chunk=chunk),
        "jaxreg": functools.partial(ours, chunk=chunk),
        "jaxreg without z-loss": functools.partial(ours, chunk=chunk, z_loss=0.0),
    }
    with jax.enable_x64():
        double = [x.astype(jnp.float64) if jnp.isrealobj(x) and x.ndim == 2 else x for x in arrays]
        few = slice(0, min(64, shape[0]))  # float64 logits of some tokens are enough
        exact = {z: by_float64(double[0][few], double[1], arrays[2][few], z) for z in (Z_LOSS, 0.0)}
    programs, memory = {}, {}
    for name, loss in losses.items():
        part = loss if name != "recomputed" else functools.partial(recomputed, chunk=few.stop)
        found = jax.jit(with_gradient(part))(arrays[0][few], arrays[1], arrays[2][few])
        check(found, exact[0.0 if "without" in name else Z_LOSS], name)
        program = jax.jit(with_gradient(loss)).lower(*arrays).compile()
        memory[name] = program.memory_analysis().temp_size_in_bytes
        programs[name] = functools.partial(program, *arrays)
        if name == "jaxreg":
            yield Row.exactly("jaxreg: matrix products", products(program.as_text()), "≤ 3")
    alone = jax.jit(functools.partial(three_products, chunk=chunk)).lower(*arrays[:2]).compile()
    programs["three products"] = functools.partial(alone, *arrays[:2])
    seconds = interleaved(programs, rounds)
    details = {"seconds": {name: summary(times) for name, times in seconds.items()}}
    targets = {"held": "≤ 0.95", "recomputed": "≤ 0.80", "jaxreg without z-loss": "≤ 1.01"}
    for baseline, target in targets.items():
        ratio = ratios(seconds, "jaxreg", baseline)
        yield Row(f"value and gradient: jaxreg ÷ {baseline}", ratio, target, details)
    least = ratios(seconds, "three products", "held")
    yield Row("value and gradient: the three products alone ÷ held", least)
    share = memory["jaxreg"] / memory["held"]
    yield Row.exactly("temporary memory: jaxreg ÷ held", share, "≤ 0.20", bytes=memory)


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


def growth(shape: Shape, chunk: int) -> Iterator[Row]:
    """Yield how the temporary memory of programs for this machine grows with the shape."""
    tokens, features, words = shape

    def temporary(tokens: int, chunk: int, words: int) -> int:
        arrays = (
            jax.ShapeDtypeStruct((tokens, features), jnp.float32),
            jax.ShapeDtypeStruct((features, words), jnp.float32),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
        )
        loss = with_gradient(functools.partial(ours, chunk=chunk))
        return jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    once = temporary(tokens, chunk, words)
    for what, twice in {
        "tokens": temporary(2 * tokens, chunk, words),
        "the chunk": temporary(tokens, 2 * chunk, words),
        "words": temporary(tokens, chunk, 2 * words),
    }.items():
        yield Row.exactly(f"temporary memory: twice {what} ÷ once", twice / once)


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios."""
    shape, chunk = (SMOKE, 8) if smoke else (TIMED, 512)
    yield from timed(shape, chunk, rounds)
    yield from growth(shape, chunk)


def main(shape: Shape = COMPILED, chunk: int = 1024) -> None:
    """Print the temporary memory of programs for devices that are not there."""
    from .aot import DEVICES, compiled_for

    tokens, features, words = shape
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
                program = compiled_for(with_gradient(loss), arrays, device)
                temporary = program.memory_analysis().temp_size_in_bytes
                baseline = baseline or temporary
                share = temporary / baseline
                print(
                    f"{device:8} {jnp.dtype(weight)!s:9} {name:34}"
                    f" {temporary / 1e9:7.3f} GB {share:6.3f} ÷ logits",
                    flush=True,
                )


if __name__ == "__main__":
    main()
