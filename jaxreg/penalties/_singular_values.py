"""Functions of the singular values of matrices, differentiable where those are equal or 0."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._arithmetic import matmul


def svd(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return U, the singular values from the largest on, and V*; of an array with an inf, NaN."""
    # LAPACK returns at once for a NaN, but may loop for ever for an inf.
    u, s, vt = jnp.linalg.svd(jnp.where(jnp.isinf(w), jnp.nan, w), full_matrices=False)
    return u, s, vt


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def map_singular_values(f: Callable[..., Any], w: jax.Array, parameter: Any) -> jax.Array:
    """Return U f(Σ) V* of each matrix.

    `f(singular values, parameter)` gives the new ones, and their slopes, which stand for divided
    differences where singular values are equal. So the derivative is finite there and at 0, where
    those of U and V are not.
    """
    u, s, vt = svd(w)
    return matmul(u * f(s, parameter)[0][..., None, :], vt)


@map_singular_values.defjvp
def _map_singular_values_jvp(
    f: Callable[..., Any], primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (w, parameter), (dw, dparameter) = primals, tangents
    u, s, vt = svd(w)
    turned = matmul(matmul(_adjoint(u), dw), _adjoint(vt))
    ds = jnp.real(jnp.diagonal(turned, axis1=-2, axis2=-1))
    (y, slope), (dy, _) = jax.jvp(f, (s, parameter), (ds, dparameter))

    def quotient(y: jax.Array, s: jax.Array, slope: jax.Array) -> jax.Array:
        return jnp.where(s == 0, slope, y / jnp.where(s == 0, 1, s))

    slopes = jnp.broadcast_to(slope[..., None], turned.shape)
    rows, columns = (..., slice(None), None), (..., None, slice(None))
    # Equal singular values come out of LAPACK a few roundings apart.
    gaps = s[rows] - s[columns]
    alike = jnp.abs(gaps) <= np.finfo(s.dtype).eps ** 0.5 * s[..., :1, None]
    differences = quotient(y[rows] - y[columns], jnp.where(alike, 0, gaps), slopes)
    sums = quotient(y[rows] + y[columns], s[rows] + s[columns], slopes)
    along = differences * (turned + _adjoint(turned)) / 2
    along = jnp.where(jnp.eye(s.shape[-1], dtype=bool), dy[rows], along)
    core = along + sums * (turned - _adjoint(turned)) / 2
    tangent = matmul(matmul(u, core), vt)
    # What leaves the span of the singular vectors on the longer side.
    ratio = quotient(y, s, slope)
    if w.shape[-2] > w.shape[-1]:
        outside = dw - matmul(u, matmul(_adjoint(u), dw))
        tangent += matmul(matmul(outside, _adjoint(vt)) * ratio[columns], vt)
    elif w.shape[-2] < w.shape[-1]:
        outside = dw - matmul(matmul(dw, _adjoint(vt)), vt)
        tangent += matmul(u * ratio[columns], matmul(_adjoint(u), outside))
    return matmul(u * y[columns], vt), tangent


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(x.mT)
