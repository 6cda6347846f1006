"""The backward pass on Hopper: from the second layer's cotangent to the first's, in one kernel.

Where XLA writes the hidden cotangent and reads it again, for the activation's slope and for the
bias's gradient, here both are in the epilogue of the product that makes it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.ops._epilogue import Gradient, NotElementwise, elementwise, evaluate, gradient
from jaxreg.ops._kernel import Results
from jaxreg.ops._mosaic_gpu import refusal
from jaxreg.ops._product import product, sizes, wins
from jaxreg.ops.dense import Activation, keeps_input, with_slope
from jaxreg.ops.dense import supports as layer_supports
from jaxreg.penalties import Penalty


def _kernel_name(activation: Activation) -> str:
    # What comes before the activation is loaded in place of its value, and takes other tiles.
    return "jaxreg_mlp_backward" + ("_keep" if keeps_input(activation) else "")


def supports(
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array | None,
    w2: jax.Array,
    activation: Activation,
    penalty: Penalty,
) -> str | None:
    """Return why the kernels cannot run on these operands, or None."""
    reason = layer_supports(x, w1, b1, activation, penalty)
    if reason is not None:
        return reason
    m, n, _ = sizes(x, w1)
    what = ("the examples", "hidden features", "the output's features")
    reason = refusal(m, n, w2.shape[1], what, x, w2)
    if reason is not None:
        return reason
    shape = (*x.shape[:-1], n)
    array: Any = jax.ShapeDtypeStruct
    moments = jax.eval_shape(penalty.moments, array(shape, jnp.float32))
    try:
        gradient(penalty, shape, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), moments))
    except NotElementwise as error:
        name = type(penalty).__name__
        return f"the gradient of `jaxreg.{name}` cannot be taken tile by tile: {error}"
    return None


def backward_wins(activation: Activation, x: jax.Array, w: jax.Array) -> bool:
    """Return whether the kernel is recorded to be faster than XLA on any device.

    Args:
        activation: a function of single entries.
        x: the first layer's input.
        w: the second layer's kernel.
    """
    array: Any = jax.ShapeDtypeStruct
    dy = array((*x.shape[:-1], w.shape[1]), x.dtype)
    return wins(_kernel_name(activation), dy, w, transposed=True)


def backward(
    dy: jax.Array,
    w: jax.Array,
    kept: jax.Array,
    scalars: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    *,
    activation: Activation,
    penalty: Gradient,
    asked_by: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents (m, n) of what comes before the activation, and (n,) of the bias.

    Args:
        dy: (m, k), the output's cotangent.
        w: (n, k).
        kept: (m, n), what `with_slope` takes.
        scalars: the penalty's.
        columns: the penalty's, each (n,).
        activation: a function of single entries.
        penalty: the gradient of the penalty's moments, at their cotangents.
        asked_by: see `product`.
    """
    nodes = elementwise(functools.partial(with_slope, activation))

    def finish(part: jax.Array, loaded: Any, columns: Any, scalars: Any) -> Any:
        a, slope = evaluate(nodes, loaded[0].astype(jnp.float32), scalars)
        (own,) = evaluate([penalty.node], a, scalars, columns)
        dz = (part + own) * slope
        return (dz,), (dz,)

    def plain(dy: jax.Array, w: jax.Array, loaded: Any, columns: Any, scalars: Any) -> Any:
        a, slope = with_slope(activation, loaded[0])
        wide = [jnp.broadcast_to(column.astype(jnp.float32), a.shape) for column in columns]
        (own,) = evaluate([penalty.node], a.astype(jnp.float32), scalars, wide)
        dz = (jnp.matmul(dy, w.T) + own.astype(dy.dtype)) * slope
        return [dz], [jnp.sum(dz.astype(jnp.float32), axis=0)]

    (dz,), (db,) = product(
        dy,
        w,
        transposed=True,
        loaded=[kept],
        columns=columns,
        scalars=scalars,
        epilogue=finish,
        results=Results(stored=1, summed=("examples",)),
        plain=plain,
        name=_kernel_name(activation),
        asked_by=asked_by,
    )
    return dz, db
