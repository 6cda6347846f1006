"""Penalties of functions, against Jacobians written out by hand."""

import re

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxreg as jr

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))


def weights(hidden, outputs):
    shapes = [(3, hidden), (hidden,), (hidden, outputs)]
    return [RNG.normal(size=shape) for shape in shapes]


def network(params, x):
    first, bias, second = params
    return jnp.tanh(x @ first + bias) @ second


def jacobians(params):
    """Return the Jacobian (outputs, inputs) of each example, by the chain rule."""
    first, bias, second = params
    slopes = 1 - np.tanh(X @ first + bias) ** 2
    return [second.T @ np.diag(slope) @ first.T for slope in slopes]


def by_example(function):
    return lambda params: np.mean([function(jacobian) for jacobian in jacobians(params)])


def squared_norm(jacobian):
    return np.sum(jacobian**2)


def contractive_formula(params):
    """Rifai et al.: Σ_j (h_j (1 − h_j))² Σ_k W_kj², for the sigmoid."""
    kernel, bias, _ = params
    total = 0.0
    for x in X:
        for j in range(kernel.shape[1]):
            h = 1 / (1 + np.exp(-(x @ kernel[:, j] + bias[j])))
            total += (h * (1 - h)) ** 2 * np.sum(kernel[:, j] ** 2)
    return total / len(X)


functional = jr.functional
PENALTIES = {
    "gradient_penalty": (
        weights(5, 1),
        lambda p, x: functional.gradient_penalty(lambda x: network(p, x), x),
        by_example(lambda jacobian: (np.sqrt(np.sum(jacobian**2)) - 1) ** 2),
    ),
    "gradient_penalty-target": (
        weights(5, 1),
        lambda p, x: functional.gradient_penalty(lambda x: network(p, x)[:, 0], x, target=0.3),
        by_example(lambda jacobian: (np.sqrt(np.sum(jacobian**2)) - 0.3) ** 2),
    ),
    "input_gradient": (
        weights(5, 1),
        lambda p, x: functional.input_gradient(lambda x: network(p, x)[:, 0], x),
        by_example(squared_norm),
    ),
    "jacobian_norm-by-outputs": (
        weights(5, 2),
        lambda p, x: functional.jacobian_norm(lambda x: network(p, x), x),
        by_example(squared_norm),
    ),
    "jacobian_norm-by-inputs": (
        weights(5, 4),
        lambda p, x: functional.jacobian_norm(lambda x: network(p, x).reshape(-1, 2, 2), x),
        by_example(squared_norm),
    ),
    "contractive": (
        weights(5, 1),
        lambda p, x: functional.contractive(jax.nn.sigmoid, x, p[0], p[1]),
        contractive_formula,
    ),
    "lipschitz_bound": (
        weights(5, 2),
        lambda p, x: functional.lipschitz_bound({"first": p[0], "second": p[2]}),
        lambda p: np.linalg.svd(p[0])[1][0] * np.linalg.svd(p[2])[1][0],
    ),
}
every_penalty = pytest.mark.parametrize(
    ("params", "penalty", "formula"), PENALTIES.values(), ids=PENALTIES
)
of_functions = pytest.mark.parametrize(
    ("params", "penalty"), [v[:2] for v in list(PENALTIES.values())[:-1]], ids=list(PENALTIES)[:-1]
)


@every_penalty
def test_value_and_gradient_by_the_parameters(params, penalty, formula):
    with jax.enable_x64():
        derive = jax.jit(jax.value_and_grad(penalty))
        value, gradients = derive([jnp.asarray(p) for p in params], jnp.asarray(X))
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, formula(params), rtol=1e-12)
    h = 1e-6
    for i, gradient in enumerate(gradients):
        for index in np.ndindex(params[i].shape):
            ahead, behind = ([p.copy() for p in params] for _ in range(2))
            ahead[i][index] += h
            behind[i][index] -= h
            slope = (formula(ahead) - formula(behind)) / (2 * h)
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-6, atol=1e-7)


