"""The specification of the dense layer, in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def reference(
    x: jax.Array, w: jax.Array, b: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """Return activation(x w + b), of the operands' dtype.

    Raises:
        ValueError: for an activation that returns another shape than it is given.
    """
    z = jnp.matmul(x, w)
    if b is not None:
        z = z + b
    if activation is None:
        return z
    a = activation(z)
    if a.shape != z.shape:
        raise ValueError(
            f"An activation must return an array of the shape that it is given; got {a.shape} for"
            f" {z.shape}."
        )
    return a
