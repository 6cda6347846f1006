"""The kernel as a function of JAX's, with a derivative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxreg.ops._epilogue import epilogue
from jaxreg.ops._product import wins
from jaxreg.penalties import Penalty
from jaxreg.penalties._arithmetic import of_rank
from jaxreg.terms import varying_as

from ._mosaic_gpu import forward, kernel_name
from ._reference import Activation


def identity(z: jax.Array) -> jax.Array:
    """Return z."""
    return z


# Where f' is a function of f's value, what comes before the activation need not be kept.
_FROM_OUTPUT: tuple[tuple[Activation, Callable[[jax.Array], jax.Array]], ...] = (
    (identity, jnp.ones_like),
    (jax.nn.relu, lambda a: (a > 0).astype(a.dtype)),
    (jax.nn.sigmoid, lambda a: a * (1 - a)),
    (jnp.tanh, lambda a: 1 - a * a),
    (jax.nn.tanh, lambda a: 1 - a * a),
)


def _slope_from_output(activation: Activation) -> Callable[[jax.Array], jax.Array] | None:
    # A function of one's own need not have a hash.
    return next((slope for known, slope in _FROM_OUTPUT if known is activation), None)


def keeps_input(activation: Activation) -> bool:
    """Return whether the activation's derivative needs what came before it."""
    return _slope_from_output(activation) is None


def with_slope(activation: Activation, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the activation and its derivative.

    Args:
        activation: a function of single entries.
        kept: its argument where `keeps_input`, else its value.
    """
    slope = _slope_from_output(activation)
    if slope is not None:
        return kept, slope(kept)
    return jax.jvp(activation, (kept,), (jnp.ones_like(kept),))


def layer_wins(activation: Activation, x: jax.Array, w: jax.Array) -> bool:
    """Return whether the kernel is recorded to be faster than XLA on any device."""
    return any(wins(kernel_name(keep), x, w) for keep in {False, keeps_input(activation)})


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def layer(
    activation: Activation,
    keep: bool,
    asked_by: str | None,
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    penalty: Penalty,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Return the activation, what came before it if that is to be kept, and the moments."""
    shape = (*x.shape[:-1], w.shape[1])
    sums = epilogue(penalty, shape)
    a, z, totals = forward(
        *(x.reshape(-1, x.shape[-1]), w, b, sums.scalars),
        activation=activation,
        sums=sums,
        keep=keep,
        asked_by=asked_by,
    )
    return a.reshape(shape), None if z is None else z.reshape(shape), sums.moments(totals)


@functools.partial(layer.defjvp, symbolic_zeros=True)
def _derivative(
    activation: Activation, keep: bool, asked_by: str | None, primals: Any, tangents: Any
) -> Any:
    """The derivative in plain JAX: reverse mode transposes it, and any further order derives it."""
    x, w, b, penalty = primals
    dx, dw, db, dpenalty = tangents
    a, z, moments = layer(activation, keeps_input(activation), asked_by, x, w, b, penalty)
    dz = varying_as(product_tangent(x, dx, w, dw), a)
    if not isinstance(db, SymbolicZero):
        dz += of_rank(dz.ndim, db.astype(dz.dtype))
    _, slope = with_slope(activation, a if z is None else z)
    da = slope * dz
    _, dmoments = jax.jvp(
        lambda p, a: p.moments(p.prepare(a)), (penalty, a), (instantiate(dpenalty), da)
    )
    return (a, z if keep else None, moments), (da, dz if keep else None, dmoments)


def product_tangent(x: jax.Array, dx: Any, w: jax.Array, dw: Any) -> jax.Array:
    """Return the tangent of x w; no product is made of a tangent that is a symbolic zero."""
    terms = [] if isinstance(dx, SymbolicZero) else [jnp.matmul(dx, w)]
    terms += [] if isinstance(dw, SymbolicZero) else [jnp.matmul(x, dw)]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros((*x.shape[:-1], w.shape[1]), x.dtype)


def instantiate(tangents: Any) -> Any:
    """Return the tangents, with arrays for symbolic zeros."""
    return jax.tree.map(
        lambda t: jnp.zeros(t.shape, t.dtype) if isinstance(t, SymbolicZero) else t,
        tangents,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
