"""One convention for the axes of vectors and the axes of separate arrays."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.penalties._axes import as_matrices

LAYERS = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
GROUPED = [
    jr.GroupLasso(0.3, batch_axes=0),
    jr.SparseGroupLasso(0.3, alpha=0.4, batch_axes=(0,)),
    jr.L1Inf(0.3, batch_axes=-3),
    jr.ExclusiveLasso(0.3, batch_axes=0),
]


@pytest.mark.parametrize("penalty", GROUPED, ids=lambda p: type(p).__name__)
def test_stacked_layers_are_separate_arrays(penalty):
    one = type(penalty)(**{**vars(penalty), "batch_axes": ()})

    @jax.jit
    def value_and_prox(penalty, x):
        return penalty(x), penalty.prox(x, 0.7)

    value, z = value_and_prox(penalty, LAYERS)
    values, expected = jax.vmap(value_and_prox, (None, 0))(one, LAYERS)
    np.testing.assert_allclose(value, np.sum(values), rtol=1e-6)
    np.testing.assert_allclose(z, expected, rtol=1e-6)
    if not isinstance(penalty, jr.ExclusiveLasso | jr.L1Inf):
        # Without it a group reaches over the layers.
        assert abs(one(LAYERS) - penalty(LAYERS)) > 1e-3


def test_batch_axes_and_axis_together():
    penalty = jr.GroupLasso(1.0, axis=2, batch_axes=0, weighted=False)
    expected = np.sqrt((LAYERS**2).sum(2)).sum()
    np.testing.assert_allclose(penalty(LAYERS), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("axis", "batch_axes"), [(None, 3), (0, 0), (None, (0, 0)), (1, (0, -2)), ((0, 3), ())]
)
def test_axes_that_the_array_has_not_or_twice_are_an_error(axis, batch_axes):
    penalty = jr.GroupLasso(1.0, axis=axis, batch_axes=batch_axes)
    got = f"got axis={axis}" + (f", batch_axes={batch_axes}" if batch_axes != () else "")
    with pytest.raises(ValueError, match=re.escape(got + ' for "x" of shape (3, 4, 2)')):
        penalty(jnp.asarray(LAYERS))


@pytest.mark.parametrize(
    ("shape", "axis", "batch_axes", "expected"),
    [
        ((4, 5), None, (), (1, 4, 5)),
        ((4, 5), -1, (), (1, 5, 4)),
        ((3, 3, 2, 5), None, (), (1, 18, 5)),
        ((4, 2, 3), 0, (), (1, 4, 6)),
        ((2, 3, 4), (0, 1), (), (1, 6, 4)),
        ((7, 4, 5), None, 0, (7, 4, 5)),
        ((7, 2, 4, 3), 2, (0,), (7, 4, 6)),
        ((4, 5, 7), None, -1, (7, 4, 5)),
        ((0, 5), None, (), (1, 0, 5)),
    ],
)
def test_matrices_have_the_vectors_as_columns_and_come_back(shape, axis, batch_axes, expected):
    penalty = jr.GroupLasso(1.0, axis=axis, batch_axes=batch_axes)
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    matrices, back = as_matrices(penalty, x)
    assert matrices.shape == expected
    np.testing.assert_array_equal(back(matrices), x)
    if x.size:
        norms = jnp.sqrt(jnp.sum(matrices**2, axis=1)).sum()
        unweighted = jr.GroupLasso(1.0, axis=axis, batch_axes=batch_axes, weighted=False)
        np.testing.assert_allclose(norms, unweighted(x), rtol=1e-6)


def test_an_axis_that_is_no_integer_is_an_error():
    axes: list[Any] = [[0, 1], "0", 1.0]
    for axis in axes:
        with pytest.raises(TypeError, match=r"must be an integer, or a tuple of integers; got"):
            jr.GroupLasso(1.0, axis=axis)(np.ones((2, 3)))