@every_penalty
def test_half_precision_is_added_up_in_float32(params, penalty, formula):
    half = [jnp.asarray(p, jnp.bfloat16) for p in params]
    value, gradients = jax.jit(jax.value_and_grad(penalty))(half, jnp.asarray(X, jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, formula(params), rtol=0.05)


@of_functions
def test_an_empty_batch_gives_zero(params, penalty):
    arrays = [jnp.asarray(p, jnp.float32) for p in params]
    value, gradients = jax.jit(jax.value_and_grad(penalty))(arrays, jnp.zeros((0, 3)))
    assert value == 0.0
    assert all(np.all(g == 0) for g in gradients)


@of_functions
def test_input_that_is_not_real_floating_point(params, penalty):
    for dtype in (jnp.int32, jnp.complex64):
        message = (
            rf'takes a real floating-point array; got dtype {dtype.dtype} for "x" of shape \(4'
        )
        with pytest.raises(TypeError, match=message):
            penalty(params, jnp.ones((4, 3), dtype))


@of_functions
def test_nan_propagates(params, penalty):
    arrays = [jnp.asarray(p, jnp.float32) for p in params]
    x = np.where(np.eye(4, 3) * X > 0, np.nan, X).astype(np.float32)
    assert np.isnan(x).any()
    assert jnp.isnan(jax.jit(penalty)(arrays, x))


def test_many_half_precision_gradients_add_up_in_float32():
    x = jnp.ones((1, 4097), jnp.bfloat16)
    assert functional.input_gradient(lambda x: jnp.sum(x, axis=1), x) == 4097


def test_zero_gradients_have_a_finite_penalty():
    @jax.jit
    @jax.value_and_grad
    def penalty(w):
        x = jnp.ones((2, 3))
        return functional.gradient_penalty(lambda x: x @ w, x)

    value, gradient = penalty(jnp.zeros(3))
    assert value == 1.0
    np.testing.assert_array_equal(gradient, 0)
    value, gradient = penalty(jnp.array([3.0, 0.0, 4.0]))
    assert value == 16.0
    np.testing.assert_allclose(gradient, 2 * 4 * np.array([0.6, 0, 0.8]), rtol=1e-6)


def test_interpolates_lie_between_and_have_a_share_each():
    real, fake = jnp.full((2000, 2, 1), 3.0), jnp.full((2000, 2, 1), 1.0)
    x = np.asarray(functional.interpolate(KEY, real, fake))
    np.testing.assert_array_equal(x[:, 0], x[:, 1])
    share = (x[:, 0, 0] - 1) / 2
    assert len(np.unique(share)) > 1900
    np.testing.assert_allclose(np.quantile(share, [0, 0.25, 1]), [0, 0.25, 1], atol=0.03)
    half = functional.interpolate(KEY, real.astype(jnp.bfloat16), fake)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, x.astype(jnp.bfloat16))


def test_interpolate_keeps_what_real_and_fake_share():
    x = np.asarray(X, np.float32)
    np.testing.assert_allclose(functional.interpolate(KEY, x, x), x, rtol=1e-6)


def test_the_share_is_that_of_the_real_example():
    real, fake = jnp.ones((2, 1)), jnp.zeros((2, 1))
    share = jax.random.uniform(KEY, (2, 1))
    np.testing.assert_array_equal(functional.interpolate(KEY, real, fake), share)


def test_interpolate_checks_its_shapes():
    with pytest.raises(ValueError, match=re.escape("the same shape; got (2, 3) and (3, 3)")):
        functional.interpolate(KEY, jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r'axis of examples; got shape \(\) for "real"'):
        functional.interpolate(KEY, jnp.float32(1), jnp.float32(1))


@pytest.mark.parametrize("samples", [1, 3])
def test_projections_of_an_isotropic_jacobian_have_no_variance(samples):
    """For J = 2Q with orthonormal rows, C‖vJ‖² is 4C for every v on the unit sphere."""
    q = np.linalg.qr(RNG.normal(size=(5, 5)))[0][:, :3].astype(np.float32)
    estimate = functional.jacobian_norm(
        lambda x: 2 * x @ q, jnp.ones((4, 5)), key=KEY, samples=samples
    )
    np.testing.assert_allclose(estimate, 12.0, rtol=1e-5)


