import threading
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxreg as jr

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        return jr.sow(self, "code", nnx.relu(self.dense(x)), jr.L1(1.0))


class Autoencoder(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)
        self.decoder = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


@pytest.fixture
def model():
    return Autoencoder(nnx.Rngs(0))


def test_value_and_gradient_equal_a_handwritten_loss(model):
    def ours(model):
        y, terms = jr.activity({"encoder/dense": jr.L2(0.5)})(model)(X)
        return jnp.mean((y - X) ** 2) + terms.total

    def theirs(model):
        h = model.encoder.dense(X)
        y = model.decoder(nnx.relu(h))
        penalty = 0.5 * jnp.sum(h**2) + jnp.sum(nnx.relu(h))
        return jnp.mean((y - X) ** 2) + penalty / 4

    chex.assert_trees_all_close(
        nnx.jit(nnx.value_and_grad(ours))(model), nnx.value_and_grad(theirs)(model), rtol=1e-5
    )


def test_returns_what_the_module_returned(model):
    y, terms = jr.activity({"encoder": jr.L1(1.0), ".": jr.L2(1.0)})(model)(X)
    chex.assert_trees_all_equal(y, model(X))
    assert sorted(terms) == [".", "encoder", "encoder/code"]


def test_a_bound_method(model):
    h, terms = jr.activity({"encoder": jr.L1(1.0)})(model.encode)(X)
    chex.assert_trees_all_equal(h, model.encode(X))
    np.testing.assert_allclose(terms["encoder"], jnp.sum(h) / 4, rtol=1e-6)


def test_a_bound_call_is_the_module(model):
    y, terms = jr.activity({".": jr.L1(1.0)})(model.__call__)(X)
    np.testing.assert_allclose(terms["."], jnp.sum(jnp.abs(y)) / 4, rtol=1e-6)


def test_a_module_has_the_names_of_its_class():
    names = ("__name__", "__qualname__", "__module__", "__doc__")

    class Named(nnx.Module):
        """What it does."""

        def __call__(self):
            return [getattr(type(self), name) for name in names]

    assert jr.activity({})(Named())()[0] == [getattr(Named, name) for name in names]


def test_the_model_and_its_classes_are_untouched(model):
    attributes, cls = dict(vars(model.encoder)), type(model.encoder)
    methods = dict(vars(cls))
    jr.activity({"**": jr.L1(1.0)})(model)(X)
    assert type(model.encoder) is cls
    assert dict(vars(cls)) == methods
    assert vars(model.encoder).keys() == attributes.keys()
    assert all(vars(model.encoder)[name] is value for name, value in attributes.items())


def test_a_raising_model_leaves_no_trace(model):
    class Raises(Autoencoder):
        def __call__(self, x):
            super().__call__(x)
            raise RuntimeError("from the model")

    raising = Raises(nnx.Rngs(0))
    attributes, structure = dict(vars(raising.encoder)), nnx.graphdef(raising)
    with pytest.raises(RuntimeError, match="from the model"):
        jr.activity({"encoder": jr.L1(1.0)})(raising)(X)
    assert nnx.graphdef(raising) == structure
    assert vars(raising.encoder).keys() == attributes.keys()
    chex.assert_trees_all_equal(jr.sow(raising, "x", X, jr.L1(1.0)), X)
    chex.assert_trees_all_equal(model(X), super(Raises, raising).__call__(X))


def test_another_thread_with_the_same_model_sees_nothing():
    inside, leave, found = threading.Event(), threading.Event(), []

    class Waits(Autoencoder):
        def __call__(self, x):
            if not inside.is_set():
                inside.set()
                leave.wait(10)
            return super().__call__(x)

    model = Waits(nnx.Rngs(0))

    def other():
        inside.wait(10)
        model(X)
        found.append(nnx.graphdef(model))
        leave.set()

    structure = nnx.graphdef(model)
    thread = threading.Thread(target=other)
    thread.start()
    _, terms = jr.activity({"encoder": jr.L1(1.0)})(model)(X)
    thread.join()
    assert found == [structure]
    np.testing.assert_allclose(terms["encoder"], jnp.sum(model.encoder(X)) / 4, rtol=1e-6)


