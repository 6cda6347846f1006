"""The kernels as a function of JAX's, with a derivative."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxreg.ops._epilogue import gradient
from jaxreg.ops._linear import linear
from jaxreg.ops.dense import (
    Activation,
    instantiate,
    keeps_input,
    layer,
    product_tangent,
    with_slope,
)
from jaxreg.penalties import Penalty
from jaxreg.penalties._arithmetic import of_rank
from jaxreg.terms import varying_as, varying_axes

from ._mosaic_gpu import backward


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def layers(
    activation: Activation,
    asked_by: str | None,
    x: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    penalty: Penalty,
) -> tuple[jax.Array, jax.Array, Any]:
    """Return the output without its bias, the hidden activation, and its moments."""
    h, _, moments = layer(activation, False, asked_by, x, w1, b1, penalty)
    return jnp.matmul(h, w2), h, moments


@functools.partial(layers.defjvp, symbolic_zeros=True)
def _derivative(activation: Activation, asked_by: str | None, primals: Any, tangents: Any) -> Any:
    """The derivative in plain JAX, but for the part whose transpose is a kernel."""
    x, w1, b1, w2, penalty = primals
    dx, dw1, db1, dw2, dpenalty = tangents
    keep = keeps_input(activation)
    h, z, moments = layer(activation, keep, asked_by, x, w1, b1, penalty)
    dz = product_tangent(x, dx, w1, dw1)
    # The kernel's results vary over a `shard_map` as h does: so must what they are cotangents of.
    dz, db1 = varying_as((dz, instantiate(db1).astype(dz.dtype)), h)
    dy, dh, dmoments = linear(
        functools.partial(_hidden_to_output, activation),
        functools.partial(_output_to_hidden, activation, asked_by),
        residuals=(h if z is None else z, w2, penalty),
        operands=(dz, db1),
    )
    if not isinstance(dw2, SymbolicZero):
        dy += jnp.matmul(h, dw2)
    own = jax.jvp(lambda p: p.moments(p.prepare(h)), (penalty,), (instantiate(dpenalty),))[1]
    return (jnp.matmul(h, w2), h, moments), (dy, dh, jax.tree.map(jnp.add, dmoments, own))


def _hidden_to_output(activation: Activation, residuals: Any, operands: Any) -> Any:
    """Return the tangents of the output, of the hidden activation and of its moments.

    Args:
        activation: a function of single entries.
        residuals: what is kept of the hidden layer, the second kernel, and the penalty.
        operands: the tangents of the first product and of its bias.
    """
    (kept, w2, penalty), (dz, db1) = residuals, operands
    h, slope = with_slope(activation, kept)
    dh = slope * (dz + of_rank(dz.ndim, db1))
    dmoments = jax.jvp(lambda h: penalty.moments(penalty.prepare(h)), (h,), (dh,))[1]
    return jnp.matmul(dh, w2), dh, dmoments


def _output_to_hidden(
    activation: Activation, asked_by: str | None, residuals: Any, cotangents: Any, zero: Any
) -> Any:
    """Return the transpose of `_hidden_to_output`, by the kernel."""
    (kept, w2, penalty), (dy, _, dmoments) = residuals, cotangents
    no_output, no_hidden, _ = zero
    # What else is made of the hidden activation would be one more array to read.
    if no_output or not no_hidden:
        return None
    # Each shard of a split output would add the penalty's gradient.
    if not varying_axes(jax.typeof(dy)) <= varying_axes(jax.typeof(kept)):
        return None
    own = gradient(penalty, kept.shape, dmoments)
    rows = [a.reshape(-1, a.shape[-1]) for a in (dy, kept)]
    dz, db1 = backward(
        *(rows[0], w2, rows[1], own.scalars, own.columns),
        activation=activation,
        penalty=own,
        asked_by=asked_by,
    )
    return dz.reshape(kept.shape), db1.astype(dz.dtype)
