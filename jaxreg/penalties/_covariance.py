"""Penalties of the variances and covariances of features over examples."""

import abc
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import count_examples, of_rank, sum_examples
from ._base import Penalty
from ._explicit import partitioned
from ._fields import positive

Gram = Callable[[jax.Array, jax.Array], jax.Array]
"""From two arrays (..., features) to sums over examples of products of features."""


class Scatter(NamedTuple):
    """Sums over examples that add up across microbatches: Σ (x − μ)(x − μ)ᵀ, in parts.

    The textbook's Σ x xᵀ − n μ μᵀ loses in float32 what little examples differ beside a large mean.
    Here each microbatch centers its own examples, and only differences of its mean from that of the
    others are left to such a subtraction: for a single microbatch, zero.

    Args:
        examples: n, how many examples count.
        total: Σ x.
        within: Σ (x − m)(x − m)ᵀ for m the mean of the microbatch.
        between: n m mᵀ.
    """

    examples: jax.Array
    total: jax.Array
    within: jax.Array
    between: jax.Array

    @classmethod
    def of(cls, x: jax.Array, where: jax.Array | None, gram: Gram) -> "Scatter":
        """Return the sums over every axis of `x` but the last."""
        examples, total = count_examples(x, where), sum_examples(x)
        centered = x - of_rank(x.ndim, total / jnp.maximum(examples, 1))
        if where is not None:
            centered = jnp.where(where, centered, 0)
        return cls(examples, total, gram(centered, centered), _of_mean(total, examples, gram))

    def combined(self, gram: Gram) -> jax.Array:
        """Return Σ (x − μ)(x − μ)ᵀ for μ the mean of all examples."""
        # In parentheses are equal numbers from equal operations, if there is one microbatch only.
        return self.within + (self.between - _of_mean(self.total, self.examples, gram))


def _of_mean(total: jax.Array, examples: jax.Array, gram: Gram) -> jax.Array:
    # The square of the total would overflow for many examples, and the derivative of n times that
    # of the mean for small entries.
    mean = total / jnp.maximum(examples, 1)
    return gram(total[None], mean[None])


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return Σ x_j y_j for each feature j."""
    return sum_examples(x * y)


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return Σ x_i y_j for each pair of features."""
    axes = tuple(range(x.ndim - 1))
    # An accelerator multiplies float32 in fewer bits by default.
    return jnp.tensordot(x, y, (axes, axes), precision="highest")


class OfScatter(Penalty):
    """A penalty of the scatter of features over examples; a mean by itself."""

    strength: ArrayLike

    @abc.abstractmethod
    def gram(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the products of features that are needed, summed over examples."""

    @abc.abstractmethod
    def of_scatter(self, scatter: jax.Array, examples: jax.Array) -> jax.Array:
        """Return the value for a strength of one from Σ (x − μ)(x − μ)ᵀ and n ≥ 1."""

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Scatter:
        return Scatter.of(jnp.atleast_1d(x), where, self.gram)

    def finish(self, moments: Scatter, count: ArrayLike | None) -> jax.Array:
        examples = moments.examples
        value = self.of_scatter(moments.combined(self.gram), jnp.maximum(examples, 1))
        value = jnp.asarray(self.strength, examples.dtype) * value
        return jnp.where(examples > 0, value, jnp.zeros_like(value))


class Decorrelation(OfScatter):
    r"""Half the sum of the squared covariances of different features: DeCov.

    $$ R(h) = \tfrac s2 \Big( \lVert C \rVert_F^2 - \lVert \mathrm{diag}(C) \rVert_2^2 \Big)
            = \tfrac s2 \sum_{i \ne j} C_{ij}^2, \qquad
       C = \tfrac1n \sum_{k=1}^n (h_k - \mu)(h_k - \mu)^\top $$

    The last axis holds the features, all others together are the n examples; μ is their mean. The
    covariance term of VICReg is `Decorrelation(2 * s / features)`, but for its factor n / (n − 1)
    in C. What adds up over microbatches, and is carried, are 2·features² numbers. Within each the
    examples are centered; where several are combined, C is off by about 3·10⁻⁷·μᵢμⱼ in float32.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        (2s / n) · C̃ (h_k − μ), C̃ being C without its diagonal. Smooth everywhere.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> h = jnp.array([[1.0, 5.0], [-1.0, 1.0]])         # covariance 2
        >>> float(jr.Decorrelation(1.0)(h))
        4.0

    References:
        Cogswell, Ahmed, Girshick, Zitnick and Batra, Reducing overfitting in deep networks by
        decorrelating representations, ICLR, arXiv:1511.06068, 2016.
    """

    def gram(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return outer(x, y)

    def of_scatter(self, scatter: jax.Array, examples: jax.Array) -> jax.Array:
        different = 1 - jnp.eye(len(scatter), dtype=scatter.dtype)
        return jnp.sum(jnp.square(different * scatter / examples)) / 2


class VarianceHinge(OfScatter):
    r"""How far the standard deviation of features falls short of a target: VICReg's variance term.

    $$ R(z) = \frac sd \sum_{j=1}^d \max\!\left(0,\; \gamma - \sqrt{\mathrm{Var}_j + \epsilon}
              \right), \qquad
       \mathrm{Var}_j = \frac1{n - 1} \sum_{k=1}^n (z_{kj} - \bar z_j)^2 $$

    The last axis holds the d features, all others together are the n examples. The variance is the
    unbiased one, as in the paper and in its code; for n = 1 it is 0.

    Args:
        strength: s, a non-negative scalar.
        target: γ > 0, in the units of z. A leaf, like the strength.
        epsilon: ε > 0, in the units of z². A leaf.

    Gradient:
        −(s / d)·(z_kj − z̄_j) / ((n − 1)·√(Var_j + ε)) where the hinge is active, and 0 elsewhere
        and at the hinge. It is 0 where all examples are the same.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            concrete γ or ε that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> z = jnp.array([[1.0, 0.5], [4.0, 0.5]])          # the second feature has collapsed
        >>> round(float(jr.VarianceHinge(1.0)(z)), 4)
        0.495

    References:
        Bardes, Ponce and LeCun, VICReg: variance-invariance-covariance regularization for
        self-supervised learning, ICLR, arXiv:2105.04906, 2022.
    """

    _: KW_ONLY
    target: ArrayLike = positive(default=1.0)
    epsilon: ArrayLike = positive(default=1e-4)

    def gram(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return inner(x, y)

    def of_scatter(self, scatter: jax.Array, examples: jax.Array) -> jax.Array:
        target, epsilon = (jnp.asarray(s, scatter.dtype) for s in (self.target, self.epsilon))
        # Rounding between microbatches may take it below 0.
        scatter = jnp.where(scatter < 0, 0, scatter)
        variance = scatter / jnp.maximum(examples - 1, 1)
        short = jax.nn.relu(target - jnp.sqrt(variance + epsilon))
        return jnp.sum(short) / max(scatter.size, 1)
