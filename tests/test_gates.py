"""Gates and sparse activations."""

import math
import re
import statistics

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

KEY = jax.random.key(0)
BETA, GAMMA, ZETA = 0.5, -0.2, 1.3
COUNT = 20_000


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def hard_concrete_at(u, log_alpha):
    """Transcribed from Louizos, Welling and Kingma."""
    s = sigmoid((np.log(u) - np.log(1 - u) + log_alpha) / BETA)
    return np.minimum(1, np.maximum(0, s * (ZETA - GAMMA) + GAMMA))


@jax.jit
def samples(log_alpha):
    """Return COUNT samples, and the mean of their derivatives by log α."""

    def draw(log_alpha):
        wide = jnp.broadcast_to(log_alpha, COUNT)
        return jr.gates.hard_concrete(KEY, wide, beta=BETA, gamma=GAMMA, zeta=ZETA)

    return draw(log_alpha), jax.grad(lambda a: jnp.mean(draw(a)))(log_alpha)


@pytest.mark.parametrize("log_alpha", [-1.0, 0.5])
def test_hard_concrete_has_the_distribution_of_the_paper(log_alpha):
    z, slope = samples(jnp.float32(log_alpha))
    u = (np.arange(COUNT) + 0.5) / COUNT
    quantiles = hard_concrete_at(u, log_alpha)
    # Of a sample of this size the distribution function is within 0.012 with probability 0.99.
    shares = [np.mean(np.asarray(z) <= t) for t in np.linspace(0, 0.99, 12)]
    expected = [np.mean(quantiles <= t) for t in np.linspace(0, 0.99, 12)]
    np.testing.assert_allclose(shares, expected, atol=0.012)
    h = 1e-4
    ahead, behind = (hard_concrete_at(u, log_alpha + d).mean() for d in (h, -h))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), atol=0.01)


def test_the_penalty_is_the_probability_of_a_gate_that_is_not_zero():
    log_alpha = jnp.float32(-1.0)
    penalty = jr.HardConcrete(1.0, beta=BETA, gamma=GAMMA, zeta=ZETA)
    open_share = np.mean(np.asarray(samples(log_alpha)[0]) > 0)
    np.testing.assert_allclose(penalty(log_alpha), open_share, atol=0.01)
    exact = sigmoid(-1.0 - BETA * math.log(0.2 / 1.3))
    np.testing.assert_allclose(penalty(log_alpha), exact, rtol=1e-6)


def test_hard_concrete_at_the_paper_s_defaults():
    assert jax.tree.leaves(jr.HardConcrete(1.0)) == [1.0, 2 / 3, -0.1, 1.1]
    log_alpha = jnp.linspace(-3, 3, 50)
    named = jr.gates.hard_concrete(KEY, log_alpha, beta=2 / 3, gamma=-0.1, zeta=1.1)
    np.testing.assert_array_equal(jr.gates.hard_concrete(KEY, log_alpha), named)


def test_hard_concrete_is_sampled_in_float32_and_rounded_once():
    log_alpha = jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16)
    z = jr.gates.hard_concrete(KEY, log_alpha)
    wide = jr.gates.hard_concrete(KEY, log_alpha.astype(jnp.float32))
    assert z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(z, wide.astype(jnp.bfloat16))


def test_each_entry_has_a_gate_of_its_own():
    z = jr.gates.hard_concrete(KEY, jnp.zeros((100, 3)))
    assert 0 < np.sum(z == 0) < 300
    assert len(np.unique(z, axis=0)) > 90


def test_deterministic_gate():
    log_alpha = np.linspace(-6, 6, 25)
    z = jr.gates.hard_concrete_deterministic(
        jnp.asarray(log_alpha, jnp.float32), gamma=GAMMA, zeta=ZETA
    )
    expected = np.minimum(1, np.maximum(0, sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA))
    np.testing.assert_allclose(z, expected, atol=1e-6)
    assert 0 < np.sum(np.asarray(z) == 0) < 25
    assert 0 < np.sum(np.asarray(z) == 1) < 25


