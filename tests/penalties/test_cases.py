"""What every penalty of the registry must satisfy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxreg as jr
from tests.registry import CASES, STRENGTH, Case, derivatives

every_penalty = pytest.mark.parametrize("case", CASES, ids=str)
STRENGTHS = np.linspace(0.1, 0.8, 8).astype(np.float32)


def both(penalty: jr.Penalty, x: jax.Array):
    value, gradient, _ = derivatives(penalty, x, jnp.ones_like(x))
    return value, gradient


def point(case: Case, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(case.sample, dtype)


@every_penalty
def test_value_is_the_formula_added_up_in_float32(case):
    value, gradient = both(case.penalty, point(case))
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert (gradient.shape, gradient.dtype) == (case.sample.shape, jnp.float32)
    np.testing.assert_allclose(value, case.value(case.sample), rtol=2e-6)


@every_penalty
def test_float64_value_gradient_and_second_order(case):
    with jax.enable_x64():
        x = point(case, jnp.float64)
        direction = np.cos(np.arange(x.size)).reshape(x.shape)
        value, gradient, curvature = derivatives(case.penalty, x, direction)
        assert (value.dtype, gradient.dtype) == (jnp.float64, jnp.float64)
        np.testing.assert_allclose(value, case.value(case.sample), rtol=1e-13)
        np.testing.assert_allclose(gradient, central_differences(case), rtol=1e-6, atol=1e-8)
        h = 1e-5
        _, ahead, _ = derivatives(case.penalty, x + h * direction, direction)
        _, behind, _ = derivatives(case.penalty, x - h * direction, direction)
        np.testing.assert_allclose(curvature, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def central_differences(case: Case, h: float = 1e-5):
    out = np.empty_like(case.sample)
    for index in np.ndindex(out.shape):
        step = np.zeros_like(case.sample)
        step[index] = h
        out[index] = (case.value(case.sample + step) - case.value(case.sample - step)) / (2 * h)
    return out


@every_penalty
def test_complex_entries_count_by_their_modulus(case):
    x = jnp.asarray(
        case.sample * np.exp(1j * np.arange(case.sample.size)).reshape(case.sample.shape)
    )
    if not case.takes_complex:
        with pytest.raises(TypeError, match="takes a real array; got dtype complex64"):
            case.penalty(x)
        return
    value, gradient = both(case.penalty, x)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.complex64
    np.testing.assert_allclose(value, case.value(x), rtol=2e-6)
    # The direction x / |x| has the slope of the modulus; jax.grad gives the conjugate gradient.
    direction = np.conj(gradient) / np.where(gradient == 0, 1, np.abs(gradient))
    h = 1e-6
    ahead, behind = (np.asarray(x, np.complex128) + t * direction for t in (h, -h))
    slope = (case.value(ahead) - case.value(behind)) / (2 * h)
    np.testing.assert_allclose(np.sum(np.abs(gradient)), slope, rtol=1e-4)


@every_penalty
def test_half_precision_is_only_that_of_the_input(case):
    x = point(case, jnp.bfloat16)
    value, gradient = both(case.penalty, x)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    assert gradient.shape == x.shape
    np.testing.assert_allclose(value, case.value(x), rtol=2e-6)
    _, wide = both(case.penalty, x.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, wide.astype(jnp.bfloat16))


@every_penalty
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_strict_dtype_promotion(case, dtype):
    x = jax.ShapeDtypeStruct(case.sample.shape, dtype)
    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.eval_shape(both, case.penalty, x)
        if case.has_prox:
            assert jax.eval_shape(case.penalty.prox, x, 0.1) == x
    assert value.dtype == jnp.float32
    assert gradient == x


@every_penalty
def test_gradient_at_zero_is_the_documented_one_and_twice_differentiable(case):
    zero = jnp.zeros(case.sample.shape)
    _, gradient, curvature = derivatives(case.penalty, zero, jnp.ones_like(zero))
    expected = np.broadcast_to(STRENGTH * case.gradient_at_zero, zero.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
    assert np.isfinite(curvature).all()
    if case.curvature is not None:
        expected = np.broadcast_to(STRENGTH * case.curvature, zero.shape)
        np.testing.assert_allclose(curvature, expected, rtol=1e-5, atol=1e-8)


@every_penalty
def test_one_trace_serves_every_strength(case):
    x = point(case)
    ones = jnp.ones_like(x)
    _, gradient, _ = derivatives(case.penalty, x, ones)
    weaker, stronger = case.build(0.1), case.build(0.7)
    with jax.no_tracing():
        results = [derivatives(penalty, x, ones) for penalty in (weaker, stronger)]
    for strength, (value, own, _) in zip((0.1, 0.7), results, strict=True):
        # A gradient that is a small difference of large terms is rounded like those.
        expected = case.formula(case.sample, strength), gradient * (strength / STRENGTH)
        chex.assert_trees_all_close((value, own), expected, rtol=1e-5, atol=1e-7)


@every_penalty
def test_traced_strengths_have_a_value_and_a_slope_each(case):
    x = point(case)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(lambda s: case.build(s)(x))))(STRENGTHS)
    expected = [case.formula(case.sample, s) for s in STRENGTHS.tolist()]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    # The slope is the value at a strength of one.
    expected = [case.formula(case.sample, 1.0)] * len(STRENGTHS)
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


@every_penalty
def test_vmap_over_penalties_and_data_gives_a_value_for_each(case):
    stacked = jax.tree.map(lambda *s: np.stack(s), *[case.build(s) for s in STRENGTHS])
    scales = np.linspace(0.25, 1, 8)
    batch = jnp.asarray(np.stack([case.sample * scale for scale in scales]), jnp.float32)
    values = jax.jit(jax.vmap(lambda p, x: p(x)))(stacked, batch)
    expected = [
        case.formula((case.sample * scale).astype(np.complex128), s)
        for s, scale in zip(STRENGTHS.tolist(), scales, strict=True)
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


@every_penalty
def test_unflatten_takes_any_leaves(case):
    leaves, treedef = jax.tree.flatten(case.penalty)
    placeholders = [object() for _ in leaves]
    assert jax.tree.leaves(jax.tree.unflatten(treedef, placeholders)) == placeholders
    assert repr(jax.tree.map(lambda leaf: leaf, case.penalty)) == repr(case.penalty)


@pytest.mark.parametrize("case", [case for case in CASES if case.any_shape], ids=str)
def test_arrays_of_no_entry_and_of_one(case):
    shape = case.sample.shape
    shapes = [(0, *shape[1:]), (*shape[:-1], 0), (1,) * len(shape)]
    both = jax.jit(lambda xs: [(case.penalty(x), case.penalty.gradient(x)) for x in xs])
    *empty, (value, gradient) = both([jnp.full(shape, 0.5) for shape in shapes])
    assert [(float(zero), none.shape) for zero, none in empty] == [(0, s) for s in shapes[:2]]
    assert gradient.shape == shapes[2]
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@every_penalty
def test_nan_propagates_to_value_and_gradient(case):
    x = point(case).at[(0,) * case.sample.ndim].set(jnp.nan)
    value, gradient = both(case.penalty, x)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[(0,) * case.sample.ndim]) == case.nan_gradient


@every_penalty
def test_inf_propagates_to_the_value(case):
    x = point(case).at[(0,) * case.sample.ndim].set(jnp.inf)
    value, _ = both(case.penalty, x)
    assert jnp.isfinite(value) == case.bounded


@every_penalty
def test_integer_input_is_an_error(case):
    x = jnp.ones(case.sample.shape, jnp.int32)
    with pytest.raises(TypeError, match="takes a floating-point array; got dtype int32"):
        case.penalty(x)


@every_penalty
def test_gradient_of_integer_input_is_the_same_error(case):
    x = jnp.ones(case.sample.shape, jnp.int32)
    with pytest.raises(TypeError, match="takes a floating-point array; got dtype int32"):
        case.penalty.gradient(x)


@every_penalty
def test_eight_devices_give_what_one_gives(case):
    axis = case.sample.shape.index(8)
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("shards",))
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "shards"))
    x = jax.device_put(point(case), sharding)
    value, gradient = both(case.penalty, x)
    _, on_one = both(case.penalty, point(case))
    assert len(x.sharding.device_set) == 8
    np.testing.assert_allclose(value, case.value(case.sample), rtol=2e-6)
    np.testing.assert_allclose(gradient, on_one, rtol=1e-5, atol=1e-7)


def test_bfloat16_ones_are_counted_exactly():
    ones = jnp.ones(65_536, jnp.bfloat16)
    assert jr.L1(1.0)(ones) == 65_536
    assert jr.L2(1.0)(ones) == 65_536
    assert jr.GroupLasso(1.0, axis=0, weighted=False)(ones) == 256


def test_float16_squares_do_not_overflow():
    x = jnp.full((2, 1), 1e4, jnp.float16)
    assert jr.L2(0.5)(x) == 1e8
    np.testing.assert_array_equal(jr.L2(0.5).gradient(x), x)
    np.testing.assert_allclose(jr.GroupLasso(1.0)(x), 2e4, rtol=1e-6)


@pytest.mark.parametrize("penalty", [jr.L1(2.0), jr.GroupLasso(2.0)], ids=["L1", "GroupLasso"])
def test_subgradient_is_zero_only_at_the_kink(penalty):
    x = jnp.array([3.0, 0.0, -4.0])
    np.testing.assert_array_equal(penalty.gradient(x), [2.0, 0.0, -2.0])


def test_group_of_zeros_beside_another_keeps_its_gradient_finite():
    x = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    penalty = jr.GroupLasso(1.0, weighted=False)
    np.testing.assert_allclose(penalty.gradient(x), [[0.6, 0.0], [0.8, 0.0]], rtol=1e-6)
    _, curvature = jax.jit(lambda x: jax.jvp(penalty.gradient, (x,), (jnp.ones_like(x),)))(x)
    # (I - uu') / norm for the group (3, 4), along (1, 1).
    np.testing.assert_allclose(curvature, [[0.032, 0.0], [-0.024, 0.0]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [(jr.L1(2.0), 1.0), (jr.L2(2.0), 0.5), (jr.L1L2(2.0, 2.0), 1.5), (jr.GroupLasso(2.0), 1.0)],
    ids=lambda p: type(p).__name__,
)
def test_scalar_array(penalty, expected):
    assert penalty(jnp.float32(-0.5)) == expected
    assert penalty.gradient(jnp.float32(-0.5)).shape == ()


def test_rank_zero_is_one_example_of_one_unit_for_kl_sparsity():
    value = jr.KLSparsity(1.0, target=0.2)(jnp.float32(0.5))
    np.testing.assert_allclose(value, 0.2 * np.log(0.4) + 0.8 * np.log(1.6), rtol=1e-6)


def test_kernel_term_of_the_case_keras_documents():
    assert jr.L1(0.01)(jnp.ones((5, 5))) == np.float32(0.25)


@pytest.mark.parametrize(
    ("axis", "groups"),
    [
        (None, [0, 1, 0, 1, 0, 1]),
        (0, [0, 1, 2, 3, 4, 5]),
        (1, [0, 1, 0, 1, 0, 1]),
        (-1, [0, 0, 1, 1, 2, 2]),
        ((0, -1), [0, 0, 1, 1, 2, 2]),
        ((0, 1, 2), [0] * 6),
        ((), [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_group_lasso_axis(axis, groups, weighted):
    x = np.array([1.0, -2.0, 3.0, 4.0, -5.0, 6.0])
    expected = 0.0
    for group in set(groups):
        members = x[np.array(groups) == group]
        expected += np.sqrt(len(members) if weighted else 1) * np.sqrt(np.sum(members**2))
    penalty = jr.GroupLasso(1.0, axis=axis, weighted=weighted)
    np.testing.assert_allclose(
        penalty(jnp.asarray(x.reshape(1, 3, 2), jnp.float32)), expected, rtol=1e-6
    )


def test_group_lasso_of_a_vector_is_l1():
    x = jnp.array([1.0, -2.0])
    assert jr.GroupLasso(1.0)(x) == 3.0


def test_kl_sparsity_is_taken_over_all_axes_but_the_last():
    penalty = jr.KLSparsity(1.0, target=0.3)
    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(penalty(x), penalty(x.reshape(6, 4)), rtol=1e-6)
    # Repeating the examples changes no mean: nothing is divided by, or added over, the batch.
    np.testing.assert_allclose(penalty(x), penalty(jnp.concatenate([x, x])), rtol=1e-6)


def test_kl_sparsity_target_is_a_leaf():
    x = jnp.full((2, 1), 0.5)
    gradient = jax.grad(lambda target: jr.KLSparsity(1.0, target=target)(x))(0.2)
    np.testing.assert_allclose(gradient, np.log(0.2 / 0.8), rtol=1e-5)
