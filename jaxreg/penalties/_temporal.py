"""Penalties of activations of sequences: how large they are, and how fast they change."""

import operator
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._base import Penalty
from ._covariance import Scatter, inner
from ._explicit import partitioned
from ._fields import static
from ._statistic import Statistic


class ActivationNorm(Statistic):
    r"""The mean square of all entries: activation regularization (AR) of recurrent networks.

    $$ R(h) = \frac{s}{n\,d} \sum_{k=1}^n \sum_{j=1}^d h_{kj}^2 $$

    The last axis holds the d features, all others together are the n steps that count. It is a mean
    by itself: no reduction divides it again. AWD-LSTM penalizes by it the output of the last layer
    *after* dropout (strength α = 2), and by `TemporalDifference` the same output *before* dropout.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        2·s·h / (n·d).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.ActivationNorm(2.0)(jnp.array([[[1.0, 3.0], [0.0, 0.0]]])))
        5.0

    References:
        Merity, McCann and Socher, Revisiting activation regularization for language RNNs,
        arXiv:1708.01009, 2017. Merity, Keskar and Socher, Regularizing and optimizing LSTM language
        models, ICLR, arXiv:1708.02182, 2018.
    """

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        return jnp.sum(jnp.square(x), where=where) / max(x.shape[-1], 1)


class Temporal(Penalty):
    """A penalty of the differences of successive steps.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis of time, not the last one.
    """

    strength: ArrayLike
    _: KW_ONLY
    axis: int = static(default=-2)

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        try:
            axis = operator.index(self.axis)
        except TypeError:
            raise TypeError(
                f"`jaxreg.{type(self).__name__}(axis=...)` must be an integer; got {self.axis!r}."
            ) from None
        if not -x.ndim <= axis < x.ndim or axis in (-1, x.ndim - 1):
            raise ValueError(
                f"`jaxreg.{type(self).__name__}(axis=...)` must name the axis of time of an array"
                f" (..., time, ..., features), not the last one; got axis={self.axis} for"
                f' "{name}" of shape {x.shape}.'
            )

    def adds_up(self, ndim: int) -> bool:
        return self.axis not in (0, -ndim)

    def changes(self, x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Return Σ (x_{t+1} − x_t)² of each feature, and how many pairs of steps count.

        Of a pair both steps must count.
        """
        counts = jnp.broadcast_to(True if where is None else where, (*x.shape[:-1], 1))
        steps = jnp.moveaxis(counts, self.axis, 0)
        both = jnp.moveaxis(steps[1:] & steps[:-1], 0, self.axis)
        difference = jnp.where(both, jnp.diff(x, axis=self.axis), 0)
        return inner(difference, difference), jnp.sum(both, dtype=x.dtype)


class TemporalDifference(Temporal):
    r"""The mean square of the differences of successive steps: temporal AR (TAR).

    $$ R(h) = \frac{s}{m\,d} \sum_{t} \sum_{j=1}^d (h_{t+1,j} - h_{tj})^2 $$

    m is the number of pairs of successive steps that both count, in all sequences together. It is a
    mean by itself: no reduction divides it again. AWD-LSTM applies it to the raw output of the last
    layer, before dropout (strength β = 1); see `ActivationNorm`.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis of time, not the last one. Microbatches must hold whole sequences.

    Gradient:
        2·s·(2h_t − h_{t−1} − h_{t+1}) / (m·d) inside a sequence. 0 for sequences of one step.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have, or that is its last.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> h = jnp.array([[[0.0], [1.0], [3.0]]])           # one sequence, three steps
        >>> float(jr.TemporalDifference(1.0)(h))
        2.5

    References:
        Merity, McCann and Socher, Revisiting activation regularization for language RNNs,
        arXiv:1708.01009, 2017.
    """

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        changes, pairs = self.changes(x, where)
        return jnp.sum(changes) / max(x.shape[-1], 1), pairs

    def finish(self, moments: tuple[jax.Array, jax.Array], count: ArrayLike | None) -> jax.Array:
        return super().finish(*moments)


class Slowness(Temporal):
    r"""How fast features change relative to how much they vary: slow feature analysis.

    $$ R(y) = s \sum_j \frac{\langle (y_{t+1,j} - y_{tj})^2 \rangle}{\mathrm{Var}(y_j)}, \qquad
       \mathrm{Var}(y_j) = \langle (y_{tj} - \langle y_{tj} \rangle)^2 \rangle $$

    ⟨·⟩ is the mean over all steps, or pairs of successive steps, that count, of all sequences. Each
    quotient is the Δ-value of a feature scaled to unit variance: near 0 for a slow one, 2 for white
    noise, 4 for one that alternates. Nothing here keeps the features from being the same: add
    `Decorrelation`.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis of time, not the last one. Microbatches must hold whole sequences.

    Gradient:
        Smooth where a feature varies. It is orthogonal to the feature: its scale does not matter.
        For a feature that does not change value and gradient are 0; near that the gradient grows
        as 1 / √Var.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have, or that is its last.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> y = jnp.array([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
        >>> slow, fast = (jr.Slowness(1.0)(y[:, j:j + 1]) for j in range(2))
        >>> round(float(slow), 4), round(float(fast), 4)
        (1.3333, 4.0)

    References:
        Wiskott and Sejnowski, Slow feature analysis: unsupervised learning of invariances, Neural
        Computation 14(4), 2002.
    """

    @partitioned
    def moments(
        self, x: jax.Array, where: jax.Array | None = None
    ) -> tuple[Scatter, jax.Array, jax.Array]:
        return Scatter.of(x, where, inner), *self.changes(x, where)

    def finish(
        self, moments: tuple[Scatter, jax.Array, jax.Array], count: ArrayLike | None
    ) -> jax.Array:
        scatter, changes, pairs = moments
        # Rounding between microbatches may take it below the part within them, and below 0.
        scattered = jnp.maximum(scatter.combined(inner), scatter.within)
        still = (changes == 0) | (scattered == 0)
        # Not of the mean, which vanishes before the sum does. The derivative of a quotient by a
        # square would overflow where entries are near 1e-10.
        root = jnp.sqrt(jnp.where(still, 1, changes)) / jnp.sqrt(jnp.where(still, 1, scattered))
        speed = jnp.where(still, 0, jnp.square(root)) * (scatter.examples / jnp.maximum(pairs, 1))
        return jnp.asarray(self.strength, speed.dtype) * jnp.sum(speed)
