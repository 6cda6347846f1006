"""Penalties of matrices, against Keras, pyproximal, NumPy and Sonnet's formula."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pyproximal
import pytest

import jaxreg as jr

KERNEL = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.mark.parametrize(("mode", "axis"), [("columns", None), ("rows", -1)])
def test_orthogonal_is_keras(mode, axis):
    peer = keras.regularizers.OrthogonalRegularizer(0.3, mode=mode)
    penalty = jr.Orthogonal(0.3, axis=axis)
    # Not NumPy's array: of one, Keras takes axis 0 for the last when it normalizes.
    value, gradient = jax.value_and_grad(lambda w: peer(w))(jnp.asarray(KERNEL))
    np.testing.assert_allclose(penalty(KERNEL), value, rtol=1e-6)
    np.testing.assert_allclose(penalty.gradient(KERNEL), gradient, rtol=1e-4, atol=1e-7)


def test_one_vector_is_nan_in_keras():
    peer = keras.regularizers.OrthogonalRegularizer(0.3, mode="columns")
    assert np.isnan(peer(jnp.asarray(KERNEL[:, :1])))
    assert jr.Orthogonal(0.3)(KERNEL[:, :1]) == 0


# The smaller Gram matrix serves where there are at least twice as many columns as rows.
@pytest.mark.parametrize("kernel", [KERNEL, KERNEL.T[:2]], ids=["tall", "wide"])
def test_off_diagonal_is_sonnet(kernel):
    # snt.regularizers.OffDiagonalOrthogonal, transcribed.
    m = kernel.reshape(-1, kernel.shape[-1])
    x = m.T @ m
    x = x * (np.ones_like(x) - np.eye(x.shape[0], dtype=x.dtype))
    np.testing.assert_allclose(
        jr.OffDiagonalOrthogonal(0.3)(kernel), 0.3 * np.sum(x * x), rtol=1e-5
    )


@pytest.mark.parametrize("step", [0.5, 5.0])
def test_nuclear_is_pyproximal(step):
    peer = pyproximal.Nuclear(KERNEL.shape, sigma=0.6)
    penalty = jr.Nuclear(0.6)
    np.testing.assert_allclose(penalty(KERNEL), peer(KERNEL.ravel()), rtol=1e-6)
    expected = peer.prox(KERNEL.ravel(), step).reshape(KERNEL.shape)
    np.testing.assert_allclose(penalty.prox(KERNEL, step), expected, atol=2e-6)


@pytest.mark.parametrize("step", [0.5, 5.0, 50.0])
def test_spectral_norm_prox_is_that_of_the_largest_entry_in_pyproximal(step):
    # Moreau: less the projection of the singular values on the L1 ball of radius step.
    u, s, vt = np.linalg.svd(KERNEL.astype(np.float64), full_matrices=False)
    projection = pyproximal.projection.L1BallProj(s.size, step)(s) if s.sum() > step else s
    expected = (u * (s - projection)) @ vt
    np.testing.assert_allclose(jr.SpectralNorm(1.0).prox(KERNEL, step), expected, atol=1e-4)


@pytest.mark.parametrize("kernel", [KERNEL, KERNEL.T], ids=["tall", "wide"])
def test_norms_are_numpys(kernel):
    norms = [np.linalg.norm(kernel, order) for order in (2, "nuc")]
    values = [jr.SpectralNorm(1.0)(kernel), jr.Nuclear(1.0)(kernel)]
    np.testing.assert_allclose(values, norms, rtol=1e-6)
    u, _, vt = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(jr.Nuclear(1.0).gradient(kernel), u @ vt, atol=1e-5)
    top = np.outer(u[:, 0], vt[0])
    np.testing.assert_allclose(jr.SpectralNorm(1.0).gradient(kernel), top, atol=1e-5)
