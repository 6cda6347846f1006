"""Proximal operators, against what defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from tests.registry import STRENGTH, WITH_PROX, Case

every_prox = pytest.mark.parametrize("case", WITH_PROX, ids=str)
every_convex_prox = pytest.mark.parametrize(
    "case", [case for case in WITH_PROX if case.convex], ids=str
)
every_nonconvex_prox = pytest.mark.parametrize(
    "case", [case for case in WITH_PROX if not case.convex], ids=str
)


@jax.jit
def prox(penalty: jr.Penalty, x, step):
    return penalty.prox(x, step)


def inner(a, b) -> float:
    return float(np.real(np.sum(a * np.conj(b))))


def random_point(case: Case, rng, scale: float, dtype):
    shape = case.sample.shape
    x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype == np.complex128 else 0)
    return scale * x


@every_convex_prox
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
def test_prox_residual_is_a_subgradient(case, dtype):
    """x - z lies in t∂R(z): R(y) >= R(z) + <(x - z) / t, y - z> for every y."""
    if dtype == np.complex128 and not case.takes_complex:
        with pytest.raises(TypeError, match="takes a real array"):
            case.penalty.prox(jnp.ones(2, jnp.complex64), 1.0)
        return
    rng = np.random.default_rng(0)
    zeros = 0
    with jax.enable_x64():
        for scale, step in [(0.3, 0.5), (1.0, 0.5), (3.0, 1.5), (1.0, 20.0)]:
            x = random_point(case, rng, scale, dtype)
            z = np.asarray(prox(case.penalty, jnp.asarray(x), step))
            zeros += np.sum(z == 0)
            subgradient = (x - z) / step
            directions = [random_point(case, rng, 1.0, dtype) for _ in range(20)]
            directions += [z, -z, x, -x, subgradient, -subgradient]
            for index in np.ndindex(x.shape):
                unit = np.zeros_like(x)
                unit[index] = 1
                directions += [unit, -unit, 1j * unit] if dtype == np.complex128 else [unit, -unit]
            value = case.value(z)
            for direction in directions:
                for size in (1.0, 1e-4):
                    ahead = case.value(z + size * direction)
                    assert ahead - value >= size * inner(subgradient, direction) - 1e-11
    assert (zeros > 0) == case.sparse


@every_nonconvex_prox
@pytest.mark.parametrize("step", [0.5, 3.0, 20.0])
def test_nonconvex_prox_has_the_least_objective_on_a_grid(case, step):
    """Also where t·s exceeds the width of a concave piece (a step of 20)."""
    grid = np.linspace(-6, 6, 24_001)
    weight = step * STRENGTH
    penalty_on_grid = weight * np.array([case.formula(np.array([z]), 1.0) for z in grid])
    with jax.enable_x64():
        points = np.random.default_rng(0).uniform(-5, 5, 200)
        best = np.asarray(prox(case.penalty, jnp.asarray(points), step))
    for x, z in zip(points, best, strict=True):
        reached = (z - x) ** 2 / 2 + weight * case.formula(np.array([z]), 1.0)
        assert reached <= np.min((grid - x) ** 2 / 2 + penalty_on_grid) + 1e-12
    assert (best == 0).any()


@pytest.mark.parametrize("case", [case for case in WITH_PROX if case.takes_complex], ids=str)
def test_jacobian_of_a_complex_prox_is_that_of_finite_differences(case):
    rng = np.random.default_rng(2)
    with jax.enable_x64():
        x, direction = (random_point(case, rng, 3.0, np.complex128) for _ in range(2))
        moved, tangent = jax.jvp(
            lambda x: prox(case.penalty, x, 0.7), (jnp.asarray(x),), (jnp.asarray(direction),)
        )
        ahead = prox(case.penalty, jnp.asarray(x + 1e-7 * direction), 0.7)
        np.testing.assert_allclose(tangent, (ahead - moved) / 1e-7, rtol=1e-5, atol=1e-6)


@every_convex_prox
def test_prox_is_firmly_nonexpansive(case):
    rng = np.random.default_rng(1)
    for _ in range(5):
        a, b = (random_point(case, rng, 1.0, np.float64).astype(np.float32) for _ in range(2))
        moved = prox(case.penalty, a, 0.7) - prox(case.penalty, b, 0.7)
        assert inner(moved, moved) <= inner(moved, a - b) + 1e-5


@every_convex_prox
def test_moreau_envelope_has_the_residual_as_its_gradient(case):
    """The gradient of min_z R(z) + |z - x|² / 2t by x is (x - prox(x)) / t."""
    step = 0.7

    @jax.jit
    def residual_and_gradient(penalty, x):
        def envelope(x):
            z = penalty.prox(x, step)
            return penalty(z) + jnp.sum(jnp.square(z - x)) / (2 * step)

        return (x - penalty.prox(x, step)) / step, jax.grad(envelope)(x)

    with jax.enable_x64():
        for seed in range(3):
            x = random_point(case, np.random.default_rng(seed), 1.5, np.float64)
            residual, gradient = residual_and_gradient(case.penalty, x)
            np.testing.assert_allclose(gradient, residual, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "case",
    [case for case in WITH_PROX if case.penalty.step_axes(case.sample.ndim) is not None],
    ids=str,
)
def test_prox_takes_a_step_for_each_entry_or_group(case):
    x = jnp.asarray(case.sample, jnp.float32)
    axes = case.penalty.step_axes(x.ndim)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    steps = jnp.asarray(np.random.default_rng(0).uniform(0.1, 5.0, shape), jnp.float32)
    with_each = jax.vmap(prox, (None, None, 0))(case.penalty, x, steps.ravel())
    expected = np.zeros(x.shape)
    for z, index in zip(with_each, np.ndindex(*shape), strict=True):
        own = tuple(slice(None) if a in axes else slice(i, i + 1) for a, i in enumerate(index))
        expected[own] = z[own]
    np.testing.assert_allclose(prox(case.penalty, x, steps), expected, rtol=1e-6, atol=1e-7)


@every_prox
def test_step_zero_is_the_identity(case):
    x = jnp.asarray(case.sample, jnp.float32).at[0].set(0)
    np.testing.assert_array_equal(prox(case.penalty, x, 0.0), x)


@every_prox
def test_minimizer_is_a_fixed_point_and_the_jacobian_there_and_at_zero_is_finite(case):
    derive = jax.jit(lambda x: jax.jvp(lambda x: case.penalty.prox(x, 0.7), (x,), (x + 1,)))
    fixed = jnp.asarray(np.broadcast_to(case.fixed_point, case.sample.shape), jnp.float32)
    out, tangent = derive(fixed)
    np.testing.assert_array_equal(out, fixed)
    assert np.isfinite(tangent).all()
    _, tangent = derive(jnp.zeros(case.sample.shape))
    assert np.isfinite(tangent).all()


@pytest.mark.parametrize("case", [case for case in WITH_PROX if case.any_shape], ids=str)
def test_prox_of_an_empty_array_is_empty(case):
    x = jnp.zeros((0, *case.sample.shape[1:]))
    assert prox(case.penalty, x, 0.7).shape == x.shape


@every_prox
def test_half_precision_is_kept_and_rounded_once(case):
    x = jnp.asarray(case.sample, jnp.bfloat16)
    z = prox(case.penalty, x, 0.7)
    assert z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        z, prox(case.penalty, x.astype(jnp.float32), 0.7).astype(jnp.bfloat16)
    )


@every_prox
def test_a_wider_strength_or_step_does_not_widen_the_result(case):
    with jax.enable_x64():
        x = jnp.asarray(case.sample, jnp.float32)
        strength, step = np.float64(STRENGTH), np.float64(0.7)
        z = jax.eval_shape(lambda: case.build(strength).prox(x, step))
    assert z.dtype == jnp.float32


@pytest.mark.parametrize(
    ("x", "slopes"),
    [([0.0, 0.0, 0.0], [0, 0, 0]), ([0.1, 0.0, 0.2], [0, 0, 0]), ([3.0, 0.0, -1.0], [1, 1, 1])],
)
def test_a_group_that_l1_inf_makes_zero_has_no_derivative(x, slopes):
    prox = jr.L1Inf(1.0, axis=0).prox
    jacobian = jax.jacobian(lambda x: prox(x, 1.0))(jnp.array(x))
    np.testing.assert_array_equal(jacobian, np.diag(slopes))
    np.testing.assert_array_equal(prox(jnp.array(x), jnp.inf), 0)


def test_an_infinite_entry_and_a_nan_among_others_of_a_group():
    x = jnp.array([[jnp.inf, -jnp.inf, jnp.nan], [1.0, 1.0, 1.0], [-2.0, 0.0, 2.0]])
    largest, shared = (
        jr.L1Inf(0.5, axis=0).prox(x, 1.0),
        jr.ExclusiveLasso(0.5, axis=0).prox(x, 1.0),
    )
    np.testing.assert_array_equal(largest[:, :2], x[:, :2])
    np.testing.assert_array_equal(shared[:, :2], jnp.where(jnp.isinf(x), x, 0)[:, :2])
    assert jnp.isnan(largest[:, 2]).all()
    assert jnp.isnan(shared[:, 2]).all()


@every_prox
def test_nan_and_inf_propagate(case):
    first = (0,) * case.sample.ndim
    x = jnp.asarray(case.sample, jnp.float32)
    assert jnp.isnan(prox(case.penalty, x.at[first].set(jnp.nan), 100.0)[first])
    assert prox(case.penalty, x.at[first].set(-jnp.inf), 0.1)[first] == -jnp.inf


@every_prox
def test_prox_under_jit_and_vmap_over_strength_and_step(case):
    x = jnp.asarray(case.sample, jnp.float32)
    strengths, steps = jnp.array([0.1, 0.4, 0.9]), jnp.array([0.2, 0.3, 1.5])
    batched = jax.vmap(lambda s, t: prox(case.build(s), x, t))(strengths, steps)
    for s, t, z in zip(strengths, steps, batched, strict=True):
        np.testing.assert_allclose(prox(case.build(s), x, t), z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [jr.L1(0.5), jr.L1L2(0.5, 0.0), jr.GroupLasso(0.5), jr.L1(0.5) + jr.L2(0.0)],
    ids=["L1", "L1L2", "GroupLasso", "L1+L2"],
)
def test_soft_thresholding_zeroes_exactly(penalty):
    x = jnp.array([3.0, -1.5, 1.0, -1.0, 0.25, 0.0])
    z = penalty.prox(x, 2.0)
    np.testing.assert_allclose(z, [2.0, -0.5, 0.0, 0.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(z == 0, [False, False, True, True, True, True])


def test_group_lasso_zeroes_whole_groups():
    x = jnp.array([[3.0, 0.3], [4.0, 0.4]])
    z = jr.GroupLasso(1.0, weighted=False).prox(x, 1.0)
    np.testing.assert_allclose(z, [[2.4, 0.0], [3.2, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(z[:, 1], 0.0)


def test_l1_plus_l2_is_the_elastic_net_in_either_order():
    x = jnp.linspace(-2, 2, 9)
    expected = jr.L1L2(l1=0.3, l2=0.8).prox(x, 0.7)
    np.testing.assert_allclose((jr.L1(0.3) + jr.L2(0.8)).prox(x, 0.7), expected, rtol=1e-6)
    np.testing.assert_allclose((jr.L2(0.8) + jr.L1(0.3)).prox(x, 0.7), expected, rtol=1e-6)
    assert np.sum(expected == 0) == 1


@pytest.mark.parametrize(
    "penalty",
    [
        jr.L1(1.0) + jr.GroupLasso(1.0),
        jr.L2(1.0) + jr.L1(1.0) + jr.L1L2(1.0, 1.0),
        jr.TotalVariation(1.0) + jr.TotalVariation(1.0, axis=0),
    ],
    ids=["L1+GroupLasso", "L2+L1+L1L2", "TotalVariation+TotalVariation"],
)
def test_sum_without_a_closed_form_says_so(penalty):
    with pytest.raises(
        NotImplementedError,
        match=r"only where at most one term is not an L2, or all .* one TotalVariation; got [LT]",
    ):
        penalty.prox(jnp.ones((2, 2)), 0.1)


@pytest.mark.parametrize(
    "penalty",
    [jr.KLSparsity(1.0, target=0.2), jr.KLSparsity(1.0, target=0.2) + jr.L2(1.0)],
    ids=["KLSparsity", "KLSparsity+L2"],
)
def test_penalty_without_a_closed_form_names_those_that_have_one(penalty):
    message = r"`jaxreg.KLSparsity` has no closed-form .*GroupLasso, .*L1, .*L1L2, L2\b"
    with pytest.raises(NotImplementedError, match=message):
        penalty.prox(jnp.full((2, 2), 0.5), 0.1)


def test_prox_checks_its_input():
    with pytest.raises(
        TypeError, match=r"`jaxreg\.L1` takes a floating-point array; got dtype int32"
    ):
        jr.L1(1.0).prox(jnp.arange(3), 0.1)


@pytest.mark.parametrize(
    ("penalty", "shape"),
    [
        (jr.L1(1.0), (2, 2, 3)),
        (jr.L1(1.0), (4,)),
        (jr.GroupLasso(1.0, axis=0), (2, 1)),
        (jr.Nuclear(1.0), (2, 1)),
    ],
)
def test_a_step_of_another_shape_is_an_error(penalty, shape):
    with pytest.raises(ValueError, match=r"takes a step that broadcasts to x and is"):
        jax.jit(penalty.prox)(jnp.ones((2, 3)), jnp.ones(shape))


@pytest.mark.parametrize("step", [-0.1, float("nan"), np.array([[0.1, -0.1, 0.1]])])
def test_a_negative_step_is_an_error(step):
    with pytest.raises(ValueError, match=r"`jaxreg.L1.prox\(x, step\)` takes a non-negative step"):
        jr.L1(1.0).prox(jnp.ones((2, 3)), step)


def test_steps_of_numpy_are_checked_too():
    with pytest.raises(ValueError, match="takes a non-negative step"):
        jr.L1(1.0).prox(jnp.ones(3), np.float32(-0.1))


@pytest.mark.parametrize(
    "penalty", [jr.L1(0.5), jr.L1L2(0.5, 0.5), jr.SparseGroupLasso(0.5, alpha=0.5)], ids=str
)
def test_derivatives_of_a_complex_prox_at_zero_are_finite(penalty):
    x = jnp.zeros(3, jnp.complex64).at[0].set(3 + 4j)
    for step in (0.0, 0.7):
        gradient = jax.grad(lambda x, step=step: jnp.sum(jnp.abs(penalty.prox(x, step)) ** 2))(x)
        assert jnp.isfinite(gradient).all()


def test_derivatives_of_the_log_sum_prox_are_finite_where_it_is_zero():
    prox = jr.LogSum(1.0, epsilon=0.1).prox
    slope, by_step = jax.grad(prox, (0, 1))(0.5, 5.0)
    assert (slope, by_step) == (0, 0)


def test_a_step_for_each_group_promotes_no_rank():
    x, step = jnp.array([[3.0, 0.25], [-1.0, 0.5]]), jnp.array([1.0, 0.25])
    with jax.numpy_rank_promotion("raise"):
        np.testing.assert_allclose(jr.L1Inf(1.0).prox(x, step), [[2.0, 0.25], [-1.0, 0.25]])
