"""Which axes of an array make up one vector, and which hold separate arrays."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def vector_axes(penalty: Any, ndim: int) -> tuple[int, ...]:
    """Return the axes along which the entries make up one vector, counted from the front.

    `axis=None` is every axis but the last, so that a kernel (..., in, out) has one vector for each
    output unit; the `batch_axes` are set aside first.
    """
    if penalty.axis is not None:
        return _from_front(penalty.axis, ndim)
    batch = batch_axes(penalty, ndim)
    return tuple(axis for axis in range(ndim) if axis not in batch)[:-1]


def batch_axes(penalty: Any, ndim: int) -> tuple[int, ...]:
    """Return the axes that hold separate arrays, counted from the front."""
    return _from_front(penalty.batch_axes, ndim)


def check_axes(penalty: Any, x: jax.Array, name: str) -> None:
    """Raise unless the penalty's axes are axes of the array, each named once."""
    named = (() if penalty.axis is None else _from_front(penalty.axis, x.ndim)) + batch_axes(
        penalty, x.ndim
    )
    if any(not 0 <= axis < x.ndim for axis in named) or len(set(named)) < len(named):
        stacked = f", batch_axes={penalty.batch_axes}" if penalty.batch_axes != () else ""
        raise ValueError(
            f"`jaxreg.{type(penalty).__name__}(axis=...)` must name an axis of the array, or"
            f" several different ones; got axis={penalty.axis}{stacked} for"
            f' "{name}" of shape {x.shape}.'
        )


def check_matrices(penalty: Any, x: jax.Array, name: str) -> None:
    """Raise unless the array is a matrix, or several along the penalty's batch axes."""
    check_axes(penalty, x, name)
    if x.ndim - len(batch_axes(penalty, x.ndim)) < 2:
        stacked = f", beside batch_axes={penalty.batch_axes}" if penalty.batch_axes != () else ""
        raise ValueError(
            f"`jaxreg.{type(penalty).__name__}` takes a matrix, an array with two axes or"
            f' more{stacked}; got "{name}" of shape {x.shape}. Exempt it by a rule of its own.'
        )


def as_matrices(penalty: Any, x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Return the array as matrices whose columns are its vectors, and the way back.

    Returns:
        An array [batch, entries of a vector, vectors], and the function from an array of that shape
        to one of the shape of `x`.
    """
    batch, vector = batch_axes(penalty, x.ndim), vector_axes(penalty, x.ndim)
    others = tuple(axis for axis in range(x.ndim) if axis not in (*batch, *vector))
    order = (*batch, *vector, *others)
    sizes = [math.prod(x.shape[axis] for axis in axes) for axes in (batch, vector, others)]
    permuted = jnp.transpose(x, order)

    def back(matrices: jax.Array) -> jax.Array:
        return jnp.moveaxis(matrices.reshape(permuted.shape), range(x.ndim), order)

    return permuted.reshape(sizes), back


def _from_front(axis: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, tuple) else (axis,))]
    except TypeError:
        raise TypeError(
            f"An axis must be an integer, or a tuple of integers; got {axis!r}."
        ) from None
    return tuple(a + ndim if a < 0 else a for a in axes)
