"""Against optax, and against the formulas that Levanter and MaxText publish."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg as jr
from tests.ops.linear_cross_entropy.formula import problem

P = problem()


def ours(hidden, weight, **options):
    r = jr.ops.linear_cross_entropy(hidden, weight, P.labels, chunk=4, **options)
    return r.total


def by_optax(hidden, weight):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, P.labels))


def by_optax_smoothed(hidden, weight):
    targets = optax.smooth_labels(jax.nn.one_hot(P.labels, weight.shape[1]), 0.1)
    return jnp.mean(optax.softmax_cross_entropy(hidden @ weight, targets))


def by_maxtext(hidden, weight):
    """Targets one-hot; z·log_z² joins the loss of each token, and tokens are added up."""
    logits = hidden @ weight
    targets = jax.nn.one_hot(P.labels, weight.shape[1])
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_z = jnp.squeeze(
        jnp.log(jnp.sum(jnp.exp(logits - largest), -1, keepdims=True)) + largest, -1
    )
    loss = -jnp.sum(targets * (logits - log_z[:, None]), axis=-1)
    return jnp.sum(loss + 0.1 * jnp.square(log_z))


def by_levanter(hidden, weight):
    """The normalizer less the label's logit, its square added, and a mean over the mask."""
    logits = hidden @ weight
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    of_label = jnp.sum(logits * jax.nn.one_hot(P.labels, weight.shape[1]), axis=-1)
    loss = normalizer - of_label + 0.1 * normalizer**2
    return jnp.sum(loss * P.weights) / jnp.sum(P.weights)


PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "optax": (by_optax, {}),
    "optax, smoothed": (by_optax_smoothed, {"label_smoothing": 0.1}),
    "MaxText": (by_maxtext, {"z_loss": 0.1, "reduction": "sum"}),
    "Levanter": (by_levanter, {"z_loss": 0.1, "weights": P.weights}),
}


@pytest.mark.parametrize("name", PEERS)
def test_value_and_gradient_are_those_of_others(name):
    theirs, options = PEERS[name]
    with jax.enable_x64():
        found, expected = (
            jax.jit(jax.value_and_grad(f, (0, 1)))(P.hidden, P.weight)
            for f in (lambda h, w: ours(h, w, **options), theirs)
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


def test_the_z_loss_is_the_penalty_of_that_name():
    penalty = jr.ZLoss(0.1)
    found = jr.ops.linear_cross_entropy(P.hidden, P.weight, P.labels, z_loss=0.1).z_loss
    np.testing.assert_allclose(found, penalty(jnp.asarray(P.hidden @ P.weight)), rtol=1e-5)
