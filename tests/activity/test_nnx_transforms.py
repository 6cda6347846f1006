"""Terms under each of NNX's transformations: value and gradient of a loss written by hand."""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxreg as jr

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
AXES: Any = {jr.nnx.PenaltyTerm: 0, ...: None}
STACKED: Any = nnx.StateAxes(AXES)


def squares(*outputs):
    """Return the term of L2(1.0) by batch mean."""
    return sum(jnp.sum(h**2) / h.shape[0] for h in outputs)


class Special(nnx.Linear):
    """Inherits its `__call__`."""


class Model(nnx.Module):
    """Three modules, one of which has two names, run in one of several ways."""

    def __init__(self, run):
        rngs = nnx.Rngs(0)
        self.run = run
        self.a = Special(3, 3, rngs=rngs)
        self.parts = nnx.Dict(b=nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.relu))
        self.list = nnx.List([self.a, nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x):
        return self.run(self, x)


def call(module, x):
    return module(x)


def summed(module, x):
    return module(x).sum()


def split_and_merge(*filters):
    def run(model, x):
        parts: Any = nnx.split(model.a, *filters)
        return nnx.merge(*parts)(x)

    return run


def split_merge_and_update(model, x):
    module = nnx.merge(*nnx.split(model.a))
    y = module(x)
    nnx.update(model.a, nnx.state(module))
    return y


def over_time(model, x):
    def step(carry, module, x):
        carry = jnp.tanh(module(x) + carry)
        return carry, carry

    scanned: Any = nnx.scan(step, in_axes=(nnx.Carry, STACKED, 0), out_axes=(nnx.Carry, 0))
    return scanned(jnp.zeros((1, 3)), model.a, x[:, None])[1]


def a(model, x):
    h = model.a(x)
    return h, squares(h)


def over_time_by_hand(model, x):
    carries = [jnp.zeros((1, 3))]
    for row in x:
        carries.append(jnp.tanh(model.a(row[None]) + carries[-1]))
    h = model.a(x)
    return jnp.stack(carries[1:]), squares(*(row[None] for row in h))


def b_of_list(model, x):
    first = model.a(x)
    second = model.parts["b"].layers[0](model.list[1](first))
    return nnx.relu(second), squares(first, second)


def doubled(model, x):
    h = model.a(x)
    return h, 2 * squares(h)


def rows(model, x):
    h = model.a(x)
    return h, jnp.sum(h**2) / 3


def gradient(model, x):
    kernel = model.a.kernel[...]
    return jnp.broadcast_to(kernel.sum(1), x.shape), squares(model.a(x))


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "containers": (lambda m, x: m.parts["b"](m.list[1](m.list[0](x))), b_of_list),
    "jit": (lambda m, x: nnx.jit(call)(m.a, x), a),
    "remat": (lambda m, x: nnx.remat(call)(m.a, x), a),
    "remat-method": (lambda m, x: nnx.remat(type(m.a).__call__)(m.a, x), a),
    "cond": (lambda m, x: nnx.cond(x[0, 0] < 9, call, lambda a, x: 3 * a(x), m.a, x), a),
    "switch": (
        lambda m, x: nnx.switch(jnp.int32(1), [lambda a, x: 3 * a(x), call], m.a, x),
        a,
    ),
    "vmap": (lambda m, x: nnx.vmap(call, in_axes=(STACKED, 0))(m.a, x), rows),
    "scan": (over_time, over_time_by_hand),
    "split": (split_and_merge(), a),
    "split-filters": (split_and_merge(nnx.Param, ...), a),
    "split-update": (split_merge_and_update, a),
    "value_and_grad": (
        lambda m, x: nnx.value_and_grad(summed, argnums=1)(m.a, x)[1],
        gradient,
    ),
    "grad-twice": (
        lambda m, x: m.a(x) + 0 * nnx.grad(summed, argnums=1)(m.a, x),
        doubled,
    ),
}


