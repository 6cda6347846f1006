"""A linear function with a transpose of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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


def test_reverse_mode_runs_the_transpose_and_forward_mode_the_function():
    def everything(f, times):
        whole = jax.grad(lambda x: loss(f, A, x))(X)
        # None leaves it to JAX, here where one cotangent is known to be zero.
        part = jax.grad(lambda x: loss(f, A, x, whole=False))(X)
        tangents = [jax.jvp(f, (A, X), (da, X))[1] for da in (A, jnp.zeros_like(A))]
        return times * whole, part, tangents

    close(jax.jit(everything, static_argnums=0)(apply, 1), everything(both, 2))
    close(jax.grad(lambda x: loss(apply, A, x))(X), everything(both, 2)[0])


def test_vmap_inside_and_outside():
    batch, kernels = jnp.stack([X, 2 * X, -X]), jnp.stack([A, 3 * A])

    def everything(f, times):
        outside = jax.vmap(jax.grad(lambda x: loss(f, A, x)))(batch)
        inside = jax.grad(lambda batch: jnp.sum(jax.vmap(lambda x: loss(f, A, x))(batch)))(batch)
        # What all share gets the sum, which is that of each one's own.
        shared = jax.grad(lambda x: jnp.sum(jax.vmap(lambda a: loss(f, a, x))(kernels)))(X)
        return times * outside, times * inside, times * shared

    everything = jax.jit(everything, static_argnums=0)
    close(everything(apply, 1), everything(both, 2))


def test_second_order_is_plain():
    def everything(f):
        curvature = jax.jacfwd(jax.grad(lambda x: loss(f, A, x)))(X)
        twice = jax.grad(lambda a: jnp.sum(jax.jvp(lambda x: f(a, x)[0], (X,), (X,))[1]))(A)
        return curvature, twice

    everything = jax.jit(everything, static_argnums=0)
    close(everything(apply), everything(both))
