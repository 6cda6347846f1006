"""The public function."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.ops import _dispatch
from jaxreg.ops._dispatch import Implementation
from jaxreg.ops.dense import Activation, check, check_activation, layer_wins, reference
from jaxreg.penalties import Penalty
from jaxreg.penalties._arithmetic import of_rank
from jaxreg.terms import AxisName, Reduction, measure

from ._mosaic_gpu import backward_wins, supports
from ._rule import layers


def mlp(
    x: ArrayLike,
    w1: ArrayLike,
    b1: ArrayLike | None,
    w2: ArrayLike,
    b2: ArrayLike | None,
    *,
    activation: Activation,
    penalty: Penalty,
    reduction: Reduction = "batch_mean",
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Return the output of two dense layers, what lies between them, and its penalty.

    $$ h = f(x W_1 + b_1), \qquad y = h W_2 + b_2, \qquad R = \frac1N R(h) $$

    With as many outputs as inputs it is an autoencoder whose code is h.

    Args:
        x: (..., d), floating-point.
        w1: (d, n).
        b1: None, or (n,).
        w2: (n, m).
        b2: None, or (m,).
        activation: f, a function of an array, such as `jax.nn.relu`.
        penalty: R.
        reduction: what a separable penalty is divided by; see `jaxreg.activity`.
        axis_name: inside `jax.shard_map`, the mesh axis, or a tuple of them, that the batch is
            split over: the penalty is then that of the whole batch. Under `jit` there is no need.
        implementation: None and `"xla"` leave it to XLA. `"mosaic_gpu"` runs two kernels for NVIDIA
            Hopper: that of `jaxreg.ops.dense`, and one for the backward pass, whose matrix product
            of y's cotangent and $W_2$ ends with the penalty's gradient, f's derivative and the
            gradient of $b_1$. They take what that of `dense` takes, and of $W_2$ the same. None
            takes each where it is recorded to be faster; see `dense`.

    Returns:
        y (..., m) and h (..., n), of the operands' dtype, and the penalty of h, a scalar in float32
        or, for float64, float64.

    Gradient:
        That of the formula, of any order, in forward and in reverse mode; kinks are f's and R's.
        Where the loss also depends on h itself, the backward pass is XLA's.

    Raises:
        TypeError: for integer operands, a penalty that is none, or an activation that cannot be
            called.
        ValueError: for shapes that do not match, an activation that changes the shape, an unknown
            reduction or implementation; with `axis_name`, for a penalty that does not add up over
            the leading axis.
        NotImplementedError: where an implementation that was asked for by name cannot run; it says
            why. On another platform than the kernel's it is raised when the function is lowered.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x, w1, w2 = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((4, 3))
        >>> y, h, value = jr.ops.mlp(
        ...     x, w1, None, w2, None, activation=jax.nn.relu, penalty=jr.L1(0.1))
        >>> y.shape, h.shape, round(float(value), 4)
        ((2, 3), (2, 4), 1.2)
    """
    x, w1, w2 = (jnp.asarray(operand) for operand in (x, w1, w2))
    b1, b2 = (None if b is None else jnp.asarray(b) for b in (b1, b2))
    check("mlp", penalty, x, w1, b1, " in the first layer")
    array: Any = jax.ShapeDtypeStruct
    hidden = array((*x.shape[:-1], w1.shape[1]), x.dtype)
    check("mlp", penalty, hidden, w2, b2, " in the second")
    check_activation(activation)

    def reason() -> str | None:
        return supports(x, w1, b1, w2, activation, penalty)

    recorded = layer_wins(activation, x, w1) or backward_wins(activation, x, w2)
    kernel, asked_by = _dispatch.choose("mlp", implementation, recorded, reason)
    moments = None
    if not kernel:
        h = reference(x, w1, b1, activation)
        y = reference(h, w2, b2, None)
    else:
        bias = jnp.zeros(w1.shape[1], x.dtype) if b1 is None else b1
        y, h, moments = layers(activation, asked_by, x, w1, bias, w2, penalty)
        y = y if b2 is None else y + of_rank(y.ndim, b2)
    measurement = measure(h, penalty, reduction, name="h", moments=moments)
    return y, h, measurement.psum(axis_name, "ops.mlp", "h").value
