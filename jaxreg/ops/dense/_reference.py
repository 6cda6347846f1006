"""The specification of the dense layer, in plain JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.penalties._arithmetic import of_rank

Activation = Callable[[jax.Array], jax.Array]


def reference(
    x: jax.Array, w: jax.Array, b: jax.Array | None, activation: Activation | None
) -> jax.Array:
    """Return activation(x w + b), of the operands' dtype.

    Raises:
        TypeError: for an activation that is no function of an array.
        ValueError: for one that returns another shape than it is given.
    """
    check_activation(activation)
    z = jnp.matmul(x, w)
    if b is not None:
        z = z + of_rank(z.ndim, b)
    if activation is None:
        return z
    a = activation(z)
    shape = getattr(a, "shape", type(a).__name__)
    if shape != z.shape:
        raise ValueError(
            f"An activation must return an array of the shape that it is given; got {shape} for"
            f" {z.shape}."
        )
    return a


def check_activation(activation: Any) -> None:
    """Raise unless this can be called, or is None."""
    if not (activation is None or callable(activation)):
        raise TypeError(
            "An activation must be a function of an array, such as `jax.nn.relu`; got"
            f" {activation!r}."
        )
