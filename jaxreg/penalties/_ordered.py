"""Penalties of arrays whose entries have an order: they compare neighbours."""

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import modulus, root
from ._axes import check_axes, vector_axes
from ._base import Penalty
from ._checks import require_integer
from ._explicit import partitioned
from ._fields import static
from ._total_variation import prox_total_variation


class Ordered(Penalty):
    """A penalty of the differences of neighbours along some axes.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which neighbours differ; the others hold separate arrays.
    """

    strength: ArrayLike
    _: KW_ONLY
    axis: int | tuple[int, ...] = static(default=-1)

    batch_axes: ClassVar[tuple[int, ...]] = ()

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        if self.axis is None or self.axis == ():
            raise ValueError(
                f"`jaxreg.{type(self).__name__}(axis=...)` must name an axis of the array, or"
                f' several different ones; got axis={self.axis} for "{name}" of shape {x.shape}.'
            )
        check_axes(self, x, name)

    def adds_up(self, ndim: int) -> bool:
        return 0 not in vector_axes(self, ndim)

    def _differences(
        self, x: jax.Array, where: jax.Array | None, order: int = 1
    ) -> Iterator[jax.Array]:
        """Yield the differences of an order along each axis; 0 where an entry does not count."""
        for axis in vector_axes(self, x.ndim):
            difference = jnp.diff(x, n=order, axis=axis)
            if where is not None:
                missing = ~jnp.broadcast_to(where, x.shape)
                for _ in range(order):
                    size = max(missing.shape[axis] - 1, 0)
                    before = jax.lax.slice_in_dim(missing, 0, size, axis=axis)
                    missing = before | jax.lax.slice_in_dim(
                        missing, missing.shape[axis] - size, None, axis=axis
                    )
                difference = jnp.where(missing, 0, difference)
            yield difference


class TotalVariation(Ordered):
    r"""The sum of the sizes of the steps between neighbours: makes arrays piecewise constant.

    $$ R(x) = s \sum_i \sum_a |\Delta_a x_i|, \qquad
       R_{\mathrm{iso}}(x) = s \sum_i \sqrt{\sum_a (\Delta_a x_i)^2} $$

    Δ_a x_i is the next entry along the axis a less x_i, and 0 for the last entry of the axis.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis along which neighbours differ, as in `numpy.diff`, or several, such as
            (-3, -2) for the rows and columns of images (..., height, width, channels). Every index
            of the other axes is a signal of its own. As an activity penalty it adds up over
            microbatches only if the leading axis is not among them. With a mask, a step counts
            where both of its entries do.
        isotropic: whether the differences along several axes count by their Euclidean norm. With
            one axis it makes no difference.

    Gradient:
        s · (sign(x_i − x_{i−1}) − sign(x_{i+1} − x_i)) along each axis, with sign(0) = 0; the
        isotropic one of an entry of which all differences are 0 is 0. The second derivative of the
        former is 0.

    Prox:
        Along one axis, exactly: each segment of equal entries is the mean of x over it, drawn by
        t·s / length towards its neighbours. Made of whole-array operations, in rounds of which
        there are about log₂ of the number of distinct values; signals on other axes run together.
        Its derivative by x is the mean over each segment. A NaN makes its signal NaN; an infinite
        entry stays. A sum with a `jaxreg.L1` (the fused lasso) has one as well.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.
        NotImplementedError: from `prox`, for several axes, where it takes an iteration or a maximum
            flow.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> signal = jnp.array([0.0, 1.0, 0.0, 5.0, 6.0])
        >>> float(jr.TotalVariation(1.0)(signal))
        8.0
        >>> jr.TotalVariation(1.0).prox(signal, step=2.0).tolist()
        [1.0, 1.0, 1.0, 4.5, 4.5]

    References:
        Rudin, Osher and Fatemi, Nonlinear total variation based noise removal algorithms, Physica D
        60, 1992. Hochbaum, An efficient algorithm for image segmentation, Markov random fields and
        related problems, Journal of the ACM 48(4), 2001. Chambolle and Darbon, On total variation
        minimization and surface evolution using parametric maximum flows, International Journal of
        Computer Vision 84(3), 2009. Tibshirani, Saunders, Rosset, Zhu and Knight, Sparsity and
        smoothness via the fused lasso, JRSS B 67(1), 2005.
    """

    _: KW_ONLY
    isotropic: bool = static(default=False)

    fuses: ClassVar[bool] = True

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        differences = self._differences(x, where)
        if not self.isotropic:
            return sum((jnp.sum(modulus(d)) for d in differences), start=jnp.zeros((), x.dtype))
        squares = jnp.zeros_like(x)
        for d in differences:
            padding = [(0, size - own) for size, own in zip(x.shape, d.shape, strict=True)]
            squares += jnp.pad(jnp.square(d), padding)
        return jnp.sum(root(squares))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        axes = vector_axes(self, x.ndim)
        if len(axes) > 1:
            raise NotImplementedError(
                "`jaxreg.TotalVariation` has an exact proximal operator along one axis only; got"
                f" axis={self.axis}. Use its gradient instead (`jaxreg.add_penalty_gradient`)."
            )
        signals = jnp.moveaxis(x, axes[0], -1)
        weight = jnp.asarray(step * self.strength, x.dtype).reshape(())
        z = prox_total_variation(signals, weight)
        return jnp.moveaxis(z, -1, axes[0])


