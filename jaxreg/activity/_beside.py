"""Measurements that leave a transformation beside an output, where no variable carries them."""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from ._pass import Measured

takers: ContextVar[tuple[Any, ...]] = ContextVar("jaxreg_takers", default=())
"""The forward passes under way, the outermost first: each can `take` what was put beside."""


def probe() -> jax.Array:
    """Return an array of no elements; where its axis ends up tells where others were added."""
    return jnp.zeros((0,))


@dataclasses.dataclass(frozen=True)
class Beside:
    """A leaf of an output, and measurements that leave a transformation beside it.

    When JAX puts the output together outside of the transformation, the leaf alone is left.

    Args:
        output: the leaf.
        measured: the measurements.
        probe: see `probe`.
        level: how many forward passes are around the one that measured.
        axes: on how many axes the transformations may stack it.
        cached: whether it leaves an `nn.jit`, which JAX may run without tracing it.
        jitted: whether a jitted function returns it.
    """

    output: Any
    measured: Measured
    probe: Any = dataclasses.field(default_factory=probe)
    level: int = 0
    axes: range = range(1)
    cached: bool = False
    jitted: bool = False


def _take_apart(beside: Beside) -> tuple[Any, Any]:
    static = (beside.level, beside.axes, beside.cached, beside.jitted)
    return (beside.output, beside.measured, beside.probe), static


def _put_together(static: tuple[int, range, bool, bool], children: Any) -> Any:
    output, measured, probe = children
    beside = Beside(output, measured, probe, *static)
    passes = takers.get()
    # JAX also makes trees of placeholders.
    if not isinstance(beside.probe, jax.Array) or beside.level >= len(passes):
        return beside
    return passes[beside.level].take(beside)


jax.tree_util.register_pytree_node(Beside, _take_apart, _put_together)


def with_last_leaf(wrap: Callable[[Any], Any], out: Any) -> Any:
    """Wrap the last leaf of an output, or one that has none.

    The axes of outputs are a prefix of their tree, so that a leaf may become a tree.
    """
    leaves, structure = jax.tree.flatten(out)
    if not leaves:
        return wrap(out)
    return jax.tree.unflatten(structure, [*leaves[:-1], wrap(leaves[-1])])
