"""Gates and sparse activations: hard concrete, JumpReLU, TopK and BatchTopK."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties import HardConcrete
from jaxreg.penalties._checks import require, require_real
from jaxreg.penalties._explicit import on_any_mesh


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
    HardConcrete(0, beta=beta, gamma=gamma, zeta=zeta)  # checks them
    wide = log_alpha.astype(_wide(log_alpha))
    logits = wide + jax.random.logistic(key, wide.shape, wide.dtype)
    soft = jax.nn.sigmoid(logits / jnp.asarray(beta, wide.dtype))
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
    HardConcrete(0, gamma=gamma, zeta=zeta)  # checks them
    wide = log_alpha.astype(_wide(log_alpha))
    return _stretch(jax.nn.sigmoid(wide), gamma, zeta).astype(log_alpha.dtype)


def _stretch(s: jax.Array, gamma: ArrayLike, zeta: ArrayLike) -> jax.Array:
    gamma, zeta = jnp.asarray(gamma, s.dtype), jnp.asarray(zeta, s.dtype)
    stretched = (zeta - gamma) * s + gamma
    # `jnp.clip` has a derivative of ½ at its bounds.
    return jnp.where(stretched <= 0, 0, jnp.where(stretched >= 1, 1, stretched))


def step(x: ArrayLike, threshold: ArrayLike, *, bandwidth: ArrayLike) -> jax.Array:
    r"""Return 1 where x exceeds its threshold and 0 elsewhere, with a pseudo-derivative by it.

    $$ H(x - \theta), \qquad \frac{\eth}{\eth\theta} = -\frac1\epsilon K\!\left(\frac{x - \theta}
       {\epsilon}\right), \qquad \frac{\eth}{\eth x} = 0, \qquad
       K(u) = \begin{cases} 1 & |u| < \tfrac12 \\ 0 & \text{otherwise} \end{cases} $$

    Added up over features it is the L0 penalty of JumpReLU autoencoders. Add it up by `jnp.sum`,
    and not by `jaxreg.L1`, whose gradient is 0 where the step is 0.

    Args:
        x: pre-activations.
        threshold: θ, which broadcasts to x, such as one for each feature. The paper keeps it
            positive as exp(log θ).
        bandwidth: ε > 0, a scalar in the units of x: how near to its threshold x moves it.

    Returns:
        An array of the shape and dtype of `x`.

    Gradient:
        As displayed, in forward and in reverse mode: an estimator of the derivative of the
        expectation over x, whose variance falls and whose bias grows with ε. Not a derivative of
        the value, which no finite difference would show. 0 by the bandwidth.

    Raises:
        TypeError: for an x or a threshold that is not real floating-point.
        ValueError: for a threshold that does not broadcast to x, or a concrete bandwidth that is
            not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x, threshold = jnp.array([[0.9, 3.0], [1.2, 0.0]]), jnp.array([1.0, 1.0])
        >>> def l0(threshold):  # active features, the mean over examples
        ...     return jnp.mean(jnp.sum(jr.gates.step(x, threshold, bandwidth=0.5), axis=-1))
        >>> value, gradient = jax.value_and_grad(l0)(threshold)
        >>> float(value), gradient.tolist()
        (1.0, [-2.0, 0.0])

    References:
        Rajamanoharan et al., Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
        autoencoders, arXiv:2407.14435, 2024.
    """
    return _thresholded("step", _step, x, threshold, bandwidth)


def jump_relu(x: ArrayLike, threshold: ArrayLike, *, bandwidth: ArrayLike) -> jax.Array:
    r"""Return x where it exceeds its threshold and 0 elsewhere, with a pseudo-derivative by it.

    $$ x\,H(x - \theta), \qquad \frac{\eth}{\eth\theta} = -\frac\theta\epsilon K\!\left(
       \frac{x - \theta}{\epsilon}\right), \qquad \frac{\eth}{\eth x} = H(x - \theta), \qquad
       K(u) = \begin{cases} 1 & |u| < \tfrac12 \\ 0 & \text{otherwise} \end{cases} $$

    Args:
        x: pre-activations.
        threshold: θ, which broadcasts to x; see `step`.
        bandwidth: ε > 0, a scalar in the units of x; see `step`.

    Returns:
        An array of the shape and dtype of `x`.

    Gradient:
        As displayed, in forward and in reverse mode. 0 by the bandwidth.

    Raises:
        TypeError: for an x or a threshold that is not real floating-point.
        ValueError: for a threshold that does not broadcast to x, or a concrete bandwidth that is
            not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([[2.0, 0.5]]), "log_threshold": jnp.zeros(2)}
        >>> def loss(params, x, l0_coefficient):  # a sparse autoencoder with tied weights
        ...     pre, threshold = x @ params["kernel"], jnp.exp(params["log_threshold"])
        ...     code = jr.gates.jump_relu(pre, threshold, bandwidth=1e-3)
        ...     l0 = jnp.mean(jnp.sum(jr.gates.step(pre, threshold, bandwidth=1e-3), axis=-1))
        ...     return jnp.mean((code @ params["kernel"].T - x) ** 2) + l0_coefficient * l0
        >>> float(loss(params, jnp.ones((1, 1)), 0.5))
        9.5

    References:
        Rajamanoharan et al., Jumping ahead: improving reconstruction fidelity with JumpReLU sparse
        autoencoders, arXiv:2407.14435, 2024.
    """
    return _thresholded("jump_relu", _jump_relu, x, threshold, bandwidth)


@jax.custom_jvp
def _step(x: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    # Not of the difference, which is NaN for equal infinities.
    above = jnp.where(x > threshold, 1, 0).astype(x.dtype)
    return jnp.where(jnp.isnan(x) | jnp.isnan(threshold), jnp.nan, above)


@_step.defjvp
def _step_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    _, by_threshold, _ = tangents
    return _step(*primals), -_kernel(*primals) * by_threshold


@jax.custom_jvp
def _jump_relu(x: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    gate = _step(x, threshold, bandwidth)
    # -inf is below any threshold, and 0 · inf would be NaN.
    return jnp.where(gate == 0, 0, gate * x)


@_jump_relu.defjvp
def _jump_relu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    by_x, by_threshold, _ = tangents
    _, threshold, _ = primals
    # At an infinite threshold the density is 0, and 0 · inf would be NaN.
    finite = jnp.where(jnp.isinf(threshold), 0, threshold)
    tangent = _step(*primals) * by_x - finite * _kernel(*primals) * by_threshold
    return _jump_relu(*primals), tangent


def _kernel(x: jax.Array, threshold: jax.Array, bandwidth: jax.Array) -> jax.Array:
    """Return K((x − θ)/ε)/ε, the estimate of the density of x at its threshold."""
    return jnp.where(jnp.abs(x - threshold) < bandwidth / 2, 1 / bandwidth, 0)


def _thresholded(
    name: str, function: Any, x: ArrayLike, threshold: ArrayLike, bandwidth: ArrayLike
) -> jax.Array:
    """Apply a function of x, threshold and bandwidth in their common dtype."""
    x, threshold = (
        require_real(f"gates.{name}", "x", x),
        require_real(f"gates.{name}", "threshold", threshold),
    )
    positive = "a positive, finite scalar"
    require(f"gates.{name}(bandwidth=...)", bandwidth, positive, lambda e: 0 < e < math.inf)
    try:
        fits = jnp.broadcast_shapes(x.shape, threshold.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`jaxreg.gates.{name}(threshold=...)` must broadcast to x; got shape"
            f" {threshold.shape} for x of shape {x.shape}."
        )
    # The gradient by the threshold adds up over examples in this dtype.
    wide = jnp.promote_types(_wide(x), _wide(threshold))
    out: jax.Array = function(
        x.astype(wide),
        jnp.broadcast_to(threshold.astype(wide), x.shape),
        jnp.asarray(bandwidth, wide),
    )
    return out.astype(x.dtype)


def top_k(x: ArrayLike, k: int, *, axis: int = -1) -> jax.Array:
    r"""Keep the k largest entries along an axis, and set the others to 0.

    $$ z_i = \begin{cases} x_i & x_i \text{ is among the } k \text{ largest} \\
                           0 & \text{otherwise} \end{cases} $$

    The largest, not the largest in modulus: negative entries are kept where there are not k others.
    The paper's implementation applies ReLU as well: `jax.nn.relu(top_k(x, k))`.

    Args:
        x: pre-activations.
        k: how many entries are kept, from 1 to the size of the axis. Static.
        axis: the axis that the k are taken along.

    Returns:
        An array of the shape and dtype of `x`. Of equal entries the first are kept, so that no more
        than k are. A NaN is kept as well.

    Gradient:
        1 for entries that are kept, and 0 for the others.

    Raises:
        TypeError: for an x that is not real floating-point, or a k or an axis that is no integer.
        ValueError: for a k out of its range, or an axis that x does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.gates.top_k(jnp.array([3.0, 1.0, 2.0, 2.0]), 2).tolist()
        [3.0, 0.0, 2.0, 0.0]

    References:
        Makhzani and Frey, k-Sparse autoencoders, ICLR, arXiv:1312.5663, 2014. Gao et al., Scaling
        and evaluating sparse autoencoders, arXiv:2406.04093, 2024.
    """
    x = require_real("gates.top_k", "x", x)
    if not -x.ndim <= operator.index(axis) < x.ndim:
        raise ValueError(
            f"`jaxreg.gates.top_k(axis=...)` must name an axis of x; got axis={axis} for x of shape"
            f" {x.shape}."
        )
    k = _check_k("top_k", k, x, x.shape[axis])
    kept: jax.Array = on_any_mesh(
        lambda x: jnp.moveaxis(_keep_largest(jnp.moveaxis(x, axis, -1), k), -1, axis),
        x,
        split=True,
    )
    return kept


def batch_top_k(x: ArrayLike, k: int) -> jax.Array:
    r"""Keep the k·n largest entries of n examples, and set the others to 0.

    Each example keeps k on average, and as many as it needs. The last axis holds features, all
    others together are the n examples: under `vmap` over examples it would be `top_k`. The paper's
    implementation applies ReLU first: `batch_top_k(jax.nn.relu(x), k)`.

    At test time an example must not depend on the others: keep the mean of `batch_top_k_threshold`
    over training batches, and use `jnp.where(x > threshold, x, 0)` instead.

    Args:
        x: pre-activations, (batch, ..., features).
        k: how many entries of an example are kept on average, from 1 to the number of features.
            Static.

    Returns:
        An array of the shape and dtype of `x`. Of equal entries the first are kept, so that no more
        than k·n are. A NaN is kept as well.

    Gradient:
        1 for entries that are kept, and 0 for the others.

    Raises:
        TypeError: for an x that is not real floating-point, or a k that is no integer.
        ValueError: for a k out of its range, or an x without axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.gates.batch_top_k(jnp.array([[5.0, 4.0, 3.0], [1.0, 2.0, 0.5]]), 1).tolist()
        [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]

    References:
        Bussmann, Leask and Nanda, BatchTopK sparse autoencoders, arXiv:2412.06410, 2024.
    """
    x = require_real("gates.batch_top_k", "x", x)
    if x.ndim == 0:
        raise ValueError("`jaxreg.gates.batch_top_k` takes an x with an axis of features; got ().")
    total = _check_k("batch_top_k", k, x, x.shape[-1]) * math.prod(x.shape[:-1])
    kept: jax.Array = on_any_mesh(
        lambda x: _keep_largest(x.reshape(x.size), total).reshape(x.shape), x, split=True
    )
    return kept


def batch_top_k_threshold(z: ArrayLike) -> jax.Array:
    r"""Return the smallest positive entry of what `batch_top_k` kept, a scalar; 0 if there is none.

    $$ \theta = \mathbb{E}_Z \left[ \min \{ z_{ij} : z_{ij} > 0 \} \right] $$

    is the test-time threshold: the mean of what this function returns for batches Z.

    Args:
        z: the output of `batch_top_k`.

    Returns:
        A scalar of the dtype of `z`.

    Gradient:
        0: the threshold is measured, and not trained.

    Raises:
        TypeError: for a z that is not real floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> threshold = jr.gates.batch_top_k_threshold(jnp.array([[5.0, 4.0], [0.0, 0.0]]))
        >>> x = jnp.array([4.5, 3.9])
        >>> jnp.where(x > threshold, x, 0).tolist()
        [4.5, 0.0]

    References:
        Bussmann, Leask and Nanda, BatchTopK sparse autoencoders, arXiv:2412.06410, 2024.
    """
    z = jax.lax.stop_gradient(require_real("gates.batch_top_k_threshold", "z", z))
    smallest = jnp.min(z, where=~(z <= 0), initial=jnp.inf)
    return jnp.where(smallest == jnp.inf, 0, smallest)


def _keep_largest(x: jax.Array, k: int) -> jax.Array:
    """Keep the k largest entries along the last axis."""
    _, indices = jax.lax.top_k(jax.lax.stop_gradient(x), k)
    nothing = jnp.zeros(x.shape, bool)
    kept = jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)
    # A NaN with its sign bit set sorts below all numbers.
    return jnp.where(kept | jnp.isnan(x), x, 0)


def _check_k(name: str, k: int, x: jax.Array, size: int) -> int:
    k = operator.index(k)
    if not 1 <= k <= size:
        raise ValueError(
            f"`jaxreg.gates.{name}(k=...)` must be from 1 to the {size} entries there are; got"
            f" k={k} for x of shape {x.shape}."
        )
    return k


def _wide(x: jax.Array) -> Any:
    """Return the dtype to compute in: at least single precision."""
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype
