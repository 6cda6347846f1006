"""Values and gradients against the formula in float64, and at its limits."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxreg as jr
from tests.ops.linear_cross_entropy.formula import Problem, by_formula, problem

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "cap": {"soft_cap": 1.5},
    "all, sum": {"z_loss": 0.3, "label_smoothing": 0.2, "soft_cap": 1.5, "reduction": "sum"},
    "all": {"z_loss": 0.3, "label_smoothing": 0.2, "soft_cap": 1.5},
}
op = jax.jit(
    jr.ops.linear_cross_entropy,
    static_argnames=("reduction", "layout", "chunk", "dtype", "gradient_dtype", "implementation"),
)
ARGUMENTS = ("hidden", "weight", "bias", "weights", "z_loss")
both = pytest.mark.parametrize("implementation", ["chunked", "reference"])


def differentiate(p, dtype=jnp.float32, field="total", layout="DV", z_loss=0.0, **options):
    """Return the result and the gradient of one field, summed, by all arguments."""

    def loss(hidden, weight, bias, weights, z_loss):
        result = jr.ops.linear_cross_entropy(
            hidden,
            weight if layout == "DV" else weight.T,
            p.labels,
            bias=bias,
            weights=weights,
            z_loss=z_loss,
            layout=layout,
            **options,
        )
        return jnp.sum(getattr(result, field)), result

    arrays = [jnp.asarray(x, dtype) for x in (p.hidden, p.weight, p.bias, p.weights, z_loss)]
    run = jax.jit(jax.grad(loss, tuple(range(5)), has_aux=True))
    gradient, result = run(*arrays)
    return result, dict(zip(ARGUMENTS, gradient, strict=True))


def assert_is(found, expected, rtol):
    result, gradient = found
    np.testing.assert_allclose(result.total, expected.loss + expected.z_loss, rtol=rtol)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=rtol)
    np.testing.assert_allclose(result.z_loss, expected.z_loss, rtol=rtol)
    np.testing.assert_allclose(result.lse, expected.lse, rtol=rtol)
    for name, value in expected.gradient.items():
        atol = rtol * np.max(np.abs(value), initial=0)
        np.testing.assert_allclose(gradient[name], value, rtol=rtol, atol=atol, err_msg=name)


@both
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_formulas(name, implementation):
    p = problem()
    options = {"implementation": implementation, "chunk": 4}
    with jax.enable_x64():
        found = differentiate(p, jnp.float64, **CASES[name], **options)
    expected = by_formula(p, **CASES[name])
    assert_is(found, expected, 1e-12)
    np.testing.assert_array_equal(found[0].correct, expected.correct)
    np.testing.assert_allclose(found[0].weight, p.weights.sum())
    accuracy = np.sum(p.weights * expected.correct) / p.weights.sum()
    np.testing.assert_allclose(found[0].accuracy, accuracy)


@pytest.mark.parametrize("field", ["loss", "z_loss", "lse"])
def test_the_cotangent_of_each_field_is_honoured(field):
    p = problem()
    options = CASES["all"] | {"field": field}
    with jax.enable_x64():
        found = differentiate(p, jnp.float64, chunk=4, **options)[1]
        expected = differentiate(p, jnp.float64, implementation="reference", **options)[1]
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-13, err_msg=name)
    assert np.abs(expected["hidden"]).max() > 1e-3


def test_the_fields_of_one_pass_have_any_cotangents_at_once():
    p = problem()

    def loss(implementation, hidden, weight):
        options = {"z_loss": 0.1, "chunk": 4, "implementation": implementation}
        r = jr.ops.linear_cross_entropy(hidden, weight, p.labels, **options)
        return r.total - 3 * r.loss + 2 * r.z_loss + jnp.sum(jnp.sin(r.lse))

    with jax.enable_x64():
        found, expected = (
            jax.jit(jax.grad(lambda *a, i=i: loss(i, *a), (0, 1)))(p.hidden, p.weight)
            for i in ("chunked", "reference")
        )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_each_token_for_itself():
    p, options = problem(), CASES["all"]
    with jax.enable_x64():
        none, by_none = differentiate(p, jnp.float64, chunk=4, **options, reduction="none")
    expected = by_formula(p, **options, reduction="sum")
    assert none.total.shape == none.loss.shape == none.z_loss.shape == p.labels.shape
    np.testing.assert_allclose(np.asarray(none.loss).sum(), expected.loss)
    np.testing.assert_allclose(np.asarray(none.z_loss).sum(), expected.z_loss)
    for name, value in expected.gradient.items():
        np.testing.assert_allclose(by_none[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("field", ["total", "lse"])
def test_a_tied_embedding(field):
    p = problem()
    kernel, embedding = (
        differentiate(p, field=field, layout=layout, z_loss=0.1, chunk=4) for layout in ("DV", "VD")
    )
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(embedding), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@given(
    tokens=st.integers(0, 20),
    features=st.integers(1, 6),
    words=st.integers(1, 9),
    chunk=st.integers(1, 24),
    seed=st.integers(0, 99),
)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
def test_any_shape_and_chunk(tokens, features, words, chunk, seed):
    p = problem(seed, tokens, features, words)
    options = CASES["all"]
    with jax.enable_x64():
        found = differentiate(p, jnp.float64, chunk=chunk, **options)
    assert_is(found, by_formula(p, **options), 1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_each_precision_adds_up_in_float32(dtype):
    """As near to the formula of the rounded inputs as the rounding of the factors allows."""
    p = problem(tokens=300, words=40, features=16)
    rounded = p._replace(
        **{
            name: np.asarray(jnp.asarray(getattr(p, name), dtype), np.float64)
            for name in ("hidden", "weight", "bias", "weights")
        }
    )
    result, gradient = differentiate(p, dtype, chunk=8, z_loss=jnp.float32(0.25))
    expected = by_formula(rounded, z_loss=0.25)
    assert result.total.dtype == result.lse.dtype == jnp.float32
    np.testing.assert_allclose(result.loss, expected.loss, rtol=2e-6)
    np.testing.assert_allclose(result.lse, expected.lse, rtol=2e-6)
    for name in ("hidden", "weight", "bias"):
        assert gradient[name].dtype == dtype
        error = np.asarray(gradient[name], np.float64) - expected.gradient[name]
        size = np.sqrt(np.mean(expected.gradient[name] ** 2))
        assert np.sqrt(np.mean(error**2)) < max(float(jnp.finfo(dtype).eps), 5e-7) * size, name


def test_half_precision_keeps_small_gradients():
    """A mean over many tokens of a large vocabulary is below the least number of float16."""
    tokens, words = 4096, 64
    hidden = jnp.ones((tokens, 1), jnp.float16)
    labels = jnp.zeros(tokens, int)
    weight = jnp.zeros((1, words), jnp.float16).at[0, 0].set(12)

    @jax.jit
    def by_hidden(hidden):
        loss_scale = 1e4
        return loss_scale * jr.ops.linear_cross_entropy(hidden, weight, labels, chunk=1024).total

    rest = 63 / (np.exp(12) + 63)
    np.testing.assert_allclose(jax.grad(by_hidden)(hidden)[0, 0], -12e4 * rest / tokens, rtol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_float32_weight_of_a_bfloat16_product_has_an_unrounded_gradient(reduction):
    p = problem(tokens=64)
    hidden, weight = jnp.asarray(p.hidden, jnp.bfloat16), jnp.asarray(p.weight, jnp.float32)

    def gradient(**options):
        def mean(weight):
            return jnp.mean(
                op(hidden, weight, p.labels, chunk=8, reduction=reduction, **options).total
            )

        return jax.grad(mean)(weight)

    wide = gradient(dtype="bfloat16")
    assert wide.dtype == jnp.float32
    assert np.any(wide != wide.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(wide, gradient(), atol=2e-3)
    narrow = gradient(dtype="bfloat16", gradient_dtype="bfloat16")
    np.testing.assert_array_equal(narrow * 64, (narrow * 64).astype(jnp.bfloat16))


def test_a_float32_bias_of_a_bfloat16_product_is_not_rounded():
    bias = jnp.asarray([1.001, 2.003, 3.005])
    hidden, weight = jnp.zeros((2, 4), jnp.bfloat16), jnp.zeros((4, 3), jnp.bfloat16)
    lse = op(hidden, weight, np.array([0, 1]), bias=bias).lse
    np.testing.assert_allclose(lse, 2 * [jax.nn.logsumexp(bias)], rtol=1e-6)


@both
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size, implementation):
    p = problem()
    p = p._replace(weight=size * p.weight, weights=np.ones(len(p.labels)))
    result, gradient = differentiate(p, z_loss=1e-4, chunk=4, implementation=implementation)
    p = Problem(*(np.asarray(x, np.float32) if i != 2 else x for i, x in enumerate(p)))
    expected = by_formula(p, z_loss=1e-4)
    np.testing.assert_allclose(result.total, expected.loss + expected.z_loss, rtol=1e-5)
    for name in ("hidden", "weight", "z_loss"):
        value = expected.gradient[name]
        np.testing.assert_allclose(
            gradient[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max()
        )


def test_a_loss_far_below_its_logits_keeps_its_digits():
    """Of 10⁴ float32 has three decimals, and the loss here is 10⁻³."""
    logits = np.array([[1e4, 1e4 - 7.0]], np.float32)
    loss = op(logits, np.eye(2, dtype=np.float32), [0], layout="DV").loss
    np.testing.assert_allclose(loss, np.log1p(np.exp(-7.0)), rtol=1e-4)


def test_a_bias_of_minus_infinity_takes_a_word_out():
    p = problem(words=12)
    p = p._replace(
        labels=np.minimum(p.labels, 9), bias=np.where(np.arange(12) < 10, p.bias, -np.inf)
    )
    fewer = p._replace(weight=p.weight[:, :10], bias=p.bias[:10])
    result, gradient = differentiate(p, z_loss=0.1, chunk=4)
    expected = by_formula(fewer, z_loss=0.1)
    np.testing.assert_allclose(result.total, expected.loss + expected.z_loss, rtol=1e-5)
    np.testing.assert_allclose(
        gradient["hidden"], expected.gradient["hidden"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(gradient["weight"][:, 10:], 0)
    np.testing.assert_array_equal(gradient["bias"][10:], 0)


@both
def test_without_any_word_the_normalizer_is_zero(implementation):
    p = problem()
    bias = np.full(p.bias.shape, -np.inf)
    result = op(p.hidden, p.weight, p.labels, bias=bias, implementation=implementation, z_loss=1.0)
    np.testing.assert_array_equal(result.lse, -np.inf)
    assert result.z_loss == np.inf


@both
def test_an_ignored_token_counts_nothing_where_the_first_word_is_taken_out(implementation):
    hidden, weight = jnp.ones((3, 4)), jnp.ones((4, 7))
    bias = jnp.zeros(7).at[0].set(-jnp.inf)

    def loss(weight, w):
        labels = jnp.array([1, 2, -100])
        return jr.ops.linear_cross_entropy(
            hidden, weight, labels, bias=bias, weights=w, implementation=implementation
        ).total

    total, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(weight, jnp.ones(3))
    np.testing.assert_allclose(total, np.log(6), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_of_zero_takes_out_a_token_whose_word_is_taken_out(implementation, reduction):
    hidden, weight = jnp.ones((3, 4)), jnp.ones((4, 7))
    bias = jnp.zeros(7).at[5].set(-jnp.inf)

    def loss(weight, w):
        labels = jnp.array([1, 2, 5])
        return jnp.sum(
            jr.ops.linear_cross_entropy(
                *(hidden, weight, labels),
                bias=bias,
                weights=w,
                reduction=reduction,
                implementation=implementation,
            ).total
        )

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    total, gradients = both(weight, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(total, np.log(6) * (1 if reduction == "mean" else 2), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.isinf(both(weight, jnp.ones(3))[0])


@both
def test_without_features_all_words_are_alike(implementation):
    def loss(hidden, weight):
        labels = jnp.arange(4)
        options: Any = {"layout": "DV", "implementation": implementation}
        return jr.ops.linear_cross_entropy(hidden, weight, labels, **options).total

    arrays = jnp.zeros((4, 0)), jnp.zeros((0, 7))
    value, gradient = jax.value_and_grad(loss, (0, 1))(*arrays)
    np.testing.assert_allclose(value, np.log(7), rtol=1e-6)
    chex.assert_trees_all_equal(gradient, arrays)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_all_ignored_is_zero_with_gradients_of_zero(dtype, reduction):
    p = problem()
    p = p._replace(labels=np.full_like(p.labels, -100))
    result, gradient = differentiate(p, dtype, z_loss=0.1, chunk=4, reduction=reduction)
    for value in (result.total, result.loss, result.z_loss, result.accuracy, result.weight):
        np.testing.assert_array_equal(value, 0)
    assert not result.correct.any()
    for name in gradient:
        np.testing.assert_array_equal(gradient[name], 0, err_msg=name)


def test_ignored_tokens_are_as_if_they_were_not_there():
    p = problem()
    keep = np.arange(len(p.labels)) % 3 > 0
    fewer = Problem(p.hidden[keep], p.weight, p.labels[keep], p.bias, p.weights[keep])
    expected = by_formula(fewer, z_loss=0.1)
    for index in (-100, 7):
        holes = p._replace(labels=np.where(keep, np.where(p.labels == 7, 8, p.labels), index))
        seen = fewer._replace(labels=np.where(fewer.labels == 7, 8, fewer.labels))
        expected = by_formula(seen, z_loss=0.1)
        result, gradient = differentiate(holes, z_loss=0.1, chunk=4, ignore_index=index)
        np.testing.assert_allclose(result.total, expected.loss + expected.z_loss, rtol=1e-5)
        np.testing.assert_allclose(result.weight, p.weights[keep].sum(), rtol=1e-6)
        np.testing.assert_allclose(
            gradient["weight"], expected.gradient["weight"], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(gradient["hidden"][~keep], 0)


def test_a_mask_is_weights_of_zero_and_one():
    p = problem()
    mask = np.arange(len(p.labels)) % 2 == 0
    masked = op(*p[:3], weights=mask)
    ignored = op(*p[:2], np.where(mask, p.labels, -100))
    for a, b in zip(masked, ignored, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_axes_of_a_batch_and_of_microbatches():
    p = problem(tokens=12)
    whole = op(p.hidden, p.weight, p.labels, z_loss=0.1)
    shaped = op(p.hidden.reshape(3, 4, -1), p.weight, p.labels.reshape(3, 4), z_loss=0.1)
    np.testing.assert_allclose(shaped.total, whole.total, rtol=1e-6)
    np.testing.assert_allclose(shaped.lse.reshape(-1), whole.lse, rtol=1e-6)
    assert shaped.lse.shape == shaped.correct.shape == (3, 4)
    parts = [
        op(p.hidden[s], p.weight, p.labels[s], z_loss=0.1, reduction="sum")
        for s in (slice(0, 3), slice(3, 12))
    ]
    mean = sum(part.total for part in parts) / sum(part.weight for part in parts)
    np.testing.assert_allclose(mean, whole.total, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_labels_of_few_bits(dtype):
    p = problem(words=256)
    few = op(p.hidden, p.weight, p.labels.astype(dtype))
    np.testing.assert_array_equal(few.total, op(p.hidden, p.weight, p.labels).total)


def test_equal_logits_count_the_first_as_largest():
    """As argmax does: a new layer of zeros is not right about everything."""
    result = op(jnp.ones((4, 2)), jnp.zeros((2, 4)), np.arange(4))
    np.testing.assert_array_equal(result.correct, [True, False, False, False])
    assert result.accuracy == 0.25


def test_a_token_that_does_not_count_is_not_correct():
    weights = jnp.array([1.0, 0.0, 1.0])
    labels = np.array([0, 1, -100])
    result = op(jnp.eye(3), jnp.eye(3), labels, weights=weights, layout="DV")
    np.testing.assert_array_equal(result.correct, [True, False, False])
    assert result.accuracy == 1


def test_correct_is_told_before_the_soft_cap_makes_logits_equal():
    weight = jnp.array([[1e4, 2e4]])
    result = jr.ops.linear_cross_entropy(jnp.ones((2, 1)), weight, np.arange(2), soft_cap=5.0)
    np.testing.assert_array_equal(result.correct, [False, True])


def test_traced_labels_out_of_range_make_nan_and_never_another_class():
    p = problem()

    @jax.jit
    def run(hidden, weight, labels):
        def loss(hidden, weight):
            result = jr.ops.linear_cross_entropy(hidden, weight, labels, chunk=4)
            return result.total, result

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, weight)

    for wrong in (11, -1, 10**6):
        labels = p.labels.copy()
        labels[2] = wrong
        gradients, result = run(p.hidden, p.weight, labels)
        assert np.isnan(result.total)
        assert np.isnan(result.loss)
        assert all(np.isnan(gradient).all() for gradient in gradients)
        each = op(p.hidden, p.weight, labels, chunk=4, reduction="none").total
        np.testing.assert_array_equal(np.isnan(each), np.arange(len(each)) == 2)


def test_infinite_inputs_propagate():
    p = problem()
    hidden = jnp.asarray(p.hidden).at[3, 0].set(jnp.inf)
    assert not np.isfinite(op(hidden, p.weight, p.labels).total)


def test_an_ignored_token_of_infinite_logits_leaves_the_z_loss_finite():
    hidden = jnp.array([[1.0, 2.0], [jnp.inf, jnp.inf]])
    weight, labels = -jnp.ones((2, 5)), jnp.array([3, -100])
    result = jr.ops.linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    alone = jr.ops.linear_cross_entropy(hidden[:1], weight, labels[:1], z_loss=0.1)
    np.testing.assert_allclose(result.z_loss, alone.z_loss, rtol=1e-6)


def test_no_tokens_in_float16():
    hidden, weight = jnp.ones((0, 3), jnp.float16), jnp.ones((3, 5), jnp.float16)
    labels = jnp.zeros(0, jnp.int32)
    gradient = jax.grad(lambda w: jr.ops.linear_cross_entropy(hidden, w, labels).total)(weight)
    np.testing.assert_array_equal(gradient, np.zeros((3, 5)))
