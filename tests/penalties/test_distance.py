"""Distances to references, beyond what every penalty satisfies."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

RNG = np.random.default_rng(0)
LOGITS, TEACHER = RNG.normal(size=(2, 6, 4)).astype(np.float32)


def forward(reference):
    return jr.KLTo(0.7, reference=reference, temperature=3.0)


def reverse(reference):
    return jr.KLTo(0.5, reference=reference, direction="reverse")


def cosine(reference):
    return jr.Cosine(0.3, reference=reference)


@jax.jit
def each(x, reference):
    return [build(reference)(x) for build in (forward, reverse, cosine)]


def all_three(reference):
    return forward(reference) + reverse(reference) + cosine(reference)


def test_microbatches_with_their_references_combine_exactly():
    """The references do not leave the module, and a microbatch counts by its unmasked tokens."""
    model = nn.Dense(4)
    x = RNG.normal(size=(6, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    mask = np.array([True, True, False, True, True, False])

    @jax.jit
    def measure(x, reference, mask):
        activity = jr.activity({".": all_three(reference)}, mask=mask)
        return activity(model.apply)(variables, x)[1]

    whole = measure(x, TEACHER, mask)
    assert all(leaf.size == 1 for leaf in jax.tree.leaves(whole))
    parts = [slice(0, 2), slice(2, 6)]
    combined = jr.combine([measure(x[part], TEACHER[part], mask[part]) for part in parts])
    np.testing.assert_allclose(combined.total, whole.total, rtol=1e-6)
    kept = each(model.apply(variables, x)[mask], TEACHER[mask])
    np.testing.assert_allclose(whole.total, sum(kept), rtol=1e-6)


def test_a_masked_token_has_no_gradient_whatever_its_reference():
    mask = np.array([True, True, False, True, True, False])
    reference = np.where(mask[:, None], TEACHER, np.nan)

    @jax.jit
    @jax.value_and_grad
    def masked(x):
        return jr.penalize(x, all_three(reference), mask=mask)

    value, gradient = masked(LOGITS)
    np.testing.assert_allclose(value, sum(each(LOGITS[mask], TEACHER[mask])), rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.any(gradient != 0, axis=1), mask)


def test_reference_broadcasts():
    tiled = np.tile(TEACHER[0], (6, 1))
    np.testing.assert_allclose(each(LOGITS, TEACHER[0]), each(LOGITS, tiled), rtol=1e-6)
    tiled = np.tile(TEACHER[:, :1], (1, 4))
    np.testing.assert_allclose(each(LOGITS, TEACHER[:, :1]), each(LOGITS, tiled), rtol=1e-6)
    for build in (forward, reverse, cosine):
        message = r'reference=...\)` must broadcast .* \(6, 3\) for "x" of'
        with pytest.raises(ValueError, match=message):
            build(TEACHER[:, :3])(LOGITS)


def test_a_complex_reference_of_a_real_array_is_an_error():
    message = r"`jaxreg\.L2To\(%s=\.\.\.\)` must be real for a real array; got dtype complex"
    for name in ("reference", "weight"):
        penalty = jr.L2To(1.0, **({"reference": 0.0} | {name: np.ones(4, complex)}))
        for of in (penalty, penalty.gradient, lambda x, p=penalty: p.prox(x, 1.0)):
            with pytest.raises(TypeError, match=message % name):
                of(LOGITS)
    assert jr.L2To(1.0, reference=1j)(np.ones(3, np.complex64)) == 6
    kernel = jr.kernel({"w": jr.L2To(1.0, reference=1j)})
    assert "w" in kernel.describe({"w": jax.ShapeDtypeStruct((3,), np.complex64)})
    with pytest.raises(TypeError, match=r"`jaxreg\.Box\(lower=\.\.\.\)` must be real"):
        jr.Box(np.ones(4, complex), 2.0).project(LOGITS)


def test_the_reference_is_differentiated_unless_the_user_stops_it():
    for gradient in jax.jit(jax.jacobian(lambda r: each(LOGITS, r)))(TEACHER):
        assert (gradient != 0).all()
    stopped = jax.jit(jax.grad(lambda r: all_three(jax.lax.stop_gradient(r))(LOGITS)))(TEACHER)
    np.testing.assert_array_equal(stopped, 0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty_arrays_give_zero(shape):
    empty = jnp.zeros(shape)
    assert each(empty, empty) == [0.0] * 3
    assert all_three(empty).gradient(empty).shape == shape


def test_leading_axes_are_examples():
    values = each(LOGITS, TEACHER)
    stacked = each(LOGITS.reshape(2, 3, 4), TEACHER.reshape(2, 3, 4))
    np.testing.assert_allclose(stacked, values, rtol=1e-6)
    one_by_one = jax.vmap(each)(LOGITS, TEACHER)
    np.testing.assert_allclose(values, np.mean(one_by_one, axis=1), rtol=1e-6)


@jax.jit
def both_directions(x, reference):
    penalties = [jr.KLTo(1.0, reference=reference, direction=d) for d in ("forward", "reverse")]
    return [p(x) for p in penalties], [p.gradient(x) for p in penalties]


def test_a_class_that_the_reference_excludes():
    reference = jnp.array([[0.3, -jnp.inf, 1.0]])
    x = jnp.array([[1.0, 0.0, 0.5]])
    values, gradients = both_directions(x, reference)
    # The model's probability of the two other classes is all that the missing one costs.
    q, p = np.exp(x) / np.sum(np.exp(x)), np.exp(reference) / np.sum(np.exp(reference))
    kept = np.log(p[:, ::2] / q[:, ::2])
    np.testing.assert_allclose(values, [np.sum(p[:, ::2] * kept), np.inf], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], q - p, rtol=1e-5)
    by_reference = jax.jit(jax.grad(lambda r: jr.KLTo(1.0, reference=r)(x)))(reference)
    assert np.isfinite(by_reference).all()


def test_a_class_that_both_exclude():
    reference = jnp.array([[0.3, -jnp.inf, 1.0]])
    x = jnp.array([[1.0, -jnp.inf, 0.5]])
    values, gradients = both_directions(x, reference)
    expected_values, expected = both_directions(x[:, ::2], reference[:, ::2])
    np.testing.assert_allclose(values, expected_values, rtol=1e-6)
    for gradient, without in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, np.insert(without, 1, 0, axis=1), rtol=1e-5)


def test_kl_of_equal_logits_is_zero_and_a_shift_changes_nothing():
    values, gradients = both_directions(TEACHER, TEACHER)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_allclose(gradients, np.zeros((2, 6, 4)), atol=1e-7)
    shifted, _ = both_directions(LOGITS + 7, TEACHER)
    np.testing.assert_allclose(shifted, both_directions(LOGITS, TEACHER)[0], rtol=1e-5)


def test_value_keeps_its_size_at_high_temperatures():
    """T² times the divergence tends to the variance of the difference of the logits, halved."""
    limit = np.mean(np.var(LOGITS - TEACHER, axis=1)) / 2
    for direction in ("forward", "reverse"):
        penalty = jr.KLTo(1.0, reference=TEACHER, temperature=300.0, direction=direction)
        np.testing.assert_allclose(penalty(LOGITS), limit, rtol=2e-2)


def test_temperature_is_a_leaf_and_the_direction_is_not():
    penalty = jr.KLTo(0.5, reference=1.0, temperature=2.0)
    assert jax.tree.leaves(penalty) == [0.5, 1.0, 2.0]
    with pytest.raises(ValueError, match=re.escape("KLTo(temperature=...)` must be a positive")):
        jr.KLTo(1.0, reference=TEACHER, temperature=0.0)
    message = "`jaxreg.KLTo(direction=...)` must be one of 'forward', 'reverse'; got 'sideways'."
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.KLTo(1.0, reference=TEACHER, direction="sideways")  # type: ignore[arg-type]


def test_cosine_with_a_vector_of_zeros_is_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    reference = jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    penalty = jr.Cosine(3.0, reference=reference)
    assert penalty(x) == 2.0
    np.testing.assert_array_equal(penalty.gradient(x), np.zeros((3, 2)))
    by_reference = jax.grad(lambda r: jr.Cosine(3.0, reference=r)(x))(reference)
    np.testing.assert_array_equal(by_reference, np.zeros((3, 2)))


def test_cosine_does_not_depend_on_lengths():
    penalty = jr.Cosine(1.0, reference=TEACHER)
    np.testing.assert_allclose(penalty(100 * LOGITS), penalty(LOGITS), rtol=1e-6)
    np.testing.assert_allclose(penalty(2 * TEACHER), 0, atol=1e-6)
    np.testing.assert_allclose(penalty(-TEACHER), 2, rtol=1e-6)