def test_variables_that_the_forward_pass_updates_are_the_models():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.calls = 0

        def __call__(self, x):
            self.calls = self.calls + 1
            return self.dropout(self.norm(x))

    plain, penalized = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    expected = plain(X)
    y, _ = jr.activity({"norm": jr.L2(1.0)})(penalized)(X)
    chex.assert_trees_all_equal(y, expected)
    assert penalized.calls == 1
    chex.assert_trees_all_equal(
        *(nnx.to_pure_dict(nnx.state(model)) for model in (plain, penalized))
    )


class Sows(nnx.Module):
    def __call__(self, x):
        self.sow(nnx.Intermediate, "code", 2 * x)
        return x


def test_values_that_the_model_sows_have_paths_and_are_still_the_users():
    model = Sows()

    def penalized(model, x):
        return jr.activity({"code": jr.L1(1.0)})(model)(x)

    forward: Any = nnx.capture(penalized, nnx.Intermediate)
    (_, terms), captured = forward(model, X)
    np.testing.assert_allclose(terms["code"], 2 * jnp.sum(jnp.abs(X)) / 4, rtol=1e-6)
    chex.assert_trees_all_equal(captured["code"].get_value(), (2 * X,))


def test_inherited_call_and_shared_modules():
    class Special(nnx.Linear):
        pass

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = Special(3, 3, rngs=rngs)
            self.second = self.first
            self.plain = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.plain(self.second(self.first(x)))

    model = Model(nnx.Rngs(0))
    _, terms = jr.activity({"first": jr.L1(1.0)})(model)(X)
    once = model.first(X)
    expected = (jnp.sum(jnp.abs(once)) + jnp.sum(jnp.abs(model.first(once)))) / 4
    np.testing.assert_allclose(terms["first"], expected, rtol=1e-6)
    assert list(terms) == ["first"]


def test_lists_and_sequentials_have_paths():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
            self.head = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.relu)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    _, terms = jr.activity({"blocks/*": jr.L1(1.0), "head/layers/0": jr.L1(1.0)})(
        Model(nnx.Rngs(0))
    )(X)
    assert sorted(terms) == ["blocks/0", "blocks/1", "head/layers/0"]


class Stack(nnx.Module):
    """Three layers stacked on a leading axis, run in one of several ways."""

    def __init__(self, rngs, run):
        self.run = run
        self.blocks = make_blocks(rngs)

    def __call__(self, x):
        return RUNS[self.run](self.blocks, x)


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def make_blocks(rngs):
    return nnx.Linear(3, 3, rngs=rngs)


def call(x, block):
    return jnp.tanh(block(x))


def scanned(function, axes: Any = 0):
    return nnx.scan(function, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)


def state_axes(stacked: Any) -> Any:
    return nnx.StateAxes({stacked: 0, ...: None})


def lax_scan(blocks, x):
    graphdef, state = nnx.split(blocks)
    return jax.lax.scan(lambda x, s: (call(x, nnx.merge(graphdef, s)), None), x, state)[0]


RUNS = {
    "scan": lambda blocks, x: scanned(call)(x, blocks),
    "remat": lambda blocks, x: scanned(nnx.remat(call))(x, blocks),
    "axes": lambda blocks, x: scanned(call, state_axes((nnx.Param, jr.nnx.PenaltyTerm)))(x, blocks),
    "vmap": lambda blocks, x: nnx.vmap(call, in_axes=(None, 0))(x, blocks).sum(0),
    "no_axis": lambda blocks, x: scanned(call, state_axes(nnx.Param))(x, blocks),
    "lax_scan": lax_scan,
}


