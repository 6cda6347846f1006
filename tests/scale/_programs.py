"""What the tests of sharded programs share: a mesh, placement, and what devices exchange."""

import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

_EXCHANGE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|"
    r"collective-broadcast|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


class Exchange(NamedTuple):
    """One array that a compiled program's devices exchange: by what operation, and its size."""

    kind: str
    entries: int


def exchanges(compiled: Any) -> list[Exchange]:
    """Return what the devices exchange in a compiled program."""
    return [
        Exchange(match["kind"], math.prod(int(size) for size in sizes.split(",") if size))
        for match in _EXCHANGE.finditer(compiled.as_text())
        for sizes in _ARRAY.findall(match["result"])
    ]


def put(x: Any, *axes: Any) -> jax.Array:
    """Return the array on the mesh, its axes split over these mesh axes."""
    placed: jax.Array = jax.device_put(x, NamedSharding(MESH, PartitionSpec(*axes)))
    return placed


def assert_all_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Assert that two trees are the same up to rounding, relative to each leaf's largest entry."""

    def close(a: Any, b: Any) -> None:
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b), initial=0)))

    jax.tree.map(close, found, expected)