def test_deterministic_gate_of_half_precision_is_rounded_once():
    log_alpha = jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16)
    z = jr.gates.hard_concrete_deterministic(log_alpha)
    wide = jr.gates.hard_concrete_deterministic(log_alpha.astype(jnp.float32))
    assert z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(z, wide.astype(jnp.bfloat16))


def test_deterministic_gate_has_no_gradient_where_it_is_closed_or_open():
    # σ(0) · 4 − 2 is exactly 0, and σ(0) · 4 − 1 exactly 1.
    slope = jax.grad(jr.gates.hard_concrete_deterministic)
    np.testing.assert_array_equal(
        [slope(0.0, gamma=-2.0, zeta=2.0), slope(0.0, gamma=-1.0, zeta=3.0)], [0, 0]
    )
    np.testing.assert_allclose(slope(0.0, gamma=-1.0, zeta=2.0), 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "(beta=...)` must be a positive, finite scalar; got 0.0"),
        ({"gamma": 0.0}, "(gamma=...)` must be a finite scalar below 0; got 0.0"),
        ({"zeta": 1.0}, "(zeta=...)` must be a finite scalar above 1; got 1.0"),
    ],
    ids=["beta", "gamma", "zeta"],
)
def test_hard_concrete_settings_out_of_range(settings, message):
    calls = [
        lambda: jr.HardConcrete(1.0, **settings),
        lambda: jr.gates.hard_concrete(KEY, jnp.zeros(2), **settings),
    ]
    if "beta" not in settings:
        calls.append(lambda: jr.gates.hard_concrete_deterministic(jnp.zeros(2), **settings))
    names = "HardConcrete", "gates.hard_concrete", "gates.hard_concrete_deterministic"
    for call, name in zip(calls, names, strict=False):
        with pytest.raises(ValueError, match=re.escape(f"`jaxreg.{name}{message}")):
            call()


def test_traced_settings_do_not_retrace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(beta, bandwidth):
        z = jr.gates.hard_concrete(KEY, jnp.zeros(3), beta=beta)
        return z, jr.gates.jump_relu(z, 0.5, bandwidth=bandwidth)

    assert not np.array_equal(sample(0.5, 1.0)[0], sample(0.7, 2.0)[0])


# The pseudo-derivatives of Rajamanoharan et al., one entry at a time.


def rectangle(u):
    return 1.0 if -0.5 < u < 0.5 else 0.0


def step_derivatives(x, threshold, bandwidth):
    return 0.0, -rectangle((x - threshold) / bandwidth) / bandwidth


def jump_relu_derivatives(x, threshold, bandwidth):
    kernel = rectangle((x - threshold) / bandwidth)
    return float(x > threshold), -threshold * kernel / bandwidth


RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 0.7, size=(2, 5, 3)).astype(np.float32)
THRESHOLD = np.array([0.5, 1.0, 1.5], np.float32)
BANDWIDTH = 0.8
FUNCTIONS = {
    "step": (jr.gates.step, step_derivatives),
    "jump_relu": (jr.gates.jump_relu, jump_relu_derivatives),
}
every_function = pytest.mark.parametrize(
    ("function", "derivatives"), FUNCTIONS.values(), ids=FUNCTIONS
)


def test_values_of_step_and_jump_relu():
    x = jnp.array([0.5, 1.0, 1.5, -2.0, jnp.inf, -jnp.inf, jnp.nan])
    step = jr.gates.step(x, 1.0, bandwidth=0.1)
    np.testing.assert_array_equal(step, [0, 0, 1, 0, 1, 0, np.nan])
    jump = jr.gates.jump_relu(x, 1.0, bandwidth=0.1)
    np.testing.assert_array_equal(jump, [0, 0, 1.5, 0, np.inf, 0, np.nan])