@pytest.mark.parametrize("run", ["scan", "remat", "axes", "vmap"])
def test_lifted_layers_add_up(run):
    def ours(model):
        return jr.activity({"blocks": jr.L2(1.0)})(model)(X)[1].total

    def theirs(model):
        x, total = X, jnp.zeros(())
        blocks = model.blocks
        for kernel, bias in zip(blocks.kernel[...], blocks.bias[...], strict=True):
            h = (X if run == "vmap" else x) @ kernel + bias
            x, total = jnp.tanh(h), total + jnp.sum(h**2) / 4
        return total

    model = Stack(nnx.Rngs(0), run)
    chex.assert_trees_all_close(
        nnx.value_and_grad(ours)(model), nnx.value_and_grad(theirs)(model), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("run", ["no_axis", "lax_scan"])
def test_a_transformation_that_would_drop_the_term_is_an_error(run):
    forward = jr.activity({"blocks": jr.L2(1.0)})(Stack(nnx.Rngs(0), run))
    with pytest.raises(ValueError, match=r'lost the term "blocks".*jaxreg.nnx.PenaltyTerm: 0'):
        forward(X)


def test_nested_jit_does_not_replay_another_trace():
    @nnx.jit
    def run(block, x):
        return block(x)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.block = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return run(self.block, x)

    model = Model(nnx.Rngs(0))
    h = model(X)
    for penalty, expected in [(jr.L1(1.0), jnp.sum(jnp.abs(h))), (jr.L2(1.0), jnp.sum(h**2))]:
        forward = jr.activity({"block": penalty, ".": None})(model)
        for _ in range(2):
            np.testing.assert_allclose(forward(X)[1].total, expected / 4, rtol=1e-6)


def test_modules_stacked_along_another_axis_need_one_for_the_terms():
    layers = nnx.vmap(
        lambda key: nnx.Linear(X.shape[-1], 3, rngs=nnx.Rngs(key)), in_axes=0, out_axes=1
    )(jax.random.split(jax.random.key(0), 2))

    class Stack(nnx.Module):
        def __init__(self, axes):
            self.layers, self.axes = layers, axes

        def __call__(self, x):
            return nnx.vmap(lambda m, x: m(x), in_axes=(self.axes, None))(self.layers, x)

    activity = jr.activity({"layers": jr.L1(1.0)})
    with pytest.raises(ValueError, match="axis 1 is out of bounds") as caught:
        activity(Stack(1))(X)
    assert any('"layers" out of the transf' in note for note in caught.value.__notes__)
    axes: Any = {jr.nnx.PenaltyTerm: 0, ...: 1}
    y, terms = activity(Stack(nnx.StateAxes(axes)))(X)
    np.testing.assert_allclose(terms["layers"], jnp.abs(y).sum() / len(X), rtol=1e-6)


def test_sow_without_activity_does_nothing(model):
    structure = nnx.graphdef(model)
    chex.assert_trees_all_equal(model.encoder(X), nnx.relu(model.encoder.dense(X)))
    assert nnx.graphdef(model) == structure


def test_sow_in_a_module_outside_of_the_wrapped_one_is_an_error():
    outsider = Encoder(nnx.Rngs(1))

    class Model(nnx.Module):
        def __call__(self, x):
            return outsider(x)

    with pytest.raises(ValueError, match=r'cannot carry the term "code".*not part'):
        jr.activity({})(Model())(X)


def test_sow_in_a_function_that_calls_nnx_modules(model):
    _, terms = jr.activity({})(lambda x: model(x))(X)
    np.testing.assert_allclose(terms["code"], jnp.sum(model.encoder(X)) / 4, rtol=1e-6)


def test_a_rule_replaces_the_sown_penalty(model):
    h = model.encoder(X)
    terms = jr.activity({"encoder/code": jr.L2(3.0)})(model)(X)[1]
    np.testing.assert_allclose(terms["encoder/code"], 3 * jnp.sum(h**2) / 4, rtol=1e-6)
    assert jr.activity({"encoder/code": None})(model)(X)[1].as_dict() == {}


def test_a_value_named_as_a_submodule_is_an_error():
    class Named(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(X.shape[-1], 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return jr.sow(self, "layer", self.layer(x), jr.L1(1.0))

    with pytest.raises(ValueError, match='cannot name a value as a module is named: "layer" is'):
        jr.activity({})(Named())(X)


def test_a_value_named_as_a_container_is_no_module():
    class Named(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(X.shape[-1], 2, rngs=nnx.Rngs(0))])

        def __call__(self, x):
            return jr.sow(self, "layers", self.layers[0](x), jr.L1(1.0))

    y, terms = jr.activity({})(Named())(X)
    np.testing.assert_allclose(terms["layers"], jr.penalize(y, jr.L1(1.0)), rtol=1e-6)


def test_a_layer_without_a_penalty_of_its_own_has_that_of_a_rule():
    layer = jr.nnx.ActivityRegularization(None)
    assert not jr.activity({})(layer)(X)[1]
    _, terms = jr.activity({"output": jr.L1(2.0)})(layer)(X)
    np.testing.assert_allclose(terms["output"], jr.penalize(X, jr.L1(2.0)), rtol=1e-6)


def test_an_activity_is_an_argument_of_a_jitted_step(model):
    activity = jr.activity({"encoder": jr.L1(0.5), "**": None}, mask=jnp.array([1, 1, 0, 1], bool))

    @jax.jit
    def total(activity, x):
        return activity(model)(x)[1].total

    by_activity = jax.grad(total, allow_int=True)(activity, X)
    (expected,) = activity(model)(X)[1].values()
    np.testing.assert_allclose(total(activity, X), expected, rtol=1e-6)
    np.testing.assert_allclose(by_activity.rules.values[0].strength, 2 * expected, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.5, jnp.float32(0.5)], ids=["float", "array"])
def test_activity_regularization_layer(strength):
    layer = jr.nnx.ActivityRegularization(jr.L2(strength))
    model = nnx.Sequential(nnx.relu, layer)
    y, terms = nnx.jit(lambda m, x: jr.activity({})(m)(x))(model, X)
    chex.assert_trees_all_equal(y, nnx.relu(X))
    np.testing.assert_allclose(terms["layers/1/output"], 0.5 * jnp.sum(y**2) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"encodr": jr.L1(1.0)}, r'"encodr" wins none of the .* Nearest: "encoder'),
        ({"**": jr.L1(1.0), "encoder": jr.L2(1.0)}, r'earlier rule "\*\*" wins that'),
    ],
)
def test_a_rule_that_wins_nothing_names_what_is_near(model, rules, message):
    with pytest.raises(ValueError, match=message):
        jr.activity(rules)(model)(X)


