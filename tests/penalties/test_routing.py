"""Load balance: what each convention is worth at balance and at collapse, and what it ignores."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from tests.registry.logits import softmax
from tests.registry.routing import deepseek, dispatch_and_probability, gshard, switch

RNG = np.random.default_rng(0)
E = 4
LOGITS = (2 * RNG.normal(size=(3, 5, E)) + [1, 0, 0, 0]).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
PAIRS = jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])

CONVENTIONS: dict[str, Any] = {
    "Switch": jr.SwitchLoadBalance(1.0),
    "Switch-groups": jr.SwitchLoadBalance(1.0, per_group=True),
    "GShard": jr.GShardLoadBalance(1.0),
    "TopK": jr.TopKLoadBalance(1.0, k=2),
    "TopK-groups": jr.TopKLoadBalance(1.0, k=2, per_group=True),
    "DeepSeek": jr.DeepSeekLoadBalance(1.0, k=2),
    "DeepSeek-V3": jr.DeepSeekLoadBalance(1.0, k=2, scores="sigmoid"),
    "DeepSeek-whole": jr.DeepSeekLoadBalance(1.0, k=2, per_group=False),
}
every_convention = pytest.mark.parametrize("penalty", CONVENTIONS.values(), ids=CONVENTIONS)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_chosen_are_those_of_top_k(k):
    # With ties, and experts that are masked out.
    rng = np.random.default_rng(k)
    logits = rng.choice([-np.inf, -1.0, 0.0, 2.0, np.inf], size=(64, E)).astype(np.float32)
    _, indices = jax.lax.top_k(logits, k)
    expected = np.mean(np.any(np.arange(E) == np.asarray(indices)[..., None], axis=1), axis=0)
    penalty = jr.TopKLoadBalance(1.0, k=k)
    (chosen, _), count = penalty.moments(jnp.asarray(logits))
    np.testing.assert_allclose(chosen / count, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "balance", "collapse"),
    [
        ("Switch", 1, E),
        ("Switch-groups", 1, E),
        ("GShard", 1 / E**2, 1 / E),
        ("TopK", 2, E),
        ("TopK-groups", 2, E),
        ("DeepSeek", 1, E / 2),
        ("DeepSeek-V3", 1, E / 2),
        ("DeepSeek-whole", 1, E / 2),
    ],
)
def test_value_at_balance_and_at_collapse(name, balance, collapse):
    penalty = CONVENTIONS[name]
    k = getattr(penalty, "k", 1)
    # Every expert is chosen by as many tokens.
    balanced = 40 * jnp.concatenate([jnp.roll(PAIRS, shift, axis=1) for shift in (0, 1)])
    balanced = balanced if k == 2 else 40 * jnp.eye(E)
    if name == "DeepSeek-V3":
        balanced = balanced - 20
    np.testing.assert_allclose(penalty(balanced), balance, rtol=1e-5)
    collapsed = jnp.tile(balanced[:1], (5, 1))
    np.testing.assert_allclose(penalty(collapsed), collapse, rtol=1e-5)


def test_conventions_differ_by_constants():
    values = {name: float(penalty(LOGITS)) for name, penalty in CONVENTIONS.items()}
    np.testing.assert_allclose(values["GShard"] * E**2, values["Switch-groups"], rtol=1e-6)
    np.testing.assert_allclose(values["DeepSeek"] * 2, values["TopK-groups"], rtol=1e-6)
    np.testing.assert_allclose(values["DeepSeek-whole"] * 2, values["TopK"], rtol=1e-6)
    np.testing.assert_allclose(jr.TopKLoadBalance(1.0, k=1)(LOGITS), values["Switch"], rtol=1e-6)
    assert abs(values["Switch"] - values["Switch-groups"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "of_tokens"),
    [
        ("Switch", switch),
        ("TopK", lambda z: switch(z, 2)),
        ("DeepSeek-whole", lambda z: deepseek(z, 2, softmax)),
    ],
)
def test_padding_is_neither_dispatched_nor_averaged(name, of_tokens):
    found = jr.penalize(LOGITS, CONVENTIONS[name], mask=MASK)
    np.testing.assert_allclose(found, of_tokens(LOGITS[MASK].astype(float)), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "of_tokens"),
    [("GShard", gshard), ("DeepSeek", lambda z: deepseek(z, 2, softmax))],
)
def test_groups_without_tokens_that_count_are_left_out_of_the_mean(name, of_tokens):
    found = jr.penalize(LOGITS, CONVENTIONS[name], mask=MASK)
    groups = [of_tokens(z[m].astype(float)) for z, m in zip(LOGITS, MASK, strict=True) if m.any()]
    assert len(groups) == 2
    np.testing.assert_allclose(found, np.mean(groups), rtol=1e-5)


def test_the_dispatch_fraction_is_a_constant_to_the_gradient():
    tokens = LOGITS.reshape(-1, E).astype(float)
    f, _ = dispatch_and_probability(tokens, 1, softmax)
    p = np.array([softmax(token) for token in tokens])
    expected = E / len(tokens) * p * (f - (p @ f)[:, None])
    gradient = jr.SwitchLoadBalance(1.0).gradient(LOGITS)
    np.testing.assert_allclose(gradient.reshape(-1, E), expected, rtol=1e-4, atol=1e-7)


@every_convention
def test_gradient_pushes_away_from_the_expert_that_has_it_all(penalty):
    x = jnp.zeros((6, E)).at[:, 1].set(1.0)
    gradient = penalty.gradient(x)
    assert (gradient[:, 1] > 0).all()
    assert (gradient[:, 3] < 0).all()


@every_convention
def test_ties_go_to_the_first_experts(penalty):
    k = getattr(penalty, "k", 1)
    gradient = penalty.gradient(jnp.zeros((3, E)))
    assert (np.asarray(gradient > 0) == (np.arange(E) < k)).all()


@every_convention
def test_huge_logits(penalty):
    x = jnp.asarray(1e4 * np.sign(LOGITS) + LOGITS)
    value, gradient = jax.jit(jax.value_and_grad(penalty))(x)
    with jax.enable_x64():
        exact = penalty(np.asarray(x, np.float64))
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    assert np.isfinite(gradient).all()


@every_convention
def test_an_expert_that_is_masked_out_gets_no_probability(penalty):
    x = jnp.asarray(LOGITS).at[..., 2].set(-jnp.inf)
    value, gradient = jax.jit(jax.value_and_grad(penalty))(x)
    assert jnp.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[..., 2], 0.0)


def test_normalized_sigmoids_that_all_underflow():
    penalty = jr.DeepSeekLoadBalance(1.0, k=1, scores="sigmoid")
    x = jnp.array([[-1000.0, -1000.0, -1001.0, -1000.0]])
    p = np.exp([0, 0, -1, 0]) / np.sum(np.exp([0, 0, -1, 0]))
    np.testing.assert_allclose(penalty(x), 4 * p[0], rtol=1e-6)


@every_convention
def test_router_logits_of_half_precision(penalty):
    x = jnp.asarray(LOGITS, jnp.bfloat16)
    value = penalty(x)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, penalty(x.astype(jnp.float32)))


@every_convention
def test_one_token(penalty):
    values = [penalty(x) for x in (LOGITS[0, 0], LOGITS[0, :1], LOGITS[:1, :1])]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert values[0] > 0


@pytest.mark.parametrize(
    "penalty",
    [
        jr.SwitchLoadBalance(1.0),
        jr.GShardLoadBalance(1.0),
        jr.TopKLoadBalance(1.0, k=1),
        jr.DeepSeekLoadBalance(1.0, k=1),
    ],
    ids=lambda p: type(p).__name__,
)
def test_one_expert_is_balanced(penalty):
    x = jnp.array([[[3.0], [-2.0]]])
    assert penalty(x) == 1.0
    np.testing.assert_array_equal(penalty.gradient(x), jnp.zeros((1, 2, 1)))


@pytest.mark.parametrize("penalty", [jr.TopKLoadBalance, jr.DeepSeekLoadBalance])
@pytest.mark.parametrize("k", [0, -1, 1.5, None, "2", True], ids=str)
def test_k_must_be_a_positive_integer(penalty, k):
    message = f"`jaxreg.{penalty.__name__}(k=...)` must be a positive integer; got {k!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        penalty(1.0, k=k)


@pytest.mark.parametrize("penalty", [jr.TopKLoadBalance, jr.DeepSeekLoadBalance])
def test_k_may_be_an_integer_of_numpy(penalty):
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    assert penalty(1.0, k=np.int64(2))(x) == penalty(1.0, k=2)(x)


@pytest.mark.parametrize("penalty", [jr.TopKLoadBalance, jr.DeepSeekLoadBalance])
def test_more_choices_than_experts_are_an_error(penalty):
    message = (
        f"`jaxreg.{penalty.__name__}(k=...)` must not exceed the number of experts, the size of the"
        ' last axis; got k=5 for "x" of shape (3, 5, 4).'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        penalty(1.0, k=5)(LOGITS)


def test_unknown_scores_are_an_error():
    message = "(scores=...)` must be one of 'softmax', 'sigmoid'; got 'relu'."
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.DeepSeekLoadBalance(1.0, k=1, scores="relu")  # type: ignore[arg-type]


def test_importance_of_one_expert_for_all_is_the_number_of_the_others():
    gates = jnp.zeros((3, E)).at[:, 2].set(0.7)
    np.testing.assert_allclose(jr.ImportanceCV(1.0)(gates), E - 1, rtol=1e-6)


def test_importance_adds_up_gates_of_any_size():
    gates = np.array([[0.6, 0.4, 0.0], [0.0, 0.1, 0.9], [0.5, 0.0, 0.5]])
    importance = gates.sum(axis=0)
    expected = np.var(importance) / np.mean(importance) ** 2
    np.testing.assert_allclose(jr.ImportanceCV(1.0)(gates), expected, rtol=1e-6)
    np.testing.assert_allclose(jr.ImportanceCV(1.0)(10 * gates), expected, rtol=1e-6)


def test_importance_of_gates_that_cancel_is_not_hidden():
    assert jr.ImportanceCV(1.0)(jnp.array([[1.0, -1.0]])) == math.inf


def test_importance_cv_of_tiny_gates_has_the_value_and_gradient_of_larger_ones():
    gates = jnp.full((4, 16), 1.0).at[:, 0].set(2.0)
    penalty = jr.ImportanceCV(1.0)
    np.testing.assert_allclose(penalty(1e-25 * gates), penalty(gates), rtol=1e-5)
    gradient = 1e-10 * penalty.gradient(1e-10 * gates)
    np.testing.assert_allclose(gradient, penalty.gradient(gates), rtol=1e-3, atol=1e-6)
