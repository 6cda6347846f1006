"""Penalties of whole batches: microbatches, masks, and the numerics of covariances and norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.terms import measure
from tests.registry.statistic import decorrelation, variance_hinge

RNG = np.random.default_rng(0)
X = (RNG.uniform(0.1, 2.0, (6, 4, 5)) * [1, 2, 3, 1, 1]).astype(np.float32)
# One sequence counts not at all, one has a single step.
MASK = RNG.uniform(size=(6, 4)) < 0.7
MASK[2], MASK[4] = False, [False, True, False, False]

MEANS = {
    "Decorrelation": jr.Decorrelation(0.5),
    "VarianceHinge": jr.VarianceHinge(0.5, target=2.0),
    "ActivationNorm": jr.ActivationNorm(0.5),
    "TemporalDifference": jr.TemporalDifference(0.5),
    "Slowness": jr.Slowness(0.5),
    "ZLoss": jr.ZLoss(0.5),
    "RouterZLoss": jr.RouterZLoss(0.5),
    "Entropy": jr.Entropy(0.5),
    "ConfidencePenalty": jr.ConfidencePenalty(0.5),
    "LabelEntropy": jr.LabelEntropy(0.5),
    "ImportanceCV": jr.ImportanceCV(0.5),
    "SwitchLoadBalance": jr.SwitchLoadBalance(0.5),
    "SwitchLoadBalance-groups": jr.SwitchLoadBalance(0.5, per_group=True),
    "GShardLoadBalance": jr.GShardLoadBalance(0.5),
    "TopKLoadBalance": jr.TopKLoadBalance(0.5, k=2),
    "DeepSeekLoadBalance": jr.DeepSeekLoadBalance(0.5, k=2),
    "DeepSeekLoadBalance-V3": jr.DeepSeekLoadBalance(0.5, k=3, scores="sigmoid"),
}
PENALTIES = MEANS | {
    "HoyerSquare": jr.HoyerSquare(0.5),
    "HoyerSquare-examples": jr.HoyerSquare(0.5, axis=-1),
    "HoyerSparsity": jr.HoyerSparsity(0.5),
    "HoyerSparsity-units": jr.HoyerSparsity(0.5, axis=(0, 1)),
}
every_penalty = pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
value_and_gradient = jax.jit(lambda penalty, x: (penalty(x), penalty.gradient(x)))
every_mean = pytest.mark.parametrize("penalty", MEANS.values(), ids=MEANS)


def terms_of(x, penalty, mask=None):
    return jr.Terms({"h": (measure(x, penalty, "batch_mean", mask),)})


@every_penalty
def test_microbatches_combine_to_the_whole_batch(penalty):
    def whole(x, mask):
        return jr.penalize(x, penalty, mask=mask)

    def unequal(x, mask):
        parts = slice(0, 2), slice(2, 6)
        return jr.combine([terms_of(x[p], penalty, mask[p]) for p in parts]).total

    def equal(x):
        _, stacked = jax.lax.scan(
            lambda carry, part: (carry, terms_of(part, penalty)),
            None,
            x.reshape(3, 2, *x.shape[1:]),
        )
        return jr.combine(stacked).total

    @jax.jit
    def given(x, mask):
        masked = [jax.value_and_grad(f)(x, mask) for f in (whole, unequal)]
        return [*masked, jax.value_and_grad(whole)(x, None), jax.value_and_grad(equal)(x)]

    masked, combined, unmasked, scanned = given(X, MASK)
    for found, expected in [(combined, masked), (scanned, unmasked)]:
        assert np.any(expected[1] != 0)
        np.testing.assert_allclose(found[0], expected[0], rtol=5e-6)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=3e-7)
    assert masked[0] != unmasked[0]


@every_penalty
def test_what_is_masked_out_leaks_into_neither_value_nor_gradient(penalty):
    given = jax.jit(jax.value_and_grad(lambda x: jr.penalize(x, penalty, mask=MASK)))
    value, gradient = given(X)
    np.testing.assert_array_equal(gradient[~MASK], 0.0)
    for garbage in (np.nan, np.inf, 1e30):
        found, slope = given(jnp.where(MASK[..., None], X, garbage))
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-8)


@every_mean
def test_means_are_not_divided_again_and_nothing_that_counts_is_zero(penalty):
    @jax.jit
    def values(x, mask, none):
        reductions = [
            jr.penalize(x, penalty, reduction=r, mask=mask)
            for r in ("batch_mean", "sum", "mean", "token_mean")
        ]
        return reductions, jax.value_and_grad(lambda x: jr.penalize(x, penalty, mask=none))(x)

    reductions, (value, gradient) = values(X, MASK, np.zeros_like(MASK))
    np.testing.assert_allclose(reductions, reductions[0], rtol=1e-6)
    assert reductions[0] > 0
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


@pytest.mark.parametrize(
    "penalty",
    [
        penalty
        for name, penalty in MEANS.items()
        if not getattr(penalty, "per_group", False)
        and name not in ("TemporalDifference", "Slowness")
    ],
    ids=lambda p: type(p).__name__,
)
def test_masked_means_are_those_of_the_examples_that_count(penalty):
    np.testing.assert_allclose(jr.penalize(X, penalty, mask=MASK), penalty(X[MASK]), rtol=2e-6)


def test_one_example_decorrelates_nothing_and_has_no_variance():
    x = jnp.array([[3.0, -2.0, 1.0]])
    hinge = jr.VarianceHinge(1.0, target=1.5, epsilon=0.25)
    for penalty, expected in [(jr.Decorrelation(1.0), 0.0), (hinge, 1.0)]:
        value, gradient = value_and_gradient(penalty, x)
        assert value == expected
        np.testing.assert_array_equal(gradient, jnp.zeros((1, 3)))


def test_one_feature_has_nothing_to_decorrelate_from():
    assert jr.Decorrelation(1.0)(jnp.array([[1.0], [5.0]])) == 0.0
    assert jnp.isnan(jr.Decorrelation(1.0)(jnp.array([[1.0], [jnp.nan]])))


def test_variance_hinge_is_zero_beyond_the_target():
    # Of a variance of 4.5; and of one of 2, to which a deviation of 2 is the target itself.
    for x, epsilon in ([[0.0], [3.0]], 1e-4), ([[-1.0], [1.0]], 2.0):
        penalty = jr.VarianceHinge(1.0, target=2.0, epsilon=epsilon)
        value, gradient = value_and_gradient(penalty, jnp.array(x))
        assert value == 0.0
        np.testing.assert_array_equal(gradient, [[0.0], [0.0]])


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_a_large_mean_takes_no_digits_from_covariances(mean):
    x = (RNG.normal(size=(64, 3)) @ [[1, 0.5, 0], [0, 1, 0], [0, 0, 0.1]] + mean).astype(np.float32)
    values = jax.jit(lambda x: (jr.Decorrelation(1.0)(x), jr.VarianceHinge(1.0, target=2.0)(x)))(x)
    wide = x.astype(np.float64)
    expected = decorrelation(wide, 1.0), variance_hinge(wide, 1.0, target=2.0)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_the_squares_of_sums_over_many_examples_do_not_overflow():
    x = jnp.full((4096, 2), 2.0**53)
    assert jr.Decorrelation(1.0)(x) == 0
    np.testing.assert_allclose(jr.VarianceHinge(1.0)(x), 0.99, rtol=1e-6)


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_rounding_between_microbatches_leaves_the_variance_hinge_finite(mean):
    means = mean * np.linspace(1, 2, 8)  # of some of which rounding makes a negative variance
    parts = (means + 1e-4 * RNG.normal(size=(3, 4, 8))).astype(np.float32)
    penalty = jr.VarianceHinge(1.0)

    @jax.jit
    @jax.value_and_grad
    def combined(parts):
        moments = jax.tree.map(lambda m: m.sum(axis=0), jax.vmap(penalty.moments)(parts))
        return penalty.finish(moments, None)

    value, gradient = combined(parts)
    assert 0 <= value <= 1
    assert np.isfinite(gradient).all()


def test_decorrelation_carries_products_and_no_examples():
    leaves = jax.tree.leaves(jr.Decorrelation(1.0).moments(jnp.ones((100, 3))))
    assert {leaf.shape for leaf in leaves} == {(), (3,), (3, 3)}


def test_hoyer_square_counts_equal_entries():
    x = jnp.zeros((3, 4)).at[0, :3].set(-2.0).at[2, 1].set(2.0)
    np.testing.assert_allclose(jr.HoyerSquare(1.0)(x), 4.0, rtol=1e-6)
    np.testing.assert_allclose(jr.HoyerSquare(1.0, axis=-1)(x), 3.0 + 0.0 + 1.0, rtol=1e-6)


@pytest.mark.parametrize("axis", [None, -1, 0], ids=str)
@pytest.mark.parametrize("penalty", [jr.HoyerSquare, jr.HoyerSparsity])
def test_hoyer_measures_are_blind_to_scale(penalty, axis):
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32).at[1].set(0.0)
    value, gradient = value_and_gradient(penalty(1.0, axis=axis), x)
    small, _ = value_and_gradient(penalty(1.0, axis=axis), 1e-3 * x)
    np.testing.assert_allclose(small, value, rtol=1e-5)
    np.testing.assert_allclose(np.sum(gradient * x), 0.0, atol=1e-5)
    np.testing.assert_array_equal(gradient[1], 0.0)


def test_hoyer_sparsity_falls_as_sparsity_grows():
    vectors = jnp.array([[0, 5, 0, 0], [0, 5, 0, 1], [0, 5, 2, 2], [3, -3, 3, 3]], jnp.float32)
    values = [float(jr.HoyerSparsity(1.0)(vector)) for vector in vectors]
    assert values == sorted(values)
    np.testing.assert_allclose([values[0], values[-1]], [0.0, 1.0], atol=1e-6)
    # Hoyer's own measure, the paper's equation.
    x = np.array([0.0, 5.0, 2.0, 2.0])
    sparseness = (np.sqrt(4) - np.abs(x).sum() / np.linalg.norm(x)) / (np.sqrt(4) - 1)
    np.testing.assert_allclose(values[2], 1 - sparseness, rtol=1e-6)


def test_hoyer_sparsity_of_one_entry():
    x = jnp.array([[3.0], [-1.0]])
    penalty = jr.HoyerSparsity(1.0, axis=-1)
    value, gradient = value_and_gradient(penalty, x)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, [[0.0], [0.0]])
    assert jnp.isnan(penalty(jnp.array([[jnp.nan]])))
    assert jr.HoyerSparsity(1.0)(jnp.float32(3.0)) == 0.0


def test_hoyer_sparsity_counts_the_entries_that_a_mask_leaves():
    mask = np.array([True, False, True])
    x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    penalty = jr.HoyerSparsity(1.0)
    masked = jr.penalize(x, penalty, mask=mask, reduction="sum")
    np.testing.assert_allclose(masked, penalty(x[mask]), rtol=1e-6)


@pytest.mark.parametrize("penalty", [jr.HoyerSquare, jr.HoyerSparsity])
def test_hoyer_of_stacked_kernels_is_the_sum_over_kernels(penalty):
    kernels = jnp.asarray(RNG.normal(size=(3, 4, 2)), jnp.float32)
    stacked = penalty(1.0, batch_axes=0)(kernels)
    np.testing.assert_allclose(stacked, sum(map(penalty(1.0), kernels)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"Hoyer\w+\(axis=...\)` must name .* batch_axes=3 for"):
        penalty(1.0, batch_axes=3)(kernels)


@pytest.mark.parametrize("field", ["target", "epsilon"])
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")], ids=str)
def test_variance_hinge_settings_are_positive(field, bad):
    with pytest.raises(ValueError, match=rf"`jaxreg.VarianceHinge\({field}=...\)` must be a pos"):
        jr.VarianceHinge(1.0, **{field: bad})


@pytest.mark.parametrize("size", [1e-10, 1e-13])
def test_gradient_of_hoyer_square_is_finite_beside_tiny_entries(size):
    x = jnp.array([[1.0, 2.0, 0.0], [0.0, size, 0.0]])
    expected = jr.HoyerSquare(1.0, axis=-1).gradient(x.at[1, 1].set(1.0))
    gradient = jr.HoyerSquare(1.0, axis=-1).gradient(x)
    np.testing.assert_allclose(gradient[0], expected[0], rtol=1e-6)
    # The gradient is orthogonal to a single entry; it is of the order of 1 / size otherwise.
    np.testing.assert_allclose(gradient[1], 0, atol=1e-3 / size)
