"""Times that compare: several functions, interleaved in one process."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

SHORTEST = 0.05
"""About how many seconds a function is run for in a round."""


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int, *, queued: bool = False
) -> dict[str, list[float]]:
    """Run every function in each round, so that load on the machine falls on all alike.

    Args:
        functions: by name; each is called without arguments, and what it returns is waited for.
        rounds: how many rounds are timed, after two calls of each that are not.
        queued: whether the last call of a round alone is waited for. A device that runs one call
            after the other then has the next one at hand, and the time is the device's, unless the
            host takes longer to call. Where no function has more than 5 calls a round, each is
            waited for after all.

    Returns:
        For each name the seconds of a call, in each round.
    """

    def run(function: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for left in reversed(range(calls)):
            result = None  # one result at a time
            result = function()
            if left == 0 or not queued:
                jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, function in functions.items():
        run(function, 1)
        calls[name] = max(1, round(SHORTEST / run(function, 1)))
    # The results of queued calls may all be in memory, and beside long ones a wait is little.
    queued = queued and max(calls.values()) > 5
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in shuffled(functions, rounds):
        seconds[name].append(run(functions[name], calls[name]))
    return seconds


def compilations(compile_of: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run every function once in each round, with nothing in JAX's caches.

    Args:
        compile_of: by name; each is called without arguments, traces and compiles.
        rounds: how many rounds are timed.

    Returns:
        For each name the seconds, in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in compile_of}
    for name in shuffled(compile_of, rounds):
        jax.clear_caches()
        start = time.perf_counter()
        compile_of[name]()
        seconds[name].append(time.perf_counter() - start)
    return seconds


def shuffled(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Yield all names in each round, in an order that is drawn anew for each.

    What one leaves behind (a warm cache, threads that still spin) then falls on all alike.
    """
    order, names = random.Random(0), list(names)
    for _ in range(rounds):
        yield from order.sample(names, len(names))


def summary(values: Any) -> dict[str, float]:
    """Return the quartiles."""
    low, median, high = np.percentile(np.asarray(values, float), [25, 50, 75])
    return {"low": float(low), "median": float(median), "high": float(high)}


def ratios(seconds: dict[str, list[float]], name: str, baseline: str) -> dict[str, float]:
    """Return the quartiles of the time of one over that of the other, and of how many rounds."""
    found = np.divide(seconds[name], seconds[baseline])
    return {**summary(found), "rounds": len(found)}