@pytest.mark.parametrize(
    "forward",
    [lambda model, x: model(x), nnx.jit(lambda model, x: model(x))],
    ids=["function", "jitted"],
)
def test_a_function_that_calls_an_nnx_module_is_told_to_give_the_module(forward):
    layer = nnx.Linear(X.shape[-1], 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"met no module .* NNX module that it is given itself"):
        jr.activity({".": jr.L1(1.0)})(forward)(layer, X)
    _, terms = jr.activity({".": jr.L1(1.0)}, strict=False)(forward)(layer, X)
    assert not terms


def test_changing_a_strength_does_not_recompile(model):
    @nnx.jit
    @chex.assert_max_traces(n=1)
    def total(model, strength):
        return jr.activity({"encoder": jr.L1(strength), "**": None})(model)(X)[1].total

    chex.clear_trace_counter()
    np.testing.assert_allclose(total(model, 2.0), 2 * total(model, 1.0), rtol=1e-6)


class Reused(nnx.Module):
    """Calls one module in a scan without an axis for its terms, and once outside of it."""

    def __init__(self, rngs, first):
        self.first = first
        self.block = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        def scan(x):
            f = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3)
            return f(x, self.block)

        return scan(self.block(x)) if self.first else self.block(scan(x))


@pytest.mark.parametrize("first", [True, False], ids=["outside_first", "inside_first"])
def test_a_dropped_term_is_noticed_beside_one_of_the_same_module(first):
    forward = jr.activity({"block": jr.L1(1.0)})(Reused(nnx.Rngs(0), first))
    with pytest.raises(ValueError, match=r'lost the term "block"'):
        forward(X)


