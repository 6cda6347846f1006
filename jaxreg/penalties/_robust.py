"""Convex penalties that are a sum of one function over the entries, beyond L1 and L2."""

import math
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import modulus, shrunk
from ._checks import require_choice, require_order
from ._fields import positive, setting, static
from ._separable import Separable


class Huber(Separable):
    r"""Squares near zero and absolute values away from it.

    $$ R(x) = s \sum_i \begin{cases} \tfrac12 x_i^2 & |x_i| \le \delta \\
                                     \delta\,(|x_i| - \tfrac12 \delta) & \text{otherwise}
                       \end{cases} $$

    Args:
        strength: s, a non-negative scalar.
        delta: δ > 0, where the squares end. A leaf, like the strength.

    Gradient:
        s · clip(x, −δ, δ). Continuous; the second derivative is 0 or s.

    Prox:
        With λ = t·s: x / (1 + λ) where |x| ≤ δ(1 + λ), and x − λδ · sign(x) beyond.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, or a
            concrete δ that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.Huber(1.0, delta=1.0)(jnp.array([0.5, -3.0])))
        2.625

    References:
        Huber, Robust estimation of a location parameter, Annals of Mathematical Statistics 35(1),
        1964.
    """

    _: KW_ONLY
    delta: ArrayLike = positive(default=1.0)

    def phi(self, x: jax.Array) -> jax.Array:
        delta = jnp.asarray(self.delta, x.dtype)
        near = jnp.clip(x, -delta, delta)
        return near * (x - near / 2)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale, delta = step * self.strength, jnp.asarray(self.delta, x.dtype)
        near = shrunk(x, scale)
        return jnp.where(jnp.abs(near) <= delta, near, x - scale * delta * jnp.sign(x))


class LogCosh(Separable):
    r"""The logarithm of the hyperbolic cosine, a smooth absolute value.

    $$ R(x) = s \sum_i \log\cosh x_i $$

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        s · tanh(x). Smooth everywhere.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> round(float(jr.LogCosh(1.0)(jnp.array([1.0, -100.0]))), 3)
        99.741

    References:
        Green, Bayesian reconstructions from emission tomography data using a modified EM algorithm,
        IEEE Transactions on Medical Imaging 9(1), 1990.
    """

    def phi(self, x: jax.Array) -> jax.Array:
        # log cosh x = log(1 + 2 sinh²(x/2)) keeps its digits near 0, and overflows away from it;
        # there it is |x| + log(1 + exp(-2|x|)) - log 2.
        near = jnp.abs(x) < 1
        sinh = jnp.sinh(jnp.where(near, x, 0) / 2)
        far = jnp.where(near, 1, jnp.abs(x))
        return jnp.where(
            near, jnp.log1p(2 * sinh * sinh), far + jnp.log1p(jnp.exp(-2 * far)) - math.log(2)
        )


def _bound(default: float) -> Any:
    return setting("a scalar", lambda bound: not math.isnan(bound), default=default)


class RangeHinge(Separable):
    r"""The distance, or its square, by which entries leave a range; for activations and rates.

    $$ R(x) = s \sum_i \max(l - x_i, 0)^k + \max(x_i - u, 0)^k $$

    Args:
        strength: s, a non-negative scalar.
        lower: l. A leaf, like the strength.
        upper: u. A leaf.
        power: k, 1 or 2.

    Gradient:
        For k = 1: −s below l, s above u, and 0 between them and at both. For k = 2:
        −2s·(l − x) below, 2s·(x − u) above, 0 between.

    Prox:
        With λ = t·s. For k = 1 an entry outside moves by λ towards the range, and not into it.
        For k = 2: (x + 2λl) / (1 + 2λ) below, (x + 2λu) / (1 + 2λ) above.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            power that is neither 1 nor 2; for concrete bounds that are NaN or out of order.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> rates = jnp.array([0.0, 3.0, 12.0])
        >>> float(jr.RangeHinge(1.0, lower=1.0, upper=10.0, power=2)(rates))
        5.0

    References:
        Zenke and Vogels, The remarkable robustness of surrogate gradient learning for instilling
        complex function in spiking neural networks, Neural Computation 33(4), 2021.
    """

    _: KW_ONLY
    lower: ArrayLike = _bound(default=-math.inf)
    upper: ArrayLike = _bound(default=math.inf)
    power: int = static(default=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "lower", "upper")
        require_choice("RangeHinge(power=...)", self.power, (1, 2))

    def phi(self, x: jax.Array) -> jax.Array:
        return modulus(self._excess(x)) if self.power == 1 else jnp.square(self._excess(x))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        excess, scale = self._excess(x), step * self.strength
        if self.power == 1:
            return x - jnp.clip(excess, -scale, scale)
        # Where it is this large all of the excess is gone, and more would overflow.
        pull = jnp.minimum(2 * scale, 1e30)
        return jnp.where(jnp.isinf(excess), x, x - pull / (1 + pull) * excess)

    def _excess(self, x: jax.Array) -> jax.Array:
        """Return how far each entry is above the range, or, negative, below it."""
        lower, upper = jnp.asarray(self.lower, x.dtype), jnp.asarray(self.upper, x.dtype)
        # Without a bound, an infinite entry is within.
        within = (x >= lower) & (x <= upper)
        return jnp.where(within, 0, x - jnp.clip(x, lower, upper))
