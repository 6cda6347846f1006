"""What is peculiar to penalties of matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

EACH = [
    jr.Orthogonal(0.3),
    jr.SoftOrthogonal(0.3),
    jr.OffDiagonalOrthogonal(0.3),
    jr.SpectralNorm(0.3),
    jr.Nuclear(0.3),
]
each = pytest.mark.parametrize("penalty", EACH, ids=lambda p: type(p).__name__)


def normal(*shape: int, seed: int = 0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def remade(penalty, **settings):
    return type(penalty)(penalty.strength, **settings)


@jax.jit
def value_and_gradient(penalty, x):
    return jax.value_and_grad(penalty.__call__)(x)


@each
def test_array_that_is_no_matrix_is_an_error_that_names_it(penalty):
    name = type(penalty).__name__
    message = f'`jaxreg.{name}` takes a matrix, an array with two axes or more; got "dense/bias" of'
    with pytest.raises(ValueError, match=re.escape(message + " shape (3,)")):
        jr.kernel({"**": penalty})({"dense": {"bias": jnp.ones(3)}})
    stacked = remade(penalty, batch_axes=0)
    with pytest.raises(ValueError, match=r"beside batch_axes=0; got \"x\" of shape \(2, 3\)"):
        stacked(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(axis=...\)` must name an axis of the array"):
        remade(penalty, axis=2)(jnp.ones((2, 3)))


@each
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 8)], ids=["tall", "wide"])
def test_stacked_matrices_add_up(penalty, shape):
    layers = normal(*shape)
    value, gradient = value_and_gradient(remade(penalty, batch_axes=0), layers)
    values, gradients = jax.vmap(value_and_gradient, (None, 0))(penalty, layers)
    np.testing.assert_allclose(value, np.sum(values), rtol=1e-5)
    np.testing.assert_allclose(gradient, gradients, rtol=1e-4, atol=1e-6)
    if isinstance(penalty, jr.SpectralNorm | jr.Nuclear):
        one_by_one = jax.vmap(lambda w: penalty.prox(w, 2.0))(layers)
        together = remade(penalty, batch_axes=0).prox(layers, 2.0)
        np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-6)


@each
def test_vectors_of_convolutions_attention_and_rows(penalty):
    conv, query = normal(2, 1, 3, 4), normal(3, 2, 4)

    @jax.jit
    def reshaped():
        return [
            (penalty(conv), penalty(conv.reshape(6, 4))),
            (remade(penalty, axis=0)(query), penalty(query.reshape(3, 8))),
            (remade(penalty, axis=-1)(query), penalty(query.reshape(6, 4).T)),
        ]

    for value, expected in reshaped():
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_one_vector_has_no_pair():
    value, gradient = value_and_gradient(jr.Orthogonal(1.0), normal(4, 1))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((4, 1)))


def test_orthogonal_and_zero_vectors_add_no_gradient():
    kernel = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.0]], np.float32)
    value, gradient = value_and_gradient(jr.Orthogonal(6.0), kernel)
    # Of the six pairs only the first and the last vector are not orthogonal, and they are parallel.
    assert value == 1
    np.testing.assert_array_equal(gradient, np.zeros((2, 4)))


@pytest.mark.parametrize("name", ["SoftOrthogonal", "OffDiagonalOrthogonal", "SpectralNorm"])
def test_larger_gram_matrix_is_never_formed(name):
    def shapes(penalty, n):
        return str(jax.make_jaxpr(jax.value_and_grad(penalty))(jnp.ones((n, 37))))

    penalty = getattr(jr, name)(1.0)
    assert "37,37]" not in shapes(penalty, 5)
    assert "5,5]" in shapes(penalty, 5)
    assert "64,64]" not in shapes(penalty, 64)
    assert "37,37]" in shapes(penalty, 64)


def test_gram_matrix_takes_one_product_forward_and_one_backward():
    text = str(jax.make_jaxpr(jax.grad(jr.SoftOrthogonal(1.0)))(jnp.ones((5, 37))))
    assert text.count("dot_general[") == 2


@pytest.mark.parametrize("n", [7, 8], ids=["direct", "by the smaller"])
def test_off_diagonal_is_the_same_either_way(n):
    w = normal(4, n)
    g = w.astype(np.float64).T @ w
    value, gradient = value_and_gradient(jr.OffDiagonalOrthogonal(1.0), w)
    np.fill_diagonal(g, 0)
    np.testing.assert_allclose(value, np.sum(g**2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 4 * w @ g, rtol=1e-5, atol=1e-5)


REPEATED = np.diag([2.0, 2.0, 1.0, 0.0]).astype(np.float32)
RANK_ONE = np.outer([3.0, 0.0, -4.0], [0.6, 0.8, 0.0, 0.0]).astype(np.float32)


@jax.jit
def curvature(penalty, x):
    return jax.jvp(jax.grad(penalty.__call__), (x,), (jnp.ones_like(x),))


@pytest.mark.parametrize("x", [REPEATED, RANK_ONE, RANK_ONE.T, np.zeros((3, 4), np.float32)])
@pytest.mark.parametrize("penalty", [jr.SpectralNorm(1.0), jr.Nuclear(1.0)], ids=["one", "all"])
def test_gradient_where_singular_values_repeat_or_vanish_is_a_subgradient(penalty, x):
    gradient, second = curvature(penalty, x)
    np.testing.assert_allclose(np.sum(gradient * x), penalty(x), rtol=1e-5)
    dual = np.linalg.norm(gradient, 2 if isinstance(penalty, jr.Nuclear) else "nuc")
    np.testing.assert_allclose(dual, np.any(x), rtol=1e-5)
    assert np.isfinite(second).all()


def test_gradient_of_the_nuclear_norm_leaves_the_null_space_alone():
    gradient = jr.Nuclear(2.0).gradient(RANK_ONE)
    np.testing.assert_allclose(gradient, 2 * RANK_ONE / 5, atol=1e-6)


@pytest.mark.parametrize("penalty", [jr.SpectralNorm(1.0), jr.Nuclear(1.0)], ids=["one", "all"])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)], ids=str)
def test_prox_has_its_derivative_also_where_singular_values_repeat(penalty, shape):
    rng = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    distinct, repeated = np.array([3.0, 2.0, 0.5, 0.25]), np.array([2.0, 2.0, 0.5, 0.5])
    direction, slope, h = rng.normal(size=shape), 0.7, 1e-5
    with jax.enable_x64():
        prox = jax.jit(penalty.prox)
        derivative = jax.jit(lambda *at: jax.jvp(penalty.prox, at, (direction, slope))[1])
        for s in (distinct, repeated):
            x, step = (u * s[: min(shape)]) @ vt, 1.25
            ahead, behind = (prox(x + t * direction, step + t * slope) for t in (h, -h))
            np.testing.assert_allclose(
                derivative(x, step), (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("shape", [(2, 12, 12), (2, 20, 6), (2, 6, 20)], ids=str)
@pytest.mark.parametrize("step", [1e-3, 0.3, 3.0, 100.0])
def test_polar_prox_is_near_the_exact_one(shape, step):
    x = normal(*shape)
    exact, polar = (jr.Nuclear(1.0, batch_axes=0, method=m) for m in ("svd", "polar"))
    difference = jax.jit(polar.prox)(x, step) - jax.jit(exact.prox)(x, step)
    assert np.max(np.linalg.norm(difference, 2, axis=(1, 2))) < 1e-3 * min(step, 1) + 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("step", [0.3, 100.0, 1e8])
def test_polar_prox_of_any_magnitude(scale, step):
    x = normal(2, 6, 4)
    prox = jax.jit(jr.Nuclear(1.0, batch_axes=0, method="polar").prox)
    expected = prox(x, min(step, 100.0))
    np.testing.assert_allclose(prox(x * scale, step * scale) / scale, expected, atol=1e-5)
    np.testing.assert_allclose(prox(x * scale, 1e38) / scale, 0, atol=1e-5)
    np.testing.assert_allclose(
        prox(np.full((1, 1, 1), scale, np.float32), 0.25 * scale) / scale, 0.75, 1e-5
    )


def test_polar_prox_of_the_largest_entries():
    prox = jr.Nuclear(1.0, method="polar").prox
    np.testing.assert_allclose(prox(jnp.array([[3e38]]), 2e38), [[1e38]], rtol=1e-4)


def test_polar_prox_of_zeros_has_the_derivative_of_the_exact_one():
    exact, polar = jr.Nuclear(1.0), jr.Nuclear(1.0, method="polar")
    np.testing.assert_array_equal(polar.prox(jnp.zeros((3, 2)), 1.0), np.zeros((3, 2)))
    x = normal(4, 3)
    derive = jax.jit(jax.grad(lambda x, p: jnp.sum(p.prox(x, 1.0) ** 3)))
    np.testing.assert_allclose(derive(x, polar), derive(x, exact), rtol=1e-3, atol=1e-4)


def test_polar_prox_takes_no_decomposition():
    def text(method):
        prox = jr.Nuclear(1.0, method=method).prox
        return str(jax.make_jaxpr(prox)(jnp.ones((3, 2)), 1.0))

    decomposition = re.compile(r"= (svd|eigh|qr|cholesky|householder_product)\b")
    assert decomposition.search(text("svd"))
    assert not decomposition.search(text("polar"))
    assert "dot_general" in text("polar")


def test_unknown_method_is_an_error():
    with pytest.raises(ValueError, match=r"Nuclear\(method=...\)` must be one of 'svd', 'polar'; "):
        jr.Nuclear(1.0, method="qr")  # type: ignore[arg-type]


def regularizer(vectors=None):
    return jr.kernel({"**/kernel": jr.SpectralNorm(0.05, vector=vectors)})


def follow(reg, params):
    return reg.map(lambda p, w: p.leading_vector(w), params, exempt=params)


@pytest.mark.parametrize("start", ["exact", "random"])
def test_carried_vector_follows_the_norm_through_training(start):
    x, y = normal(64, 16, seed=1), normal(64, 8, seed=2)
    params = {
        "hidden": {"kernel": normal(16, 24, seed=3) / 4, "bias": np.zeros(24, np.float32)},
        "out": {"kernel": normal(24, 8, seed=4) / 5, "bias": np.zeros(8, np.float32)},
    }
    vectors = follow(regularizer(), params)
    if start == "random":
        vectors = jax.tree.map(lambda v: normal(*v.shape, seed=5), vectors)

    def loss(params):
        h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return jnp.mean(jnp.square(h @ params["out"]["kernel"] + params["out"]["bias"] - y))

    @jax.jit
    def train_step(params, vectors):
        reg = regularizer(vectors)
        gradient = jax.grad(lambda p: loss(p) + reg(p))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), follow(reg, params)

    for _ in range(20):
        params, vectors = train_step(params, vectors)
    for layer in ("hidden", "out"):
        kernel = params[layer]["kernel"]
        estimate = jr.SpectralNorm(1.0, vector=vectors[layer]["kernel"])(kernel)
        np.testing.assert_allclose(estimate, np.linalg.norm(kernel, 2), rtol=0.01)


def test_value_and_next_vector_share_a_product():
    @jax.jit
    def both(w, v):
        penalty = jr.SpectralNorm(1.0, vector=v)
        return penalty(w), penalty.leading_vector(w)

    text = both.lower(jnp.ones((16, 8)), jnp.ones(8)).compile().as_text() or ""
    assert len(re.findall(r"= f32\S+ dot\(", text)) == 2


def test_leading_vector_has_the_shape_of_the_kernel_without_the_axis():
    layers = normal(2, 3, 4, 5)
    penalty = jr.SpectralNorm(1.0, axis=1, batch_axes=0)
    vector = penalty.leading_vector(layers)
    assert vector.shape == (2, 1, 4, 5)
    tight = jr.SpectralNorm(1.0, axis=1, batch_axes=0, vector=vector)
    np.testing.assert_allclose(tight(layers), penalty(layers), rtol=1e-6)
    np.testing.assert_allclose(tight.leading_vector(layers), vector, atol=1e-5)
    np.testing.assert_allclose(tight.prox(layers, 0.5), penalty.prox(layers, 0.5), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)], ids=str)
def test_vector_of_a_zero_kernel_stays_a_unit_vector(shape):
    vector = jr.SpectralNorm(1.0).leading_vector(jnp.zeros(shape))
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-6)
    following = jr.SpectralNorm(1.0, vector=vector)
    np.testing.assert_allclose(following.leading_vector(jnp.zeros(shape)), vector, rtol=1e-6)
    np.testing.assert_array_equal(following.gradient(jnp.zeros(shape)), np.zeros(shape))


def test_vector_is_held_constant():
    x = jnp.asarray(normal(3, 2))
    slope = jax.grad(lambda v: jr.SpectralNorm(1.0, vector=v)(x))(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(slope, [0, 0])


@pytest.mark.parametrize("vector", [None, np.array([1, 2], np.float32)], ids=["exact", "following"])
def test_no_gradient_flows_through_the_leading_vector(vector):
    def first_entry(x, vector):
        return jr.SpectralNorm(1.0, vector=vector).leading_vector(x)[0, 0]

    for slope in jax.tree.leaves(jax.grad(first_entry, (0, 1))(normal(3, 2), vector)):
        np.testing.assert_array_equal(slope, np.zeros(slope.shape))


@pytest.mark.parametrize("shape", [(3,), (4, 1), (4, 2), (1, 1, 2)], ids=str)
def test_vector_of_another_shape_is_an_error(shape):
    message = r"SpectralNorm\(vector=...\)` must broadcast to .*; got shape"
    with pytest.raises(ValueError, match=message):
        jr.SpectralNorm(1.0, vector=jnp.ones(shape))(jnp.ones((4, 2)))


@pytest.mark.parametrize(
    "penalty", [jr.SoftOrthogonal(1.0), jr.SpectralNorm(1.0, vector=jnp.ones(3))]
)
def test_mask_is_an_error(penalty):
    with pytest.raises(ValueError, match=rf"`jaxreg.{type(penalty).__name__}` takes no mask"):
        jr.penalize(jnp.eye(3), penalty, mask=jnp.array([True, True, False]))


def test_a_vector_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    kernel, penalty = normal(8, 4, 6), jr.SpectralNorm(1.0, vector=jnp.ones(6))
    found = penalty(jax.device_put(kernel, sharding))
    np.testing.assert_allclose(found, penalty(kernel), rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        jr.Orthogonal(1.0),
        jr.SoftOrthogonal(1.0),
        jr.OffDiagonalOrthogonal(1.0),
        jr.SpectralNorm(1.0),
        jr.SpectralNorm(1.0, vector=np.ones(3, np.float32)),
        jr.Nuclear(1.0),
        jr.Decorrelation(1.0),
        lambda x: jnp.sum(jr.Nuclear(1.0, method="polar").prox(x, 0.1)),
        lambda x: jnp.sum(jr.Orthonormal().project(x)),
    ],
)
def test_products_of_matrices_keep_all_digits_on_accelerators(function):
    text = str(
        jax.make_jaxpr(lambda x: (function(x), jax.grad(lambda x: function(x))(x)))(
            jnp.ones((4, 3))
        )
    )
    products = re.findall(r"dot_general\[(?:[^\[\]]|\[[^\]]*\])*\]", text)
    assert products
    assert all("HIGHEST" in product for product in products)


def test_the_nuclear_norm_takes_singular_values_for_zero_as_matrix_rank_does():
    def slope(small):
        return jr.Nuclear(1.0).gradient(jnp.zeros((3, 400)).at[0, 0].set(1).at[1, 1].set(small))

    assert slope(1e-5)[1, 1] == 0
    np.testing.assert_allclose(slope(1e-4)[1, 1], 1, rtol=1e-5)


def test_second_derivatives_backwards_where_singular_values_repeat():
    hessian = jax.jacrev(jr.SpectralNorm(1.0).gradient)(jnp.diag(jnp.array([2.0, 2.0, 1.0])))
    assert jnp.isfinite(hessian).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_the_leading_vector_of_an_empty_kernel(shape):
    for vector in (None, jnp.ones(shape[-1])):
        found = jr.SpectralNorm(1.0, vector=vector).leading_vector(jnp.zeros(shape))
        assert found.shape == (1, shape[-1])


@pytest.mark.parametrize("shape", [(4, 3), (3, 3), (3, 4)])
def test_second_derivatives_of_the_spectral_norm(shape):
    rng, penalty = np.random.default_rng(0), jr.SpectralNorm(1.0)
    with jax.enable_x64():
        x, along = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
        _, curvature = jax.jvp(penalty.gradient, (x,), (along,))
        ahead, behind = (penalty.gradient(x + h * along) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(curvature, (ahead - behind) / 2e-6, atol=1e-8)
