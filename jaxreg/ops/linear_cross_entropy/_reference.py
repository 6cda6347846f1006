"""The formula as it is written, logits and all: the specification that the chunks are tested on."""

from typing import Any

import jax
import jax.numpy as jnp

from ._chunked import Settings, weighted


def of_logits(
    settings: Settings,
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    coefficients: tuple[jax.Array, jax.Array] | None,
) -> Any:
    """Return what the function of the same name in `_chunked` returns."""
    logits = settings.product(
        hidden.astype(settings.dtype), weight.astype(settings.dtype), settings.wide
    )
    if bias is not None:
        logits += bias[None].astype(settings.wide)
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(settings.wide)
    logits = settings.function.cap(logits)
    smoothing = settings.function.label_smoothing
    log_probabilities = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    loss = jnp.where(labels < 0, 0, -of_label)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * jnp.mean(log_probabilities, axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    terms = loss, jnp.square(lse)
    return weighted(coefficients, terms), terms, (lse, correct)
