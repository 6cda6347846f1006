"""The few operations on arrays that many penalties share."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Accelerators round the factors of a float32 product to fewer bits unless told not to.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def real_dtype(x: jax.Array) -> Any:
    """Return the dtype of the modulus of `x`."""
    return jnp.real(x).dtype


def wide(x: jax.Array) -> jax.Array:
    """Return the array in its accumulation dtype: at least single precision."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def of_rank(ndim: int, array: jax.Array) -> jax.Array:
    """Return the array with axes of size 1 in front, for users who let JAX add none by itself."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)


def shrunk(x: jax.Array, pull: jax.Array) -> jax.Array:
    """Return x / (1 + pull), for a pull from 0 on."""
    # 1 + pull would round a small pull, and all entries' alike: that adds up over many steps.
    small = jnp.where(pull < 1, pull, 0)
    near = x - x * (small / (1 + small))
    return jnp.where((pull < 1) & jnp.isfinite(x), near, x / (1 + pull))


def sum_examples(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Return the sum of each feature over the examples, along all axes but the last."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), where=where)


def count_examples(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """Return how many examples, along all axes but the last, `where` lets count."""
    if where is None:
        return jnp.asarray(math.prod(x.shape[:-1]), x.dtype)
    return jnp.sum(jnp.broadcast_to(where, (*x.shape[:-1], 1)), dtype=x.dtype)


def among_largest(x: jax.Array, k: int) -> jax.Array:
    """Return which entries are the k largest along the last axis; of equal ones the first."""
    _, indices = jax.lax.top_k(x, k)
    return jnp.put_along_axis(jnp.zeros(x.shape, bool), indices, True, axis=-1, inplace=False)


def modulus(x: jax.Array) -> jax.Array:
    """Return the modulus of each entry, with derivative 0 at 0."""
    # The derivative of `jnp.abs` at a real 0 is 1.
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * jnp.sign(x)


def squared_modulus(x: jax.Array) -> jax.Array:
    """Return the squared modulus of each entry."""
    # The derivative of `jnp.square` is one product; that of x · x is two and a sum.
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else jnp.square(x)


def root(square: jax.Array) -> jax.Array:
    """Return the square root, with derivative 0 at 0."""
    # The derivative of the root is infinite at 0, and 0 · inf would be NaN.
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def polar(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the norms of the vectors along `axes`, and the vectors divided by them.

    No square overflows or vanishes. For a vector of zeros both are 0, and so are their derivatives.
    """
    scale, scaled = scaled_to_one(x, axes)
    squares = jnp.sum(jnp.real(scaled * jnp.conj(scaled)), axis=axes, keepdims=True)
    zero = squares == 0
    norm = jnp.sqrt(jnp.where(zero, 1, squares))
    return jnp.where(zero, 0, scale * norm), jnp.where(zero, 0, scaled / norm)


def scaled_to_one(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return a scale, held constant, and the array divided by it, with largest moduli of about 1.

    An inf makes itself NaN: it has no direction.
    """
    sizes = jnp.abs(jax.lax.stop_gradient(x))
    largest = jnp.max(sizes, axis=axes, keepdims=True, initial=0)
    # XLA multiplies by the reciprocal, and flushes it to 0 where it is subnormal.
    limit = 1 / np.finfo(largest.dtype).tiny
    scale = jnp.where((largest > limit) & ~jnp.isinf(largest), limit, largest)
    scale = jnp.where(scale == 0, 1, scale)
    return scale, x / scale


def divide(total: jax.Array, count: ArrayLike | None) -> jax.Array:
    """Return total / count; the total itself for None, and 0 for a count of 0."""
    if count is None:
        return total
    # Known while tracing: one operation instead of five.
    if isinstance(count, np.ndarray | np.generic):
        return total / count.astype(total.dtype) if count > 0 else jnp.zeros_like(total)
    count = jnp.asarray(count, total.dtype)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.zeros_like(total))
