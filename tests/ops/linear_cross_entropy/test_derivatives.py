"""Derivatives of any mode and order, under any transformation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from tests.ops.linear_cross_entropy.formula import problem

P = problem(tokens=7, features=3, words=5)
OPTIONS: dict[str, Any] = {"z_loss": 0.2, "label_smoothing": 0.1, "soft_cap": 2.0, "bias": P.bias}


def loss(hidden, weight, implementation="chunked", **options):
    """Return one number of every field that has a derivative."""
    r = jr.ops.linear_cross_entropy(
        hidden, weight, P.labels, implementation=implementation, chunk=3, **OPTIONS | options
    )
    return jnp.sum(r.total) + 0.1 * jnp.sum(jnp.square(r.lse))


def assert_same(transform):
    """Assert that what a transformation makes of the loss is what it makes of the reference."""
    with jax.enable_x64():
        ours, theirs = (
            jax.jit(lambda h, w, i=i: transform(lambda h, w: loss(h, w, i))(h, w))(
                P.hidden, P.weight
            )
            for i in ("chunked", "reference")
        )
    chex.assert_trees_all_equal_structs(ours, theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.any(np.asarray(b) != 0)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_ranks_are_not_promoted():
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(
            jax.value_and_grad(lambda h, w, b: loss(h, w, bias=b), (0, 1, 2)),
            *(P.hidden, P.weight, P.bias),
        )


def test_forward_mode():
    assert_same(lambda f: lambda h, w: jax.jvp(f, (h, w), (jnp.sin(h), jnp.cos(w))))


def test_hessian_vector_products_in_three_ways():
    def products(f):
        def apply(h, w):
            v = jnp.cos(w)
            slope = jax.grad(f, 1)
            return (
                jax.jvp(lambda w: slope(h, w), (w,), (v,))[1],
                jax.grad(lambda w: jnp.vdot(slope(h, w), v))(w),
                jax.grad(lambda w: jax.jvp(lambda w: f(h, w), (w,), (v,))[1])(w),
            )

        return apply

    assert_same(products)


def test_vmap_over_weights_and_tokens():
    def mapped(f):
        both = lambda h, w: (jnp.stack([h, 2 * h]), jnp.stack([w, -w]))  # noqa: E731
        return lambda h, w: jax.vmap(jax.value_and_grad(f, (0, 1)))(*both(h, w))

    assert_same(mapped)


def test_inside_a_scan_and_a_checkpoint():
    def accumulated(f):
        def apply(h, w):
            def step(total, scale):
                return total + jax.checkpoint(f)(scale * h, w), None

            return jax.lax.scan(step, jnp.zeros((), h.dtype), jnp.array([1.0, 0.5], h.dtype))[0]

        return jax.value_and_grad(apply, (0, 1))

    assert_same(accumulated)


def test_the_strength_is_a_leaf():
    """One that a schedule changes does not trace again, and has a derivative."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value(strength):
        r = jr.ops.linear_cross_entropy(P.hidden, P.weight, P.labels, z_loss=strength, chunk=3)
        return r.total, r.lse

    (zero, lse), (one, _) = value(0.0), value(1.0)
    np.testing.assert_allclose(one - zero, jnp.mean(jnp.square(lse)), rtol=1e-5)


def test_weights_that_are_differentiated_alone():
    def by_weights(w):
        return loss(P.hidden, P.weight, weights=w)

    with jax.enable_x64():
        w = jnp.asarray(P.weights)
        slope = jax.jit(jax.grad(by_weights))(w)
        h = 1e-5
        step = h * jnp.eye(len(w))[2]
        quotient = jax.jit(lambda: (by_weights(w + step) - by_weights(w - step)) / (2 * h))()
    np.testing.assert_allclose(slope[2], quotient, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_integers_and_masks_have_no_derivative(reduction):
    def value(h, labels, mask):
        r = jr.ops.linear_cross_entropy(h, P.weight, labels, weights=mask, reduction=reduction)
        return jnp.sum(r.total)

    mask = np.arange(len(P.labels)) > 2
    slopes = jax.jit(jax.grad(value, (0, 1, 2), allow_int=True))
    found = slopes(jnp.asarray(P.hidden), P.labels, mask)
    assert found[1].dtype == found[2].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(found[0][:3], 0)
    assert np.all(found[0][3:] != 0)
