"""Mixtures of experts: the router's terms, however experts, tokens and microbatches are split."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxreg as jr

from ._programs import MESH, assert_all_close, exchanges, put

WIDTH, EXPERTS, LAYERS = 12, 4, 2
X = np.random.default_rng(0).normal(size=(16, 4, WIDTH)).astype(np.float32)
BALANCE: Any = jr.TopKLoadBalance(1e-1, k=2) + jr.RouterZLoss(1e-2)


class Mixture(nn.Module):
    """Each token goes to its two best experts, whose outputs are weighted by its probabilities."""

    @nn.compact
    def __call__(self, x, _=None):
        logits = nn.Dense(EXPERTS, name="router")(x)
        best = jax.lax.stop_gradient(jnp.argsort(-logits, axis=-1)[..., :2])
        chosen = jnp.sum(jax.nn.one_hot(best, EXPERTS), axis=-2)
        gates = chosen * jax.nn.softmax(logits, axis=-1)
        init = nn.initializers.lecun_normal(batch_axis=0)
        experts = self.param("experts", init, (EXPERTS, WIDTH, WIDTH))
        return x + jnp.einsum("bte,btd,edf->btf", gates, x, experts), None


class Model(nn.Module):
    layer: Any = Mixture

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            self.layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(name="layers")(x, None)[0]


PARAMS = Model().init(jax.random.key(0), X)["params"]


def loss(params, x, across=lambda mean, terms: (mean, terms), layer=Mixture):
    forward = jr.activity({"layers/router": BALANCE})(Model(layer).apply)
    y, terms = forward({"params": params}, x)
    mean, terms = across(jnp.mean(y**2), terms)
    return mean + terms.total, terms.as_dict()


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, X)


def by_hand(params, x):
    """Return the router's terms without the library."""
    total = jnp.float32(0)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        logits = x @ layer["router"]["kernel"] + layer["router"]["bias"]
        probabilities = jax.nn.softmax(logits, axis=-1)
        best = jax.lax.top_k(jax.lax.stop_gradient(logits), 2)[1]
        fraction = jnp.mean(jnp.sum(jax.nn.one_hot(best, EXPERTS), axis=-2), axis=(0, 1))
        total += 1e-1 * EXPERTS * jnp.sum(fraction * jnp.mean(probabilities, axis=(0, 1)))
        total += 1e-2 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
        x = Mixture().apply({"params": layer}, x)[0]
    return total + jnp.mean(x**2), {"layers/router": total}


def test_the_terms_are_those_of_the_papers(on_one_device):
    expected = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(PARAMS, X)
    assert_all_close(on_one_device, expected)


def test_remat_logs_each_term_once(on_one_device):
    remat = partial(loss, layer=nn.remat(Mixture, prevent_cse=False))
    assert_all_close(jax.jit(jax.value_and_grad(remat, has_aux=True))(PARAMS, X), on_one_device)


def test_experts_and_tokens_are_split(on_one_device):
    axes = {"experts": (None, "model"), "kernel": (), "bias": ()}
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: put(leaf, *axes[path[-1].key]), PARAMS
    )
    x = put(X, "data")
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, x).compile()
    assert_all_close(step(params, x), on_one_device)
    # The tokens' outputs are summed over the experts; no router's logits are gathered.
    gathered = [e.entries for e in exchanges(step) if e.kind == "all-gather"]
    assert X.size // WIDTH * EXPERTS not in gathered


def test_experts_and_tokens_are_split_by_hand(on_one_device):
    def over(mean, terms):
        axes = ("data", "model")
        return jax.lax.pmean(mean, axes), jr.combine(terms, axis_name=axes)

    step = jax.shard_map(
        lambda params, x: jax.value_and_grad(loss, has_aux=True)(params, x, over),
        mesh=MESH,
        in_specs=(P(), P(("data", "model"))),
        out_specs=P(),
    )
    assert_all_close(jax.jit(step)(PARAMS, X), on_one_device)


def test_accumulation_balances_the_whole_batch(on_one_device):
    def accumulated(params, microbatches):
        forward = jr.activity({"layers/router": BALANCE})(Model().apply)

        @jax.checkpoint
        def microbatch(squares, x):
            y, terms = forward({"params": params}, x)
            return squares + jnp.sum(y**2), terms

        squares, stacked = jax.lax.scan(microbatch, jnp.float32(0), microbatches)
        terms = jr.combine(stacked)
        return squares / X.size + terms.total, (terms.as_dict(), stacked.total)

    microbatches = X.reshape(4, 4, 4, WIDTH)
    (value, (terms, uncombined)), gradient = jax.jit(jax.value_and_grad(accumulated, has_aux=True))(
        PARAMS, microbatches
    )
    assert_all_close(((value, terms), gradient), on_one_device)
    # What other trainers log: as many times the term as there are microbatches, and not its mean.
    assert uncombined > 3.9 * terms["layers/router"]
