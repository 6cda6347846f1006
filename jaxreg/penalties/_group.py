"""Penalties that are a sum of norms of groups of entries."""

import math
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._base import Penalty, real_dtype, static


class GroupLasso(Penalty):
    r"""The sum of the Euclidean norms of groups of entries, which zeroes whole groups.

    $$ R(w) = s \sum_g \sqrt{n_g}\,\lVert w_g \rVert_2 $$

    n_g is the number of entries of a group. With `weighted=False` the factor √n_g is 1.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes over which a norm is taken, as in NumPy: the entries along them make
            up one group. None is every axis but the last, so that a kernel (..., in, out) has one
            group for each output unit; on an array of rank 1 or 0 each entry is then its own group.
        weighted: whether a group counts by √n_g, as Yuan and Lin weight it.

    Gradient:
        s · √n_g · w / ‖w_g‖, and 0 for a group that is all zeros. Complex entries count by their
        modulus.

    Prox:
        Block soft thresholding, w · max(1 − t·s·√n_g / ‖w_g‖, 0): exact zeros.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])
        >>> lasso = jr.GroupLasso(1.0, weighted=False)
        >>> float(lasso(kernel))
        5.0
        >>> lasso.prox(kernel, step=2.5).tolist()
        [[1.5, 0.0], [2.0, 0.0]]

    References:
        Yuan and Lin, Model selection and estimation in regression with grouped variables,
        JRSS B 68(1), 2006.
    """

    strength: ArrayLike
    axis: int | tuple[int, ...] | None = static(default=None)
    weighted: bool = static(default=True)

    takes_complex: ClassVar[bool] = True

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        axes = self._axes(x.ndim)
        if any(not 0 <= axis < x.ndim for axis in axes) or len(set(axes)) < len(axes):
            raise ValueError(
                f"`jaxreg.GroupLasso(axis=...)` must name an axis of the array, or several"
                f' different ones; got axis={self.axis} for "{name}" of shape {x.shape}.'
            )

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        axes = self._axes(x.ndim)
        squares, size = _squares(x, axes), _size(x, axes, where)
        # Groups that reach over the leading axis, a batch's, grow with it: their squares and sizes
        # add up. Other groups lie within one example each: their weighted norms do.
        grows = 0 in axes
        return (squares, size) if grows else self._total(squares, size)

    def finish(self, moments: Any, count: jax.Array | None) -> jax.Array:
        grows = isinstance(moments, tuple)
        return super().finish(self._total(*moments) if grows else moments, count)

    def _total(self, squares: jax.Array, size: jax.Array) -> jax.Array:
        return jnp.sum(self._weight(size) * _root(squares))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        axes = self._axes(x.ndim)
        norm = _root(_squares(x, axes))
        threshold = step * self.strength * self._weight(_size(x, axes, None))
        # Compared this way round, so that a NaN is not below the threshold and stays a NaN.
        zero = norm <= threshold
        return jnp.where(zero, 0, x * (1 - threshold / jnp.where(zero, 1, norm)))

    def _weight(self, size: jax.Array) -> jax.Array:
        return jnp.sqrt(size) if self.weighted else jnp.ones_like(size)

    def _axes(self, ndim: int) -> tuple[int, ...]:
        if self.axis is None:
            return tuple(range(ndim - 1))
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(operator.index(a) + ndim if a < 0 else operator.index(a) for a in axes)


def _squares(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.real(x * jnp.conj(x)), axis=axes, keepdims=True)


def _size(x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """Return how many entries make up a group; of each group where some do not count."""
    if where is None:
        return jnp.asarray(math.prod(x.shape[axis] for axis in axes), real_dtype(x))
    counts = jnp.broadcast_to(where, x.shape)
    return jnp.sum(counts, axis=axes, keepdims=True, dtype=real_dtype(x))


def _root(square: jax.Array) -> jax.Array:
    # The derivative of the root is infinite at 0, and 0 · inf would be NaN.
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
