"""Cross-entropy and squared normalizer of a chunk of logits, whole or split over devices."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxreg.terms import AxisName

from ._sharding import psum


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy and the squared log-normalizer of each token.

    Under `vocab_axis_name` each device has a block of the words; maxima and sums of the blocks
    are all that is exchanged.
    """

    label_smoothing: float
    soft_cap: float | None
    vocab_axis_name: AxisName | None

    def __call__(self, logits: jax.Array, labels: jax.Array) -> "Outcome":
        labels, name = labels[:, None], self.vocab_axis_name
        block = vocabulary = logits.shape[-1]
        largest = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        if name is not None:
            labels -= block * lax.axis_index(name)
            vocabulary *= lax.axis_size(name)
            largest = lax.pmax(largest, name)  # type: ignore[no-untyped-call]
        capped, limit = self.cap(logits), self.cap(largest)
        # All logits -inf: log 0 is -inf, and -inf less itself would be NaN.
        limit = jnp.where(limit == -jnp.inf, 0, limit)
        shifted = capped - limit

        # Indices that do not come from the chunk would be an array of its size, which the
        # differentiation of a scan computes before it, and keeps.
        words = jnp.arange(block)[None] + 0 * labels[:1]
        is_here = (labels >= 0) & (labels < block)
        # XLA for the CPU would write where(words == labels, shifted, 0) as an array.
        at_label = jnp.take_along_axis(logits, labels, axis=-1, mode="clip")

        def total(x: jax.Array) -> jax.Array:
            return psum(jnp.sum(x, axis=-1), name)  # type: ignore[no-any-return]

        log_sum = jnp.log(total(jnp.exp(shifted)))
        of_label = total(jnp.where(is_here, self.cap(at_label) - limit, 0))
        target = of_label
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * of_label
            target += self.label_smoothing / vocabulary * total(shifted)
        # Before the cap: XLA may compute that twice, and round it differently.
        hit = (is_here & (at_label == largest))[:, 0]
        earlier = jnp.any((logits == largest) & (words < labels), axis=-1)
        correct = psum(hit.astype(logits.dtype) - earlier.astype(logits.dtype), name) == 1
        lse = limit[:, 0] + log_sum
        return Outcome(
            terms=(log_sum - target, jnp.square(lse)),
            statistics=(lse, correct.astype(logits.dtype)),
            # exp(logits - lse) would have the rounding error of lse. The exponentials of the sum
            # would do for the gradient too, but then XLA for TPUs keeps them beside the logits.
            log_probabilities=shifted - log_sum[:, None],
            slope_of_cap=self._slope_of_cap(capped),
            is_label=words == labels,
            at_label=1 - self.label_smoothing,
            elsewhere=self.label_smoothing / vocabulary,
            vocab_axis_name=name,
        )

    def cap(self, logits: jax.Array) -> jax.Array:
        """Return the logits within ± the soft cap."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def _slope_of_cap(self, capped: jax.Array) -> jax.Array | float:
        return 1.0 if self.soft_cap is None else 1 - jnp.square(capped / self.soft_cap)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Terms: cross-entropy, lse². Statistics: lse, and 1 where the label has the largest logit."""

    terms: tuple[jax.Array, jax.Array]
    statistics: tuple[jax.Array, jax.Array]
    log_probabilities: jax.Array
    slope_of_cap: jax.Array | float
    is_label: jax.Array
    at_label: float
    elsewhere: float
    vocab_axis_name: AxisName | None

    def gradient(self, coefficients: tuple[jax.Array, ...]) -> jax.Array:
        """Return the derivative of Σ coefficient · term by the logits."""
        by_loss, by_square = coefficients
        by_lse = by_loss + 2 * self.statistics[0] * by_square
        by_loss = by_loss[:, None]
        slope = jnp.exp(self.log_probabilities) * by_lse[:, None]
        if self.elsewhere:
            slope -= by_loss * self.elsewhere
        return jnp.where(self.is_label, slope - by_loss * self.at_label, slope) * self.slope_of_cap

    def tangent(self, logits: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Return the tangents of terms and statistics, given that of the logits."""
        capped = logits * self.slope_of_cap

        def along(weights: jax.Array) -> jax.Array:
            return psum(jnp.sum(weights * capped, axis=-1), self.vocab_axis_name)  # type: ignore[no-any-return]

        lse, correct = self.statistics
        by_lse = along(jnp.exp(self.log_probabilities))
        target = self.at_label * self.is_label.astype(logits.dtype) + self.elsewhere
        by_loss = by_lse - along(target)
        return (by_loss, 2 * lse * by_lse), (by_lse, jnp.zeros_like(correct))
