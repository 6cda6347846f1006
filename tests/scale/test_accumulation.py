"""Gradient accumulation: microbatches give the value and the gradient of the whole batch."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr

from ._programs import assert_all_close

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3, 6)).astype(np.float32)
TOKENS = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]])
TOKENS = np.concatenate([TOKENS, TOKENS[:1]]).astype(bool)

SEPARABLE: dict[str, Any] = {"code": jr.L1(0.3)}
STATISTIC: dict[str, Any] = {"code": jr.KLSparsity(0.3, target=0.2) + jr.Decorrelation(0.5)}
BOTH: dict[str, Any] = {"encoder": jr.GroupLasso(0.1), "code": STATISTIC["code"] + jr.L1(0.3)}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        code = nn.sigmoid(nn.Dense(5, name="encoder")(x))
        self.sow("intermediates", "code", code)
        return nn.Dense(6, name="decoder")(code)


PARAMS = Model().init(jax.random.key(0), X)["params"]


def forward(params, x, tokens, rules):
    """Return the squared error summed over the tokens that count, and the terms."""
    activity = jr.activity(rules, reduction="token_mean", mask=tokens)
    y, terms = activity(Model().apply)({"params": params}, x)
    return jnp.sum(jnp.where(tokens[..., None], y - x, 0) ** 2), terms


def whole_batch(params, x, tokens, rules=BOTH):
    squares, terms = forward(params, x, tokens, rules)
    return squares / jnp.sum(tokens) + terms.total


of_whole_batch = jax.jit(jax.value_and_grad(whole_batch))


def scanned(params, x, tokens):
    """Return the loss of the batch, whose microbatches the leading axes of `x` stack."""

    @jax.checkpoint
    def microbatch(squares, part):
        more, terms = forward(params, part[0], part[1], BOTH)
        return squares + more, terms

    squares, stacked = jax.lax.scan(microbatch, jnp.float32(0), (x, tokens))
    return squares / jnp.sum(tokens) + jr.combine(stacked).total


def test_scan_over_microbatches():
    # Of four, two, five and five tokens; an example without any is what pads the last microbatch.
    parts = X.reshape(4, 2, 3, 6), TOKENS.reshape(4, 2, 3)
    found = jax.jit(jax.value_and_grad(scanned))(PARAMS, *parts)
    assert_all_close(found, of_whole_batch(PARAMS, X, TOKENS), rtol=2e-6)


def after_multi_steps(gradients):
    """Return the parameters after one update from two gradients, by a rate of one."""
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    state, params = tx.init(PARAMS), PARAMS
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert state.gradient_step == 1
    return params


def after(gradient):
    return jax.tree.map(jnp.subtract, PARAMS, gradient)


def test_multi_steps_average_separable_penalties_of_equal_microbatches_and_no_statistics():
    @jax.jit
    def gradients(x):
        tokens = jnp.ones(x.shape[:2], bool)
        separable, statistic = (
            jax.grad(partial(whole_batch, rules=rules))(PARAMS, x, tokens)
            for rules in (SEPARABLE, STATISTIC)
        )
        return separable, statistic

    halves = [gradients(x) for x in (X[:4], X[4:])]
    separable, statistic = map(after_multi_steps, zip(*halves, strict=True))
    whole = [after(gradient) for gradient in gradients(X)]
    assert_all_close(separable, whole[0], rtol=2e-6)
    # What docs/scale.md warns of: a function of means is not the mean of the function.
    difference = statistic["encoder"]["kernel"] - whole[1]["encoder"]["kernel"]
    assert np.max(np.abs(difference)) > 1e-3


@jax.jit
def terms_of(params, x, mask):
    return forward(params, x, mask, BOTH)[1]


@jax.jit
@jax.grad
def share(params, x, mask, others):
    squares, terms = forward(params, x, mask, BOTH)
    whole = jr.combine([terms, *others])
    return (1 + len(others)) * (squares / TOKENS.sum() + whole.total)


def test_multi_steps_in_two_passes_with_a_token_mask():
    parts = [(X[:5], TOKENS[:5]), (X[5:], TOKENS[5:])]
    terms = [terms_of(PARAMS, *part) for part in parts]
    gradients = [share(PARAMS, *part, terms[:i] + terms[i + 1 :]) for i, part in enumerate(parts)]
    _, whole = of_whole_batch(PARAMS, X, TOKENS)
    assert_all_close(after_multi_steps(gradients), after(whole), rtol=2e-6)
