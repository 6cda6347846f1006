"""Which tiles a kernel takes, and whether it wins over XLA: what was measured, kept as JSON."""

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ._tiles import Config, Problem, Schedule

Timer = Callable[[Callable[[], Any]], float]


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of one shape class on one device.

    Args:
        config: the fastest tiles.
        seconds: a call's with them.
        xla: a call's when it is left to XLA.
    """

    config: Config
    seconds: float
    xla: float


# How many columns a part has, and how many parts have buffers.
_PARTS = ((32, 2), (32, 4), (64, 2))

# How often each configuration is timed.
_ROUNDS = 3

# By the device's kind, then by shape class.
Records = dict[str, dict[str, Record]]


@dataclasses.dataclass(frozen=True)
class _Tuning:
    records: Records
    timer: Timer | None
    file: Path

    def write(self) -> None:
        """Write the records; another process never sees half of them."""
        file = self.file.resolve()
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(_written(self.records))
        new.replace(file)


_own: contextvars.ContextVar[_Tuning | None] = contextvars.ContextVar("tuned", default=None)


def shape_class(name: str, m: int, n: int, k: int, dtype: Any) -> str:
    """Return the name under which an (m, k) by (k, n) product of a kernel is recorded.

    Rows count as the next power of two: they are a batch's, the others a model's.
    """
    return f"{name} {1 << (m - 1).bit_length()}x{n}x{k} {dtype}"


def candidates(problem: Problem) -> list[Config]:
    """Return the configurations to try, 13 at most: to lower one takes Python a second."""
    schedules: list[tuple[Schedule, bool]] = [("resident", False)]
    schedules += [(s, p) for s in ("alternate", "together") for p in (True, False)]
    configs = [
        Config(schedule, 1, paired, *part)
        for schedule, paired in schedules
        for part in (_PARTS[:1] if schedule == "together" else _PARTS)
    ]
    configs += [Config(s, 1, True, *_PARTS[0], 16) for s in ("alternate", "together")]
    tried = [tiles.filled(problem) for tiles in configs]
    return [tiles for tiles in dict.fromkeys(tried) if tiles.fits(problem)]


def known(key: str) -> dict[str, Record]:
    """Return what is recorded of a shape class, by the device's kind."""
    own = _own.get()
    tables = [_shipped(), own.records] if own else [_shipped()]
    return {kind: t[key] for records in tables for kind, t in records.items() if key in t}


# A call for each configuration that compiles, and for None XLA's, which comes first.
Calls = Mapping[Config | None, Callable[[], Any]]


def measure(key: str, calls: Callable[[], Calls]) -> None:
    """Time a shape class on a device, where `tuned` asks for it and has no record.

    Args:
        key: the shape class.
        calls: returns what to time, and on what.
    """
    own = _own.get()
    if own is None or own.timer is None:
        return
    # In a thread of its own: the function that asks is being traced, and this is to run now.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(_measure, key, calls, own, own.timer).result()


def _measure(key: str, calls: Callable[[], Calls], own: _Tuning, timer: Timer) -> None:
    (device,) = jnp.zeros(()).devices()
    records = own.records.setdefault(device.device_kind, {})
    if key in records:
        return
    runs = _agreeing(calls())
    kernels = {tiles: run for tiles, run in runs.items() if tiles is not None}
    if not kernels:
        return
    seconds = _medians(timer, kernels)
    best = min(seconds, key=lambda tiles: seconds[tiles])
    # Once more: the least of many is less than it is, and XLA has one try.
    final = _medians(timer, {best: runs[best], None: runs[None]})
    records[key] = Record(best, final[best], final[None])
    own.write()


def _medians(timer: Timer, runs: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Return the seconds of each call, all timed in turn: the device's clock is that of all."""
    rounds = [{name: timer(run) for name, run in runs.items()} for _ in range(_ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds) for name in runs}


def leave_out(tiles: Config, why: object) -> None:
    """Warn that tiles are not among those that are timed."""
    warnings.warn(f"{tiles} is left out: {why!r}"[:500], stacklevel=1)


def _agreeing(runs: Calls) -> Calls:
    """Return the calls whose results are XLA's: a kernel's race shows on a device alone."""

    @jax.jit
    def off(got: Any, exact: Any) -> Any:
        errors = []
        for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            a, e = a.astype(jnp.float32), e.astype(jnp.float32)
            finite = jnp.isfinite(e)  # of numbers drawn at random a square root may be none
            largest = jnp.max(jnp.where(finite, jnp.abs(e), 0))
            errors.append(jnp.max(jnp.where(finite, jnp.abs(a - e), 0)) / (largest + 1e-30))
        return jnp.max(jnp.stack(errors))

    kept: dict[Config | None, Callable[[], Any]] = {None: runs[None]}
    exact = runs[None]()
    for tiles, run in runs.items():
        if tiles is None:
            continue
        try:
            error = float(off(run(), exact))
        except jax.errors.JaxRuntimeError as failure:
            leave_out(tiles, failure)
            continue
        if error <= 0.03:
            kept[tiles] = run
        else:
            leave_out(tiles, f"off by {error}")
    return kept


@contextlib.contextmanager
def tuned(
    file: str | os.PathLike[str], *, measure: bool = False, timer: Timer | None = None
) -> Iterator[None]:
    """Take tiles from a file of one's own, and with `measure` add what it lacks.

    Under `jit` a kernel runs with the tiles that are recorded for its shapes, dtype and device.
    Where it was faster than XLA there, `implementation=None` runs it as well. What was traced
    before the context was entered, or outside of it, stays as it is.

    Args:
        file: JSON; with `measure` it is written after each product and at the end, and need not
            exist.
        measure: whether each product of a kernel that is asked for by name is timed when it is
            traced, unless the file has it: with up to 13 configurations and with XLA, on arrays of
            its shapes, on the default device. Tiles that do not compile or run, or that are off
            XLA's results by 3 % of the largest entry, are left out with a warning.
        timer: given a function without arguments, returns the seconds of a call.

    Raises:
        FileNotFoundError: without `measure`, where there is no such file.

    Example:
        with jr.ops.tuned("tiles.json", measure=True):   # once, on the device
            jax.block_until_ready(step(params, x))
        with jr.ops.tuned("tiles.json"):                 # from then on
            train()
    """
    path = Path(file)
    own = {} if measure and not path.exists() else _parse(path.read_text())
    tuning = _Tuning(own, (timer or _seconds) if measure else None, path)
    token = _own.set(tuning)
    try:
        yield
    finally:
        _own.reset(token)
        if measure:
            tuning.write()


def _seconds(run: Callable[[], Any]) -> float:
    """Return the mean of the calls of 20 ms, after as many that warm up."""
    wait: Any = jax.block_until_ready

    def mean(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = None  # one result at a time
            result = run()
        # The device runs them in order.
        wait(result)
        return (time.perf_counter() - start) / calls

    mean(1)
    calls = max(5, min(100, round(0.02 / mean(1))))
    mean(calls)
    return mean(calls)


def _parse(text: str) -> Records:
    return {
        kind: {
            key: Record(Config(**record["config"]), record["seconds"], record["xla"])
            for key, record in known.items()
        }
        for kind, known in json.loads(text).items()
    }


def _written(records: Records) -> str:
    plain = {
        kind: {key: dataclasses.asdict(record) for key, record in sorted(known.items())}
        for kind, known in sorted(records.items())
    }
    return json.dumps(plain, indent=1) + "\n"


@functools.cache
def _shipped() -> Records:
    return _parse(importlib.resources.files("jaxreg.ops").joinpath("tuned.json").read_text())
