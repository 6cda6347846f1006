"""Penalties of matrices, against the formulas that users would write.

Two claims: orthogonality by the smaller Gram matrix, and the proximal operator of the nuclear norm
without a decomposition.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary


def keras_orthogonal(w: jax.Array) -> jax.Array:
    """Keras's formula, over the columns."""
    w = w / jnp.linalg.norm(w, axis=0, keepdims=True)
    n = w.shape[1]
    product = jnp.matmul(w.T, w) * (1.0 - jnp.eye(n))
    return 0.5 * jnp.sum(jnp.abs(product)) / (n * (n - 1.0) / 2.0)


def soft_orthogonal(w: jax.Array) -> jax.Array:
    """The formula of Bansal et al., as it stands."""
    return jnp.sum(jnp.square(w.T @ w - jnp.eye(w.shape[1])))


def off_diagonal(w: jax.Array) -> jax.Array:
    """Sonnet's formula."""
    return jnp.sum(jnp.square((w.T @ w) * (1.0 - jnp.eye(w.shape[1]))))


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return the function of no arguments, and what compiling it cost and says of its memory."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    cost = {"compile_s": seconds, "temporary_bytes": getattr(memory, "temp_size_in_bytes", None)}
    return lambda: program(*args), cost


def compare(
    functions: dict[str, Callable[..., Any]],
    args: tuple[Any, ...],
    baseline: str,
    rounds: int,
    label: str,
) -> Iterator[Row]:
    """Yield the ratios of times to the baseline."""
    built = {name: compiled(function, *args) for name, function in functions.items()}
    seconds = interleaved({name: run for name, (run, _) in built.items()}, rounds)
    for name in [name for name in functions if name != baseline]:
        details = {"seconds": summary(seconds[name]), **built[name][1]}
        ratio = ratios(seconds, name, baseline)
        yield Row(f"{label}: {name} ÷ {baseline}", ratio, details=details)


def orthogonality(shape: tuple[int, int], rounds: int) -> Iterator[Row]:
    """Yield the ratios for value and gradient on a wide kernel, each penalty to its own formula."""
    w = jax.random.normal(jax.random.key(0), shape) / np.sqrt(shape[0])
    label = "value and gradient, {} × {}".format(*shape)
    for penalty, baseline, formula in (
        (jr.Orthogonal(1.0), "Keras's formula", keras_orthogonal),
        (jr.SoftOrthogonal(1.0), "the formula of Bansal et al.", soft_orthogonal),
        (jr.OffDiagonalOrthogonal(1.0), "Sonnet's formula", off_diagonal),
    ):
        name = f"jr.{type(penalty).__name__}"
        functions = {
            baseline: jax.value_and_grad(formula),
            name: jax.value_and_grad(penalty.__call__),
        }
        (b, slope_b), (a, slope_a) = (jax.jit(function)(w) for function in functions.values())
        error = {
            "value": float(abs(a - b) / b),
            "gradient": float(jnp.linalg.norm(slope_a - slope_b) / jnp.linalg.norm(slope_b)),
        }
        # The slope of a modulus: among millions of cosines, rounding gives a few the other sign.
        kinks = isinstance(penalty, jr.Orthogonal)
        if error["value"] > 1e-5 or error["gradient"] > (1e-2 if kinks else 1e-5):
            raise AssertionError(f"{name} differs from {baseline}: {error}")
        yield from compare(functions, (w,), baseline, rounds, label)


def nuclear(n: int, step: float, rounds: int) -> Iterator[Row]:
    """Yield the ratios for the proximal operator by either method."""
    x = jax.random.normal(jax.random.key(0), (n, n)) / np.sqrt(n)
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    exact = (u * np.maximum(s - step, 0)) @ vt
    svd, polar = jr.Nuclear(1.0), jr.Nuclear(1.0, method="polar")
    error = {
        name: float(np.linalg.norm(jax.jit(p.prox)(x, step) - exact, 2))
        for name, p in (("svd", svd), ("polar", polar))
    }
    if error["svd"] > 1e-5 * s[0] or error["polar"] > 1e-3 * step + 1e-5 * s[0]:
        raise AssertionError(f"a method is further off than it says: {error}")
    functions = {"svd": svd.prox, "polar": polar.prox, "one product": lambda x, t: x @ x}
    label = f"nuclear norm's prox, {n} × {n}, step {step}"
    yield from compare(functions, (x, step), "svd", rounds, label)


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios."""
    yield from orthogonality((16, 256) if smoke else (1024, 16384), rounds)
    for step in (0.02, 0.2):
        yield from nuclear(16 if smoke else 1024, step, rounds)
