"""Moments as sums of functions of single entries."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr
from jaxreg.ops._epilogue import NotElementwise, elementwise, epilogue, evaluate, gradient
from tests.registry import CASES

from ._penalties import Root

# Those of the registry that a kernel can measure.
TILED = {
    *("L1", "L2", "L1L2", "Huber", "RangeHinge", "RangeHinge-squared", "L0", "HardConcrete"),
    *("MCP", "SCAD", "CappedL1", "GroupLasso", "GroupLasso-conv", "SparseGroupLasso"),
    *("KLSparsity", "HoyerSquare", "ActivationNorm", "ImportanceCV"),
    *("L2+GroupLasso+L2", "2*(L1+KLSparsity)"),
}
RNG = np.random.default_rng(0)
BATCHES = [case for case in CASES if np.ndim(case.sample) >= 2]


def by_epilogue(penalty: jr.Penalty, x: jax.Array):
    sums = epilogue(penalty, x.shape)
    values = evaluate([node for node, _ in sums.sums], x, sums.scalars)
    return sums.moments(
        [
            jnp.sum(value, axis=None if over == "all" else tuple(range(x.ndim - 1)))
            for value, (_, over) in zip(values, sums.sums, strict=True)
        ]
    )


@pytest.mark.parametrize("case", [c for c in BATCHES if c.name in TILED], ids=str)
def test_moments_come_back_from_their_sums(case):
    x = jnp.asarray(case.sample, jnp.float32)
    expected: Any = case.penalty.moments(x)
    concrete, traced = by_epilogue(case.penalty, x), jax.jit(by_epilogue)(case.penalty, x)
    for moments in (concrete, traced):
        chex.assert_trees_all_close(moments, expected, rtol=1e-5, atol=1e-6)


def test_every_other_penalty_says_why_it_cannot():
    names = {case.name for case in BATCHES}
    assert names >= TILED
    for case in BATCHES:
        if case.name not in TILED:
            with pytest.raises(NotElementwise, match=r"^it (takes|holds|sums)"):
                epilogue(case.penalty, np.shape(case.sample))


def by_gradient(penalty: jr.Penalty, x: jax.Array, cotangents: Any):
    found = gradient(penalty, x.shape, cotangents)
    columns = [jnp.broadcast_to(column, x.shape) for column in found.columns]
    (value,) = evaluate([found.node], x, found.scalars, columns)
    return value


@pytest.mark.parametrize("case", [c for c in BATCHES if c.name in TILED], ids=str)
def test_gradients_of_moments_are_those_of_single_entries(case):
    x = jnp.asarray(case.sample, jnp.float32)
    moments, pull = jax.vjp(case.penalty.moments, x)
    cotangents = jax.tree.map(lambda m: jnp.cos(m + jnp.arange(m.size).reshape(m.shape)), moments)
    traced = jax.jit(by_gradient)(case.penalty, x, cotangents)
    chex.assert_trees_all_close(traced, pull(cotangents)[0], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_needs_the_sums_says_so():
    assert epilogue(Root(0.1), (8, 4)).sums
    with pytest.raises(NotElementwise, match="its gradient needs the sums themselves"):
        gradient(Root(0.1), (8, 4), jnp.float32(1))


class Share(jr.Penalty):
    """A mean whose count is itself a sum over the entries, or over what is made of constants."""

    strength: Any
    _: dataclasses.KW_ONLY
    ones: Any = jr.penalties.static(default=jnp.ones_like)

    def moments(self, x: Any, where: Any = None) -> Any:
        return jnp.sum(jnp.abs(x)), jnp.sum(2 * self.ones(x)), jnp.sum(self.ones(x), axis=0)


def test_constants_are_counted():
    x = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    for by in (by_epilogue, jax.jit(by_epilogue)):
        chex.assert_trees_all_close(by(Share(1.0), x), Share(1.0).moments(x), rtol=1e-6)
    for ones in (lambda x: jnp.cumsum(jnp.ones_like(x)), lambda x: jnp.arange(4.0) * (0 * x + 1)):
        with pytest.raises(NotElementwise, match=r"it takes|it holds"):
            epilogue(Share(1.0, ones=ones), x.shape)


def test_an_activation_without_a_derivative_in_forward_mode_is_refused():
    @jax.custom_vjp
    def gate(z):
        return jnp.where(z > 0, z, 0)

    gate.defvjp(lambda z: (gate(z), z), lambda z, g: (g * (jnp.abs(z) < 1),))
    with pytest.raises(NotElementwise, match=r"is a `jax.custom_vjp`, which forward mode cannot"):
        elementwise(lambda z: 2 * jax.jit(gate)(z))
    # Of a penalty it is differentiated in reverse.
    penalty = type("Gated", (jr.penalties.Separable,), {"phi": staticmethod(gate)})(0.5)
    assert epilogue(penalty, (8, 4)).sums


def test_a_setting_that_is_traced_is_handed_over_and_a_number_is_not():
    assert epilogue(jr.Huber(0.1, delta=0.5), (8, 4)).scalars == []
    assert len(epilogue(jr.Huber(0.1, delta=jnp.float32(0.5)), (8, 4)).scalars) <= 2
    handed = jax.eval_shape(
        lambda delta: epilogue(jr.Huber(0.1, delta=delta), (8, 4)).scalars, jnp.float32(0.5)
    )
    assert {s.shape for s in handed} == {()}


def test_what_is_made_of_an_activations_numbers_is_a_number_under_jit():
    def both(z):
        return jax.jvp(
            lambda z: jnp.where(z > 0, z, jnp.float32(0.5) * 0.5 * z), (z,), (1 + 0 * z,)
        )

    x = jnp.linspace(-1, 1, 8)
    got = jax.jit(lambda x: evaluate(elementwise(both), x, []))(x)
    chex.assert_trees_all_close(got, list(both(x)), rtol=1e-6)


@pytest.mark.parametrize("function", [jax.nn.softmax, jnp.cumsum, lambda z: z + jnp.arange(128.0)])
def test_an_activation_that_looks_around_is_refused(function):
    with pytest.raises(NotElementwise, match=r"it takes|it holds"):
        elementwise(function)


class Sums(jr.Penalty):
    strength: Any
    axes: Any = jr.penalties.static(default=None)
    ones: Any = jr.penalties.static(default=jnp.ones_like)

    def moments(self, x, where=None):
        return jnp.sum(jnp.square(x), axis=self.axes), jnp.sum(self.ones(x))


class Against(jr.Penalty):
    strength: Any
    factors: Any = jr.penalties.array()

    def moments(self, x, where=None):
        return jnp.sum(x * jnp.broadcast_to(self.factors, x.shape))


def test_axes_of_a_sum_may_be_in_any_order():
    assert epilogue(Sums(1.0, (1, 0)), (8, 4)).sums[0][1] == "all"


@pytest.mark.parametrize("function", [lambda z: z - jnp.mean(z), lambda z: z + 0 * jnp.sum(z)])
def test_an_activation_that_sums_is_refused(function):
    with pytest.raises(NotElementwise, match="it is not a function of single entries"):
        elementwise(function)


def test_only_one_number_for_each_feature_is_a_column():
    with pytest.raises(NotElementwise, match="it holds an array"):
        gradient(Sums(1.0, -1), (8, 8), (jnp.arange(8.0), jnp.float32(0)))
    with pytest.raises(NotElementwise, match="it holds an array"):
        gradient(Against(1.0, jnp.ones((2, 8))), (3, 2, 8), jnp.float32(1))


def test_a_constant_times_an_array_is_refused():
    penalty = Sums(1.0, ones=lambda x: jnp.ones_like(x) * jnp.arange(4.0))
    with pytest.raises(NotElementwise, match=r"it takes mul of an array that is constant"):
        epilogue(penalty, (8, 4))


def test_derivatives_add_up_by_the_sum_that_kernels_know():
    def names(node):
        operands = getattr(node, "operands", ())
        return {str(getattr(node, "primitive", ""))}.union(*map(names, operands))

    found = names(gradient(jr.SCAD(0.1, threshold=0.5), (8, 4), jnp.float32(1)).node)
    assert "add" in found
    assert "add_any" not in found
