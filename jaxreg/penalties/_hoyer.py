"""Penalties of the ratio of the L1 norm to the L2 norm: sparse, and blind to scale."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ._arithmetic import modulus
from ._axes import batch_axes
from ._group import Grouped, group_size, group_squares


class Hoyer(Grouped):
    """A penalty of ‖x‖₁ and ‖x‖₂ of each vector; `axis=None` makes the whole array one vector."""

    takes_complex: ClassVar[bool] = True

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        if self.axis is not None:
            return super().moments(x, where)
        batch = batch_axes(self, x.ndim)
        every = tuple(axis for axis in range(x.ndim) if axis not in batch)
        return dataclasses.replace(self, axis=every).moments(x, where)

    def sums(
        self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        absolute = jnp.sum(modulus(x), axis=axes, keepdims=True)
        return absolute, group_squares(x, axes), group_size(x, axes, where)


class HoyerSquare(Hoyer):
    r"""The squared ratio of the L1 norm to the L2 norm: about how many entries are not zero.

    $$ R(x) = s \sum_v \frac{\big(\sum_{i \in v} |x_i|\big)^2}{\sum_{i \in v} x_i^2} $$

    For a vector of n entries it lies between 1, for a single one that is not 0, and n, for n equal
    ones. It does not shrink what it keeps: R(c·x) = R(x).

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which the entries make up one vector v, as in NumPy. None is
            every axis: one vector, as in DeepHoyer. (Not every axis but the last, as for groups.)
            As an activity penalty, None takes the whole batch as one vector, and `axis=-1` each
            example by itself. Both add up exactly over microbatches.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        2s·(‖v‖₁ / ‖v‖₂²)·(sign(x_i) − x_i·‖v‖₁ / ‖v‖₂²). It does not push zeros away from 0, and
        is orthogonal to x. For a vector that is all zeros value and gradient are 0; near it the
        gradient grows as 1 / ‖v‖₂.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x = jnp.array([[3.0, 0.0], [0.0, -1.0]])
        >>> round(float(jr.HoyerSquare(1.0)(x)), 4)      # 4² / 10
        1.6
        >>> float(jr.HoyerSquare(1.0, axis=-1)(x))
        2.0

    References:
        Yang, Wen and Li, DeepHoyer: learning sparser neural network with differentiable
        scale-invariant sparsity measures, ICLR, arXiv:1908.09979, 2020.
    """

    def of_sums(self, sums: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        absolute, squares, _ = sums
        zero = squares == 0
        # The derivative of a quotient by a square would overflow where entries are near 1e-10.
        ratio = absolute / jnp.sqrt(jnp.where(zero, 1, squares))
        return jnp.sum(jnp.where(zero, 0, jnp.square(ratio)))


class HoyerSparsity(Hoyer):
    r"""One minus Hoyer's sparseness: 0 for a single entry that is not zero, 1 for equal ones.

    $$ R(x) = s \sum_v 1 - \frac{\sqrt n - \lVert x_v \rVert_1 / \lVert x_v \rVert_2}{\sqrt n - 1}
            = s \sum_v \frac{\lVert x_v \rVert_1 / \lVert x_v \rVert_2 - 1}{\sqrt n - 1} $$

    n is the number of entries of a vector. Hoyer's sparseness itself is the fraction after "1 −":
    it is 1 for the sparsest vector, and code that adds it to a loss makes vectors dense. A penalty
    must fall as sparsity grows, hence the complement. `HoyerSquare` differs: its value is a count
    of entries, and its gradient is larger for dense vectors.

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up one vector; see `HoyerSquare`. None is every axis.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        s / (√n − 1) · (sign(x_i) / ‖v‖₂ − x_i·‖v‖₁ / ‖v‖₂³), orthogonal to x. Value and gradient
        are 0 for a vector that is all zeros, or has one entry only.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x = jnp.array([[0.0, -3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
        >>> float(jr.HoyerSparsity(1.0, axis=-1)(x))
        1.0

    References:
        Hoyer, Non-negative matrix factorization with sparseness constraints, JMLR 5, 2004.
    """

    def of_sums(self, sums: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        absolute, squares, size = sums
        none = (squares == 0) | (size <= 1)
        ratio = absolute / jnp.sqrt(jnp.where(none, 1, squares))
        span = jnp.sqrt(jnp.where(none, 4, size)) - 1
        # A product with 0, so that a vector of one NaN is not 0.
        return jnp.sum(jnp.where(none, 0 * ratio, (ratio - 1) / span))