def test_projections_are_unbiased_and_drawn_for_each_example():
    jacobian = RNG.normal(size=(3, 4)).astype(np.float32)
    exact = np.sum(jacobian**2)
    estimate = jax.jit(lambda key, x: functional.jacobian_norm(lambda x: x @ jacobian, x, key=key))
    one_by_one = jax.vmap(estimate, (0, None))(jax.random.split(KEY, 4096), jnp.ones((1, 3)))
    error = np.std(one_by_one) / np.sqrt(len(one_by_one))
    assert 0 < error < exact / 50
    assert abs(np.mean(one_by_one) - exact) < 4 * error
    # The same number of draws in one batch: shared between examples they would err like one.
    assert abs(estimate(KEY, jnp.ones((4096, 3))) - exact) < 4 * error
    assert estimate(KEY, jnp.ones((1, 3))) != estimate(jax.random.key(1), jnp.ones((1, 3)))


def test_more_samples_have_less_variance():
    jacobian = jnp.diag(jnp.array([3.0, 0.0, 0.0]))

    def spread(samples):
        def estimate(key):
            return functional.jacobian_norm(
                lambda x: x @ jacobian, jnp.ones((1, 3)), key=key, samples=samples
            )

        values = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 2000))
        np.testing.assert_allclose(np.mean(values), 9.0, rtol=0.1)
        return np.std(values)

    np.testing.assert_allclose(spread(1) / spread(9), 3.0, rtol=0.15)


def test_one_output_needs_no_projection():
    params, _, formula = PENALTIES["input_gradient"]
    arrays = [jnp.asarray(p, jnp.float32) for p in params]
    x = jnp.asarray(X, jnp.float32)
    estimate = functional.jacobian_norm(lambda x: network(arrays, x), x, key=KEY)
    np.testing.assert_allclose(estimate, formula(params), rtol=1e-5)


@pytest.mark.parametrize("key", [None, KEY], ids=["exact", "sampled"])
def test_functions_without_inputs_or_outputs(key):
    assert functional.jacobian_norm(lambda x: x[:, :0], jnp.ones((2, 3)), key=key) == 0
    assert functional.jacobian_norm(lambda x: jnp.ones((2, 3)), jnp.ones((2, 0)), key=key) == 0


def test_contractive_of_an_activation_that_narrows():
    x, kernel = jnp.ones((4, 3)), jnp.full((3, 2), 0.1)
    narrow = functional.contractive(lambda z: jnp.tanh(z).astype(jnp.bfloat16), x, kernel)
    np.testing.assert_allclose(narrow, functional.contractive(jnp.tanh, x, kernel), rtol=0.02)


@jax.custom_vjp
def clipped(x):
    """A function with a surrogate derivative, as spiking networks have."""
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), x), lambda x, g: (g / (1 + x**2),))


def test_only_more_outputs_than_inputs_need_a_forward_derivative():
    x = jnp.asarray(X, jnp.float32)
    slopes = 1 / (1 + x**2)
    expected = jnp.mean(jnp.sum(slopes**2, axis=1))
    np.testing.assert_allclose(functional.jacobian_norm(clipped, x), expected, rtol=1e-6)
    with pytest.raises(TypeError, match="custom_vjp"):
        functional.jacobian_norm(lambda x: clipped(jnp.tile(x, 2)), x)


@pytest.mark.parametrize(
    "activation",
    [jax.nn.sigmoid, jnp.tanh, jax.nn.gelu, jax.nn.relu, clipped],
    ids=lambda f: f.__name__,
)
def test_contractive_is_the_jacobian_norm_of_the_layer(activation):
    kernel, bias = jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=2))
    x = jnp.asarray(X, jnp.float32)
    exact = functional.jacobian_norm(lambda x: activation(x @ kernel + bias), x)
    closed = functional.contractive(activation, x, kernel, bias)
    np.testing.assert_allclose(closed, exact, rtol=1e-5)
    tokens = functional.contractive(activation, x.reshape(2, 2, 3), kernel, bias)
    np.testing.assert_allclose(tokens, exact, rtol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [((4, 3), (2, 5), (5,)), ((4, 3), (3, 5), (3,)), ((), (3, 5), (5,)), ((4, 3), (3,), (3,))],
    ids=str,
)
def test_contractive_checks_its_shapes(shapes):
    x, kernel, bias = map(jnp.ones, shapes)
    message = f"takes x (..., in), kernel (in, out) and bias (out,); got {shapes[0]}, {shapes[1]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.contractive(jnp.tanh, x, kernel, bias)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"strides": 2},
    "dilated": {"kernel_dilation": 2},
    "circular": {"padding": "CIRCULAR"},
    "grouped": {"feature_group_count": 2},
}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_bound_of_a_convolution(settings):
    conv = nn.Conv(4, (3, 2), use_bias=False, **settings)
    image = jnp.zeros((1, 5, 6, 2))
    variables = conv.init(KEY, image)
    matrix = jax.jit(jax.jacobian(lambda x: jnp.ravel(jnp.asarray(conv.apply(variables, x)))))(
        image
    )
    norm = np.linalg.norm(matrix.reshape(-1, image.size), ord=2)
    bound = functional.lipschitz_bound(variables)
    assert norm <= bound * (1 + 1e-6)
    assert bound < 6 * norm