def test_a_module_without_call_sows():
    class Halves(nnx.Module):
        def encode(self, x):
            self.sow(nnx.Intermediate, "code", x)
            return x

    class Model(nnx.Module):
        def __init__(self):
            self.halves = Halves()

        def __call__(self, x):
            return self.halves.encode(x)

    model = Model()

    def penalized(model, x):
        return jr.activity({"halves/code": jr.L1(1.0)})(model)(x)[1]

    forward: Any = nnx.capture(penalized, nnx.Intermediate)
    terms, _ = forward(model, X)
    np.testing.assert_allclose(terms["halves/code"], jnp.sum(jnp.abs(X)) / 4, rtol=1e-6)


def test_modules_that_no_rule_matches_can_be_split_by_the_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            parts: Any = nnx.split(self.norm, nnx.Param, nnx.BatchStat)
            return self.head(nnx.merge(*parts)(x))

    _, terms = jr.activity({"head": jr.L1(1.0)})(Model(nnx.Rngs(0)))(X)
    assert list(terms) == ["head"]


def test_a_module_that_the_forward_pass_assigns_is_the_models_own():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
            self.last = self.blocks[0]

        def __call__(self, x):
            self.last = self.blocks[1]
            return self.last(x)

    model = Model(nnx.Rngs(0))
    jr.activity({"blocks/1": jr.L1(1.0)})(model)(X)
    assert model.last is model.blocks[1]


def test_a_jitted_call_that_ran_before_is_not_replayed():
    class Model(Encoder):
        @nnx.jit
        def __call__(self, x):
            return jr.sow(self, "code", nnx.relu(self.dense(x)), jr.L1(1.0))

    model = Model(nnx.Rngs(0))
    expected = jnp.sum(model(X)) / 4
    for _ in range(2):
        _, terms = jr.activity({})(model)(X)
        np.testing.assert_allclose(terms["code"], expected, rtol=1e-6)


def test_an_activity_inside_another_measures_alone():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encoder = Encoder(rngs)

        def __call__(self, x):
            outside = self.encoder(x)
            return outside, jr.activity({"**": jr.L2(1.0)})(self.encoder)(x)

    model = Model(nnx.Rngs(0))
    (code, (again, inner)), outer = jr.activity({"encoder": jr.L1(1.0), ".": None})(model)(X)
    chex.assert_trees_all_equal(again, code)
    squares = jnp.sum(code**2) / 4
    expected = {".": squares, "code": squares, "dense": jnp.sum(model.encoder.dense(X) ** 2) / 4}
    chex.assert_trees_all_close(inner.as_dict(), expected, rtol=1e-6)
    once = jnp.sum(code) / 4
    chex.assert_trees_all_close(outer.as_dict(), {"encoder": once, "encoder/code": once}, rtol=1e-6)


def test_what_an_activity_around_has_measured_is_not_the_inner_ones():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 5, rngs=rngs)

        def __call__(self, x):
            return self.linear(x), jr.activity({})(self.linear)(x)

    (h, (_, inner)), outer = jr.activity({"linear": jr.L1(1.0)})(Model(nnx.Rngs(0)))(X)
    assert not inner
    np.testing.assert_allclose(outer.total, jr.penalize(h, jr.L1(1.0)), rtol=1e-6)


def test_any_bound_method_runs_itself():
    class Base(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x)

        encode = __call__
        shifted = lambda self, x: self.dense(x + 1)  # noqa: E731

    class Derived(Base):
        def __call__(self, x):
            return 2 * self.dense(x)

    model = Derived()
    free = types.MethodType(lambda self, x: 3 * self.dense(x), model)
    x = jnp.ones((2, 3))
    for method in (model.encode, model.shifted, free, model):
        y, terms = jr.activity({"dense": jr.L2(1.0)})(method)(x)
        np.testing.assert_allclose(y, method(x), rtol=1e-6)
        assert list(terms) == ["dense"]
