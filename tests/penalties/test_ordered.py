"""Penalties of neighbours, and the total variation's proximal operator against its dual."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import lsq_linear

import jaxreg as jr

RNG = np.random.default_rng(0)
SIZE = 300
SIGNALS = {
    "noise": RNG.normal(size=SIZE),
    "steps": np.repeat(RNG.normal(size=SIZE // 10), 10) * 3 + RNG.normal(size=SIZE),
    "walk": np.cumsum(RNG.normal(size=SIZE)),
    "ramp": np.arange(SIZE) / 7,
    "fall": -(np.arange(SIZE) ** 2) / 100,
    "saw": np.arange(SIZE) % 7 * 1.0,
    "alternating": (-1.0) ** np.arange(SIZE),
    "ties": RNG.integers(-2, 3, SIZE) * 1.0,
    "constant": np.full(SIZE, 0.1),
    "spike": np.where(np.arange(SIZE) == 100, 1e6, RNG.normal(size=SIZE)),
    "ratios": RNG.normal(size=SIZE) * 10.0 ** RNG.integers(-8, 8, SIZE),
    "geometric": 1.5 ** (np.arange(SIZE) % 80),
    "offset": 1e4 + RNG.normal(size=SIZE),
}
WEIGHTS = [1e-6, 0.02, 0.5, 1.0, 3.0, 40.0, 1e4]


@jax.jit
def prox(x, weight):
    return jr.TotalVariation(1.0).prox(x, weight)


def assert_optimal(x, z, weight, tolerance):
    """Σ_{j≤i} (x − z) lies in [−λ, λ], is −λ·sign at a step of z, and 0 at the end."""
    dual = np.cumsum(x - z, axis=-1)
    steps = np.diff(z, axis=-1)
    np.testing.assert_allclose(dual[..., -1], 0, atol=tolerance)
    assert np.all(np.abs(dual[..., :-1]) <= weight + tolerance)
    slack = np.abs(dual[..., :-1] + weight * np.sign(steps))
    # A step within rounding of 0 may have the wrong sign.
    assert np.all(slack[np.abs(steps) > tolerance] <= tolerance)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_prox_has_a_dual_certificate(weight):
    with jax.enable_x64():
        x = np.stack(list(SIGNALS.values()))
        z = np.asarray(prox(x, weight))
    for signal, minimizer in zip(x, z, strict=True):
        scale = np.abs(signal).sum() + weight
        assert_optimal(signal, minimizer, weight, 1e-14 * scale)


def test_prox_of_thousands_of_random_signals_has_a_dual_certificate():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 41)) * 10.0 ** rng.uniform(-2, 2, (3000, 1))
    with jax.enable_x64():
        z = np.asarray(prox(x, 0.8))
    assert_optimal(x, z, 0.8, 1e-11)
    assert 100 < np.sum(np.all(z == z[:, :1], axis=1)) < 2900


def test_prox_is_the_least_squares_solution_of_the_dual():
    rng = np.random.default_rng(2)
    adjoint = -np.diff(np.eye(12), axis=0).T
    for weight in (0.1, 0.7, 2.0):
        x = rng.normal(size=12)
        dual = lsq_linear(adjoint, x, (-weight, weight), "bvls", tol=1e-14).x
        with jax.enable_x64():
            np.testing.assert_allclose(prox(x, weight), x - adjoint @ dual, atol=1e-10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float64, 16, elements=st.floats(-1e6, 1e6, allow_subnormal=False)),
    st.floats(0, 1e6, allow_subnormal=False),
)
def test_prox_of_adversarial_signals_has_a_dual_certificate(x, weight):
    with jax.enable_x64():
        z = np.asarray(prox(x, weight))
    assert_optimal(x, z, weight, 1e-13 * (np.abs(x).sum() + weight))


LONG = 100_000


@pytest.mark.parametrize("weight", [0.3, 20.0, 1000.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_keeps_its_digits_on_long_signals(weight, offset):
    rng = np.random.default_rng(3)
    noisy = np.repeat(rng.normal(size=LONG // 1000), 1000) + rng.normal(size=LONG)
    x = (offset + np.stack([noisy, np.linspace(0, 1, LONG)])).astype(np.float32)
    single = np.asarray(prox(x, weight))
    with jax.enable_x64():
        double = np.asarray(prox(x.astype(np.float64), weight))
    exact = x.astype(np.float64)
    assert_optimal(exact, double, weight, 1e-14 * np.abs(exact).sum())
    np.testing.assert_allclose(single, double, rtol=2.4e-7, atol=5e-7 + 4e-8 * weight)


@pytest.mark.parametrize("weight", [500.0, 5000.0])
def test_float32_leaves_the_middle_of_a_monotone_signal_as_it_is(weight):
    """Its digits must not be those of a dual that is thousands of times larger."""
    x = np.sort(np.random.default_rng(6).random((2, LONG))).astype(np.float32)
    z = np.asarray(prox(x, weight))
    middle = slice(2 * LONG // 5, 3 * LONG // 5)
    np.testing.assert_array_equal(z[:, middle], x[:, middle])
    assert np.all(z[:, 0] > x[:, 0] + 0.05)


@pytest.mark.parametrize("kinds", [("ramp", "saw"), ("stairs", "cubic")], ids="-".join)
def test_time_does_not_grow_with_the_square_of_the_length(kinds):
    places = np.arange(LONG)
    signals = {
        "ramp": places / 3,
        "saw": places % 100 * 1.0,
        "stairs": 1.001 ** (places % 50_000),
        "cubic": (places / 1000) ** 3,
    }
    x = np.stack([signals[kind] for kind in kinds]).astype(np.float32)
    prox(x, 1.0).block_until_ready()
    start = time.perf_counter()
    prox(x, 1.0).block_until_ready()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_prox_of_short_signals(size):
    x = np.array([3.0, -1.0, 5.0], np.float32)[:size]
    expected = {0: [], 1: [3.0], 2: [2.5, -0.5], 3: [2.5, 0.0, 4.5]}[size]
    np.testing.assert_array_equal(prox(x, 0.5), expected)


@pytest.mark.parametrize("name", SIGNALS)
def test_prox_without_weight_is_the_identity(name):
    x = SIGNALS[name].astype(np.float32)
    np.testing.assert_array_equal(prox(x, 0.0), x)


@pytest.mark.parametrize("weight", [1e12, 1e30, np.inf])
def test_prox_of_a_huge_weight_is_the_mean(weight):
    x = np.stack([SIGNALS["offset"], SIGNALS["walk"]]).astype(np.float32)
    z = np.asarray(prox(x, weight))
    np.testing.assert_array_equal(z, np.broadcast_to(z[:, :1], z.shape))
    np.testing.assert_allclose(z[:, 0], x.astype(np.float64).mean(axis=1), rtol=2e-7)


def test_nan_makes_its_signal_nan_and_leaves_the_others():
    x = np.stack([SIGNALS["noise"], SIGNALS["walk"]]).astype(np.float32)
    expected = prox(x, 0.5)
    x[0, 7] = np.nan
    z = prox(x, 0.5)
    assert np.isnan(z[0]).all()
    np.testing.assert_array_equal(z[1], expected[1])
    assert np.isnan(prox(x, np.nan)).all()


def test_infinite_entries_stay_and_pull_their_neighbours():
    x = np.array([0.0, 1.0, np.inf, 2.0, 2.0, -np.inf, -np.inf, 1.0], np.float32)
    z = prox(x, 0.5)
    # The pulled entries are [0, 1.5], [2.5, 1.5] and [0.5].
    np.testing.assert_array_equal(z, [0.5, 1.0, np.inf, 2.0, 2.0, -np.inf, -np.inf, 0.5])
    large = np.where(np.isinf(x), np.sign(x) * 1e4, x).astype(np.float32)
    finite = np.isfinite(x)
    np.testing.assert_allclose(prox(large, 0.5)[finite], z[finite], rtol=1e-6)


def test_prox_along_an_axis_is_that_of_each_signal():
    x = np.random.default_rng(4).normal(size=(2, 5, 3)).astype(np.float32)
    z = np.asarray(jr.TotalVariation(0.7, axis=1).prox(x, 0.5))
    rows = np.asarray(prox(x.transpose(0, 2, 1).reshape(6, 5), 0.35))
    np.testing.assert_array_equal(z.transpose(0, 2, 1).reshape(6, 5), rows)
    weights = np.array([0.1, 0.35], np.float32)
    np.testing.assert_allclose(jax.vmap(prox)(np.stack([rows, rows]), weights)[1], prox(rows, 0.35))


@pytest.mark.parametrize(
    "penalty",
    [jr.TotalVariation(0.7), jr.SmoothL2(0.7)],
    ids=lambda p: type(p).__name__,
)
def test_derivatives_of_prox_are_those_of_finite_differences(penalty):
    def loss(x, step):
        return jnp.sum(penalty.prox(x, step) ** 2)

    gradients = jax.grad(loss, (0, 1))

    @jax.jit
    def derive(point, direction, cotangent):
        z, pull_back = jax.vjp(penalty.prox, *point)
        return (
            (z, gradients(*point)),
            jax.jvp(lambda *p: (penalty.prox(*p), gradients(*p)), point, direction)[1],
            pull_back(cotangent),
            jax.vmap(gradients, (0, None))(*point),
        )

    rng = np.random.default_rng(5)
    x, x_dot, cotangent = rng.normal(size=(3, 4, 9))
    step, step_dot, h = 0.6, 0.3, 1e-6
    with jax.enable_x64():
        direction = (x_dot, step_dot)
        _, slopes, bars, rows = derive((x, step), direction, cotangent)
        ahead, behind = (
            derive((x + t * x_dot, step + t * step_dot), direction, cotangent)[0] for t in (h, -h)
        )
        for slope, up, down in zip(*map(jax.tree.leaves, (slopes, ahead, behind)), strict=True):
            np.testing.assert_allclose(slope, (up - down) / (2 * h), atol=1e-6)
        # Reverse mode is the transpose of forward mode, and a vmap that of each row.
        np.testing.assert_allclose(
            np.sum(cotangent * slopes[0]), np.sum(bars[0] * x_dot) + bars[1] * step_dot, rtol=1e-9
        )
        whole = jax.jit(gradients)(x, step)
        np.testing.assert_allclose(rows[0], whole[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.sum(rows[1]), whole[1], rtol=1e-9)


def test_derivative_of_prox_is_the_mean_over_each_segment():
    x = jnp.array([0.0, 1.0, 0.0, 5.0, 6.0])
    jacobian = jax.jacobian(prox)(x, 2.0)
    expected = np.zeros((5, 5))
    expected[:3, :3], expected[3:, 3:] = 1 / 3, 1 / 2
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)
    by_weight = jax.jacobian(prox, argnums=1)(x, 2.0)
    np.testing.assert_allclose(by_weight, [1 / 3] * 3 + [-1 / 2] * 2, rtol=1e-6)


def test_smooth_prox_solves_its_linear_system():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(7, 5))
    down, right = (np.diff(np.eye(n), axis=0) for n in x.shape)
    weight = 1.3
    along = np.eye(7) + 2 * weight * down.T @ down
    grid = np.kron(down.T @ down, np.eye(5)) + np.kron(np.eye(7), right.T @ right)
    both = np.linalg.solve(np.eye(35) + 2 * weight * grid, x.ravel()).reshape(x.shape)
    with jax.enable_x64():
        z = jr.SmoothL2(weight, axis=0).prox(x, 1.0)
        np.testing.assert_allclose(z, np.linalg.solve(along, x), rtol=1e-12)
        z = jr.SmoothL2(weight, axis=(0, 1)).prox(x, 1.0)
        np.testing.assert_allclose(z, both, rtol=1e-11)


def test_smooth_prox_keeps_the_mean_however_large_the_weight():
    x = np.random.default_rng(7).normal(3, 1, 10_000).astype(np.float32)
    z = jr.SmoothL2(1.0).prox(x, 1e12)
    np.testing.assert_allclose(z, np.full_like(x, x.astype(np.float64).mean()), rtol=1e-5)


@pytest.mark.parametrize(
    "penalty",
    [
        jr.TotalVariation(0.5, axis=1),
        jr.TotalVariation(0.5, axis=(1, 2), isotropic=True),
        jr.SmoothL2(0.5, axis=(1, 2)),
        jr.TrendFiltering(0.5, axis=1),
    ],
    ids=["TotalVariation", "TotalVariation-isotropic", "SmoothL2", "TrendFiltering"],
)
def test_masked_tokens_make_no_differences(penalty):
    x = np.random.default_rng(8).normal(size=(3, 6, 2)).astype(np.float32)
    mask = np.ones((3, 6), bool)
    mask[1, 4:] = mask[2, 0] = False
    kept = [x[0:1], x[1:2, :4], x[2:3, 1:]]
    expected = sum(penalty(k) for k in kept)
    unknown = np.where(mask[..., None], x, np.nan).astype(np.float32)
    masked = jr.penalize(unknown, penalty, mask=mask, reduction="sum")
    np.testing.assert_allclose(masked, expected, rtol=1e-6)


def test_values_add_up_over_the_batch():
    x = jnp.asarray(np.random.default_rng(9).normal(size=(5, 6, 2)), jnp.float32)
    penalty = jr.TotalVariation(0.5, axis=1)
    parts = penalty.moments(x[:2]) + penalty.moments(x[2:])
    np.testing.assert_allclose(penalty.finish(parts, None), penalty(x), rtol=1e-6)


def test_subgradient_of_equal_neighbours_is_zero():
    x = jnp.array([1.0, 1.0, 3.0, 3.0])
    np.testing.assert_array_equal(jr.TotalVariation(2.0).gradient(x), [0.0, -2.0, 2.0, 0.0])
    line = jnp.arange(5.0)
    np.testing.assert_array_equal(jr.TrendFiltering(2.0).gradient(line), np.zeros(5))
    flat = jnp.ones((3, 3)).at[0, 0].set(2)
    gradient = jr.TotalVariation(1.0, axis=(0, 1), isotropic=True).gradient(flat)
    expected = np.zeros((3, 3))
    expected[0, 0], expected[0, 1], expected[1, 0] = np.sqrt(2), -np.sqrt(0.5), -np.sqrt(0.5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_trend_filtering_of_order_zero_is_total_variation():
    x = SIGNALS["walk"].astype(np.float32)
    assert jr.TrendFiltering(0.5, order=0)(x) == jr.TotalVariation(0.5)(x)
    cubic = jnp.arange(9.0) ** 3
    assert jr.TrendFiltering(1.0, order=3)(cubic) == 0
    assert jr.TrendFiltering(1.0, order=2)(cubic) == 36
    assert jr.TrendFiltering(1.0, order=9)(cubic) == 0


@pytest.mark.parametrize("order", [-1, 1.5, None, "1"], ids=repr)
def test_order_must_be_a_non_negative_integer(order):
    message = f"`jaxreg.TrendFiltering(order=...)` must be a non-negative integer; got {order!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.TrendFiltering(1.0, order=order)


@pytest.mark.parametrize("build", [jr.TotalVariation, jr.SmoothL2, jr.TrendFiltering])
@pytest.mark.parametrize("axis", [2, (0, 0), (), None], ids=str)
def test_axis_must_be_one_of_the_array(build, axis):
    message = "must name an axis of the array, or several different ones; got axis="
    with pytest.raises(ValueError, match=message + re.escape(f'{axis} for "x" of shape (2, 3)')):
        build(1.0, axis=axis)(jnp.ones((2, 3)))


def test_prox_along_several_axes_is_an_error():
    with pytest.raises(NotImplementedError, match=r"along one axis only; got axis=\(0, 1\)"):
        jr.TotalVariation(1.0, axis=(0, 1)).prox(jnp.ones((2, 3)), 0.1)
    with pytest.raises(NotImplementedError, match=r"`jaxreg\.TrendFiltering` has no closed-form"):
        jr.TrendFiltering(1.0).prox(jnp.ones(3), 0.1)


def test_the_derivative_by_the_weight_beside_infinite_entries_is_finite():
    x = jnp.array([0.0, 1.0, jnp.inf, jnp.inf, 2.0, 2.0])

    def finite(step):
        return jnp.sum(jr.TotalVariation(1.0).prox(x, step)[jnp.array([0, 1, 4, 5])])

    np.testing.assert_allclose(jax.grad(finite)(0.5), 2.0, rtol=1e-6)


def test_derivatives_of_long_segments_keep_their_digits():
    x = jnp.zeros(1_000_000)
    _, tangent = jax.jvp(lambda x: jr.TotalVariation(1.0).prox(x, 1.0), (x,), (x + 0.1,))
    np.testing.assert_allclose(tangent, np.full(x.shape, 0.1), rtol=1e-4)


@pytest.mark.parametrize("order", [1, 4, 9])
def test_masks_of_signals_shorter_than_the_order(order):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
    penalty = jr.TrendFiltering(1.0, axis=1, order=order)
    mask = jnp.ones((2, 4), bool)
    found = jr.penalize(x, penalty, mask=mask, reduction="sum")
    np.testing.assert_allclose(found, penalty(x), rtol=1e-6)


@pytest.mark.parametrize("step", [1e38, np.inf])
def test_smooth_prox_of_the_longest_steps_leaves_the_mean(step):
    x = jnp.array([1.0, 4.0, -2.0])
    np.testing.assert_allclose(jr.SmoothL2(2.0).prox(x, step), np.ones(3), rtol=1e-6)


def test_a_step_with_axes_of_one_entry_is_a_step():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    prox = jr.TotalVariation(0.5).prox
    np.testing.assert_array_equal(prox(x, jnp.full((1, 1), 0.3)), prox(x, 0.3))


def test_the_prox_of_an_empty_signal_has_a_derivative():
    x = jnp.zeros((3, 0))
    _, tangent = jax.jvp(lambda x: jr.TotalVariation(1.0).prox(x, 1.0), (x,), (x,))
    assert tangent.shape == x.shape
