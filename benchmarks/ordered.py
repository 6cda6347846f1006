"""The proximal operators of penalties of neighbours, on one long signal.

The total variation's is exact; pyproximal's iterates. It runs here for so many iterations as bring
its largest error within a tenth of the noise's standard deviation, or for as many as are allowed.
"""

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary

ITERATIONS = [2**k for k in range(3, 11)]


def optimality(x: Any, z: Any, weight: float) -> dict[str, float]:
    """Return how far the dual of z is from what it must be, in float64, relative to λ."""
    dual, steps = np.cumsum(np.asarray(x, np.float64) - z), np.diff(z)
    at_steps = np.abs(dual[:-1] + weight * np.sign(steps))[steps != 0]
    return {
        "dual_above_weight": float(max(np.max(np.abs(dual[:-1])) - weight, 0) / weight),
        "dual_at_end": float(abs(dual[-1]) / weight),
        "slack_at_steps": float(np.max(at_steps, initial=0) / weight),
    }


def compiled(prox: Any, x: Any, weight: Any) -> tuple[Any, dict[str, Any]]:
    """Return a run without arguments, and what compiling it cost."""
    weight = jnp.asarray(weight, x.dtype)
    start = time.perf_counter()
    program = jax.jit(prox).lower(x, weight).compile()
    cost = {
        "compile_s": time.perf_counter() - start,
        "temporary_bytes": getattr(program.memory_analysis(), "temp_size_in_bytes", None),
    }
    return lambda: program(x, weight), cost


def total_variation(
    x: Any, weight: float, rounds: int, iterations: list[int], label: str
) -> Iterator[Row]:
    """Yield the ratios of the exact prox, in both precisions, to pyproximal's iteration."""
    penalty = jr.TotalVariation(1.0)
    with jax.enable_x64():
        double, double_cost = compiled(penalty.prox, jnp.asarray(x, jnp.float64), weight)
        exact = np.asarray(double())
        quality = optimality(x, exact, weight)
        if max(quality.values()) > 1e-6:
            raise AssertionError(f"not the minimizer: {quality}")
    single, single_cost = compiled(penalty.prox, jnp.asarray(x, jnp.float32), weight)
    single_error = float(np.max(np.abs(np.asarray(single(), np.float64) - exact)))
    if single_error > 1e-5 * (1 + np.max(np.abs(x))):
        raise AssertionError(f"float32 is off by {single_error}")
    what = {
        name: f"total variation of {label}, {x.size:,} points: {name} ÷ pyproximal"
        for name in ("jaxreg float32", "jaxreg float64")
    }
    if not importlib.util.find_spec("pyproximal"):
        for name in what:
            yield Row.skipped(what[name], 'needs the extra "bench"')
        return
    import pyproximal

    for count in iterations:
        peer = pyproximal.TV(x.shape, niter=count, rtol=0)
        peer_error = float(np.max(np.abs(peer.prox(x, weight) - exact)))
        if peer_error < 0.1:
            break
    seconds = interleaved(
        {
            "jaxreg float32": single,
            "jaxreg float64": double,
            "pyproximal": lambda: peer.prox(x, weight),
        },
        rounds,
    )
    details = {
        "segments": int(np.sum(np.diff(exact) != 0)) + 1,
        "optimality_float64": quality,
        "float32_largest_error": single_error,
        "pyproximal_iterations": count,
        "pyproximal_largest_error": peer_error,
        "pyproximal_seconds": summary(seconds["pyproximal"]),
    }
    for name, cost in (("jaxreg float32", single_cost), ("jaxreg float64", double_cost)):
        ratio = ratios(seconds, name, "pyproximal")
        own = {"seconds": summary(seconds[name]), **cost}
        yield Row(what[name], ratio, details={**details, **own})


def smooth(x: Any, weight: float, rounds: int) -> Iterator[Row]:
    """Yield the ratio of SmoothL2's prox, checked against its linear system, to SciPy's solver."""
    single = jnp.asarray(x, jnp.float32)
    run, cost = compiled(jr.SmoothL2(1.0).prox, single, weight)
    z = np.asarray(run(), np.float64)
    steps = np.pad(np.diff(z), 1)
    residual = z - 2 * weight * np.diff(steps) - x
    error = float(np.max(np.abs(residual)) / (np.max(np.abs(x)) * (1 + 8 * weight)))
    if error > 1e-5:
        raise AssertionError(f"the linear system is off by {error}")
    # The same system by LAPACK, in the same precision.
    banded = np.ones((2, x.size), np.float32)
    banded[0] *= -2 * weight
    banded[1] += 4 * weight
    banded[1, [0, -1]] -= 2 * weight
    raw = np.asarray(single)
    peer = {"scipy": lambda: scipy.linalg.solveh_banded(banded, raw), "jaxreg": run}
    np.testing.assert_allclose(peer["scipy"](), z, atol=1e-3 * np.max(np.abs(x)))
    seconds = interleaved(peer, rounds)
    what = f"SmoothL2's prox, {x.size:,} points: jaxreg ÷ scipy.linalg.solveh_banded"
    details = {"error": error, **cost, "seconds": summary(seconds["jaxreg"])}
    yield Row(what, ratios(seconds, "jaxreg", "scipy"), details=details)


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios."""
    points, iterations = (2000, ITERATIONS[:2]) if smoke else (10**6, ITERATIONS)
    rng = np.random.default_rng(0)
    steps = np.repeat(3 * rng.normal(size=points // 1000), 1000) + rng.normal(size=points)
    ramp = np.arange(points) / 1000
    yield from total_variation(steps, 10.0, rounds, iterations, "noisy steps")
    yield from total_variation(ramp, 10.0, rounds, iterations, "a ramp")
    yield from smooth(steps, 10.0, rounds)
