"""What the branches of a `nn.cond` return in place of each other's measurements.

All branches must return the same tree. A branch keeps a place for each measurement of the others:
its type while they are traced, and one that is worth 0 where it is not taken.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.penalties import Penalty
from jaxreg.terms import varying_axes

from ._pass import Parameter


def placeholder(
    path: str, penalties: Mapping[Any, Penalty], measured: Any
) -> tuple[Any, tuple[int, ...]]:
    """Return the types of a measurement, and the axes that scans in the branch have stacked.

    Without what belongs to the trace that it was made in.
    """
    if isinstance(measured, Parameter) and not jax.tree.leaves(measured):
        return measured, ()
    bare = [penalty.with_arrays(lambda _: None) for penalty in penalties.values()]
    by_structure = {jax.tree.structure(p): p for p in (*bare, *penalties.values())}
    penalty = by_structure.get(jax.tree.structure(measured.penalty))
    if penalty is None:
        raise ValueError(
            f'`jaxreg.activity` cannot carry the term "{path}" out of an `nn.jit` in a branch, of'
            " which JAX runs an old trace: its penalty holds an array. Leave `nn.jit` out."
        )
    if isinstance(measured, Parameter):
        slot = dataclasses.replace(measured, penalty=penalty)
        pairs = zip(*map(jax.tree.leaves, (measured, slot)), strict=True)
        return slot, next((x.shape[: x.ndim - bare.ndim] for x, bare in pairs), ())
    moments, count = jax.tree.map(jax.typeof, (measured.moments, measured.count))
    stacked = jnp.shape(jax.tree.leaves(measured.penalty)[0])
    return dataclasses.replace(measured, penalty=penalty, moments=moments, count=count), stacked


def take(measured: list[Any], placeholder: tuple[Any, tuple[int, ...]]) -> Any:
    """Take out the first that is of a placeholder's type, or return one of an empty batch.

    That is worth 0. A parameter's penalty does not depend on the branch.
    """
    slot, stacked = placeholder
    for i, call in enumerate(measured):
        if _type(call) == _type(slot):
            return measured.pop(i)
    if isinstance(slot, Parameter):
        return jax.tree.map(lambda s: jnp.broadcast_to(s, stacked + s.shape), slot)
    moments, count = jax.tree.map(_zeros, (slot.moments, slot.count))
    penalty = jax.tree.map(lambda s: jnp.broadcast_to(s, stacked), slot.penalty)
    return dataclasses.replace(slot, penalty=penalty, moments=moments, count=count)


def _type(measured: Any) -> tuple[Any, ...]:
    """Return what two measurements share that can stand for each other in the branches."""
    if isinstance(measured, Parameter):
        return (jax.tree.structure(measured),)
    sums = jax.tree.leaves((measured.moments, measured.count))
    types = [x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x) for x in sums]
    settings = map(jnp.result_type, jax.tree.leaves(measured.penalty))
    return (jax.tree.structure(measured), *types, *settings)


def _zeros(type_: Any) -> jax.Array:
    """Return zeros of a type, which may vary over the shards of a `jax.shard_map`."""
    zeros = jnp.zeros(type_.shape, type_.dtype)
    axes = tuple(varying_axes(type_))
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros
