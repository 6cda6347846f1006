"""The public function."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.ops import _dispatch
from jaxreg.ops._dispatch import Implementation
from jaxreg.penalties import Penalty
from jaxreg.terms import AxisName, Measurement, Reduction, measure

from ._mosaic_gpu import supports
from ._reference import Activation, check_activation, reference
from ._rule import identity, layer, layer_wins


def dense(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    activation: Activation | None = None,
    penalty: Penalty,
    reduction: Reduction = "batch_mean",
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Return a dense layer's activation and its penalty.

    $$ a = f(x W + b), \qquad R = \frac1N R(a) $$

    Args:
        x: (..., d), floating-point.
        w: (d, n).
        b: None, or (n,).
        activation: f, a function of an array, such as `jax.nn.relu`; None is the identity.
        penalty: R.
        reduction: what a separable penalty is divided by; see `jaxreg.activity`.
        axis_name: inside `jax.shard_map`, the mesh axis, or a tuple of them, that the batch is
            split over: the penalty is then that of the whole batch. Under `jit` there is no need.
        implementation: None and `"xla"` leave it to XLA, which on TPU measures the activation as it
            is produced, and on GPU reads it again. `"mosaic_gpu"` is a kernel for NVIDIA Hopper
            that does not: bfloat16 or float16, sizes that are multiples of its tiles, a function f
            of single entries, and a penalty whose moments are sums of such. It is not partitioned:
            under a mesh call it inside `jax.shard_map`. Under `jit`, None takes it for shapes for
            which it is recorded to be faster on the device, by `jaxreg.ops.tuned`; the package has
            no record yet.

    Returns:
        The activation (..., n), of the operands' dtype, and the penalty of it, a scalar in float32
        or, for float64, float64.

    Gradient:
        That of the formula, of any order, in forward and in reverse mode; kinks are f's and R's.

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
        >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
        >>> a, value = jr.ops.dense(x, w, activation=jax.nn.relu, penalty=jr.L1(0.1))
        >>> a.shape, round(float(value), 4)
        ((2, 4), 1.2)
    """
    a, measurement = measured(
        x,
        w,
        b,
        activation=activation,
        penalty=penalty,
        reduction=reduction,
        implementation=implementation,
    )
    return a, measurement.psum(axis_name, "ops.dense", "a").value


def measured(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None,
    *,
    activation: Activation | None,
    penalty: Penalty,
    reduction: Reduction,
    implementation: Implementation | None,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, Measurement]:
    """Return the activation and its penalty before it is finished; see `dense`."""
    x, w, b = jnp.asarray(x), jnp.asarray(w), None if b is None else jnp.asarray(b)
    check("dense", penalty, x, w, b)
    check_activation(activation)
    f = activation or identity

    def reason() -> str | None:
        return "it takes no mask" if mask is not None else supports(x, w, b, f, penalty)

    kernel, asked_by = _dispatch.choose("dense", implementation, layer_wins(f, x, w), reason)
    if not kernel:
        a = reference(x, w, b, activation)
        return a, measure(a, penalty, reduction, mask, name="a")
    bias = jnp.zeros(w.shape[1], x.dtype) if b is None else b
    a, _, moments = layer(f, False, asked_by, x, w, bias, penalty)
    return a, measure(a, penalty, reduction, name="a", moments=moments)


def check(
    op: str, penalty: Penalty, x: jax.Array, w: jax.Array, b: jax.Array | None, where: str = ""
) -> None:
    """Raise unless these are a penalty and the operands of a layer; `where` says which layer."""
    if not isinstance(penalty, Penalty):
        raise TypeError(f"`jaxreg.ops.{op}(penalty=...)` must be a Penalty; got {penalty!r}.")
    shapes = [operand.shape for operand in (x, w, b) if operand is not None]
    matches = x.ndim and w.ndim == 2 and x.shape[-1] == w.shape[0]
    if not matches or (b is not None and b.shape != w.shape[1:]):
        raise ValueError(
            f"`jaxreg.ops.{op}` takes x of shape (..., d), w of shape (d, n) and b of shape (n,);"
            f" got {', '.join(map(str, shapes))}{where}."
        )
    for operand in (x, w, b):
        if operand is not None and not jnp.issubdtype(operand.dtype, jnp.inexact):
            raise TypeError(
                f"`jaxreg.ops.{op}` takes floating-point arrays; got dtype {operand.dtype}."
            )
