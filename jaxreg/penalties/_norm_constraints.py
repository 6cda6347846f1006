"""Constraints on the norms of an array's vectors, and on the matrix that these make up."""

from dataclasses import KW_ONLY
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import polar, scaled_to_one
from ._axes import as_matrices, check_axes, check_matrices, vector_axes
from ._base import Constraint
from ._checks import NON_NEGATIVE, require_order
from ._fields import positive, setting, static
from ._singular_values import map_singular_values, svd


class NormConstraint(Constraint):
    """A constraint on the norm of each vector; a subclass declares `axis` and `batch_axes`."""

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_axes(self, x, name)

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return vector_axes(self, ndim)


class MaxNorm(NormConstraint):
    r"""Vectors whose Euclidean norm is at most a maximum.

    $$ C = \{w : \lVert w_g \rVert_2 \le m\}, \qquad
       P(w)_g = w_g \min\!\left(1, \frac{m}{\lVert w_g \rVert_2}\right) $$

    Args:
        max_norm: m > 0. A leaf.
        axis: the axis or axes over which a norm is taken; see `GroupLasso`. Keras's `axis=0` is the
            default for a kernel (in, out).
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        That of the projection is the identity for a vector within, its edge included.

    Raises:
        ValueError: for a concrete maximum that is not a positive, finite scalar; for an axis that
            the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.MaxNorm(2.5).project(jnp.array([[3.0, 0.0], [4.0, 1.0]])).tolist()
        [[1.5, 0.0], [2.0, 1.0]]

    References:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, Dropout: a simple way to
        prevent neural networks from overfitting, Journal of Machine Learning Research 15, 2014.
    """

    max_norm: ArrayLike = positive()
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    takes_complex: ClassVar[bool] = True

    def _project(self, x: jax.Array) -> jax.Array:
        return onto_ball(x, vector_axes(self, x.ndim), self.max_norm)


class UnitNorm(NormConstraint):
    r"""Vectors whose Euclidean norm is one.

    $$ C = \{w : \lVert w_g \rVert_2 = 1\}, \qquad P(w)_g = \frac{w_g}{\lVert w_g \rVert_2} $$

    To a vector of zeros all unit vectors are equally near: it stays zero, outside of the set, as in
    Keras. The set is not convex.

    Args:
        axis: the axis or axes over which a norm is taken; see `GroupLasso`.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        That of the projection is 0 at a vector of zeros.

    Raises:
        ValueError: for an axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.UnitNorm(axis=-1).project(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]

    References:
        Bricken et al., Towards monosemanticity: decomposing language models with dictionary
        learning, Transformer Circuits Thread, 2023, for the decoder of a sparse autoencoder.
    """

    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    takes_complex: ClassVar[bool] = True

    def _project(self, x: jax.Array) -> jax.Array:
        _, direction = polar(x, vector_axes(self, x.ndim))
        return direction


class MinMaxNorm(NormConstraint):
    r"""Vectors whose Euclidean norm lies in a range.

    $$ C = \{w : l \le \lVert w_g \rVert_2 \le u\}, \qquad
       P(w)_g = (1 - r)\,w_g
                + r\,\mathrm{clip}(\lVert w_g \rVert_2, l, u)\,\frac{w_g}{\lVert w_g \rVert_2} $$

    With r < 1 a vector goes only that part of the way, so that it reaches the set over many steps.
    A vector of zeros stays zero, as in Keras. The set is not convex, unless l = 0.

    Args:
        min_norm: l ≥ 0. A leaf.
        max_norm: u ≥ l, u > 0. A leaf.
        rate: r in [0, 1]. A leaf.
        axis: the axis or axes over which a norm is taken; see `GroupLasso`.
        batch_axes: axes that hold separate arrays; see `GroupLasso`.

    Gradient:
        That of the projection is the identity for a norm in the range, its ends included, and
        1 − r at a vector of zeros outside of it.

    Raises:
        ValueError: for concrete settings that are no scalars, outside of the ranges above, or out
            of order; for an axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[6.0, 0.25, 1.0], [8.0, 0.0, 0.0]])
        >>> jr.MinMaxNorm(0.5, 5.0).project(kernel).tolist()
        [[3.0, 0.5, 1.0], [4.0, 0.0, 0.0]]
        >>> jr.MinMaxNorm(0.5, 5.0, rate=0.5).project(kernel).tolist()
        [[4.5, 0.375, 1.0], [6.0, 0.0, 0.0]]

    References:
        Chollet et al., Keras, https://keras.io/api/layers/constraints, 2015.
    """

    min_norm: ArrayLike = setting(*NON_NEGATIVE)
    max_norm: ArrayLike = positive()
    _: KW_ONLY
    rate: ArrayLike = setting("a scalar in [0, 1]", lambda rate: 0 <= rate <= 1, default=1.0)
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "min_norm", "max_norm")

    def _project(self, x: jax.Array) -> jax.Array:
        norm, direction = polar(x, vector_axes(self, x.ndim))
        low, high, rate = (
            jnp.asarray(value, norm.dtype) for value in (self.min_norm, self.max_norm, self.rate)
        )
        nearest = jnp.clip(norm, low, high) * direction
        inside = (low <= norm) & (norm <= high)
        return jnp.where(inside, x, (1 - rate) * x + rate * nearest)


