"""Hard concrete gates, whose zeros are exact and whose number can be differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties import HardConcrete
from jaxreg.penalties._arithmetic import wide
from jaxreg.penalties._checks import require, require_real


def hard_concrete(
    key: jax.Array,
    log_alpha: ArrayLike,
    *,
    beta: ArrayLike = 2 / 3,
    gamma: ArrayLike = -0.1,
    zeta: ArrayLike = 1.1,
) -> jax.Array:
    r"""Sample gates in [0, 1] that are exactly 0 or 1 with positive probability.

    $$ z = \min(1, \max(0, \bar s)), \qquad \bar s = (\zeta - \gamma)\,s + \gamma, \qquad
       s = \sigma\!\left(\frac{\log u - \log(1 - u) + \log\alpha}{\beta}\right), \qquad
       u \sim U(0, 1) $$

    `jaxreg.HardConcrete` is the expected number of gates that are not 0, and
    `hard_concrete_deterministic` the gate at test time.

    Args:
        key: a PRNG key.
        log_alpha: log α, of any shape: one gate is sampled for each entry. To sample anew for each
            example, broadcast it to (batch, ...).
        beta: β > 0, the temperature. This and the next two defaults are the paper's.
        gamma: γ < 0, the lower end of the stretched interval.
        zeta: ζ > 1, its upper end.

    Returns:
        The gates, of the shape and dtype of `log_alpha`; sampled in at least float32.

    Gradient:
        That of the sample by log α, β, γ and ζ, with u held fixed; 0 where z is 0 or 1.

    Raises:
        TypeError: for a log α that is not real floating-point.
        ValueError: for a concrete β, γ or ζ out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> def layer(key, params, x):  # input gates, sampled for each example
        ...     log_alpha = jnp.broadcast_to(params["log_alpha"], x.shape)
        ...     return (x * jr.gates.hard_concrete(key, log_alpha)) @ params["kernel"]
        >>> params = {"log_alpha": jnp.array([9.0, -9.0]), "kernel": jnp.eye(2)}
        >>> layer(jax.random.key(0), params, jnp.ones((1, 2))).tolist()
        [[1.0, 0.0]]

    References:
        Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization,
        ICLR, arXiv:1712.01312, 2018.
    """
    log_alpha = require_real("gates.hard_concrete", "log_alpha", log_alpha)
    _check("hard_concrete", beta=beta, gamma=gamma, zeta=zeta)
    x = wide(log_alpha)
    logits = x + jax.random.logistic(key, x.shape, x.dtype)
    soft = jax.nn.sigmoid(logits / jnp.asarray(beta, x.dtype))
    return _stretch(soft, gamma, zeta).astype(log_alpha.dtype)


def hard_concrete_deterministic(
    log_alpha: ArrayLike, *, gamma: ArrayLike = -0.1, zeta: ArrayLike = 1.1
) -> jax.Array:
    r"""Return the gates at test time, without noise.

    $$ \hat z = \min(1, \max(0, (\zeta - \gamma)\,\sigma(\log\alpha) + \gamma)) $$

    It has no temperature, and is neither the mean of the samples nor their median.

    Args:
        log_alpha: log α, of any shape.
        gamma: γ < 0, as in `hard_concrete`.
        zeta: ζ > 1, as in `hard_concrete`.

    Returns:
        The gates, of the shape and dtype of `log_alpha`.

    Gradient:
        (ζ − γ) · σ(log α) · (1 − σ(log α)), and 0 where ẑ is 0 or 1.

    Raises:
        TypeError: for a log α that is not real floating-point.
        ValueError: for a concrete γ or ζ out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.gates.hard_concrete_deterministic(jnp.array([-5.0, 0.0, 5.0])).tolist()
        [0.0, 0.5, 1.0]

    References:
        Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization,
        ICLR, arXiv:1712.01312, 2018.
    """
    log_alpha = require_real("gates.hard_concrete_deterministic", "log_alpha", log_alpha)
    _check("hard_concrete_deterministic", gamma=gamma, zeta=zeta)
    return _stretch(jax.nn.sigmoid(wide(log_alpha)), gamma, zeta).astype(log_alpha.dtype)


def _check(function: str, **settings: ArrayLike) -> None:
    """Raise unless these are settings that their penalty takes."""
    for field in dataclasses.fields(HardConcrete):
        if field.name in settings:
            argument = f"gates.{function}({field.name}=...)"
            require(argument, settings[field.name], *field.metadata["requires"])


def _stretch(s: jax.Array, gamma: ArrayLike, zeta: ArrayLike) -> jax.Array:
    gamma, zeta = jnp.asarray(gamma, s.dtype), jnp.asarray(zeta, s.dtype)
    stretched = (zeta - gamma) * s + gamma
    # `jnp.clip` has a derivative of ½ at its bounds.
    return jnp.where(stretched <= 0, 0, jnp.where(stretched >= 1, 1, stretched))
