"""Penalties of groups of entries."""

import abc
import math
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import modulus, of_rank, real_dtype, root, squared_modulus
from ._axes import check_axes, vector_axes
from ._base import Penalty
from ._fields import setting, static
from ._separable import soft_threshold
from ._threshold import over_threshold


class Grouped(Penalty):
    """A penalty that is a sum over groups, each made up of the entries along some axes.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which the entries make up one group, as in NumPy. None is every
            axis but the last.
        batch_axes: axes that hold separate arrays, as a scan over layers stacks them: what is left
            of the array without them is what `axis=None` speaks of.
    """

    strength: ArrayLike
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    @abc.abstractmethod
    def sums(self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> Any:
        """Return what adds up over the entries of a group: a pytree, with `axes` of size 1."""

    @abc.abstractmethod
    def of_sums(self, sums: Any) -> jax.Array:
        """Return the value for a strength of one from the sums of all groups."""

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_axes(self, x, name)

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        axes = vector_axes(self, x.ndim)
        sums = self.sums(x, axes, where)
        # Groups that reach over the leading axis, a batch's, grow with it: their sums add up. Other
        # groups lie within one example each: their values do.
        grows = 0 in axes
        return (sums,) if grows else self.of_sums(sums)

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return vector_axes(self, ndim)

    def finish(self, moments: Any, count: ArrayLike | None) -> jax.Array:
        grows = isinstance(moments, tuple)
        return super().finish(self.of_sums(*moments) if grows else moments, count)


class GroupLasso(Grouped):
    r"""The sum of the Euclidean norms of groups of entries, which zeroes whole groups.

    $$ R(w) = s \sum_g \sqrt{n_g}\,\lVert w_g \rVert_2 $$

    n_g is the number of entries of a group. With `weighted=False` the factor √n_g is 1.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes over which a norm is taken, as in NumPy: the entries along them make
            up one group. None is every axis but the last, so that a kernel (..., in, out) has one
            group for each output unit; on an array of rank 1 or 0 each entry is then its own group.
        batch_axes: the axis or axes that hold separate arrays, such as 0 for the kernels
            (layers, in, out) of a scan over layers: `axis=None` leaves them out as well.
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

    _: KW_ONLY
    weighted: bool = static(default=True)

    takes_complex: ClassVar[bool] = True

    def sums(
        self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return group_squares(x, axes), group_size(x, axes, where)

    def of_sums(self, sums: tuple[jax.Array, jax.Array]) -> jax.Array:
        squares, size = sums
        return jnp.sum(self._weight(size) * root(squares))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        axes = vector_axes(self, x.ndim)
        norm = root(group_squares(x, axes))
        threshold = step * self.strength * self._weight(group_size(x, axes, None))
        # Compared this way round, so that a NaN is not below the threshold and stays a NaN.
        zero = (norm <= threshold) & (threshold > 0)
        share = threshold / jnp.where(zero | (norm == 0), 1, norm)
        # 1 less a small share would be rounded, and for all entries alike.
        return jnp.where(zero, 0, jnp.where(jnp.isfinite(x), x - x * share, x))

    def _weight(self, size: jax.Array) -> jax.Array:
        return jnp.sqrt(size) if self.weighted else jnp.ones_like(size)


class SparseGroupLasso(Grouped):
    r"""Zeroes groups of entries, and entries within the groups that are left.

    $$ R(w) = s \Big( \alpha \sum_i |w_i|
                      + (1 - \alpha) \sum_g \sqrt{n_g}\,\lVert w_g \rVert_2 \Big) $$

    Args:
        strength: s, a non-negative scalar.
        alpha: α in [0, 1], the share of the L1. A leaf, like the strength.
        axis: which entries make up a group; see `GroupLasso`.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.
        weighted: whether a group counts by √n_g; see `GroupLasso`.

    Gradient:
        That of the two terms; 0 at zero entries and for a group that is all zeros.

    Prox:
        Soft thresholding by t·s·α, then block soft thresholding by t·s·(1 − α)·√n_g.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            concrete α outside [0, 1]; for an axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.0], [-4.0, 0.5]])
        >>> penalty = jr.SparseGroupLasso(1.0, alpha=0.5, weighted=False)
        >>> float(penalty(kernel))
        6.5
        >>> penalty.prox(kernel, step=1.0)[:, 1].tolist()
        [0.0, 0.0]

    References:
        Simon, Friedman, Hastie and Tibshirani, A sparse-group lasso, Journal of Computational and
        Graphical Statistics 22(2), 2013.
    """

    _: KW_ONLY
    alpha: ArrayLike = setting("a scalar in [0, 1]", lambda alpha: 0 <= alpha <= 1)
    weighted: bool = static(default=True)

    takes_complex: ClassVar[bool] = True

    def sums(
        self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        absolute = jnp.sum(modulus(x), axis=axes, keepdims=True)
        return absolute, self._groups.sums(x, axes, where)

    def of_sums(self, sums: tuple[jax.Array, Any]) -> jax.Array:
        absolute, groups = sums
        alpha = jnp.asarray(self.alpha, absolute.dtype)
        return alpha * jnp.sum(absolute) + (1 - alpha) * self._groups.of_sums(groups)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale = step * self.strength
        entries = soft_threshold(x, scale * self.alpha)
        return self._groups._prox(entries, scale * (1 - self.alpha))

    @property
    def _groups(self) -> GroupLasso:
        return GroupLasso(1, axis=self.axis, batch_axes=self.batch_axes, weighted=self.weighted)


class L1Inf(Grouped):
    r"""The sum of the largest moduli of groups of entries, which zeroes whole groups.

    $$ R(w) = s \sum_g \max_{i \in g} |w_i| $$

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up a group; see `GroupLasso`. As an activity penalty it adds up
            over microbatches only if a group lies within one example.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        s · sign(w_i), divided equally among the entries that attain the maximum; 0 for a group that
        is all zeros.

    Prox:
        sign(w_i) · min(|w_i|, τ_g), where τ_g is such that the group loses t·s in all: the
        projection on an L1 ball, by Moreau's identity.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.25], [-1.0, 0.5]])
        >>> float(jr.L1Inf(1.0)(kernel))
        3.5
        >>> jr.L1Inf(1.0).prox(kernel, step=1.0).tolist()
        [[2.0, 0.0], [-1.0, 0.0]]

    References:
        Turlach, Venables and Wright, Simultaneous variable selection, Technometrics 47(3), 2005.
        Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the ℓ1-ball, ICML,
        2008.
    """

    def sums(self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
        return jnp.max(modulus(x), axis=axes, keepdims=True, initial=0)

    def adds_up(self, ndim: int) -> bool:
        return 0 not in vector_axes(self, ndim)

    def of_sums(self, sums: jax.Array) -> jax.Array:
        return jnp.sum(sums)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        axes = vector_axes(self, x.ndim)
        size = jnp.abs(x)
        # Where it is this large all of the group is gone, and the sum of as many would overflow.
        entries = max(math.prod(x.shape[axis] for axis in axes), 1)
        most = float(jnp.finfo(x.dtype).max) / (4 * entries)  # type: ignore[no-untyped-call]
        total = jnp.minimum(of_rank(x.ndim, step * self.strength), most)
        lost = over_threshold(size, axes, total)
        left = jnp.where((lost >= size) & (lost > 0), 0, x - jnp.sign(x) * lost)
        return jnp.where(jnp.isinf(x), x, left)


class ExclusiveLasso(Grouped):
    r"""The sum of the squared L1 norms of groups: the entries of a group compete.

    $$ R(w) = s \sum_g \Big( \sum_{i \in g} |w_i| \Big)^2 $$

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up a group; see `GroupLasso`.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        2·s·‖w_g‖₁ · sign(w_i), and 0 at 0.

    Prox:
        Soft thresholding by τ_g, where τ_g = 2λ Σ_i max(|w_i| − τ_g, 0) and λ = t·s.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.5], [-1.0, 0.5]])
        >>> float(jr.ExclusiveLasso(1.0)(kernel))
        17.0
        >>> jr.ExclusiveLasso(0.5).prox(kernel, step=1.0)[:, 0].tolist()
        [1.5, 0.0]

    References:
        Zhou, Jin and Hoi, Exclusive lasso for multi-task feature selection, AISTATS, 2010.
    """

    def sums(self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
        return jnp.sum(modulus(x), axis=axes, keepdims=True)

    def of_sums(self, sums: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(sums))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        axes = vector_axes(self, x.ndim)
        twice = of_rank(x.ndim, 2 * step * self.strength)
        left = over_threshold(jnp.abs(x), axes, 0, scale=twice, slope=1)
        return jnp.where(jnp.isinf(x), x, jnp.where(left == 0, 0, jnp.sign(x) * left))


def group_squares(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the sum of the squared moduli of each group."""
    return jnp.sum(squared_modulus(x), axis=axes, keepdims=True)


def group_size(x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> jax.Array:
    """Return how many entries make up a group; of each group where some do not count."""
    if where is None:
        return jnp.asarray(math.prod(x.shape[axis] for axis in axes), real_dtype(x))
    counts = jnp.broadcast_to(where, x.shape)
    return jnp.sum(counts, axis=axes, keepdims=True, dtype=real_dtype(x))
