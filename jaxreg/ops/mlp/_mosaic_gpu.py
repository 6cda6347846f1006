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
from jaxreg.ops._mosaic_gpu import Results, config, product, refusal
from jaxreg.ops.dense import Activation, keeps_input, with_slope
from jaxreg.ops.dense import supports as layer_supports
from jaxreg.penalties import Penalty


def supports(
    x: jax.Array, w1: jax.Array, w2: jax.Array, activation: Activation, penalty: Penalty
) -> str | None:
    """Return why the kernels cannot run on these operands, or None."""
    reason = layer_supports(x, w1, activation, penalty)
    if reason is not None:
        return reason
    (n, k), m = w2.shape, x.size // x.shape[-1]
    reason = refusal(m, n, k, ("the examples", "hidden features", "the output's features"), x, w2)
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


def backward(
    dy: jax.Array,
    w: jax.Array,
    kept: jax.Array,
    scalars: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    *,
    activation: Activation,
    penalty: Gradient,
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
    """
    # A slope that is computed anew takes registers.
    part = 16 if keeps_input(activation) else 32
    tiles = config(dy.shape[0], w.shape[0], dy.shape[1], arrays=2, part=part)
    assert tiles is not None
    nodes = elementwise(functools.partial(with_slope, activation))

    def finish(part: jax.Array, loaded: Any, columns: Any, scalars: Any) -> Any:
        a, slope = evaluate(nodes, loaded[0].astype(jnp.float32), scalars)
        (own,) = evaluate([penalty.node], a, scalars, columns)
        dz = (part + own) * slope
        return (dz,), (dz,)

    (dz,), (partial,) = product(
        dy,
        w,
        tiles=tiles,
        transposed=True,
        loaded=[kept],
        columns=columns,
        scalars=scalars,
        epilogue=finish,
        results=Results(stored=1, summed=1, by_column=True),
        name="jaxreg_mlp_backward",
    )
    return dz, jnp.sum(partial, axis=0)
