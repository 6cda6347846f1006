"""Cross-entropy of logits never held at once, with the gradient computed in the forward pass.

A scan over chunks of tokens computes a chunk's logits, what is wanted of each token, and, where a
derivative is wanted, that of one weighted sum of it all: the derivative by the logits is there only
within the chunk, and goes into those by the hidden states and the weight at once. That makes three
matrix products, where autodiff with recomputation makes four.

The rule is one of forward mode. The tangent of the sum is the inner product of the gradient with
the tangents of the inputs, which JAX transposes; for the values of single tokens, whose weights in
a cotangent are known only in the backward pass, it is a scan that computes the logits again. So
JAX itself finds which of the two is wanted, derivatives of any order and mode exist, and
under `shard_map` the transposition puts the sums over devices where they belong: after the scan.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxreg.terms import varying_as

from ._cross_entropy import CrossEntropy
from ._sharding import psum

LOGITS = 2**27
"""How many logits a chunk holds at most if its size is not given: 512 MiB of float32."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static: what is wanted of the logits, and how they are computed."""

    function: CrossEntropy
    chunk: int | None  # tokens
    words: int  # the axis of the weight that the vocabulary lies along
    dtype: DTypeLike  # of the factors of the matrix products
    gradient_dtype: DTypeLike  # in which the weight's gradient adds up
    wide: DTypeLike  # of the logits

    def chunk_of(self, weight: tuple[int, ...]) -> int:
        """Return how many tokens a chunk has, for the words that this device has."""
        words = weight[self.words]
        return self.chunk or max(2 ** math.floor(math.log2(LOGITS / words)), 128)

    def product(self, hidden: jax.Array, weight: jax.Array, out: DTypeLike) -> jax.Array:
        """Return hidden times weight, (tokens, words)."""
        return _product(hidden, weight, 1, 1 - self.words, out)

    def by_hidden(self, slope: jax.Array, weight: jax.Array) -> jax.Array:
        """Return the gradient by the hidden states, given that by the logits."""
        return _product(slope, weight, 1, self.words, self.wide)

    def by_weight(self, hidden: jax.Array, slope: jax.Array) -> jax.Array:
        """Return the gradient by the weight, given that by the logits."""
        if self.words == 0:
            return _product(slope, hidden, 0, 0, self.wide)
        # XLA for the CPU is slower, and copies the slope, where the first factor is to be
        # transposed. Without the barrier it would drop the transposed copy for that.
        transposed = lax.optimization_barrier(hidden.T)  # type: ignore[no-untyped-call]
        return _product(transposed, slope, 1, 0, self.wide)


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int, out: DTypeLike) -> jax.Array:
    dimensions = (((over_a,), (over_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def of_logits(
    settings: Settings,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    coefficients: tuple[jax.Array, ...] | None,
) -> tuple[jax.Array | None, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return Σ coefficient · term, the terms, and the statistics.

    Args:
        settings: what is wanted of the logits.
        hidden: (tokens, features).
        weight: (features, words) or (words, features).
        bias: (words,), or None.
        labels: (tokens,), negative where there is none.
        coefficients: an array (tokens,) for each term; or None where no sum is wanted, and the
            terms themselves are to be differentiated.
    """
    terms, statistics, _ = _sweep(settings, hidden, weight, bias, labels)
    return weighted(coefficients, terms), terms, statistics


def weighted(
    coefficients: tuple[jax.Array, ...] | None, terms: tuple[jax.Array, ...]
) -> jax.Array | None:
    """Return Σ coefficient · term, or None where it is not wanted."""
    if coefficients is None:
        return None
    return jnp.sum(sum(c * counted(c, t) for c, t in zip(coefficients, terms, strict=True)))


def counted(coefficient: jax.Array, term: jax.Array) -> jax.Array:
    """Return the term, and 0 where it is infinite and does not count: 0 · ∞ is NaN."""
    return jnp.where((coefficient == 0) & jnp.isinf(term), 0, term)


@functools.partial(of_logits.defjvp, symbolic_zeros=True)
def _of_logits_jvp(settings: Settings, primals: Any, tangents: Any) -> Any:
    hidden, weight, bias, labels, coefficients = primals
    *by_inputs, _, by_coefficients = tangents
    wanted = tuple(not isinstance(t, SymbolicZero | None) for t in by_inputs)
    if coefficients is None or not any(wanted):
        terms, statistics, _ = _sweep(settings, hidden, weight, bias, labels)
        gradients, scale = None, None
    else:
        scale = _scale(settings, coefficients)
        relative = tuple(c if scale is None else c / scale for c in coefficients)
        terms, statistics, gradients = _sweep(
            settings, hidden, weight, bias, labels, relative, wanted
        )
    if any(wanted):
        dots = _recompute(settings, hidden, weight, bias, labels, by_inputs)
    else:
        dots = jax.tree.map(jnp.zeros_like, (terms, statistics))

    total = weighted(coefficients, terms)
    total_dot: Any = None
    if total is not None:
        total_dot = jnp.zeros_like(total)
        for c_dot, c, term in zip(by_coefficients, coefficients, terms, strict=True):
            if not isinstance(c_dot, SymbolicZero):
                total_dot += jnp.sum(c_dot * counted(c, term))
        if gradients is not None:
            along = jnp.zeros_like(total)
            for gradient, tangent in zip(gradients, by_inputs, strict=True):
                if gradient is not None:
                    along += jnp.sum(gradient.astype(along.dtype) * tangent.astype(along.dtype))
            if scale is not None:
                along *= scale
            total_dot += psum(along, settings.function.vocab_axis_name)
    return (total, terms, statistics), (total_dot, *dots)


def _scale(settings: Settings, coefficients: tuple[jax.Array, ...]) -> jax.Array | None:
    """Return what the coefficients are divided by for the products, or None for 1.

    float16 keeps the gradient by the logits only if it is not divided by the number of tokens. The
    other dtypes reach as low as float32; and what is not multiplied afterwards is not copied.
    """
    if settings.dtype != jnp.float16:
        return None
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(c), initial=0) for c in coefficients))
    return lax.stop_gradient(jnp.where(largest == 0, 1, largest))


def _sweep(
    settings: Settings,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    coefficients: tuple[jax.Array, ...] | None = None,
    wanted: tuple[bool, ...] = (False, False, False),
) -> tuple[Any, Any, tuple[jax.Array | None, ...]]:
    """Return terms and statistics, and the wanted gradients of Σ coefficient · term."""
    cast = weight.astype(settings.dtype)
    of_hidden, of_weight, of_bias = wanted
    sums = (
        jnp.zeros(weight.shape, settings.gradient_dtype) if of_weight else None,
        jnp.zeros(bias.shape, settings.wide) if of_bias and bias is not None else None,
    )

    def body(sums: Any, chunk: Any) -> Any:
        h, y, c = chunk
        h = h.astype(settings.dtype)
        outcome = settings.function(_logits(settings, h, cast, bias), y)
        values = outcome.terms, outcome.statistics
        if c is None:
            return sums, (values, None)
        gradient = outcome.gradient(c)
        narrow = gradient.astype(settings.dtype)
        by_weight, by_bias = sums
        if of_weight:
            by_weight += settings.by_weight(h, narrow).astype(by_weight.dtype)
        if by_bias is not None:
            by_bias += jnp.sum(gradient, axis=0)
        by_hidden = None
        if of_hidden:
            by_hidden = settings.by_hidden(narrow, cast).astype(settings.dtype)
        return (by_weight, by_bias), (values, by_hidden)

    inputs = hidden, labels, coefficients
    sums = varying_as(sums, (inputs, weight, bias))
    # Where the sweep is differentiated itself, for second derivatives, a chunk is computed again.
    (by_weight, by_bias), (values, by_hidden) = _scan(
        body, sums, inputs, settings.chunk_of(weight.shape)
    )
    return *values, (by_hidden, by_weight, by_bias)


def _logits(
    settings: Settings, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> jax.Array:
    logits = settings.product(hidden, weight, settings.wide)
    return logits if bias is None else logits + bias[None].astype(settings.wide)


def _recompute(
    settings: Settings,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    tangents: Any,
) -> Any:
    """Return the tangents of terms and statistics, linear in those of the inputs.

    The tangents of the logits are products in the dtype of the factors, cast: so that in the
    transpose the cotangents of the logits are cast to it, and multiplied in it. The weight's
    tangent is wide before the scan, and so is its cotangent, which adds up in it.
    """
    cast = weight.astype(settings.dtype)
    hidden_dot, weight_dot, bias_dot = (
        None if isinstance(t, SymbolicZero | None) else t for t in tangents
    )
    if weight_dot is not None:
        weight_dot = weight_dot.astype(settings.gradient_dtype)
    # So that the transpose adds up over devices after the scan.
    hidden_dot, weight_dot, bias_dot = varying_as(
        (hidden_dot, weight_dot, bias_dot), (hidden, weight, labels)
    )

    def body(_: None, chunk: Any) -> Any:
        h, h_dot, y = chunk
        h = h.astype(settings.dtype)
        logits = _logits(settings, h, cast, bias)
        products = []
        if h_dot is not None:
            h_dot = h_dot.astype(settings.dtype)
            products.append(settings.product(h_dot, cast, settings.dtype))
        if weight_dot is not None:
            narrow = weight_dot.astype(settings.dtype)
            products.append(settings.product(h, narrow, settings.dtype))
        logits_dot: Any = sum(product.astype(settings.wide) for product in products)
        if bias_dot is not None:
            logits_dot += bias_dot[None]
        logits_dot = jnp.broadcast_to(logits_dot, logits.shape)
        return None, settings.function(logits, y).tangent(logits_dot)

    return _scan(body, None, (hidden, hidden_dot, labels), settings.chunk_of(weight.shape))[1]


def _scan(body: Any, carry: Any, inputs: Any, chunk: int) -> Any:
    """Scan over chunks of the leading axis, in equal chunks of at most so many.

    A chunk has every n-th token, and not neighbours: where the tokens are sharded over devices,
    each device then has its part of every chunk.
    """
    tokens = jax.tree.leaves(inputs)[0].shape[0]
    n = max(-(-tokens // chunk), 1)
    size = max(-(-tokens // n), 1)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, n * size - tokens), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(padded.reshape(size, n, *x.shape[1:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(n * size, *x.shape[2:])[:tokens]

    carry, outputs = lax.scan(
        jax.checkpoint(body, prevent_cse=False), carry, jax.tree.map(split, inputs)
    )
    return carry, jax.tree.map(join, outputs)
