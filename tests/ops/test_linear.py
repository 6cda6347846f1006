"""A linear function with a transpose of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.ops._linear import linear

RNG = np.random.default_rng(0)
A, X = jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=3))


def transpose(a, cotangents, zero):
    """Return twice what the transpose is, so that one sees which ran."""
    (y, total) = cotangents
    return None if zero[1] else 2 * (a @ y + total)


def both(a, x):
    return jnp.sin(a).T @ x, jnp.sum(x)


def apply(a, x):
    return linear(lambda a, x: (a.T @ x, jnp.sum(x)), transpose, jnp.sin(a), x)


def loss(f, a, x, whole=True):
    y, total = f(a, x)
    return jnp.sum(jnp.square(y)) + (jnp.square(total) if whole else 0)


def close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, expected)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_reverse_mode_runs_the_transpose_and_forward_mode_the_function(jit):
    gradient = jit(jax.grad(lambda x: loss(apply, A, x)))(X)
    close(gradient, 2 * jax.grad(lambda x: loss(both, A, x))(X))
    # None leaves it to JAX, here where one cotangent is known to be zero.
    gradient = jit(jax.grad(lambda x: loss(apply, A, x, whole=False)))(X)
    close(gradient, jax.grad(lambda x: loss(both, A, x, whole=False))(X))
    for by, tangents in (((A, X), (A, X)), ((A, X), (A, jnp.zeros_like(X)))):
        close(jit(functools.partial(jax.jvp, apply))(by, tangents), jax.jvp(both, by, tangents))


def test_vmap_inside_and_outside():
    batch = jnp.stack([X, 2 * X, -X])
    expected = 2 * jax.vmap(jax.grad(lambda x: loss(both, A, x)))(batch)
    close(jax.vmap(jax.grad(lambda x: loss(apply, A, x)))(batch), expected)
    within = jax.grad(lambda batch: jnp.sum(jax.vmap(lambda x: loss(apply, A, x))(batch)))
    close(within(batch), expected)
    # What all share gets the sum, which is that of each one's own.
    kernels = jnp.stack([A, 3 * A])
    shared = jax.grad(lambda x: jnp.sum(jax.vmap(lambda a: loss(apply, a, x))(kernels)))
    expected = jax.grad(lambda x: jnp.sum(jax.vmap(lambda a: loss(both, a, x))(kernels)))(X)
    close(shared(X), 2 * expected)


def test_second_order_is_plain():
    def curvature(f):
        return jax.jacfwd(jax.grad(lambda x: loss(f, A, x)))(X)

    close(curvature(apply), curvature(both))
    twice = jax.grad(lambda a: jnp.sum(jax.jvp(lambda x: apply(a, x)[0], (X,), (X,))[1]))
    plain = jax.grad(lambda a: jnp.sum(jax.jvp(lambda x: both(a, x)[0], (X,), (X,))[1]))
    close(twice(A), plain(A))
