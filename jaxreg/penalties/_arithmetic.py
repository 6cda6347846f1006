"""The few operations on arrays that many penalties share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Accelerators round the factors of a float32 product to fewer bits unless told not to.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def real_dtype(x: jax.Array) -> Any:
    """Return the dtype of the modulus of `x`."""
    return jnp.real(x).dtype


def of_rank(ndim: int, array: jax.Array) -> jax.Array:
    """Return the array with axes of size 1 in front, for users who let JAX add none by itself."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def modulus(x: jax.Array) -> jax.Array:
    """Return the modulus of each entry, with derivative 0 at 0."""
    # The derivative of `jnp.abs` at a real 0 is 1.
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * jnp.sign(x)


def squared_modulus(x: jax.Array) -> jax.Array:
    """Return the squared modulus of each entry."""
    # The derivative of `jnp.square` is one product; that of x · x is two and a sum.
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else jnp.square(x)


def divide(total: jax.Array, count: jax.Array | np.ndarray[Any, Any] | None) -> jax.Array:
    """Return total / count; the total itself for None, and 0 for a count of 0."""
    if count is None:
        return total
    if isinstance(count, np.ndarray):  # known while tracing: one operation instead of five
        return total / count.astype(total.dtype) if count > 0 else jnp.zeros_like(total)
    count = jnp.asarray(count, total.dtype)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.zeros_like(total))