class MatrixConstraint(Constraint):
    """A constraint on matrices; a subclass declares `axis` and `batch_axes`."""

    takes_complex: ClassVar[bool] = True

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_matrices(self, x, name)


class Orthonormal(MatrixConstraint):
    r"""Vectors of norm one that are orthogonal to each other: the Stiefel manifold.

    $$ C = \{W : W^* W = I\}, \qquad P(W) = U V^* \text{ where } W = U \Sigma V^* $$

    The vectors are the columns of W: by default, each output unit's. Where there are more of them
    than each has entries, they cannot all be orthogonal; then the rows are, W W* = I. The nearest
    point, the polar factor, is unique for a matrix of full rank; otherwise one of the nearest is
    returned. The set is not convex.

    Args:
        axis: the axis or axes along which the entries make up one vector; see `GroupLasso`.
        batch_axes: axes that hold separate matrices; see `GroupLasso`.

    Gradient:
        That of the projection, also at repeated singular values, where differentiating an SVD
        fails. It has no derivative along pairs of singular values that are both 0, nor, for a
        matrix that is not square, along any that is 0: there it is 0. It can be differentiated
        once.

    Raises:
        ValueError: for an array that is no matrix without its `batch_axes`; for an axis that the
            array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.Orthonormal().project(jnp.array([[0.0, 2.0], [-3.0, 0.0]])).round(3).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]

    References:
        Higham, Computing the polar decomposition, with applications, SIAM Journal on Scientific
        and Statistical Computing 7(4), 1986.
    """

    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    def _project(self, x: jax.Array) -> jax.Array:
        matrices, back = as_matrices(self, x)
        # The scale changes nothing but what overflows.
        _, scaled = scaled_to_one(matrices, (1, 2))
        return back(map_singular_values(_ones, scaled, jnp.zeros(())))


class SpectralBall(MatrixConstraint):
    r"""Matrices whose largest singular value is at most a radius.

    $$ C = \{W : \sigma_1(W) \le r\}, \qquad
       P(W) = U \min(\Sigma, r)\, V^* \text{ where } W = U \Sigma V^* $$

    So r bounds the Lipschitz constant of a dense layer in the Euclidean norm. That of a convolution
    is at most √k · r, k the number of positions in its window; see `functional.lipschitz_bound`.

    Args:
        radius: r > 0. A leaf.
        axis: the axis or axes along which the entries make up one column of W; see `GroupLasso`.
        batch_axes: axes that hold separate matrices; see `GroupLasso`.

    Gradient:
        That of the projection is the identity for a matrix within, its edge included. Outside it is
        right also at repeated singular values and at 0, where differentiating an SVD fails; a
        singular value of exactly r counts as one within. It can be differentiated once.

    Raises:
        ValueError: for a concrete radius that is not a positive, finite scalar; for an array that
            is no matrix without its `batch_axes`; for an axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[0.0, 3.0], [-0.5, 0.0]])
        >>> jr.SpectralBall(2.0).project(kernel).round(3).tolist()
        [[0.0, 2.0], [-0.5, 0.0]]

    References:
        Lefkimmiatis, Ward and Unser, Hessian Schatten-norm regularization for linear inverse
        problems, IEEE Transactions on Image Processing 22(5), arXiv:1209.3318, 2013, for the
        projection. Gouk, Frank, Pfahringer and Cree, Regularisation of neural networks by enforcing
        Lipschitz continuity, Machine Learning 110, arXiv:1804.04368, 2021; they multiply the whole
        matrix by 1 / max(1, σ₁/r) instead, which is not the nearest point.
    """

    radius: ArrayLike = positive()
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    def _project(self, x: jax.Array) -> jax.Array:
        matrices, back = as_matrices(self, x)
        scale, scaled = scaled_to_one(matrices, (1, 2))
        scale = scale[..., 0]
        radius = jnp.asarray(self.radius, scale.dtype)
        _, s, _ = svd(jax.lax.stop_gradient(scaled))
        within = scale * jnp.max(s, axis=-1, keepdims=True, initial=0) <= radius
        nearest = map_singular_values(_at_most, scaled, (scale, radius))
        return back(jnp.where(within[..., None], matrices, nearest))


def _ones(s: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.ones_like(s), jnp.zeros_like(s)


def _at_most(
    s: jax.Array, scale_and_radius: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The radius divided by the scale could vanish.
    scale, radius = scale_and_radius
    within = scale * s <= radius
    return jnp.where(within, scale * s, radius), jnp.where(within, scale, 0)


def onto_ball(x: jax.Array, axes: tuple[int, ...], radius: ArrayLike) -> jax.Array:
    """Return each vector, shortened to the radius where it is longer."""
    norm, direction = polar(x, axes)
    limit = jnp.asarray(radius, norm.dtype)
    return jnp.where(norm <= limit, x, limit * direction)
