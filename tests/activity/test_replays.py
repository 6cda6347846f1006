"""Jitted modules where JAX runs a trace that it made for another pass, or for another module."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxreg as jr

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6))
L1 = jr.L1(1.0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jr.sow(self, "code", nn.Dense(6, name="dense")(x), jr.L2(0.5))


class Decorated(Block):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return jr.sow(self, "code", nn.Dense(6, name="dense")(x), jr.L2(0.5))


class Two(nn.Module):
    block: Any

    @nn.compact
    def __call__(self, x):
        return self.block(name="b")(self.block(name="a")(x))


PARAMS = Two(Block).init(KEY, X)
JITTED: dict[str, Any] = {"class": nn.jit(Block), "method": Decorated}
ANYWHERE: dict[str, Any] = {"eager": lambda f: f, "jit": jax.jit}


@pytest.mark.parametrize("block", JITTED)
@pytest.mark.parametrize("around", ANYWHERE)
@pytest.mark.parametrize("pattern", ["**", "[ab]", "*/dense", "*/code"])
def test_two_modules_of_equal_fields_have_terms_of_their_own(block, around, pattern):
    activity = jr.activity({pattern: L1})
    forward = ANYWHERE[around](activity(Two(JITTED[block]).apply))
    for _ in range(2):
        _, terms = forward(PARAMS, X)
        _, expected = activity(Two(Block).apply)(PARAMS, X)
        chex.assert_trees_all_close(terms.as_dict(), expected.as_dict(), rtol=1e-5)


@pytest.mark.parametrize("block", JITTED)
@pytest.mark.parametrize("rules", [{"a": L1}, {"b": L1}, {"a": None, "*": L1}, {"a/code": None}])
def test_rules_that_tell_modules_of_one_trace_apart_are_an_error(block, rules):
    message = r'out of the `nn\.jit` of "b": that runs the trace that was made for "a"'
    with pytest.raises(ValueError, match=message):
        jr.activity(rules)(Two(JITTED[block]).apply)(PARAMS, X)


def test_another_models_trace():
    class One(nn.Module):
        name_: str

        @nn.compact
        def __call__(self, x):
            return JITTED["class"](name=self.name_)(x)

    for name in ("encoder", "decoder"):
        variables = One(name).init(KEY, X)
        y, terms = jr.activity({"*": L1})(One(name).apply)(variables, X)
        np.testing.assert_allclose(terms[name], jnp.abs(y).sum() / 4, rtol=1e-6)
        assert terms.keys() == {name, f"{name}/code"}


def test_a_models_trace_as_a_part_of_another_and_the_other_way_round():
    class One(nn.Module):
        block: Any

        @nn.compact
        def __call__(self, x):
            return self.block(name="inner")(x)

    for first in (True, False):
        block = nn.jit(type("Own", (Block,), {}))
        models = [block(), One(block)]
        for model in models if first else models[::-1]:
            variables = model.init(KEY, X)
            _, terms = jr.activity({"**": L1})(model.apply)(variables, X)
            names = {"", "dense", "code"}
            paths = {f"inner/{n}".removesuffix("/") for n in names} if model is models[1] else names
            assert {path.removeprefix(".") for path in terms} == paths | {""}


def test_parameters_of_two_layers_of_one_trace_both_count():
    layer = nn.jit(jr.linen.Dense)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = layer(6, kernel_regularizer=jr.L2(1.0), name="a")(x)
            return layer(6, kernel_regularizer=jr.L2(1.0), name="b")(x)

    variables = Layers().init(KEY, X)
    _, terms = jr.activity({})(Layers().apply)(variables, X)
    expected = {f"{n}/kernel": jnp.sum(variables["params"][n]["kernel"] ** 2) for n in "ab"}
    chex.assert_trees_all_close(terms.as_dict(), expected, rtol=1e-6)


def test_under_another_activity_around_this_one():
    model = nn.Sequential([nn.jit(nn.Dense)(5)])
    variables = model.init(KEY, X)
    h: Any = model.apply(variables, X)
    inner = jr.activity({"layers_0": L1})(model.apply)
    for penalty in (L1, jr.L2(1.0)):
        (_, inside), outside = jax.jit(jr.activity({"layers_0": penalty})(inner))(variables, X)
        np.testing.assert_allclose(inside.total, jr.penalize(h, L1), rtol=1e-6)
        np.testing.assert_allclose(outside.total, jr.penalize(h, penalty), rtol=1e-6)


def test_in_a_function_nothing_tells_two_modules_of_one_trace_apart():
    forward = jr.activity({"**": L1})(lambda v, x: Two(JITTED["class"]).apply(v, x))
    with pytest.raises(ValueError, match=r"out of an `nn\.jit`, which ran one trace twice"):
        jax.jit(lambda v, x: forward(v, x)[1].total)(PARAMS, X)


def test_a_value_that_a_rule_exempts_is_met_again():
    model = Two(JITTED["class"])
    activity = jr.activity({"*/code": None, "*/dense": L1})
    _, expected = activity(Two(Block).apply)(PARAMS, X)
    for _ in range(2):
        _, terms = activity(model.apply)(PARAMS, X)
        chex.assert_trees_all_close(terms.as_dict(), expected.as_dict(), rtol=1e-5)


def test_jitted_modules_in_branches():
    class Other(Block):
        pass

    first, second = nn.jit(Block), nn.jit(Other)

    class Branches(nn.Module):
        def setup(self):
            self.a, self.b = first(), second()

        def __call__(self, x):
            if self.is_initializing():
                return self.a(x) + self.b(x)
            return nn.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x)

    variables = Branches().init(KEY, X)
    for sign in (1, -1, 1):
        x = sign * jnp.abs(X)
        y, terms = jr.activity({"a": L1, "b": L1})(Branches().apply)(variables, x)
        taken, other = "ab" if sign > 0 else "ba"
        np.testing.assert_allclose(terms[taken], jnp.abs(y).sum() / 4, rtol=1e-6)
        assert terms[other] == 0


def test_an_array_in_a_jitted_branch_is_an_error_when_its_trace_runs_again():
    strength, jitted = jnp.float32(0.5), nn.jit(type("Own", (Block,), {}))
    activity = jr.activity({"a": jr.L1(strength), "a/**": None})

    class Branches(nn.Module):
        def setup(self):
            self.a = jitted()

        def __call__(self, x):
            if self.is_initializing():
                return self.a(x)
            return nn.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: x, self, x)

    variables = Branches().init(KEY, X)
    activity(Branches().apply)(variables, jnp.abs(X))
    with pytest.raises(ValueError, match=r'term "a" out of an `nn\.jit` in a branch'):
        activity(Branches().apply)(variables, jnp.abs(X))


def test_layers_of_other_strengths_in_jitted_branches():
    layer = nn.jit(jr.linen.Dense)

    class Branches(nn.Module):
        strength: float

        @nn.compact
        def __call__(self, x):
            dense = layer(5, kernel_regularizer=jr.L2(self.strength), name="dense")
            if self.is_initializing():
                return dense(x)
            return nn.cond(True, lambda m, x: m(x).sum(), lambda m, x: x.sum(), dense, x)

    activity = jr.activity({})
    for strength in (0.1, 0.2, 0.1, 0.2):
        model = Branches(strength)
        variables = model.init(KEY, X)
        _, terms = activity(model.apply)(variables, X)
        expected = strength * jnp.sum(variables["params"]["dense"]["kernel"] ** 2)
        np.testing.assert_allclose(terms["dense/kernel"], expected, rtol=1e-6)


class Layer(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jr.sow(self, "code", self.dense(x), L1)


class Holder(nnx.Module):
    def __init__(self, run):
        self.layer, self.run = Layer(), run

    @nnx.jit
    def __call__(self, x):
        return self.run(self.layer, x)


def test_a_value_that_a_rule_exempts_in_nnx_is_met_again():
    model = Holder(lambda layer, x: layer(x))
    forward = jr.activity({"layer/code": None, "layer": L1})(model)
    for _ in range(2):
        y, terms = forward(X)
        np.testing.assert_allclose(terms["layer"], jnp.abs(y).sum() / 4, rtol=1e-6)


def test_an_exemption_is_not_that_of_another_model():
    class Other(Layer):
        @nnx.jit
        def __call__(self, x):
            return jr.sow(self, "other", self.dense(x), L1)

    class Own(Other):
        @nnx.jit
        def __call__(self, x):
            return jr.sow(self, "code", self.dense(x), L1)

    activity = jr.activity({"code": None, "dense": L1})
    activity(Own())(X)
    for _ in range(2):
        with pytest.raises(ValueError, match=r'rule "code" wins none'):
            activity(Other())(X)


def test_a_term_that_is_lost_in_nnx_is_an_error_each_time():
    merged = Holder(lambda layer, x: nnx.merge(*nnx.split(layer))(x))
    for _ in range(3):
        with pytest.raises(ValueError, match=r'lost the term "layer/code"'):
            jr.activity({})(merged)(X)


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize(
    "copy", [nnx.clone, lambda m: nnx.merge(*nnx.split(m))], ids=["clone", "merge"]
)
def test_a_copy_in_nnx_beside_its_original_is_an_error(copy, jitted):
    class Siamese(nnx.Module):
        def __init__(self):
            self.layer = Layer()

        def __call__(self, x):
            other = copy(self.layer)
            return self.layer(x), other(3 * x)

    if jitted:
        Siamese.__call__ = nnx.jit(Siamese.__call__)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r'lost the term "layer/code"'):
        jr.activity({})(Siamese())(X)
