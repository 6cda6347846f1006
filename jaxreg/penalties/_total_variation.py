"""The proximal operator of the total variation along one axis, for whole arrays at once.

The minimizer z of ½Σ(z_i − x_i)² + λΣ|z_{i+1} − z_i| has a dual u_i = Σ_{j≤i} (x_j − z_j) in
[−λ, λ], which is −λ where z rises, λ where it falls, and 0 after the last entry. It is found by
splitting (Hochbaum 2001; Chambolle and Darbon 2009): a minimum cut separates the entries of a
segment at which z lies above the segment's mean from the others, and each part is then a problem of
its own, of which the duals at both ends are known. A segment that no cut splits is constant. All
segments are split at once: the rounds are as many as the splits are deep, about log₂ of the number
of distinct values.

A minimum cut along a line is a dynamic program of two states, and the difference of their costs is
a walk that is clipped at each entry. So are the other passes of a round, sums over segments and
values filled in from their ends. Each is one `_walk`, which runs in blocks, side by side.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = 256
_FREE = 2
"""The side of a dual that is not known; known ones are at side · λ, with a side of −1, 0 or 1."""


@jax.custom_jvp
def prox_total_variation(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return argmin ½‖z − x‖² + weight · Σ|z_{i+1} − z_i| along the last axis.

    Args:
        x: floating-point signals [..., n].
        weight: λ ≥ 0, a scalar of the dtype of `x`.
    """
    if x.size == 0:
        return x
    # An infinite entry stays as it is, and pulls its neighbours with all of λ.
    finite = jnp.isfinite(x)
    rises = jnp.nan_to_num(jnp.sign(jnp.diff(x)))
    sides = jnp.where(finite[..., 1:] & finite[..., :-1], _FREE, rises)
    z = _solve(jnp.where(finite, x, 0).ravel(), _pad(sides, 0, 1, 0).ravel(), weight)
    z = jnp.where(finite & (weight != 0), z.reshape(x.shape), x)
    return jnp.where(jnp.any(jnp.isnan(x), axis=-1, keepdims=True), jnp.nan, z)


