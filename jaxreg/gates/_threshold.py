"""Gates that open above a learned threshold, with the derivative of a smoothed one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties._arithmetic import wide
from jaxreg.penalties._checks import POSITIVE, require, require_real


def step(x: ArrayLike, threshold: ArrayLike, *, bandwidth: ArrayLike) -> jax.Array:
    r"""Return 1 where x exceeds its threshold and 0 elsewhere, with a pseudo-derivative by it.

    $$ H(x - \theta), \qquad \frac{\eth}{\eth\theta} = -\frac1\epsilon K\!\left(\frac{x - \theta}
       {\epsilon}\right), \qquad \frac{\eth}{\eth x} = 0, \qquad
       K(u) = \begin{cases} 1 & |u| < \tfrac12 \\ 0 & \text{otherwise} \end{cases} $$

    Added up over features it is the L0 penalty of JumpReLU autoencoders. Add it up by `jnp.sum`, or
    inside a module, by `jaxreg.sow`, with a penalty that adds up; not by `jaxreg.L1`, whose
    gradient is 0 where the step is 0.

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
        >>> class Total(jr.penalties.Separable):
        ...     def phi(self, x):
        ...         return x
        >>> float(jr.penalize(jr.gates.step(x, threshold, bandwidth=0.5), Total(0.1)))
        0.10000000149011612

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
    x = require_real(f"gates.{name}", "x", x)
    threshold = require_real(f"gates.{name}", "threshold", threshold)
    require(f"gates.{name}(bandwidth=...)", bandwidth, *POSITIVE)
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
    dtype = jnp.promote_types(wide(x).dtype, wide(threshold).dtype)
    out: jax.Array = function(
        x.astype(dtype),
        jnp.broadcast_to(threshold.astype(dtype), x.shape),
        jnp.asarray(bandwidth, dtype),
    )
    return out.astype(x.dtype)