def check(model, forward, by_hand):
    def ours(model, x):
        y, terms = forward(model)(x)
        return jnp.mean(y**2) + terms.total, terms.total

    def theirs(model, x):
        y, term = by_hand(model, x)
        return jnp.mean(y**2) + term, term

    @nnx.jit
    def both(model, x):
        return [
            nnx.value_and_grad(f, argnums=(0, 1), has_aux=True)(model, x) for f in (ours, theirs)
        ]

    got, expected = both(model, X)
    assert float(expected[0][1]) > 0
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_a_loss_written_by_hand(name):
    run, by_hand = CASES[name]
    rules = {"a": jr.L2(1.0), "parts/b/layers/0": jr.L2(1.0)}
    check(Model(run), jr.activity(rules, strict=False), by_hand)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "cond": (
        lambda m, x: nnx.cond(x[0, 0] < 9, call, lambda a, x: x, m.a, x),
        "must call the same modules",
    ),
    "while_loop": (
        lambda m, x: nnx.while_loop(
            lambda c: c[1] < 3, lambda c: (c[0], c[1] + 1, c[0](c[2])), (m.a, 0, x)
        )[2],
        "penalize what they return, by `jaxreg.sow`",
    ),
    "fori_loop": (
        lambda m, x: nnx.fori_loop(0, 3, lambda i, c: (c[0], c[0](c[1])), (m.a, x))[1],
        "penalize what they return, by `jaxreg.sow`",
    ),
    "vmap": (
        lambda m, x: nnx.vmap(call, in_axes=(None, 0))(m.a, x),
        r"nnx.StateAxes\({jaxreg.nnx.PenaltyTerm: 0",
    ),
    "split": (split_and_merge(nnx.Param), r"`nnx.split` a filter, by `\.\.\.`"),
    "jax.vmap": (lambda m, x: jax.vmap(m.a)(x), "rather than JAX's own"),
    "jax.checkpoint": (lambda m, x: jax.checkpoint(m.a)(x), "rather than JAX's own"),
    "jax.grad": (lambda m, x: jax.grad(lambda x: m.a(x).sum())(x), "rather than JAX's own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_a_term_says_what_mends_it(name):
    """The axis, the filter and NNX's own transformations mend the cases above."""
    run, mend = REFUSED[name]
    with pytest.raises(ValueError, match=rf"cannot carry (the term \"a\"|a term) out.*{mend}"):
        jr.activity({"a": jr.L2(1.0)})(Model(run))(X)


def test_what_a_branch_or_a_loop_returns_can_be_penalized():
    def run(model, x):
        h = nnx.cond(x[0, 0] < 9, call, lambda a, x: x, model.a, x)
        h = nnx.fori_loop(0, 2, lambda i, c: (c[0], jnp.tanh(c[0](c[1]))), (model.a, h))[1]
        return jr.sow(model, "h", h, jr.L2(1.0))

    def by_hand(model, x):
        h = model.a(x)
        for _ in range(2):
            h = jnp.tanh(model.a(h))
        return h, squares(h)

    check(Model(run), jr.activity({"a": None}), by_hand)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.remat(nn.Dense)(3, name="dense")(x)
        return jr.sow(self, "tanh", jnp.tanh(h), jr.L1(0.5))


class Wraps(nnx.Module):
    """An NNX module around a Linen one."""

    def __init__(self):
        self.layer = bridge.ToNNX(Layer(), rngs=nnx.Rngs(0)).lazy_init(X)

    def __call__(self, x):
        return self.layer(x)


def test_a_linen_module_inside_of_nnx():
    """Its own output, a module inside of it, and what it sows, each under the wrapper's path."""

    def by_hand(model, x):
        params = model.layer.dense
        h = x @ params["kernel"][...] + params["bias"][...]
        y = jnp.tanh(h)
        return y, squares(h) + 3 * squares(y) + 0.5 * jnp.sum(jnp.abs(y)) / 4

    model = Wraps()
    activity = jr.activity({"layer/dense": jr.L2(1.0), "layer": jr.L2(3.0)})
    assert sorted(activity(model)(X)[1]) == ["layer", "layer/dense", "layer/tanh"]
    check(model, activity, by_hand)
    with pytest.raises(ValueError, match=r'"layer/dens" wins none.*Nearest: "layer/dense"'):
        jr.activity({"layer/dens": jr.L2(1.0)})(model)(X)


def test_an_nnx_module_inside_of_linen():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bridge.to_linen(nnx.Linear, 3, 3, name="inner")(x)

    model = Outer()
    variables = model.init(jax.random.key(0), X)
    forward = jr.activity({"inner": jr.L2(1.0)})(model.apply)
    chex.assert_trees_all_close(
        jax.value_and_grad(lambda v: forward(v, X)[1].total)(variables),
        jax.value_and_grad(lambda v: squares(model.apply(v, X)))(variables),
        rtol=1e-5,
    )


@pytest.mark.parametrize("lift", [lambda cls: cls, nn.jit, nn.remat], ids=["plain", "jit", "remat"])
def test_what_nnx_modules_inside_of_linen_name_has_paths_below_them(lift):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("first", "second"):
                layer: Any = {"activity_regularizer": jr.L2(1.0), "name": name}
                x = bridge.to_linen(jr.nnx.Dense, 3, 3, jnp.tanh, **layer)(x)
            return x

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(Block)(name="block")(x)

    model = Outer()
    variables = model.init(jax.random.key(0), X)
    first = variables["params"]["block"]["first"]
    expected = squares(jnp.tanh(X @ first["kernel"] + first["bias"]))
    terms = jr.activity({"block/second/output": None})(model.apply)(variables, X)[1]
    assert list(terms) == ["block/first/output"]
    np.testing.assert_allclose(terms.total, expected, rtol=1e-5)


@pytest.mark.parametrize("strength", [np.array(0.2), jnp.float32(0.2)], ids=["NumPy's", "JAX's"])
def test_parameters_penalties_of_numbers_and_arrays_are_scanned(strength):
    penalty = jr.L1(0.1) + jr.L2(strength)

    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def make(rngs):
        return jr.nnx.Dense(3, 3, kernel_regularizer=penalty, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))

        def __call__(self, x):
            step: Any = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return step(x, self.layers)

    model = Model()
    total = nnx.jit(lambda model, x: jr.activity({})(model)(x)[1].total)(model, jnp.ones((2, 3)))
    expected = sum(penalty(kernel) for kernel in model.layers.kernel[...])
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", ["Dense", "ActivityRegularization"])
def test_a_merged_layer_keeps_its_own_penalty(layer):
    class Model(nnx.Module):
        def __init__(self):
            dense = jr.nnx.Dense(3, 3, activity_regularizer=jr.L1(0.5), rngs=nnx.Rngs(0))
            regularization = jr.nnx.ActivityRegularization(jr.L1(0.5))
            self.layer = dense if layer == "Dense" else regularization

        def __call__(self, x):
            return nnx.merge(*nnx.split(self.layer))(x)

    x = jnp.ones((2, 3))
    y, terms = jr.activity({})(Model())(x)
    np.testing.assert_allclose(terms["layer/output"], 0.5 * jnp.sum(jnp.abs(y)) / 2, rtol=1e-6)
    assert not jr.activity({"layer/output": None})(Model())(x)[1]


