"""The arithmetic of activation penalties: reductions, masks, and microbatches."""

import functools
import itertools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.terms import measure

REDUCTIONS: list[Any] = ["batch_mean", "sum", "mean", "token_mean"]
RNG = np.random.default_rng(0)
CODES = RNG.uniform(0.1, 0.9, (6, 2, 3)).astype(np.float32)
MASK = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 1], [1, 0]], bool)

PENALTIES = {
    "L1": jr.L1(0.5),
    "L1L2": jr.L1L2(0.5, 0.25),
    "GroupLasso-rows": jr.GroupLasso(0.5, axis=-1),
    "GroupLasso-columns": jr.GroupLasso(0.5),
    "ExclusiveLasso": jr.ExclusiveLasso(0.5),
    "SparseGroupLasso": jr.SparseGroupLasso(0.5, alpha=0.3),
    "L1Inf-rows": jr.L1Inf(0.5, axis=-1),
    "RangeHinge": jr.RangeHinge(0.5, lower=0.2, upper=0.6),
    "GroupLasso-columns-unweighted": jr.GroupLasso(0.5, weighted=False),
    "KLSparsity": jr.KLSparsity(0.5, target=0.2),
    "L2+KLSparsity": jr.L2(0.5) + jr.KLSparsity(0.5, target=0.2),
}


def terms_of(x, penalty, reduction="batch_mean", mask=None, path="code"):
    return jr.Terms({path: (measure(jnp.asarray(x), penalty, reduction, mask),)})


@pytest.mark.parametrize(
    ("reduction", "divisor", "masked_divisor"),
    [("batch_mean", 6, 6), ("sum", 1, 1), ("mean", 36, 21), ("token_mean", 12, 7)],
    ids=REDUCTIONS,
)
def test_separable_reduction(reduction, divisor, masked_divisor):
    total = 0.5 * np.sum(CODES, dtype=np.float64)
    value = jr.penalize(CODES, jr.L1(0.5), reduction=reduction)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, total / divisor, rtol=1e-6)
    total = 0.5 * np.sum(CODES[MASK], dtype=np.float64)
    value = jr.penalize(CODES, jr.L1(0.5), reduction=reduction, mask=MASK)
    np.testing.assert_allclose(value, total / masked_divisor, rtol=1e-6)


def test_a_known_count_is_divided_by_in_one_operation():
    jaxpr = str(jax.make_jaxpr(lambda x: jr.penalize(x, jr.L2(1.0)))(CODES))
    assert jaxpr.count(" div ") == 1
    assert "select" not in jaxpr


def test_batch_mean_is_the_default():
    assert jr.penalize(jnp.ones((4, 2, 5)), jr.L1(1.0)) == 10.0


def test_activity_term_of_the_case_keras_documents():
    # Dense(5) with a kernel of ones, on ones((5, 5)) * 2; Keras from 3.14 on, and up to 3.13.
    out = (jnp.ones((5, 5)) * 2) @ jnp.ones((5, 5))
    assert jr.penalize(out, jr.L2(0.01)) == 5.0
    assert jr.penalize(out, jr.L2(0.01), reduction="sum") == 25.0


