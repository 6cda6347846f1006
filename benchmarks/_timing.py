"""Times that compare: several functions, interleaved in one process."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run every function once a round, in turn, so that load on the machine falls on all alike.

    Args:
        functions: by name; each is called without arguments, and what it returns is waited for.
        rounds: how many rounds are timed, after one that is not.

    Returns:
        For each name the seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for timed in range(-1, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if timed >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: Any) -> dict[str, float]:
    """Return the quartiles."""
    low, median, high = np.percentile(np.asarray(values, float), [25, 50, 75])
    return {"low": float(low), "median": float(median), "high": float(high)}


def ratios(seconds: dict[str, list[float]], name: str, baseline: str) -> dict[str, float]:
    """Return the quartiles of the time of one over that of the other, round by round."""
    return summary(np.divide(seconds[name], seconds[baseline]))