def test_of_two_activities_the_outer_one_has_the_parameters():
    class Model(nnx.Module):
        def __init__(self):
            self.dense = jr.nnx.Dense(
                3,
                3,
                kernel_regularizer=jr.L2(1.0),
                activity_regularizer=jr.L1(1.0),
                rngs=nnx.Rngs(0),
            )

        def __call__(self, x):
            return jr.activity({})(self.dense)(x)

    (_, inner), outer = jr.activity({})(Model())(X)
    assert (list(inner), list(outer)) == (["output"], ["dense/kernel"])


def test_a_class_that_notes_its_subclasses_hears_of_none():
    noted = []

    class Base(nnx.Module):
        def __init_subclass__(cls, *, kind, **kwargs):
            super().__init_subclass__(**kwargs)
            noted.append((cls.__name__, kind))

    class Model(Base, kind="a"):
        def __init__(self):
            self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x)

    _, terms = jr.activity({"dense": jr.L2(1.0)})(Model())(X)
    assert terms.keys() == {"dense"}
    assert noted == [("Model", "a")]


def test_a_cell_of_an_rnn_has_an_axis_for_its_terms():
    axes: Any = {jr.nnx.PenaltyTerm: 0, ...: nnx.Carry}
    cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    model: Any = nnx.RNN(cell, state_axes=nnx.StateAxes(axes))
    y, terms = jr.activity({"cell": jr.L2(0.5)}, reduction="sum")(model)(jnp.ones((2, 5, 3)))
    # The cell puts out its carry and the same as its output.
    np.testing.assert_allclose(terms["cell"], 2 * 0.5 * jnp.sum(y**2), rtol=1e-5)


def test_a_penalized_parameter_of_linen_inside_of_nnx_is_an_error():
    x, dense = jnp.ones((1, 3)), jr.linen.Dense(2, kernel_regularizer=jr.L2(1.0))
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match='has no parameters to measure "kernel" by'):
        jr.activity({})(model)(x)