@every_function
@pytest.mark.parametrize("shape", [(3,), (5, 1), (2, 5, 3), ()], ids=str)
def test_pseudo_derivatives_add_up_over_broadcast_axes(function, derivatives, shape):
    threshold = np.broadcast_to(np.float32(0.9), shape) if shape != (3,) else THRESHOLD
    cotangent = RNG.normal(size=X.shape).astype(np.float32)
    full = np.broadcast_to(threshold, X.shape)
    pairs = [derivatives(*v, BANDWIDTH) for v in zip(X.ravel(), full.ravel(), strict=True)]
    by_x, by_threshold = (np.reshape(d, X.shape) for d in zip(*pairs, strict=True))
    assert len(np.unique(by_threshold)) > 1

    @jax.jit
    def transposed(x, threshold):
        _, pull = jax.vjp(lambda x, t: function(x, t, bandwidth=BANDWIDTH), x, threshold)
        return pull(cotangent)

    x_bar, threshold_bar = transposed(X, threshold)
    np.testing.assert_allclose(x_bar, cotangent * by_x, rtol=1e-6)
    added_up = cotangent * by_threshold
    for axis in range(3):
        if axis < 3 - len(shape) or shape[axis - 3 + len(shape)] == 1:
            added_up = added_up.sum(axis=axis, keepdims=True)
    np.testing.assert_allclose(threshold_bar, added_up.reshape(shape), rtol=1e-4, atol=1e-6)

    # Forward mode is its transpose.
    tangents = RNG.normal(size=X.shape).astype(np.float32), np.ones(shape, np.float32)
    _, tangent = jax.jvp(
        lambda x, t: function(x, t, bandwidth=BANDWIDTH), (X, jnp.asarray(threshold)), tangents
    )
    np.testing.assert_allclose(tangent, tangents[0] * by_x + by_threshold, rtol=1e-5, atol=1e-6)


@every_function
def test_pseudo_derivative_is_that_of_the_expectation(function, derivatives):
    """Over x of the standard normal distribution, whose density at θ is p."""
    normal = statistics.NormalDist()
    count, threshold = 20_000, 0.7
    x = jnp.asarray([normal.inv_cdf((i + 0.5) / count) for i in range(count)], jnp.float32)
    mean = jax.jit(jax.grad(lambda t: jnp.mean(function(x, t, bandwidth=0.1))))
    density = normal.pdf(threshold)
    # d/dθ P(x > θ) = −p, and d/dθ E[x; x > θ] = −θp.
    expected = -density if function is jr.gates.step else -threshold * density
    np.testing.assert_allclose(mean(threshold), expected, rtol=5e-3)


@every_function
def test_many_half_precision_examples_add_up_in_float32(function, derivatives):
    x = jnp.ones((4096, 2), jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        gradient = jax.jit(
            jax.grad(lambda t: jnp.sum(function(x, t, bandwidth=1.1), dtype=jnp.float32))
        )(jnp.ones(2, dtype))
        assert gradient.dtype == dtype
        # With 1 / 1.1 in bfloat16 it would be -3712, and not -3728.
        expected = jnp.full(2, -np.float32(4096) / 1.1, dtype)
        np.testing.assert_allclose(gradient, expected, rtol=2e-7)
    assert function(x, jnp.float32(0.3), bandwidth=1.0).dtype == jnp.bfloat16


@every_function
def test_strict_dtype_promotion_of_thresholds_in_float32(function, derivatives):
    x = jnp.ones((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        out = jax.eval_shape(lambda x, t: function(x, t, bandwidth=0.1), x, jnp.ones(3))
    assert out == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)


def test_a_threshold_of_more_digits_than_its_activation():
    with jax.enable_x64():
        x, threshold = jnp.ones((), jnp.float32), jnp.asarray([1 - 1e-12, 1 + 1e-12])
        opened = jr.gates.step(jnp.broadcast_to(x, 2), threshold, bandwidth=1.0)
    np.testing.assert_array_equal(opened, np.array([1, 0], np.float32), strict=True)


@every_function
def test_second_derivatives_are_finite_and_the_bandwidth_has_none(function, derivatives):
    def loss(threshold):
        return jnp.sum(function(X, threshold, bandwidth=BANDWIDTH) ** 2)

    assert np.isfinite(jax.jit(jax.hessian(loss))(THRESHOLD)).all()
    by_bandwidth = jax.grad(lambda e: jnp.sum(function(X, THRESHOLD, bandwidth=e)))
    assert by_bandwidth(BANDWIDTH) == 0


@every_function
def test_vmap_over_examples_and_thresholds(function, derivatives):
    examples = X.reshape(10, 3)
    batched = jax.vmap(lambda x, t: function(x, t, bandwidth=BANDWIDTH), (0, None))
    np.testing.assert_array_equal(
        batched(examples, THRESHOLD), function(examples, THRESHOLD, bandwidth=BANDWIDTH)
    )


@every_function
def test_threshold_that_does_not_broadcast(function, derivatives):
    for shape in [(2,), (7, 2, 5, 3)]:
        message = f"must broadcast to x; got shape {shape} for x of shape (2, 5, 3)"
        with pytest.raises(ValueError, match=re.escape(message)):
            function(X, jnp.ones(shape), bandwidth=0.1)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan, [0.1]], ids=str)
