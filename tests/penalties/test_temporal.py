"""Penalties of sequences: what counts as a step, a pair of steps, and a mean."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.terms import measure

RNG = np.random.default_rng(0)
H = RNG.normal(size=(3, 5, 2)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 1]], bool)


def test_awd_lstm_terms():
    alpha, beta = 2.0, 1.0
    dropped = H * (RNG.uniform(size=H.shape) < 0.6) / 0.6
    expected = alpha * np.mean(dropped**2) + beta * np.mean((H[:, 1:] - H[:, :-1]) ** 2)
    found = jr.penalize(dropped, jr.ActivationNorm(alpha)) + jr.penalize(
        H, jr.TemporalDifference(beta)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def pairs(h, mask):
    """The differences of the steps that both count."""
    return np.array(
        [
            h[b, t + 1] - h[b, t]
            for b in range(h.shape[0])
            for t in range(h.shape[1] - 1)
            if mask[b, t] and mask[b, t + 1]
        ]
    )


def test_a_difference_counts_if_both_steps_do():
    found = jr.penalize(H, jr.TemporalDifference(1.0), mask=MASK)
    differences = pairs(H, MASK)
    assert len(differences) == 4
    np.testing.assert_allclose(found, np.mean(differences**2), rtol=1e-6)


def test_slowness_takes_steps_and_pairs_that_count():
    found = jr.penalize(H, jr.Slowness(1.0), mask=MASK)
    expected = np.mean(pairs(H, MASK) ** 2, axis=0) / np.var(H[MASK], axis=0)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("penalty", [jr.TemporalDifference, jr.Slowness])
def test_axis_must_be_an_integer(penalty):
    for axis in ((0, 1), None, 0.5):
        with pytest.raises(
            TypeError, match=re.escape(f"(axis=...)` must be an integer; got {axis}")
        ):
            penalty(1.0, axis=axis)(H)
    np.testing.assert_array_equal(penalty(1.0, axis=np.int64(1))(H), penalty(1.0, axis=1)(H))


@pytest.mark.parametrize("penalty", [jr.TemporalDifference, jr.Slowness])
def test_axis_of_time(penalty):
    expected = penalty(1.0)(H)
    np.testing.assert_allclose(penalty(1.0, axis=1)(H), expected, rtol=1e-6)
    time_major = np.moveaxis(H, 1, 0)
    np.testing.assert_allclose(penalty(1.0, axis=0)(time_major), expected, rtol=1e-6)
    masked = jr.penalize(time_major, penalty(1.0, axis=0), mask=MASK.T)
    np.testing.assert_allclose(masked, jr.penalize(H, penalty(1.0), mask=MASK), rtol=1e-6)


@pytest.mark.parametrize("penalty", [jr.TemporalDifference(1.0), jr.Slowness(1.0)])
@pytest.mark.parametrize("steps", [0, 1])
def test_too_few_steps_for_a_difference_are_zero(penalty, steps):
    x = jnp.ones((2, steps, 3))
    assert penalty(x) == 0.0
    np.testing.assert_array_equal(penalty.gradient(x), jnp.zeros((2, steps, 3)))
    assert jr.penalize(H, penalty, mask=np.arange(15).reshape(3, 5) % 2 == 0) == 0.0


@pytest.mark.parametrize(
    ("axis", "shape"), [(-2, (3,)), (-2, ()), (-1, (4, 3)), (1, (4, 3)), (2, (4, 3)), (-3, (4, 3))]
)
@pytest.mark.parametrize("penalty", [jr.TemporalDifference, jr.Slowness])
def test_axis_that_is_no_time_is_an_error(penalty, axis, shape):
    message = f'not the last one; got axis={axis} for "x" of shape {shape}.'
    with pytest.raises(ValueError, match=re.escape(message)):
        penalty(1.0, axis=axis)(jnp.ones(shape))


def test_error_names_the_path():
    with pytest.raises(ValueError, match=r'`jaxreg.Slowness\(axis=...\)` .* for "bias" of shape'):
        jr.kernel({"**": jr.Slowness(1.0)})({"bias": jnp.ones(3)})


def test_slowness_of_a_sine_is_its_frequency():
    steps, cycles = 400, 10
    omega = 2 * np.pi * cycles / steps
    y = np.sin(omega * np.arange(steps))[:, None]
    # A periodic sine has ⟨Δ²⟩ = (2 − 2 cos ω) Var.
    np.testing.assert_allclose(jr.Slowness(1.0)(y), 2 - 2 * np.cos(omega), rtol=5e-3)


def test_slowness_is_blind_to_scale_and_offset():
    values = jax.jit(lambda h: [jr.Slowness(1.0)(g) for g in (h, 100 * h, h + 100)])(H)
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


def test_slowness_of_a_feature_that_does_not_change_is_zero():
    x = jnp.asarray(H).at[..., 0].set(3.0)
    value, gradient = jax.jit(jax.value_and_grad(jr.Slowness(1.0)))(x)
    np.testing.assert_allclose(value, jr.Slowness(1.0)(x[..., 1:]), rtol=1e-6)
    np.testing.assert_array_equal(gradient[..., 0], 0.0)
    assert np.isfinite(gradient).all()


def test_gradient_of_slowness_is_that_of_larger_features_divided_by_the_size():
    y = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
    expected = jr.Slowness(1.0).gradient(y)
    np.testing.assert_allclose(jr.Slowness(1.0).gradient(1e-10 * y) * 1e-10, expected, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-20, 3e-19, 1e-18, 1e-10])
def test_slowness_of_one_small_spike_is_finite(size):
    y = jnp.zeros((1024, 2)).at[400].set(jnp.array([1.0, size]))
    value, gradient = jax.value_and_grad(jr.Slowness(1.0))(y)
    assert np.isfinite(gradient).all()
    # Where the squares vanish the feature counts as one that does not change; and squares of the
    # mean, which is in all other steps, vanish first.
    speeds = 2 / 1023 * 1024**2 / 1023 * np.array([1, size > 1e-19])
    np.testing.assert_allclose(value, speeds.sum(), rtol=1e-3)


def test_slowness_of_microbatches_stays_finite_where_rounding_hides_the_variance():
    y = 100 + 1e-2 * jax.random.normal(jax.random.key(0), (8, 5, 3))

    def combined(y):
        measured = [measure(y[i : i + 2], jr.Slowness(1.0), "batch_mean") for i in range(0, 8, 2)]
        return jr.combine([jr.Terms({"h": (m,)}) for m in measured]).total

    value, gradient = jax.value_and_grad(combined)(y)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
