"""The specification of the dense layer, in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def reference(
    x: jax.Array, w: jax.Array, b: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """Return activation(x w + b), of the operands' dtype."""
    z = jnp.matmul(x, w)
    if b is not None:
        z = z + b
    return z if activation is None else activation(z)
