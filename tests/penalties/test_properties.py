"""What holds at any point: Hypothesis draws it, from tiny entries to huge ones, zeros and ties."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxreg as jr
from tests.registry import CASES, STRENGTH, WITH_PROX, Case, derivatives

EXAMPLES = settings(
    max_examples=20,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
STEP = 0.7


@jax.jit
def prox(penalty: jr.Penalty, x: jax.Array):
    return penalty.prox(x, STEP)


def points(case: Case):
    """Draw float32 arrays whose entries are zeros, tiny, ordinary or huge, often equal."""
    low, high = case.domain
    magnitudes = st.sampled_from([1e-15, 1e-6, 1.0, 1e3, min(high, 1e9)])
    scaled = st.builds(lambda m, u: m * u, magnitudes, st.sampled_from([-1.0, -0.25, 0.0, 1.0]))
    free = st.floats(max(low, -4.0), min(high, 4.0), width=32, allow_subnormal=False)
    # No negative zeros: they tie with zeros, and a top k breaks that tie in its own way.
    entries = st.one_of(free, scaled).map(lambda v: np.float32(np.clip(v, low, high)) + 0)
    return arrays(np.float32, case.sample.shape, elements=entries)


@pytest.mark.parametrize("case", CASES, ids=str)
@EXAMPLES
@given(data=st.data())
def test_value_is_the_formula_and_derivatives_are_finite(case, data):
    x = data.draw(points(case))
    value, gradient, curvature = derivatives(case.penalty, x, np.ones_like(x))
    expected = case.value(x)
    size = case.formula(np.abs(x).astype(np.complex128), STRENGTH)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * max(STRENGTH, abs(size)))
    assert value >= -1e-5
    assert np.isfinite(gradient).all()
    assert np.isfinite(curvature).all()


@pytest.mark.parametrize("case", WITH_PROX, ids=str)
@EXAMPLES
@given(data=st.data())
def test_prox_improves_on_staying_where_one_is(case, data):
    x = data.draw(points(case))
    z = np.asarray(prox(case.penalty, x))
    assert np.isfinite(z).all()
    reached = np.sum((z.astype(float) - x) ** 2) / 2 + STEP * case.value(z)
    assert reached <= STEP * case.value(x) * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.convex], ids=str)
@EXAMPLES
@given(data=st.data())
def test_convex_penalty_lies_above_its_tangent(case, data):
    x, y = data.draw(points(case)), data.draw(points(case))
    _, gradient, _ = derivatives(case.penalty, x, np.ones_like(x))
    slope = np.sum(np.asarray(gradient, float) * (y.astype(float) - x))
    scale = np.sum(np.abs(gradient) * (np.abs(x) + np.abs(y)))
    assert case.value(y) >= case.value(x) + slope - 1e-5 * (1 + abs(case.value(x)) + scale)