def test_the_norm_of_a_reshaped_kernel_is_no_bound_and_the_root_is_needed():
    kernel = jnp.ones((3, 3, 1, 1))
    conv = nn.Conv(1, (3, 3), padding="CIRCULAR", use_bias=False)
    norm = jnp.max(jnp.asarray(conv.apply({"params": {"kernel": kernel}}, jnp.ones((1, 4, 4, 1)))))
    assert norm == 9.0
    np.testing.assert_allclose(functional.lipschitz_bound(kernel), 9.0, rtol=1e-6)
    assert np.linalg.norm(kernel.reshape(9, 1), ord=2) < 4


def test_lipschitz_bound_at_zero_and_of_equal_singular_values():
    slope = jax.jit(jax.value_and_grad(functional.lipschitz_bound))
    value, gradients = slope([jnp.zeros((2, 3)), 2 * jnp.eye(3)])
    assert value == 0
    np.testing.assert_array_equal(gradients[0], 0)
    np.testing.assert_array_equal(gradients[1], 0)
    value, (gradient,) = slope([2 * jnp.eye(3)])
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.eye(3) / 3, atol=1e-6)
    assert functional.lipschitz_bound(jnp.ones((0, 3))) == 0


def test_lipschitz_bound_checks_its_kernels():
    with pytest.raises(ValueError, match="takes at least one kernel; got none"):
        functional.lipschitz_bound({})
    with pytest.raises(
        ValueError, match=re.escape("takes kernels (in, out) or (*window, in, out)")
    ):
        functional.lipschitz_bound([jnp.ones((3, 2)), jnp.ones(2)])
    with pytest.raises(TypeError, match='got dtype int32 for "kernels" of shape'):
        functional.lipschitz_bound(jnp.ones((2, 2), jnp.int32))


@pytest.mark.parametrize("name", ["gradient_penalty", "input_gradient"])
def test_outputs_that_are_not_one_number_for_each_example(name):
    penalty = getattr(functional, name)
    x = jnp.ones((4, 3))
    for f in (jnp.mean, lambda x: x, lambda x: jnp.sum(x, axis=1)[None], lambda x: x[:2, 0]):
        message = f"`jaxreg.functional.{name}` takes a function to one number for each example"
        with pytest.raises(ValueError, match=re.escape(message)):
            penalty(f, x)
    with pytest.raises(
        TypeError, match=rf"{name}` takes a function that returns one array; got tup"
    ):
        penalty(lambda x: (x[:, 0], x), x)
    with pytest.raises(TypeError, match='got dtype int32 for "the function\'s output"'):
        penalty(lambda x: jnp.argmax(x, axis=1).astype(jnp.int32), x)
    with pytest.raises(ValueError, match=r'axis of examples; got shape \(\) for "x"'):
        penalty(lambda x: x, jnp.float32(1))


def test_jacobian_norm_checks_its_output_and_samples():
    x = jnp.ones((4, 3))
    for f in (jnp.mean, jnp.transpose):
        with pytest.raises(ValueError, match="takes a function whose output has the batch axis; g"):
            functional.jacobian_norm(f, x)
    for settings in ({"samples": 2}, {"samples": 0, "key": KEY}):
        with pytest.raises(ValueError, match=r"samples=...\)` must be at least 1, and takes a key"):
            functional.jacobian_norm(lambda x: x, x, **settings)


