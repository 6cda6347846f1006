"""A penalty for the tests of kernels."""

from typing import Any

import jax.numpy as jnp

import jaxreg as jr


class Root(jr.Penalty):
    """A norm: its moments can be measured tile by tile, and their gradient needs the sum."""

    strength: Any

    def moments(self, x: Any, where: Any = None) -> Any:
        return jnp.sqrt(jnp.sum(jnp.square(x)))

    def finish(self, moments: Any, count: Any) -> Any:
        return self.strength * moments
