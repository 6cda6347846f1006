"""The threshold of projections on a simplex, and of proximal operators of their kind."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def over_threshold(
    x: jax.Array,
    axes: tuple[int, ...],
    total: ArrayLike,
    *,
    scale: ArrayLike = 1,
    slope: int = 0,
) -> jax.Array:
    """Return max(x_i − τ, 0), where scale · Σ max(x_i − τ, 0) = total + slope · τ.

    The sum is along the axes, along which total and scale are constant. The difference of the two
    sides is convex and piecewise linear in τ: Newton's method from below climbs to its root,
    leaving out ever more entries, in a few passes.

    `optax.projections.projection_simplex` sorts: it takes ten times as long on a CPU, and gathers a
    sharded array. For entries much larger than the total its running sums have no digit of it left,
    and it takes neither empty arrays nor strict dtype promotion.
    """
    largest = jax.lax.stop_gradient(jnp.max(x, axis=axes, keepdims=True, initial=-jnp.inf))
    if not slope:
        # The same for a shifted vector; measured from the largest entry, τ has all its digits.
        x = x - jnp.where(largest == jnp.inf, 0, largest)

    def newton(x: Any, total: Any, scale: Any, threshold: Any) -> tuple[jax.Array, jax.Array]:
        above = ~(x <= threshold)  # a NaN, too
        count = jnp.sum(above, axis=axes, keepdims=True, dtype=jnp.int32)
        excess = jnp.sum(jnp.where(above, x - threshold, 0), axis=axes, keepdims=True)
        missing = scale * excess - total - slope * threshold
        step = missing / (scale * jnp.maximum(count, 1).astype(x.dtype) + slope)
        return threshold + jnp.where(jnp.isinf(threshold), 0, step), count

    def leaves_out_more(state: Any) -> jax.Array:
        _, count, fewest = state
        return jnp.any(count < fewest)

    def climb(state: Any) -> Any:
        threshold, count, fewest = state
        return *newton(*constants, threshold), jnp.minimum(count, fewest)

    constants = jax.lax.stop_gradient((x, total, scale))
    # Below the root, and made of x, to differ as it does from shard to shard.
    start = jnp.zeros_like(largest) - constants[1] / (constants[2] + slope)
    more = jnp.full_like(start, math.prod(x.shape[axis] for axis in axes) + 1, jnp.int32)
    threshold, _, _ = jax.lax.while_loop(leaves_out_more, climb, (start, more, more + 1))
    # One step more has the derivative.
    threshold, _ = newton(x, total, scale, threshold)
    return jnp.where((x <= threshold) & (x < jnp.inf), 0, x - threshold)