@pytest.mark.parametrize("target", [-1.0, np.nan, [1.0]], ids=str)
def test_target_out_of_range(target):
    message = "`jaxreg.functional.gradient_penalty(target=...)` must be a finite, non-negative"
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.gradient_penalty(lambda x: x[:, 0], jnp.ones((4, 3)), target=target)


class Critic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.silu(nn.Dense(8)(x)))


def by_vmap(f, x):
    """The penalties by one derivative for each example."""
    gradients = jax.vmap(jax.grad(lambda x: f(x[None])[0, 0]))(x)
    norms = jnp.sqrt(jnp.sum(gradients**2, axis=1))
    return jnp.mean((norms - 1) ** 2) + 3 * jnp.mean(norms**2)


def by_functional(f, x):
    return functional.gradient_penalty(f, x) + 3 * functional.input_gradient(f, x)


def test_linen_model():
    x = jnp.asarray(X, jnp.float32)
    critic = Critic()
    params = critic.init(KEY, x)
    derive = [
        jax.jit(
            jax.value_and_grad(lambda params, p=penalty: p(lambda x: critic.apply(params, x), x))
        )
        for penalty in (by_functional, by_vmap)
    ]
    (value, gradients), (expected, expected_gradients) = (d(params) for d in derive)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradients))


def test_nnx_model():
    x = jnp.asarray(X, jnp.float32)
    rngs = nnx.Rngs(0)
    critic = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.silu, nnx.Linear(8, 1, rngs=rngs))

    @nnx.jit
    def derive(critic):
        return [
            nnx.value_and_grad(lambda c, p=p: p(c, x))(critic) for p in (by_functional, by_vmap)
        ]

    (value, gradients), (expected, expected_gradients) = derive(critic)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradients))


def test_nnx_module_that_changes_its_state_in_the_call_is_an_error():
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate RngCount"):
        functional.jacobian_norm(dropout, jnp.ones((2, 3)))
    dropout.deterministic = True
    assert functional.jacobian_norm(dropout, jnp.ones((2, 3))) == 3.0


def test_squares_of_half_precision_jacobians_do_not_overflow():
    x = jnp.ones((2, 3), jnp.float16)
    assert functional.jacobian_norm(lambda x: 1000 * x, x) == 3e6


def test_interpolates_of_half_precision_under_strict_promotion():
    x = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(functional.interpolate, jax.random.key(0), x, x) == x


def test_contractive_of_half_precision_under_strict_promotion():
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.full((3, 2), 0.1)
    with jax.numpy_dtype_promotion("strict"):
        value = functional.contractive(jnp.tanh, x, kernel)
    np.testing.assert_allclose(value, functional.contractive(jnp.tanh, jnp.ones((2, 3)), kernel))


def test_jacobian_estimate_of_half_precision_has_unit_vectors():
    x = jnp.ones((2, 4096), jnp.bfloat16)
    for seed in range(4):
        estimate = jr.functional.jacobian_norm(lambda x: x, x, key=jax.random.key(seed))
        assert estimate.dtype == jnp.float32
        np.testing.assert_allclose(estimate, 4096, rtol=3e-4)


def test_samples_must_be_an_integer():
    with pytest.raises(TypeError, match="integer"):
        jr.functional.jacobian_norm(jnp.sin, X, key=KEY, samples=2.5)  # type: ignore[arg-type]


def test_interpolate_names_what_is_not_floating():
    with pytest.raises(TypeError, match='got dtype int32 for "fake"'):
        jr.functional.interpolate(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32))


def test_contractive_takes_no_integer_bias():
    with pytest.raises(TypeError, match='got dtype int32 for "bias"'):
        jr.functional.contractive(
            jnp.tanh, jnp.ones((4, 3)), jnp.ones((3, 2)), jnp.ones(2, jnp.int32)
        )


def test_contractive_takes_a_kernel_of_two_axes():
    with pytest.raises(ValueError, match="takes x"):
        jr.functional.contractive(jnp.tanh, jnp.ones((4, 3)), jnp.ones(3), jnp.float32(0))


def test_target_of_another_dtype_does_not_widen_the_penalty():
    with jax.enable_x64():
        x = jnp.ones((2, 3), jnp.float32)
        value = jr.functional.gradient_penalty(lambda x: x.sum(1), x, target=np.float64(1))
    assert value.dtype == jnp.float32