@prox_total_variation.defjvp
def _derivative(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    z = prox_total_variation(*primals)
    x_dot, weight_dot = tangents
    if z.size == 0:
        return z, x_dot
    # Each run of equal values moves by its mean, and towards its neighbours as the weight grows.
    pull = jnp.diff(_pad(jnp.nan_to_num(jnp.sign(jnp.diff(z))), 1, 1, 0))
    ends = _pad(z[..., 1:] != z[..., :-1], 0, 1, True)
    return z, _run_means((x_dot + weight_dot * pull).ravel(), ends.ravel()).reshape(z.shape)


def _solve(x: jax.Array, sides: jax.Array, weight: jax.Array) -> jax.Array:
    """Solve for one signal in which the duals after some entries are known.

    Args:
        x: [n].
        sides: [n], the side of the dual after each entry, or _FREE. The last is known: signals that
            follow each other with a dual of 0 between them are independent.
        weight: λ.
    """
    size = x.size
    place = _into_blocks(jnp.arange(size, dtype=jnp.int32), 0)
    x, sides = _into_blocks(x, 0), _into_blocks(sides.astype(x.dtype), 0)
    # 2λ is computed with.
    weight = jnp.minimum(weight, float(jnp.finfo(x.dtype).max) / 4)  # type: ignore[no-untyped-call]

    def sums(residual: jax.Array, left: jax.Array, place: jax.Array) -> Any:
        # Of the segment so far: its sum, its first place, and the side of the dual before that.
        first = left != _FREE
        return _start(residual, first), _fill(4 * place + left.astype(place.dtype) + 1, first)

    def cut(centred: jax.Array, left: jax.Array) -> Any:
        # The walk is kept twice, as its distance from either bound: near a bound its digits are
        # those of the distance, not of λ.
        free = left == _FREE
        return tuple(
            (
                -centred,
                jnp.where(free, low, left - origin) * weight - centred,
                jnp.where(free, low + 2, left - origin) * weight - centred,
            )
            for origin, low in ((-1, 0), (1, -2))
        )

    def split(state: Any) -> Any:
        z, sides, quiet = state
        left, end = _before(sides), sides != _FREE
        residual = x - z
        total, origin = _walk(sums, (residual, left, place))
        count = (place - (origin >> 2) + 1).astype(x.dtype)
        pull = (sides - ((origin & 3) - 1).astype(x.dtype)) * weight
        mean = _from_next((total + pull) / count, end)
        low, high = _walk(cut, (residual - mean, left))
        # Whether z lies above the mean; where the cut does not say, as the next entry.
        at_end = jnp.where(sides == 0, low + high, jnp.where(sides < 0, low, high))
        upper = (jnp.where(end, at_end, low) < 0).astype(jnp.int8)
        upper = _from_next(upper, end | (low < 0) | (high > 0))
        new = ~end & (upper != _after(upper))
        sides = jnp.where(new, (1 - 2 * upper).astype(x.dtype), sides)
        return z + mean, sides, jnp.where(jnp.any(new), 0, quiet + 1)

    # A mean has all its digits once it has been taken of what an earlier one left: the first round
    # without a split may owe that to rounding, the second does not.
    # All three are made of x, to differ as it does from shard to shard.
    zeros = jnp.zeros_like(x)
    start = zeros, sides + zeros, jnp.zeros_like(x[0, 0], jnp.int32)
    z, _, _ = jax.lax.while_loop(lambda s: s[2] < 2, split, start)
    return _from_blocks(z, size)


def _walk(
    move: Callable[..., Any], inputs: tuple[Any, ...], *, reverse: bool = False
) -> list[jax.Array]:
    """Return every m_i = clip(m_{i−1} + step_i, low_i, high_i), of several walks at once.

    Such functions are closed under composition: what a block does to the walk is one of them.

    Args:
        move: from the inputs at one place to a (step, low, high) for each walk, arrays [blocks].
        inputs: arrays [places, blocks]. The first move of all has low = high.
        reverse: whether to walk from the end to the beginning.

    Returns:
        For each walk an array [places, blocks].
    """
    first = jax.tree.map(lambda a: a[0], inputs)
    zero = [jnp.zeros_like(step) for step, _, _ in move(*first)]

    def compose(functions: Any, place: Any) -> Any:
        return [
            (total + step, jnp.clip(floor + step, low, high), jnp.clip(ceiling + step, low, high))
            for (total, floor, ceiling), (step, low, high) in zip(
                functions, move(*place), strict=True
            )
        ], None

    def follow(walks: Any, place: Any) -> Any:
        walks = [
            jnp.clip(walk + step, low, high)
            for walk, (step, low, high) in zip(walks, move(*place), strict=True)
        ]
        return walks, walks

    start, blocks = zero, zero[0].shape[-1]
    if blocks > 1:
        identity = [(z, *(jnp.full_like(z, bound) for bound in _bounds(z))) for z in zero]
        functions, _ = jax.lax.scan(compose, identity, inputs, reverse=reverse)
        packed = tuple(
            tuple(map(_into_blocks, function, (0, *_bounds(function[0])))) for function in functions
        )
        ends = [_from_blocks(e, blocks) for e in _walk(lambda *f: f, packed, reverse=reverse)]
        start = [
            jnp.concatenate([e[1:], z[:1]] if reverse else [z[:1], e[:-1]])
            for e, z in zip(ends, zero, strict=True)
        ]
    walks: list[jax.Array] = jax.lax.scan(follow, start, inputs, reverse=reverse)[1]
    return walks


def _from_next(value: jax.Array, known: jax.Array) -> jax.Array:
    """Return the value at the next place where it is known."""
    return _walk(lambda *place: (_fill(*place),), (value, known), reverse=True)[0]


def _start(value: jax.Array, first: jax.Array) -> Any:
    """Return the move of a walk that adds the value, and starts with it anew at a first entry."""
    low, high = _bounds(value)
    return value, jnp.where(first, value, low), jnp.where(first, value, high)


def _fill(value: jax.Array, known: jax.Array) -> Any:
    """Return the move of a walk that takes the value where it is known, and else stays."""
    _, low, high = _start(value, known)
    return jnp.zeros_like(value), low, high


def _bounds(x: jax.Array) -> tuple[Any, Any]:
    """Return what bounds no number of the dtype of `x`."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return -jnp.inf, jnp.inf
    limits = jnp.iinfo(x.dtype)  # type: ignore[no-untyped-call]
    return limits.min, limits.max


def _into_blocks(x: jax.Array, padding: Any) -> jax.Array:
    """Cut the last axis into blocks: [..., n] to [places, ..., blocks]."""
    places = min(_BLOCK, x.shape[-1])
    x = _pad(x, 0, -x.shape[-1] % places, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, places), -1, 0)


def _from_blocks(x: jax.Array, size: int) -> jax.Array:
    """Undo `_into_blocks`, of an axis of this size."""
    return jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:-1], -1)[..., :size]


def _before(x: jax.Array) -> jax.Array:
    """Return what stands one entry before, in blocks; 0 before the first."""
    tops = jnp.concatenate([jnp.zeros_like(x[-1:, :1]), x[-1:, :-1]], axis=1)
    return jnp.concatenate([tops, x[:-1]])


def _after(x: jax.Array) -> jax.Array:
    """Return what stands one entry after, in blocks; 0 after the last."""
    bottoms = jnp.concatenate([x[:1, 1:], jnp.zeros_like(x[:1, :1])], axis=1)
    return jnp.concatenate([x[1:], bottoms])


def _pad(x: jax.Array, before: int, after: int, value: Any) -> jax.Array:
    """Pad the last axis."""
    widths = [(0, 0)] * (x.ndim - 1) + [(before, after)]
    return jnp.pad(x, widths, constant_values=value)


def _run_means(x: jax.Array, ends: jax.Array) -> jax.Array:
    """Return each entry's mean over its run, given where runs end; linear in `x`.

    Sums are taken block by block first, since one long sum loses digits.
    """
    runs = jnp.cumsum(ends) - ends
    places = jnp.arange(x.size)
    parts = runs + places // 1024
    owners = jnp.zeros(x.size + x.size // 1024, runs.dtype).at[parts].set(runs)
    sums = jax.ops.segment_sum(x, parts, owners.size, indices_are_sorted=True)
    sums = jax.ops.segment_sum(sums, owners, x.size)
    counts = jax.ops.segment_sum(jnp.ones_like(x), runs, x.size, indices_are_sorted=True)
    return (sums / jnp.maximum(counts, 1))[runs]
