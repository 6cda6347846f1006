"""Penalties of the parameters of stochastic gates."""

import math
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._fields import positive, setting
from ._separable import Separable


class HardConcrete(Separable):
    r"""The expected number of hard concrete gates that are not zero: a differentiable L0.

    $$ R(\log\alpha) = s \sum_j \sigma\!\left(\log\alpha_j - \beta \log\frac{-\gamma}{\zeta}\right)
                     = s \sum_j P(z_j \ne 0) $$

    Its argument is log α, the parameters of the gates z that `jaxreg.gates.hard_concrete` samples
    with the same β, γ and ζ. A gate of a group of n weights counts n times in the paper's penalty:
    `n * jaxreg.HardConcrete(s)`.

    Args:
        strength: s, a non-negative scalar.
        beta: β > 0, the temperature. A leaf, like the strength. This and the next two defaults are
            the paper's.
        gamma: γ < 0, the lower end of the stretched interval. A leaf.
        zeta: ζ > 1, its upper end. A leaf.

    Gradient:
        s · P · (1 − P). Smooth.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            concrete β that is not positive, γ that is not below 0, or ζ that is not above 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> params = {"layer": {"kernel": jnp.ones((3, 2)), "log_alpha": jnp.array([9.0, -9.0])}}
        >>> kernel = jr.kernel({"**/log_alpha": jr.HardConcrete(1.0)})
        >>> round(float(kernel(params)), 2)
        1.0

    References:
        Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization,
        ICLR, arXiv:1712.01312, 2018.
    """

    _: KW_ONLY
    beta: ArrayLike = positive(default=2 / 3)
    gamma: ArrayLike = setting(
        "a finite scalar below 0", lambda gamma: -math.inf < gamma < 0, default=-0.1
    )
    zeta: ArrayLike = setting(
        "a finite scalar above 1", lambda zeta: 1 < zeta < math.inf, default=1.1
    )

    def phi(self, x: jax.Array) -> jax.Array:
        beta, gamma, zeta = (jnp.asarray(v, x.dtype) for v in (self.beta, self.gamma, self.zeta))
        return jax.nn.sigmoid(x - beta * jnp.log(-gamma / zeta))
