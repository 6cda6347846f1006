"""Penalties of means over examples."""

import abc
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import count_examples, sum_examples
from ._base import Penalty
from ._fields import setting


class Statistic(Penalty):
    r"""A penalty of means over examples.

    $$ R(x) = s \cdot f\!\left(\tfrac1n \sum_{i=1}^{n} m(x_i)\right) $$

    The last axis holds features, all others together are the n examples. The sums and n add up
    across microbatches and devices, and f runs once, so that the value is that of the whole batch.
    It averages over examples itself: no reduction divides it again.

    Args:
        strength: s.
    """

    strength: ArrayLike

    @abc.abstractmethod
    def sums(self, x: jax.Array, where: jax.Array | None) -> Any:
        """Return Σ m(x_i): a pytree of arrays, summed over every axis of `x` but the last."""

    def of_means(self, means: Any) -> jax.Array:
        """Return f, a scalar, given the sums divided by n; finite where they are all 0.

        Without one of a subclass's own it is the identity: the penalty is a mean.
        """
        mean: jax.Array = means
        return mean

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> tuple[Any, jax.Array]:
        x = jnp.atleast_1d(x)
        return self.sums(x, where), count_examples(x, where)

    def finish(self, moments: Any, count: ArrayLike | None) -> jax.Array:
        sums, examples = moments
        means = jax.tree.map(lambda s: s / jnp.maximum(examples, 1), sums)
        value = jnp.asarray(self.strength, examples.dtype) * self.of_means(means)
        return jnp.where(examples > 0, value, jnp.zeros_like(value))


class KLSparsity(Statistic):
    r"""The divergence of each unit's mean activation from a target, for sparse sigmoid codes.

    $$ R(a) = s \sum_j \rho \log\frac{\rho}{\hat\rho_j}
              + (1 - \rho) \log\frac{1 - \rho}{1 - \hat\rho_j},
       \qquad \hat\rho_j = \tfrac1n \sum_{i=1}^n a_{ij} $$

    ρ̂_j is taken over every axis but the last. If finite it is clipped to [ε, 1 − ε], ε the machine
    epsilon of the accumulation dtype.

    Args:
        strength: s, a non-negative scalar.
        target: ρ, the mean activation wanted, in (0, 1). A leaf, like the strength.

    Gradient:
        s · (−ρ/ρ̂_j + (1 − ρ)/(1 − ρ̂_j)) / n, and 0 where ρ̂_j is clipped: activations must lie in
        (0, 1), as a sigmoid's do.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, or a
            concrete target outside (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> codes = jnp.array([[0.1, 0.9], [0.3, 0.9]])     # means 0.2 and 0.9
        >>> round(float(jr.KLSparsity(1.0, target=0.2)(codes)), 4)
        1.3627

    References:
        Ng, Sparse autoencoder, CS294A lecture notes, 2011.
    """

    _: KW_ONLY
    target: ArrayLike = setting("a scalar between 0 and 1", lambda rho: 0 < rho < 1)

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        return sum_examples(x, where)

    def of_means(self, means: jax.Array) -> jax.Array:
        epsilon = float(jnp.finfo(means.dtype).eps)  # type: ignore[no-untyped-call]
        mean = jnp.where(jnp.isinf(means), means, jnp.clip(means, epsilon, 1 - epsilon))
        rho = jnp.asarray(self.target, means.dtype)
        on = rho * (jnp.log(rho) - jnp.log(mean))
        off = (1 - rho) * (jnp.log1p(-rho) - jnp.log1p(-mean))
        return jnp.sum(on + off)
