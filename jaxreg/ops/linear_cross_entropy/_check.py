"""What the arguments must be: checked once, when the function is traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxreg.penalties._checks import require, require_choice

NAME = "ops.linear_cross_entropy"
WHOLE = (
    f'`jaxreg.{NAME}(implementation="reference")` holds the logits of whole vocabularies; got one'
    " that is split over devices. Leave out the implementation."
)

# XLA ends the process over the gather of the labels' logits.
NAMED = (
    f"`jaxreg.{NAME}` inside of a `jax.shard_map` over some axes of a mesh takes tokens or words"
    " that explicit axes beside them split, and not both. Let the `jax.shard_map` be over these,"
    " too, and name them: batch_axis_name=..., vocab_axis_name=..."
)


def token_weights(
    weights: ArrayLike | None,
    labels: jax.Array,
    ignore_index: int | None,
    vocabulary: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Return each token's weight, and whether its label counts, if not with a weight of zero.

    The weight is 0 where the token is ignored, and NaN where the label is traced and no word. What
    can be differentiated by its weight has a label at a weight of zero, too: a mask's has not.
    """
    varies = False
    if weights is None:
        w = jnp.ones(labels.shape, dtype)
    else:
        w = jnp.asarray(weights)
        varies = jnp.issubdtype(w.dtype, jnp.inexact)
        if jnp.iscomplexobj(w):
            raise TypeError(f"`jaxreg.{NAME}(weights=...)` must be real; got dtype {w.dtype}.")
        if w.shape != labels.shape:
            raise ValueError(
                f"`jaxreg.{NAME}(weights=...)` must be of the labels' shape {labels.shape}; got"
                f" {w.shape}."
            )
        w = w.astype(dtype)
    ignored = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= vocabulary))
    if not isinstance(outside, jax.core.Tracer) and outside.is_fully_addressable:
        found = np.asarray(labels)[np.asarray(outside)]
        if found.size:
            raise ValueError(
                f"`jaxreg.{NAME}(labels=...)` must be in [0, {vocabulary}), or ignore_index"
                f" ({ignore_index}); got {found.flat[0]}, and {found.size} such labels in all."
            )
    w = jnp.where(outside, jnp.nan, jnp.where(ignored, 0, w))
    return w, ~ignored if varies else w != 0


def floating(argument: str, dtype: DTypeLike | None) -> None:
    """Raise unless the dtype is a floating-point one, or None."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`jaxreg.{NAME}({argument}=...)` must be floating-point; got {jnp.dtype(dtype)}."
        )


def labels(labels: ArrayLike, hidden: jax.Array) -> jax.Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`jaxreg.{NAME}(labels=...)` must be integers; got {labels.dtype}. For one-hot labels"
            " pass labels.argmax(-1)."
        )
    if hidden.ndim == 0 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`jaxreg.{NAME}(labels=...)` must have the shape of hidden, (..., D), without its last"
            f" axis; got labels {labels.shape} and hidden {hidden.shape}."
        )
    narrow = labels.dtype.itemsize < 4 or jnp.issubdtype(labels.dtype, jnp.unsignedinteger)
    return labels.astype(jnp.int32) if narrow else labels  # bytes could not be compared with 256


def words(hidden: jax.Array, weight: jax.Array, layout: str | None) -> int:
    """Return the axis of the weight that the vocabulary lies along."""
    require_choice(f"{NAME}(layout=...)", layout, (None, "DV", "VD"))
    size, shape = hidden.shape[-1], weight.shape
    fits = [
        name
        for name, features in (("VD", 1), ("DV", 0))
        if len(shape) == 2 and shape[features] == size and shape[1 - features] > 0
    ]
    if layout is None and len(fits) == 2:
        raise ValueError(
            f"`jaxreg.{NAME}(weight=...)` of shape {shape} is a kernel or a tied embedding: its"
            ' shape does not tell. Pass layout="DV" or layout="VD".'
        )
    if (layout not in fits) if layout else not fits:
        raise ValueError(
            f"`jaxreg.{NAME}(weight=...)` must be {layout or 'DV or VD'}, of D = {size} features,"
            f" the last axis of hidden, and at least one word; got shape {shape}."
        )
    return int((layout or fits[0]) == "DV")


def number(argument: str, value: Any, what: str, holds: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`jaxreg.{NAME}({argument}=...)` must be a concrete number, {what}; got a traced"
            " value. Make it a static argument."
        )
    require(f"{NAME}({argument}=...)", value, what, holds)
    return float(value)
