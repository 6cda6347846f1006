"""Where float32 overflows or vanishes, or ties: far from 1, next to a kink, among many examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from tests.registry import derivatives

RNG = np.random.default_rng(0)
X = RNG.uniform(0.5, 1.0, (5, 4)).astype(np.float32)

SCALELESS: dict[str, Any] = {
    "Orthogonal": jr.Orthogonal(1.0),
    "Cosine": jr.Cosine(1.0, reference=X[::-1]),
    "ImportanceCV": jr.ImportanceCV(1.0),
}


@pytest.mark.parametrize("name", SCALELESS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_penalties_that_know_no_scale_have_a_gradient_at_each(name, scale):
    penalty = SCALELESS[name]
    value, gradient, _ = derivatives(penalty, X * scale, X)
    expected_value, expected, _ = derivatives(penalty, X, X)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    size = np.abs(expected).max()
    np.testing.assert_allclose(gradient * scale, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("name", ["Orthogonal", "ImportanceCV"])
def test_the_value_of_the_largest_entries(name):
    penalty = SCALELESS[name]
    np.testing.assert_allclose(penalty(X[:1] * 3e38), penalty(X[:1]), rtol=1e-5)


def test_one_small_column_has_a_finite_gradient():
    kernel = X * np.array([1, 1e-25, 1, 1], np.float32)
    gradient = jr.Orthogonal(1.0).gradient(kernel)
    np.testing.assert_allclose(gradient[:, 1] * 1e-25, jr.Orthogonal(1.0).gradient(X)[:, 1], 1e-4)


def test_small_vectors_at_a_reference_as_small():
    gradient = jr.Cosine(1.0, reference=X[::-1] * 1e-12).gradient(X * 1e-12)
    expected = SCALELESS["Cosine"].gradient(X)
    np.testing.assert_allclose(gradient * 1e-12, expected, rtol=1e-4, atol=1e-6)


def test_collapsed_features_have_all_of_their_curvature():
    penalty = jr.VarianceHinge(1.0)
    direction = jnp.arange(6.0).reshape(3, 2)
    _, curvature = jax.jvp(penalty.gradient, (jnp.ones((3, 2)),), (direction,))
    # −(x − μ) / ((n − 1) √ε d), with ε = 1e-4 and n = 3.
    expected = -(direction - direction.mean(0)) / (2 * 1e-2 * 2)
    np.testing.assert_allclose(curvature, expected, rtol=1e-5)


def test_many_examples_of_a_large_mean():
    x = 1e13 + 1e12 * jnp.asarray(RNG.normal(size=(2**20, 1)), jnp.float32)
    assert jr.VarianceHinge(1.0)(x) == 0


FIRM: dict[str, Any] = {
    "MCP": (jr.MCP(1.0, knot=2.0), 2.0),
    "SCAD": (jr.SCAD(1.0, threshold=1.0), 1.0),
    "CappedL1": (jr.CappedL1(1.0, cap=2.0), 1.0),
}


@pytest.mark.parametrize("name", FIRM)
def test_thresholds_are_exact(name):
    penalty, slope = FIRM[name]
    x = 1 + jnp.float32([1e-6, 1e-5, 1e-4, 3e-4])
    moved, derivative = jax.jvp(lambda x: penalty.prox(x, 1.0), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(moved, slope * (x - 1), rtol=1e-6)
    np.testing.assert_allclose(derivative, slope, rtol=1e-6)
    np.testing.assert_array_equal(penalty.prox(jnp.float32([1.0, 0.9999]), 1.0), 0)


@pytest.mark.parametrize("step", [3e38, np.inf])
def test_steps_of_any_length_reach_what_they_lead_to(step):
    x = jnp.array([3.0, -2.0, 0.5])
    np.testing.assert_array_equal(jr.L1Inf(1.0, axis=0).prox(x, step), 0)
    np.testing.assert_array_equal(jr.L2To(1.0, reference=x[::-1]).prox(x, step), x[::-1])
    weighted = jr.L2To(1.0, reference=jnp.zeros(3), weight=jnp.array([0.0, 1.0, 1.0]))
    np.testing.assert_array_equal(weighted.prox(x, step), [3.0, 0.0, 0.0])
    inside = jr.RangeHinge(1.0, lower=-1.0, upper=1.0, power=2).prox(x, step)
    np.testing.assert_array_equal(inside, [1.0, -1.0, 0.5])


MANY = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 50_000), jnp.float32)
NORM = float(jnp.linalg.norm(MANY))
SMALL_STEPS: dict[str, tuple[Any, float]] = {
    "L2": (jr.L2(1.0), 3e-7),
    "L1L2": (jr.L1L2(0.0, 1.0), 3e-7),
    "L1 + L2": (jr.L1(0.0) + jr.L2(1.0), 3e-7),
    "L2To": (jr.L2To(1.0, reference=jnp.zeros(())), 3e-7),
    "Huber": (jr.Huber(2.0, delta=9.0), 3e-7),
    "GroupLasso": (jr.GroupLasso(2.2 * NORM, axis=0, weighted=False), 3.3e-7),
}


@pytest.mark.parametrize("name", SMALL_STEPS)
def test_small_steps_add_up_to_the_penalty(name):
    """Each is a few roundings of an entry, but of all entries alike: 1 + 3e-7 is 1 + 3.6e-7."""
    penalty, share = SMALL_STEPS[name]
    moved = MANY - penalty.prox(MANY, 1.5e-7)
    np.testing.assert_allclose(np.mean(moved / MANY, dtype=float), share, rtol=0.05)


EDGES: dict[str, tuple[Any, float, list[float]]] = {
    "MCP": (jr.MCP(1.0, knot=1.5), 0.5, [0.5, 1.5]),
    "MCP-concave": (jr.MCP(1.0, knot=0.5), 2.0, [1.0]),
    "SCAD": (jr.SCAD(1.0, threshold=1.0), 0.5, [0.5, 1.5, 3.7]),
    "SCAD-concave": (jr.SCAD(1.0, threshold=0.5, a=2.0), 1.0, [1.25]),
    "SCAD-jump": (jr.SCAD(1.0, threshold=0.5, a=2.0), 3.0, [2.1213203]),
    "CappedL1": (jr.CappedL1(1.0, cap=1.5), 0.5, [0.5, 1.75]),
    "CappedL1-jump": (jr.CappedL1(1.0, cap=0.5), 2.0, [1.4142135]),
}


@pytest.mark.parametrize("name", EDGES)
def test_next_to_an_edge_of_a_nonconvex_penalty_no_digits_are_lost(name):
    """Comparing objectives cannot tell what lies √ε apart."""
    penalty, step, edges = EDGES[name]
    away = np.array([-3e-4, -1e-5, -1e-6, 1e-6, 1e-5, 3e-4])
    x = np.concatenate([edge * (1 + away) for edge in edges]).astype(np.float32)
    knots = np.array([1.0, 1.5, 3.7], np.float32)
    beside = np.concatenate([knots, np.nextafter(knots, np.float32(9)), knots * 1.0001])
    np.testing.assert_array_equal(penalty.prox(jnp.asarray(beside), 0.0), beside)
    with jax.enable_x64():
        exact = penalty.prox(jnp.asarray(x, jnp.float64), step)
    np.testing.assert_allclose(penalty.prox(jnp.asarray(x), step), exact, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize(
    "penalty",
    [
        jr.L0(1.0),
        jr.MCP(1.0, knot=2.0),
        jr.CappedL1(1.0, cap=2.0),
        jr.LogSum(1.0, epsilon=1.0),
        jr.GroupLasso(1.0),
        jr.SparseGroupLasso(1.0, alpha=0.5),
    ],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_a_step_of_zero_moves_nothing(penalty, scale):
    x = (X - 0.7) * np.float32(scale)
    np.testing.assert_allclose(penalty.prox(x, 0.0), x, rtol=1e-6)


def test_the_projection_onto_a_simplex_leaves_out_an_entry_at_the_threshold():
    jacobian = jax.jacobian(jr.Simplex().project)
    np.testing.assert_array_equal(jacobian(jnp.array([1.0, 0.0])), 0)
    np.testing.assert_array_equal(
        jax.jacobian(jr.L1Ball(1.0).project)(jnp.array([2.0, 1.0, 0.0])), 0
    )


def test_infinite_entries_of_a_half_open_range():
    penalty = jr.RangeHinge(1.0, upper=10.0)
    value, gradient = jax.value_and_grad(penalty)(jnp.array([-jnp.inf, 1.0, 12.0]))
    assert value == 2
    np.testing.assert_array_equal(gradient, [0, 0, 1])
    assert jr.RangeHinge(1.0, upper=10.0)(jnp.array([jnp.inf])) == jnp.inf


def test_a_reference_that_does_not_count_reaches_no_derivative():
    reference, mask = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([True, False])

    def total(scale):
        penalties = (
            jr.KLTo(1.0, reference=reference, temperature=scale)
            + jr.Cosine(1.0, reference=reference)
            + jr.L2To(1.0, reference=reference, weight=reference)
        )
        x = jnp.array([[1.0, 3.0], [1.0, 1.0]])
        return jr.penalize(scale * x, penalties, mask=mask)

    assert jnp.isfinite(jax.grad(total)(2.0))


@pytest.mark.parametrize("function", [jr.gates.jump_relu, jr.gates.step])
def test_a_gate_at_an_infinite_threshold_is_closed(function):
    def total(threshold):
        return jnp.sum(function(jnp.array([1.0, jnp.inf]), threshold, bandwidth=0.1))

    value, gradient = jax.value_and_grad(total)(jnp.full(2, jnp.inf))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_features_whose_variance_vanishes_before_their_changes_do_not_count():
    y = 0.9e-19 * jnp.tile(jnp.array([[1.0], [-1.0]]), (4, 1))
    value, gradient = jax.value_and_grad(jr.Slowness(1.0))(y)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(
    "penalty", [jr.MCP(1.0, knot=2.0), jr.SCAD(1.0, threshold=1.0, a=3.0)], ids=str
)
def test_a_step_as_long_as_a_piece_of_a_nonconvex_penalty_has_a_derivative(penalty):
    slopes = jax.grad(lambda x: jnp.sum(penalty.prox(x, 2.0)))(jnp.array([0.5, 1.9, 5.0]))
    np.testing.assert_array_equal(slopes, [0, 0, 1])


@pytest.mark.parametrize("step", [1e5, 1e8, 3e38, np.inf])
def test_huber_shrinks_by_as_long_a_step_as_an_entry_without_a_gradient_has_in_adam(step):
    x = np.array([0.5, -3.0], np.float32)
    np.testing.assert_allclose(jr.Huber(1.0).prox(x, step), x / np.float32(step), 1e-4, 1e-37)


def test_hard_thresholding_is_zero_at_the_threshold_itself():
    assert jr.MCP(1.0, knot=1.0).prox(2.0, 4.0) == 0


@pytest.mark.parametrize(
    "penalty",
    [jr.MCP(1.0, knot=1.0), jr.SCAD(1.0, threshold=1.0), jr.CappedL1(1.0, cap=1.0)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_tiny_entries_are_shrunk_and_not_set_to_zero(penalty):
    np.testing.assert_allclose(penalty.prox(jnp.float32(1e-25), 1e-26), 0.9e-25, rtol=1e-5)


@pytest.mark.parametrize(
    ("penalty", "value"), [(jr.Entropy(1.0), 0), (jr.ConfidencePenalty(1.0), np.log(2))]
)
def test_logits_whose_difference_overflows_are_certain(penalty, value):
    logits = jnp.array([[3e38, -3e38]])
    np.testing.assert_allclose(penalty(logits), value, rtol=1e-6)
    np.testing.assert_array_equal(penalty.gradient(logits), 0)


@pytest.mark.parametrize("penalty", [jr.L2(1.0), jr.L1L2(0.0, 1.0), jr.Huber(1.0)], ids=repr)
def test_the_longest_steps_have_finite_derivatives(penalty):
    slopes = jax.grad(penalty.prox, argnums=(0, 1))(2.0, 3e38)
    assert np.isfinite(slopes).all(), slopes


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e20, 1e30])
def test_scad_of_any_magnitude(scale):
    threshold, x, step = (np.float32(scale * value) for value in (0.7, 1.2, 0.2))
    moved = jr.SCAD(1.0, threshold=threshold, a=2.4).prox(jnp.asarray(x), step)
    np.testing.assert_allclose(moved / scale, (0.98 * 1.2 - 1.68 * 0.2) / (0.98 - 0.2), rtol=1e-5)


@pytest.mark.parametrize("step", [1.0, np.inf])
@pytest.mark.parametrize(
    "penalty",
    [jr.MCP(1.0, knot=1.5), jr.SCAD(1.0, threshold=1.0), jr.CappedL1(1.0, cap=1.0)],
    ids=repr,
)
def test_infinite_entries_of_nonconvex_penalties_stay(penalty, step):
    x = jnp.array([jnp.inf, -jnp.inf, 0.1])
    np.testing.assert_array_equal(penalty.prox(x, step), [np.inf, -np.inf, 0])
