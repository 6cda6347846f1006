"""Sums over devices, and arrays whose types say how they are sharded over them."""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import NamedSharding

from jaxreg.terms import AxisName

PartitionSpec: Any = jax.sharding.PartitionSpec


def psum(x: Any, axis_name: AxisName | None) -> Any:
    """Return the sum over the devices along these mesh axes."""
    return x if axis_name is None else lax.psum(x, axis_name)  # type: ignore[no-untyped-call]


class Explicit(NamedTuple):
    """How tokens and words lie on a mesh of explicit axes; no axis for both."""

    mesh: Any
    tokens: Any  # the specification of the labels
    words: tuple[str, ...]

    @property
    def token_axes(self) -> tuple[str, ...]:
        return tuple(name for entry in self.tokens for name in _names(entry))

    def weight(self, words: int) -> Any:
        spec = [None, self.words or None]
        return PartitionSpec(*(spec if words == 1 else reversed(spec)))

    def put(self, x: jax.Array, spec: Any) -> jax.Array:
        """Return the array with this sharding; nothing moves if it has it."""
        return jax.reshard(x, self.sharding(spec))  # type: ignore[no-any-return,no-untyped-call]

    def sharding(self, spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def explicit(problem: Any, words: int) -> Explicit | None:
    """Return how the types say that a problem's arrays are sharded; None if they say nothing."""
    told = [jax.typeof(x).sharding for x in jax.tree.leaves(problem)]
    split = [sharding for sharding in told if any(map(_names, sharding.spec))]
    if not split:
        return None
    by_hidden, by_weight = (jax.typeof(x).sharding for x in (problem.hidden, problem.weight))
    tokens = PartitionSpec(*by_hidden.spec[:-1])
    taken = {name for entry in tokens for name in _names(entry)}
    free = tuple(name for name in _names(by_weight.spec[words]) if name not in taken)
    return Explicit(split[0].mesh, tokens, free)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