class SmoothL2(Ordered):
    r"""The sum of the squared steps between neighbours: makes arrays smooth.

    $$ R(x) = s \sum_i \sum_a (\Delta_a x_i)^2 $$

    Δ_a x_i is the next entry along the axis a less x_i, and 0 for the last entry of the axis. Along
    time, between the states of a recurrent network, it is temporal activation regularization (which
    Merity et al. average).

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which neighbours differ; see `TotalVariation`.

    Gradient:
        2·s·(2x_i − x_{i−1} − x_{i+1}) along each axis, without the neighbours that are not there.

    Prox:
        The solution z of (I + 2·t·s·DᵀD) z = x, exact also for several axes: the discrete cosine
        transform diagonalizes DᵀD, with the eigenvalues 4 sin²(πk/2n). Means are kept however
        large t·s is. An infinite entry stays; it and a NaN make the rest of their array NaN.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.SmoothL2(1.0)(jnp.array([0.0, 1.0, 3.0])))
        5.0
        >>> jr.SmoothL2(0.25).prox(jnp.array([0.0, 4.0]), step=1.0).round(4).tolist()
        [1.0, 3.0]

    References:
        Whittaker, On a new method of graduation, Proceedings of the Edinburgh Mathematical Society
        41, 1922. Merity, McCann and Socher, Revisiting activation regularization for language RNNs,
        arXiv:1708.01009, 2017.
    """

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        differences = self._differences(x, where)
        return sum((jnp.sum(jnp.square(d)) for d in differences), start=jnp.zeros((), x.dtype))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        if x.size == 0:
            return x
        axes = vector_axes(self, x.ndim)
        pull = jnp.zeros((), x.dtype)
        for axis in axes:
            size = x.shape[axis]
            sines = jnp.sin(jnp.arange(size, dtype=x.dtype) * (jnp.pi / (2 * size)))
            own = tuple(size if a == axis else 1 for a in range(x.ndim))
            pull += 4 * jnp.square(sines).reshape(own)
        # Where it is this large all but the means is gone, and more would overflow.
        pull *= jnp.minimum(2 * jnp.asarray(step * self.strength, x.dtype), 1e30)
        spectrum = jax.scipy.fft.dctn(x, axes=axes, norm="ortho")
        moved = jax.scipy.fft.idctn(spectrum * (pull / (1 + pull)), axes=axes, norm="ortho")
        return jnp.where(jnp.isinf(x), x, x - moved)


class TrendFiltering(Ordered):
    r"""The sum of the sizes of higher differences: makes arrays piecewise polynomial.

    $$ R(x) = s \sum_i \sum_a |(\Delta_a^{k+1} x)_i| $$

    The sum is over the n − k − 1 places along an axis of n entries where all of them are there.

    Args:
        strength: s, a non-negative scalar.
        order: k, the degree of the pieces: 0 is total variation, 1 makes arrays piecewise linear.
        axis: the axis or axes along which neighbours differ; see `TotalVariation`. With a mask, a
            difference counts where all of its k + 2 entries do.

    Gradient:
        The differences' signs, with sign(0) = 0, times their coefficients. It has no closed-form
        proximal operator.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            order that is not a non-negative integer; for an axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.TrendFiltering(1.0)(jnp.array([0.0, 1.0, 2.0, 2.0])))
        1.0

    References:
        Kim, Koh, Boyd and Gorinevsky, ℓ1 trend filtering, SIAM Review 51(2), 2009. Tibshirani,
        Adaptive piecewise polynomial estimation via trend filtering, Annals of Statistics 42(1),
        2014.
    """

    _: KW_ONLY
    order: int = static(default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("TrendFiltering(order=...)", self.order, least=0)

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        differences = self._differences(x, where, self.order + 1)
        return sum((jnp.sum(modulus(d)) for d in differences), start=jnp.zeros((), x.dtype))