@pytest.mark.parametrize(
    ("shape", "divisors"),
    [((), (1, 1, 1, 1)), ((4,), (4, 1, 4, 1)), ((4, 3), (4, 1, 12, 4))],
    ids=["rank0", "rank1", "rank2"],
)
def test_reduction_of_low_ranks(shape, divisors):
    x = np.full(shape, 2.0, np.float32)
    values = [jr.penalize(x, jr.L2(0.5), reduction=reduction) for reduction in REDUCTIONS]
    np.testing.assert_allclose(values, [2.0 * x.size / divisor for divisor in divisors])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_statistic_is_not_divided_again(reduction):
    penalty = PENALTIES["KLSparsity"]
    value = jr.penalize(CODES, penalty, reduction=reduction)
    np.testing.assert_allclose(value, penalty(CODES), rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_statistic_averages_over_the_tokens_that_count(reduction):
    penalty = PENALTIES["KLSparsity"]
    value = jr.penalize(CODES, penalty, reduction=reduction, mask=MASK)
    np.testing.assert_allclose(value, penalty(CODES[MASK]), rtol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_what_is_masked_out_leaks_into_neither_value_nor_gradient(penalty):
    @jax.jit
    def values_and_gradients(x):
        return [
            jax.value_and_grad(lambda a, r=r: jr.penalize(a, penalty, reduction=r, mask=MASK))(x)
            for r in REDUCTIONS
        ]

    expected = values_and_gradients(jnp.asarray(CODES))
    for garbage in (np.nan, np.inf, 1e30):
        found = values_and_gradients(jnp.where(MASK[..., None], CODES, garbage))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    for _, gradient in expected:
        np.testing.assert_array_equal(gradient[~MASK], 0.0)
        partly_flat = isinstance(penalty, jr.L1Inf | jr.RangeHinge)
        assert np.any(gradient[MASK] != 0) if partly_flat else np.all(gradient[MASK] != 0)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_nothing_that_counts_is_zero(penalty):
    @jax.jit
    def values_and_gradients(empty, x, none):
        return [
            jax.value_and_grad(
                lambda a, r=reduction, m=mask: jr.penalize(a, penalty, reduction=r, mask=m)
            )(activation)
            for reduction in REDUCTIONS
            for activation, mask in [(empty, None), (x, none)]
        ]

    results = values_and_gradients(jnp.zeros((0, 3)), CODES, np.zeros_like(MASK))
    assert len(results) == 8
    for value, gradient in results:
        assert value == 0.0
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_half_precision_activations_are_added_up_in_float32():
    x = jnp.ones((256, 256), jnp.bfloat16)
    value = jr.penalize(x, jr.L1(1.0), reduction="sum")
    assert value.dtype == jnp.float32
    assert value == 65_536
    assert jr.penalize(x, jr.L1(1.0), reduction="mean", mask=jnp.ones(256, bool)) == 1.0


def test_float64_activations_give_float64():
    with jax.enable_x64():
        x = jnp.full((3, 1), 1 / 3)
        value = jr.penalize(x, jr.L1(0.1))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, 0.1 / 3, rtol=1e-15)


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3), (6, 2, 1), (2, 6), ()], ids=str)
def test_mask_of_another_shape_is_an_error(shape):
    message = (
        "A mask must have the shape of all axes but the last;"
        f' got {shape} for "x" of shape (6, 2, 3).'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.penalize(CODES, jr.L1(1.0), mask=jnp.ones(shape, bool))


def test_a_mask_of_weights_is_an_error():
    for dtype in ("float32", "complex64"):
        with pytest.raises(TypeError, match=f"booleans, or integers; got dtype {dtype}"):
            jr.penalize(CODES, jr.L1(1.0), mask=0.5 * jnp.ones(CODES.shape[:-1], dtype))
    integers = jr.penalize(CODES, jr.L1(1.0), mask=np.asarray(MASK, int))
    np.testing.assert_allclose(integers, jr.penalize(CODES, jr.L1(1.0), mask=MASK), rtol=1e-6)


def test_unknown_reduction_is_an_error():
    message = (
        "A reduction must be one of 'batch_mean', 'sum', 'mean', 'token_mean'; got 'batch_sum'."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.penalize(CODES, jr.L1(1.0), reduction="batch_sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "penalty", "message"),
    [
        ("int32", jr.L1(1.0), "`jaxreg.L1` takes a floating-point array; got dtype int32"),
        ("complex64", jr.KLSparsity(1.0, target=0.1), "`jaxreg.KLSparsity` takes a real array"),
    ],
    ids=["int32", "complex64"],
)
def test_bad_dtype_is_an_error(dtype, penalty, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        jr.penalize(jnp.ones((2, 2), dtype), penalty)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_unequal_microbatches_combine_to_the_whole_batch(penalty, mask):
    @jax.jit
    def totals(x):
        def terms(part, reduction):
            return terms_of(x[part], penalty, reduction, None if mask is None else mask[part])

        parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
        combined = [jr.combine([terms(part, r) for part in parts]).total for r in REDUCTIONS]
        return combined, [terms(slice(None), r).total for r in REDUCTIONS]

    combined, whole = totals(CODES)
    np.testing.assert_allclose(combined, whole, rtol=1e-6)
    assert len(set(map(float, whole))) > 1 or isinstance(penalty, jr.KLSparsity)


def test_an_empty_microbatch_changes_nothing():
    penalty = PENALTIES["L2+KLSparsity"]
    terms = [terms_of(x, penalty) for x in (CODES, CODES[:0])]
    np.testing.assert_allclose(jr.combine(terms).total, terms[0].total, rtol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_terms_stacked_by_scan(penalty):
    @jax.jit
    def scan(microbatches):
        _, terms = jax.lax.scan(lambda carry, x: (carry, terms_of(x, penalty)), 0, microbatches)
        return terms, terms.total, jr.combine(terms).total

    microbatches = jnp.asarray(CODES).reshape(3, 2, 2, 3)
    terms, total, combined = scan(microbatches)
    np.testing.assert_allclose(combined, terms_of(CODES, penalty).total, rtol=1e-6)
    # Uncombined, each microbatch is a term of its own.
    each = [terms_of(x, penalty).total for x in microbatches]
    np.testing.assert_allclose(total, sum(each), rtol=1e-6)
    np.testing.assert_allclose(terms["code"], sum(each), rtol=1e-6)


def test_terms_stacked_twice_are_added_up():
    x = jnp.asarray(CODES)
    terms = jax.vmap(jax.vmap(lambda x: terms_of(x, jr.L1(0.5), "mean")))(x)
    np.testing.assert_allclose(terms.total, 0.5 * np.mean(CODES, axis=-1).sum(), rtol=1e-6)


def test_strengths_may_differ_along_a_stack():
    stacked = jax.vmap(lambda s, x: terms_of(x, jr.L1(s), "sum"))(
        jnp.array([1.0, 10.0]), jnp.ones((2, 3))
    )
    assert stacked.total == 33.0


def test_combine_takes_the_strengths_of_the_first():
    combined = jr.combine([terms_of(jnp.ones((1, 2)), jr.L1(s)) for s in (1.0, 5.0)])
    assert combined.total == 2.0


def test_gradient_flows_through_combine():
    x = jnp.asarray(CODES)
    penalty = PENALTIES["L2+KLSparsity"]

    @jax.jit
    def gradients(x):
        combined = lambda x: jr.combine([terms_of(x[:1], penalty), terms_of(x[1:], penalty)]).total  # noqa: E731
        return jax.grad(combined)(x), jax.grad(lambda x: terms_of(x, penalty).total)(x)

    accumulated, whole = gradients(x)
    np.testing.assert_allclose(accumulated, whole, rtol=1e-5)


def test_combine_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"takes at least one `Terms`; got none"):
        jr.combine([])


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_combine_of_what_are_no_terms_is_an_error(axis_name):
    terms = terms_of(CODES, jr.L1(1.0))
    wrong: list[Any] = [[(CODES, terms)], (CODES, terms), terms.as_dict()]
    for parts in wrong:
        with pytest.raises(TypeError, match=r"takes `Terms`, the second of what `jaxreg\.activity"):
            jr.combine(parts, axis_name=axis_name)


def test_combine_takes_an_iterator():
    terms = terms_of(CODES, jr.L1(1.0))
    assert jr.combine(iter([terms, terms])).total == terms.total


def test_combine_of_different_sites_is_an_error():
    terms = [terms_of(CODES, jr.L1(1.0), path=path) for path in ("a", "b")]
    with pytest.raises(
        ValueError, match=r"same sites and penalties; got \[\{'a': \['L1'\]\}, \{'b'"
    ):
        jr.combine(terms)


def test_combine_of_different_penalties_or_reductions_is_an_error():
    first = terms_of(CODES, jr.L1(1.0))
    for other in (terms_of(CODES, jr.L2(1.0)), terms_of(CODES, jr.L1(1.0), "sum")):
        with pytest.raises(ValueError, match="takes terms of the same sites"):
            jr.combine([first, other])


def test_terms_are_a_mapping_from_path_to_value():
    one = measure(jnp.ones((2, 3)), jr.L1(1.0), "batch_mean")
    two = measure(jnp.ones((1, 3)), jr.L2(2.0), "sum")
    terms = jr.Terms({"a": (one, two), "b": (two,)})
    assert list(terms) == ["a", "b"]
    assert len(terms) == 2
    assert [terms["a"], terms["b"], terms.total] == [9.0, 6.0, 15.0]
    plain = terms.as_dict()
    assert type(plain) is dict
    assert {path: value.shape for path, value in plain.items()} == {"a": (), "b": ()}
    with pytest.raises(KeyError, match="c"):
        terms["c"]


def test_no_terms_total_zero():
    assert jr.Terms({}).total == 0.0
    assert jr.Terms({}).total.dtype == jnp.float32
    assert jr.combine([jr.Terms({}), jr.Terms({})]).as_dict() == {}


def test_terms_pass_through_jit():
    total, terms = jax.jit(lambda t: (t.total, t))(terms_of(CODES, PENALTIES["L2+KLSparsity"]))
    assert isinstance(terms, jr.Terms)
    np.testing.assert_allclose(terms.total, total, rtol=1e-6)


def test_sums_and_counts_are_carried_not_activations():
    for penalty, reduction in itertools.product([jr.L1(1.0), jr.L1L2(1.0, 1.0)], REDUCTIONS):
        leaves = jax.tree.leaves(terms_of(CODES, penalty, reduction))
        assert all(leaf.shape == () for leaf in leaves)
    shapes = {leaf.shape for leaf in jax.tree.leaves(terms_of(CODES, PENALTIES["KLSparsity"]))}
    assert shapes == {(), (3,)}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("axis", [None, -1], ids=["columns", "rows"])
def test_a_masked_group_is_the_group_of_the_tokens_that_count(axis, weighted):
    x = jnp.arange(1.0, 13.0).reshape(4, 3)
    mask = jnp.array([True, False, True, False])
    penalty = jr.GroupLasso(1.0, axis=axis, weighted=weighted)
    masked = jr.penalize(x, penalty, reduction="sum", mask=mask)
    np.testing.assert_allclose(masked, penalty(x[mask]), rtol=1e-6)


def test_combine_takes_any_iterable():
    terms = [terms_of(CODES, jr.L1(1.0)), terms_of(CODES, jr.L1(1.0))]
    assert jr.combine(iter(terms)).total == jr.combine(terms).total


def test_combine_of_one_batch_is_an_error():
    with pytest.raises(ValueError, match=r"a leading axis of microbatches; got one of a single"):
        jr.combine(terms_of(CODES, jr.L1(1.0)))


REACHES_OVER: dict[str, Any] = {
    "L1Inf": jr.L1Inf(0.5),
    "SoftOrthogonal": jr.SoftOrthogonal(0.5),
    "TotalVariation": jr.TotalVariation(0.5, axis=(0, 1)),
    "Slowness": jr.Slowness(0.5, axis=0),
    "DeepSeekLoadBalance": jr.DeepSeekLoadBalance(0.5, k=2),
    "Sum": jr.L1(0.5) + jr.SpectralNorm(0.5),
}
LIES_WITHIN: dict[str, Any] = {
    "L1Inf": jr.L1Inf(0.5, axis=-1),
    "SoftOrthogonal": jr.SoftOrthogonal(0.5, batch_axes=0),
    "TotalVariation": jr.TotalVariation(0.5, axis=1),
    "Slowness": jr.Slowness(0.5),
    "DeepSeekLoadBalance": jr.DeepSeekLoadBalance(0.5, k=2),
    "TopKLoadBalance": jr.TopKLoadBalance(0.5, k=2),
}


@pytest.mark.parametrize("name", REACHES_OVER)
def test_parts_of_what_reaches_over_the_batch_do_not_add_up(name):
    terms = terms_of(CODES[:, 0], REACHES_OVER[name])
    message = (
        f'`jaxreg.combine` cannot add up parts of a batch for {name} of "code": its groups,'
        " matrices or signals reach over the leading axis, which was split. Let each lie within"
        " one example (by `axis`, `batch_axes`, `per_group` or the shape of the array), or"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.combine([terms, terms])
    assert terms.total > 0  # the whole batch by itself is no sum of parts


@pytest.mark.parametrize("name", LIES_WITHIN)
def test_parts_of_what_lies_within_examples_add_up(name):
    @jax.jit
    def totals(x):
        parts = [terms_of(part, LIES_WITHIN[name]) for part in (x[:1], x[1:])]
        return jr.combine(parts).total, terms_of(x, LIES_WITHIN[name]).total

    combined, whole = totals(CODES)
    np.testing.assert_allclose(combined, whole, rtol=1e-6)


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_parts_along_an_axis_that_has_a_name_combine(penalty):
    @jax.jit
    @functools.partial(jax.vmap, axis_name="parts")
    def totals(x):
        named = jr.penalize(x, penalty, axis_name="parts")
        return named, jr.combine(terms_of(x, penalty), axis_name="parts").total

    parts = jnp.asarray(CODES).reshape(3, 2, 2, 3)
    expected = jnp.full(3, jr.penalize(CODES, penalty))
    np.testing.assert_allclose(totals(parts), (expected, expected), rtol=1e-6)


def test_terms_of_scanned_layers_stay_apart_along_an_axis_that_has_a_name():
    def total(x):
        layers = jax.vmap(lambda x: terms_of(x, jr.L1(0.5)))(jnp.stack([x, 2 * x]))
        return jr.combine(layers, axis_name="parts").total

    parts = jnp.asarray(CODES).reshape(3, 2, 2, 3)
    found = jax.vmap(total, axis_name="parts")(parts)
    np.testing.assert_allclose(found, 3 * jnp.full(3, jr.penalize(CODES, jr.L1(0.5))), rtol=1e-6)


def test_reference_is_not_carried_out_with_the_moments():
    penalty = jr.L2To(0.5, reference=CODES + 1) + jr.L1(0.1)
    terms = terms_of(CODES, penalty, "sum")
    assert all(leaf.shape == () for leaf in jax.tree.leaves(terms))
    np.testing.assert_allclose(terms.total, penalty(CODES), rtol=1e-6)


def test_reference_under_a_mask():
    value = jr.penalize(CODES, jr.L2To(0.5, reference=CODES + 1), reduction="sum", mask=MASK)
    np.testing.assert_allclose(value, 0.5 * MASK.sum() * 3, rtol=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [
        jr.Slowness(0.5, axis=-3),
        jr.TemporalDifference(0.5, axis=-3),
        jr.TotalVariation(0.5, axis=-3),
        jr.TotalVariation(0.5, axis=(1, -3)),
        jr.L1Inf(0.5, axis=-3),
    ],
    ids=str,
)
def test_an_axis_counted_from_the_end_may_be_the_leading_one(penalty):
    terms = jr.Terms({"h": (measure(jnp.ones((4, 3, 2)), penalty, "sum"),)})
    with pytest.raises(ValueError, match="cannot add up parts of a batch"):
        jr.combine([terms, terms])


def test_entries_are_counted_beyond_the_integers():
    @jax.jit
    def count(mask):
        x = jnp.broadcast_to(jnp.float32(0), (2**16, 2**16))
        return measure(x, jr.L1(1.0), "mean", mask, moments=jnp.float32(0)).count

    assert count(np.ones(2**16, bool)) == 2.0**32


def test_a_parameter_counts_once_where_jax_does_not_know_that_it_is_the_same():
    model = jr.linen.Dense(2, kernel_regularizer=jr.L1(0.5))
    x = jnp.ones((3, 4, 5))
    params = model.init(jax.random.key(0), x[0])

    def shard(x):
        _, terms = jr.activity({})(model.apply)(params, x)
        return jr.combine(terms, axis_name="parts").total

    expected = 0.5 * jnp.sum(jnp.abs(params["params"]["kernel"]))
    np.testing.assert_allclose(jax.vmap(shard, axis_name="parts")(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [
        jr.SoftOrthogonal(0.5, batch_axes=-3),
        jr.Nuclear(0.5, batch_axes=(-3,)),
        jr.L1Inf(0.5, axis=-2),
        jr.L1Inf(0.5, batch_axes=-3),
        jr.TotalVariation(0.5, axis=-2),
    ],
    ids=str,
)
def test_batch_axes_counted_from_the_end_may_be_the_leading_one(penalty):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
    terms = [jr.Terms({"h": (measure(part, penalty, "sum"),)}) for part in (x[:1], x[1:])]
    np.testing.assert_allclose(jr.combine(terms).total, penalty(x), rtol=1e-5)


def test_float64_counts_are_exact():
    with jax.enable_x64():
        x = jnp.ones((2**24 + 1, 1))
        assert jr.penalize(x, jr.L1(1.0)) == 1


@pytest.mark.parametrize("penalty", [jr.Decorrelation(1.0), jr.VarianceHinge(1.0)], ids=str)
def test_a_microbatch_without_examples_adds_nothing(penalty):
    x = jnp.arange(12.0).reshape(4, 3) ** 2
    mask = jnp.array([[True] * 4, [False] * 4])
    parts = [jr.activity({".": penalty}, mask=m)(nn.Sequential([lambda x: x]).apply) for m in mask]
    terms = jr.combine([part({}, x)[1] for part in parts])
    np.testing.assert_allclose(terms.total, penalty(x), rtol=1e-5)