@every_function
def test_bandwidth_out_of_range(function, derivatives, bandwidth):
    name = function.__name__
    message = f"`jaxreg.gates.{name}(bandwidth=...)` must be a positive, finite scalar; got"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(X, THRESHOLD, bandwidth=bandwidth)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: jr.gates.hard_concrete(KEY, x),
        jr.gates.hard_concrete_deterministic,
        lambda x: jr.gates.step(x, 1.0, bandwidth=0.1),
        lambda x: jr.gates.jump_relu(jnp.ones(3), x, bandwidth=0.1),
        lambda x: jr.gates.top_k(x, 1),
        lambda x: jr.gates.batch_top_k(x, 1),
        jr.gates.batch_top_k_threshold,
    ],
)
@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_arrays_that_are_not_real_floating_point(call, dtype):
    message = rf"`jaxreg\.gates\.\w+` takes a real floating-point array; got dtype {dtype} for"
    with pytest.raises(TypeError, match=message):
        call(jnp.ones(3, dtype))


def keep_largest(x, k):
    """Keep the k largest, the first of equals, by sorting in Python."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    return np.array([v if i in order[:k] else 0 for i, v in enumerate(x)], x.dtype)


def test_top_k_keeps_exactly_k_along_an_axis():
    # Integers, so that there are ties.
    x = RNG.integers(-3, 3, size=(4, 6, 5)).astype(np.float32)
    for axis in (0, 1, -1):
        expected = np.apply_along_axis(keep_largest, axis, x, 3)
        np.testing.assert_array_equal(jr.gates.top_k(x, 3, axis=axis), expected)
    ones = jr.gates.top_k(jnp.ones((7, 9)), 4)
    np.testing.assert_array_equal(np.sum(ones, axis=1), 4)


def test_batch_top_k_keeps_k_of_an_example_on_average():
    x = RNG.integers(1, 9, size=(4, 2, 5)).astype(np.float32)
    z = jax.jit(lambda x: jr.gates.batch_top_k(x, 2))(x)
    np.testing.assert_array_equal(z, keep_largest(x.ravel(), 16).reshape(x.shape))
    assert np.sum(z != 0) == 16
    assert len(np.unique(np.sum(z != 0, axis=-1))) > 1
    # Of one example it is `top_k`, also under vmap.
    by_example = jax.vmap(lambda x: jr.gates.batch_top_k(x, 2))(x[:, 0])
    np.testing.assert_array_equal(by_example, jr.gates.top_k(x[:, 0], 2))


def test_negative_entries_are_kept_where_there_are_not_k_others():
    x = jnp.array([-1.0, 2.0, -3.0])
    np.testing.assert_array_equal(jr.gates.top_k(x, 2), [-1, 2, 0])
    np.testing.assert_array_equal(jax.nn.relu(jr.gates.top_k(x, 2)), [0, 2, 0])


def test_gradients_pass_only_through_kept_entries():
    x = jnp.array([[3.0, 1.0, 2.0, 2.0], [0.1, 0.2, 0.4, 0.3]])
    gradients = jax.jit(
        jax.vmap(
            lambda c: [
                jax.vjp(lambda x: jr.gates.top_k(x, 2), x)[1](c)[0],
                jax.vjp(lambda x: jr.gates.batch_top_k(x, 2), x)[1](c)[0],
            ]
        )
    )(jnp.stack([jnp.ones_like(x), 2 * x]))
    for gradient, kept in zip(
        gradients, [[[1, 0, 1, 0], [0, 0, 1, 1]], [[1, 1, 1, 1], [0] * 4]], strict=True
    ):
        np.testing.assert_array_equal(gradient, np.stack([kept, 2 * x * np.array(kept)]))
    _, tangent = jax.jvp(lambda x: jr.gates.top_k(x, 2), (x,), (jnp.full_like(x, 5.0),))
    np.testing.assert_array_equal(tangent, [[5, 0, 5, 0], [0, 0, 5, 5]])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_is_not_lost(sign):
    x = jnp.copysign(jnp.array([jnp.nan, 1, 1, 1]), jnp.array([sign, 1, 1, 1]))
    np.testing.assert_array_equal(np.isnan(jr.gates.top_k(x, 1)), [True, False, False, False])
    assert np.isnan(jr.gates.batch_top_k(x, 1)[0])


def test_top_k_keeps_the_dtype_and_takes_no_examples():
    assert jr.gates.top_k(jnp.ones((2, 3), jnp.bfloat16), 1).dtype == jnp.bfloat16
    for function in (jr.gates.top_k, jr.gates.batch_top_k):
        assert function(jnp.ones((0, 3)), 2).shape == (0, 3)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_out_of_range(k):
    for function in (jr.gates.top_k, jr.gates.batch_top_k):
        message = f"(k=...)` must be from 1 to the 5 entries there are; got k={k} for x of shape"
        with pytest.raises(ValueError, match=re.escape(message)):
            function(jnp.ones((2, 5)), k)


def test_shapes_and_axes_that_top_k_cannot_take():
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        jr.gates.top_k(jnp.ones(3), 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"top_k\(axis=...\)` must name an axis of x; got axis=2"):
        jr.gates.top_k(jnp.ones((2, 3)), 1, axis=2)
    with pytest.raises(ValueError, match="takes an x with an axis of features"):
        jr.gates.batch_top_k(jnp.float32(1), 1)


def test_threshold_of_batch_top_k_keeps_at_test_time_what_the_batch_kept():
    x = jax.random.normal(KEY, (64, 20))
    z = jr.gates.batch_top_k(x, 3)
    threshold = jr.gates.batch_top_k_threshold(z)
    assert threshold == np.min(z[z > 0])
    np.testing.assert_array_equal(jnp.where(x >= threshold, x, 0), z)
    assert jr.gates.batch_top_k_threshold(jnp.zeros((2, 3))) == 0
    assert np.isnan(jr.gates.batch_top_k_threshold(jnp.array([1.0, jnp.nan])))
    assert jr.gates.batch_top_k_threshold(jnp.array([jnp.inf, 0.0])) == jnp.inf
    np.testing.assert_array_equal(jax.grad(jr.gates.batch_top_k_threshold)(z), np.zeros_like(z))


@pytest.mark.parametrize("function", [jr.gates.step, jr.gates.jump_relu])
def test_the_kernel_is_open_at_its_ends(function):
    for x in (0.5, 1.5):
        slope = jax.grad(lambda t, x=x: function(x, t, bandwidth=1.0))(1.0)
        assert slope == 0


@pytest.mark.parametrize("function", [jr.gates.step, jr.gates.jump_relu])
def test_a_threshold_that_is_nan_makes_its_gate_nan(function):
    out = function(jnp.ones(2), jnp.array([jnp.nan, 0.5]), bandwidth=0.1)
    np.testing.assert_array_equal(out, [jnp.nan, 1])


def test_k_out_of_range_names_its_function():
    with pytest.raises(ValueError, match=r"`jaxreg\.gates\.top_k\(k=\.\.\.\)`"):
        jr.gates.top_k(jnp.ones(3), 4)
