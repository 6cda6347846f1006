"""Cross-entropy and squared normalizer of a chunk of logits, whole or split over devices."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ._sharding import AxisName, psum


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy and the squared log-normalizer of each token.

    Under `vocab_axis_name` each device has a block of the words; maxima and sums of the blocks
    are all that is exchanged.
    """

    label_smoothing: float
    vocab_axis_name: AxisName

    def __call__(self, logits: jax.Array, data: jax.Array) -> "Outcome":
        labels, name = data[:, None], self.vocab_axis_name
        block = logits.shape[-1]
        words = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        vocabulary = block
        largest = lax.stop_gradient(jnp.max(logits, axis=-1))
        if name is not None:
            words += block * lax.axis_index(name)
            vocabulary *= lax.axis_size(name)
            largest = lax.pmax(largest, name)  # type: ignore[no-untyped-call]

        def total(x: jax.Array) -> jax.Array:
            return psum(jnp.sum(x, axis=-1), name)  # type: ignore[no-any-return]

        # All logits -inf: log 0 is -inf, and -inf less itself would be NaN.
        largest = jnp.where(largest == -jnp.inf, 0, largest)
        shifted = logits - largest[:, None]
        is_label = words == labels
        log_sum = jnp.log(total(jnp.exp(shifted)))
        of_label = total(jnp.where(is_label, shifted, 0))
        target = of_label
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * of_label
            target += self.label_smoothing / vocabulary * total(shifted)
        earlier = total(jnp.where((shifted == 0) & (words < labels), 1.0, 0.0))
        correct = (of_label == 0) & (earlier == 0)
        lse = largest + log_sum
        return Outcome(
            terms=(log_sum - target, jnp.square(lse)),
            statistics=(lse, correct.astype(logits.dtype)),
            # exp(logits - lse) would have the rounding error of lse.
            log_probabilities=shifted - log_sum[:, None],
            is_label=is_label,
            smoothing=self.label_smoothing,
            vocabulary=vocabulary,
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Terms: cross-entropy, lse². Statistics: lse, and 1 where the label has the largest logit."""

    terms: tuple[jax.Array, jax.Array]
    statistics: tuple[jax.Array, jax.Array]
    log_probabilities: jax.Array
    is_label: jax.Array
    smoothing: float
    vocabulary: int

    def gradient(self, coefficients: tuple[jax.Array, ...]) -> jax.Array:
        """Return the derivative of Σ coefficient · term by the logits."""
        by_loss, by_square = (c[:, None] for c in coefficients)
        lse = self.statistics[0][:, None]
        probabilities = jnp.exp(self.log_probabilities)
        rest = by_loss * (self.smoothing / self.vocabulary)
        at_label = by_loss * (1 - self.smoothing)
        return (
            probabilities * (by_loss + 2 * lse * by_square)
            - rest
            - jnp.where(self.is_label, at_label, 0)
        )
