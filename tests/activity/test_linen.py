import re
import threading
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import config
from flax.core import FrozenDict, freeze

import jaxreg as jr

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
KEY = jax.random.key(0)


class Autoencoder(nn.Module):
    """Sows a value of its own, like a user's model."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(5, name="encoder")(x))
        self.sow("intermediates", "code", h)
        return nn.Dense(3, name="decoder")(h)


MODEL = Autoencoder()
VARIABLES = MODEL.init(KEY, X)


def encoded(variables):
    return nn.Dense(5).apply({"params": variables["params"]["encoder"]}, X)


def test_keras_documented_case():
    layer = nn.Dense(5, kernel_init=nn.initializers.ones)
    x = jnp.ones((5, 5)) * 2
    params = layer.init(KEY, x)["params"]
    _, terms = jr.activity({".": jr.L2(0.01)})(layer.apply)({"params": params}, x)
    assert float(jr.kernel(jr.L1(0.01))(params)) == 0.25
    assert float(terms.total) == 5.0


def test_output_and_not_input_is_penalized():
    layer = nn.Dense(1, kernel_init=nn.initializers.constant(10.0))
    variables = layer.init(KEY, jnp.ones((2, 1)))
    _, terms = jr.activity({".": jr.L1(1.0)})(layer.apply)(variables, jnp.ones((2, 1)))
    assert float(terms.total) == 10.0


@pytest.mark.parametrize(
    ("reduction", "count"), [("batch_mean", 4), ("sum", 1), ("mean", 20), ("token_mean", 4)]
)
def test_value_and_gradient_equal_a_handwritten_loss(reduction, count):
    forward = jr.activity({"encoder": jr.L2(0.5) + jr.L1(0.1)}, reduction=reduction)(MODEL.apply)

    def ours(variables):
        return forward(variables, X)[1].total

    def theirs(variables):
        h = encoded(variables)
        return jnp.sum(0.5 * h**2 + 0.1 * jnp.abs(h)) / count

    chex.assert_trees_all_close(
        jax.value_and_grad(ours)(VARIABLES), jax.value_and_grad(theirs)(VARIABLES), rtol=1e-6
    )


def test_returns_what_apply_returned():
    y, _ = jr.activity({"encoder": jr.L1(1.0)})(MODEL.apply)(VARIABLES, X)
    chex.assert_trees_all_equal(y, MODEL.apply(VARIABLES, X))


@pytest.mark.parametrize(
    "options",
    [
        {"mutable": ["intermediates"]},
        {"mutable": "intermediates"},
        {"mutable": True},
        {"mutable": ["batch_stats"]},
        {"mutable": []},
        {"capture_intermediates": True},
        {"capture_intermediates": lambda module, _: isinstance(module, nn.Dense)},
    ],
    ids=["list", "name", "all", "other", "empty", "capture", "capture_some"],
)
@pytest.mark.parametrize("rules", [{"encoder": jr.L1(1.0)}, {}], ids=["rule", "none"])
def test_users_own_mutables_and_sown_values_come_back_untouched(options, rules):
    expected = MODEL.apply(VARIABLES, X, **options)
    out, terms = jr.activity(rules)(MODEL.apply)(VARIABLES, X, **options)
    chex.assert_trees_all_equal(out, expected)
    assert list(terms) == list(rules)


def test_no_intermediates_come_back_where_the_model_sows_none():
    model, variables = nn.Dense(5), {"params": VARIABLES["params"]["encoder"]}
    out, _ = jr.activity({".": jr.L1(1.0)})(model.apply)(variables, X, mutable=["intermediates"])
    chex.assert_trees_all_equal(out, model.apply(variables, X, mutable=["intermediates"]))


def test_an_empty_tree_of_the_models_own_comes_back():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.put_variable("intermediates", "none", {})
            return nn.remat(nn.Dense)(5, name="encoder")(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    forward = jr.activity({"encoder": jr.L1(1.0)})(Model().apply)
    (_, state), _ = forward(variables, X, mutable=["intermediates"])
    assert state == {"intermediates": {"none": {}}}


def test_mutable_batch_statistics_are_updated():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="norm")(x)

    variables = Model().init(KEY, X)
    out, terms = jr.activity({"norm": jr.L2(1.0)})(Model().apply)(
        variables, X, mutable=["batch_stats"]
    )
    chex.assert_trees_all_equal(out, Model().apply(variables, X, mutable=["batch_stats"]))
    np.testing.assert_allclose(terms.total, jnp.sum(out[0] ** 2) / 4, rtol=1e-6)


def test_passing_variables_back_in_does_not_count_twice():
    forward = jr.activity({"encoder": jr.L1(1.0), "code": jr.L1(2.0)})(MODEL.apply)
    (_, state), first = forward(VARIABLES, X, mutable=["intermediates"])
    (_, again), second = forward({**VARIABLES, **state}, X, mutable=["intermediates"])
    chex.assert_trees_all_equal(first.as_dict(), second.as_dict())
    assert len(again["intermediates"]["code"]) == 2, "Flax's own accumulation is the user's"


def test_a_value_sown_by_an_earlier_pass_alone_is_not_this_ones():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            h = nn.Dense(5, name="encoder")(x)
            if train:
                self.sow("intermediates", "code", h)
            return h

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    _, state = Model().apply(variables, X, True, mutable=["intermediates"])
    _, terms = jr.activity({"**": jr.L1(1.0)})(Model().apply)({**variables, **state}, X, False)
    assert set(terms) == {".", "encoder"}


@pytest.mark.parametrize("method", ["init", "init_with_output"])
def test_init_leaves_no_trace(method):
    plain = getattr(MODEL, method)
    out, terms = jr.activity({"encoder": jr.L1(1.0)})(plain)(KEY, X)
    chex.assert_trees_all_equal(out, plain(KEY, X))
    assert terms.as_dict() == {}
    assert float(terms.total) == 0.0


def test_frozen_variables_and_lazy_keywords():
    forward = jr.activity({"encoder": jr.L1(1.0)})(MODEL.apply)
    expected = forward(VARIABLES, X)[1].total
    assert forward(freeze(VARIABLES), X)[1].total == expected
    assert forward(variables=VARIABLES, x=X)[1].total == expected


def test_what_comes_back_is_frozen_if_flaxs_own_is():
    with config.temp_flip_flag("return_frozendict", True):
        expected = MODEL.apply(VARIABLES, X, mutable=["intermediates"])
        out, _ = jr.activity({"encoder": jr.L1(1.0)})(MODEL.apply)(
            VARIABLES, X, mutable=["intermediates"]
        )
    assert isinstance(out[1], FrozenDict)
    chex.assert_trees_all_equal(out, expected)


def test_values_that_the_model_sows_have_paths():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Autoencoder(name="inner")(x)

    variables = {"params": {"inner": VARIABLES["params"]}}
    _, terms = jr.activity({"inner/code": jr.L1(1.0)})(Outer().apply)(variables, X)
    np.testing.assert_allclose(terms["inner/code"], jnp.sum(nn.relu(encoded(VARIABLES))) / 4)


def test_a_value_sown_in_a_lifted_method_is_measured_there():
    def step(module, x, _):
        module.sow("intermediates", "code", x)
        return 2 * x, None

    class Model(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            lifted = nn.scan(step, variable_axes={"intermediates": 0}, length=3)
            return lifted(self, x, None)[0]

    forward = jr.activity({"code": jr.L1(1.0)})(Model().apply)
    value, gradient = jax.value_and_grad(lambda x: forward({}, x)[1].total)(X)
    np.testing.assert_allclose(value, (1 + 2 + 4) * jnp.sum(jnp.abs(X)) / 4, rtol=1e-6)
    np.testing.assert_allclose(gradient, (1 + 2 + 4) * jnp.sign(X) / 4, rtol=1e-6)


def test_outputs_that_flax_captures_are_no_values_that_the_model_sows():
    forward = jr.activity({"**": jr.L1(1.0)})(MODEL.apply)
    _, terms = forward(VARIABLES, X, capture_intermediates=True)
    chex.assert_trees_all_equal(terms.as_dict(), forward(VARIABLES, X)[1].as_dict())


class HasFieldSow(nn.Module):
    sow: Any = True

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, name="dense")(x)
        return jr.sow(self, "code", y, None) if self.sow in (True, None) else x


class HasSubmoduleSow(nn.Module):
    def setup(self):
        self.sow: Any = nn.Dense(3)

    def __call__(self, x):
        return jr.sow(self, "code", self.sow(x), None)


@pytest.mark.parametrize(
    ("model", "path"),
    [(HasFieldSow(), "dense"), (HasFieldSow(sow=None), "dense"), (HasSubmoduleSow(), "sow")],
    ids=["true", "none", "submodule"],
)
def test_a_field_of_the_name_of_flaxs_sow(model, path):
    x = jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    y, terms = jr.activity({"code": jr.L2(1.0), path: jr.L2(1.0)})(model.apply)(variables, x)
    np.testing.assert_allclose(terms.total, jnp.sum(y**2), rtol=1e-6)


def test_a_value_that_another_module_sows_is_an_error():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            encoder = nn.Dense(5, name="encoder")
            encoder.sow("intermediates", "code", encoder(x))
            return x

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    forward = jr.activity({"encoder/code": jr.L1(1.0)})(Model().apply)
    with pytest.raises(ValueError, match=r'cannot measure "encoder/code".*Use `jaxreg.sow` there'):
        forward(variables, X)


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jr.sow(self, "code", nn.relu(nn.Dense(5, name="encoder")(x)), jr.L1(1.0))
        return nn.Dense(3, name="decoder")(h)


def test_sow_without_activity_costs_nothing():
    plain = jax.make_jaxpr(MODEL.apply)(VARIABLES, X)
    assert str(jax.make_jaxpr(Sows().apply)(VARIABLES, X)) == str(plain)
    chex.assert_trees_all_equal_structs(Sows().init(KEY, X), VARIABLES)
    _, state = Sows().apply(VARIABLES, X, mutable=["intermediates"])
    assert state == {}


def test_sow_is_collected_and_a_rule_replaces_its_penalty():
    h = nn.relu(encoded(VARIABLES))
    terms = jr.activity({})(Sows().apply)(VARIABLES, X)[1]
    np.testing.assert_allclose(terms["code"], jnp.sum(h) / 4, rtol=1e-6)
    terms = jr.activity({"code": jr.L2(3.0)})(Sows().apply)(VARIABLES, X)[1]
    np.testing.assert_allclose(terms["code"], 3 * jnp.sum(h**2) / 4, rtol=1e-6)
    terms = jr.activity({"code": None})(Sows().apply)(VARIABLES, X)[1]
    assert terms.as_dict() == {}


def test_activity_regularization_layer():
    model = nn.Sequential([nn.relu, jr.linen.ActivityRegularization(jr.L2(0.5))])
    y, terms = jr.activity({})(model.apply)({}, X)
    chex.assert_trees_all_equal(y, nn.relu(X))
    np.testing.assert_allclose(terms["layers_1/output"], 0.5 * jnp.sum(y**2) / 4, rtol=1e-6)


class Scanned(nn.Module):
    """Layers stacked by `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        axes: Any = {"params": 0, "intermediates": 0}
        lifted = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return lifted(name="blocks")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(3, name="dense")(x)
        return jr.sow(self, "tanh", jnp.tanh(h), jr.L1(0.5)), None


def test_remat_counts_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(5, name="encoder")(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    forward = jr.activity({"encoder": jr.L2(1.0)})(Model().apply)
    ours = jax.jit(jax.value_and_grad(lambda v: forward(v, X)[1].total))(variables)
    theirs = jax.value_and_grad(lambda v: jnp.sum(encoded(v) ** 2) / 4)(variables)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


JittedDense = nn.jit(nn.Dense)


def test_nested_jit_does_not_replay_another_trace():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return JittedDense(5, name="encoder")(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    Model().apply(variables, X, mutable=["intermediates"])
    h = encoded(VARIABLES)
    for penalty, expected in [(jr.L1(1.0), jnp.sum(jnp.abs(h))), (jr.L2(1.0), jnp.sum(h**2))]:
        forward = jr.activity({"encoder": penalty})(Model().apply)
        for _ in range(2):
            np.testing.assert_allclose(forward(variables, X)[1].total, expected / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        [{"reduction": "sum"}, {"reduction": "mean"}],
        [{"mask": jnp.arange(4) < 1}, {"mask": jnp.arange(4) < 2}],
    ],
    ids=["reduction", "mask"],
)
def test_nested_jit_does_not_replay_another_reduction_or_mask(options):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return JittedDense(5, name="encoder")(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    h, penalty = encoded(VARIABLES), jr.L1(1.0)
    for option in options:
        _, terms = jr.activity({"encoder": penalty}, **option)(Model().apply)(variables, X)
        np.testing.assert_allclose(terms.total, jr.penalize(h, penalty, **option), rtol=1e-6)


def test_a_statistic_under_scan_is_finished_per_layer():
    class Codes(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.sigmoid(nn.Dense(3, name="dense")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Codes,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scanned(name="codes")(x, None)[0]

    variables = Model().init(KEY, X)
    penalty = jr.KLSparsity(1.0, target=0.1)
    _, terms = jr.activity({"codes": penalty})(Model().apply)(variables, X)
    x, expected = X, jnp.zeros(())
    dense = variables["params"]["codes"]["dense"]
    for kernel, bias in zip(dense["kernel"], dense["bias"], strict=True):
        x = nn.sigmoid(x @ kernel + bias)
        expected += penalty(x)
    np.testing.assert_allclose(terms["codes"], expected, rtol=1e-6)


def test_a_module_called_twice_counts_twice_and_a_shared_one_once_a_call():
    class Twice(nn.Module):
        def setup(self):
            self.dense = nn.Dense(3)
            self.alias = self.dense

        def __call__(self, x):
            return self.alias(self.dense(x))

    variables = Twice().init(KEY, X)
    _, terms = jr.activity({"dense": jr.L1(1.0)})(Twice().apply)(variables, X)
    dense = nn.Dense(3).bind({"params": variables["params"]["dense"]})
    once, twice = dense(X), dense(dense(X))
    expected = (jnp.sum(jnp.abs(once)) + jnp.sum(jnp.abs(twice))) / 4
    np.testing.assert_allclose(terms["dense"], expected, rtol=1e-6)
    assert list(terms) == ["dense"]


def test_each_floating_output_counts():
    class Heads(nn.Module):
        def __call__(self, x):
            return {"a": x, "b": (2 * x, jnp.argmax(x, -1), None)}

    _, terms = jr.activity({".": jr.L1(1.0)})(Heads().apply)({}, X)
    np.testing.assert_allclose(terms.total, 3 * jnp.sum(jnp.abs(X)) / 4, rtol=1e-6)


def test_an_integer_output_is_an_error():
    class Classes(nn.Module):
        def __call__(self, x):
            return jnp.argmax(x, -1)

    with pytest.raises(TypeError, match=r'floating-point values; got "\." of dtype int32'):
        jr.activity({".": jr.L1(1.0)})(Classes().apply)({}, X)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"encodr": jr.L1(1.0)}, r'"encodr" wins none of the .* Nearest: "encoder"'),
        ({"encodr": None}, r'"encodr" wins none'),
        ({"**": jr.L1(1.0), "encoder": jr.L2(1.0)}, r'earlier rule "\*\*" wins that'),
        ({"encoder/kernel": jr.L1(1.0)}, r'Nearest: "encoder"'),
    ],
)
def test_a_rule_that_wins_nothing_names_what_is_near(rules, message):
    with pytest.raises(ValueError, match=message):
        jr.activity(rules)(MODEL.apply)(VARIABLES, X)
    _, terms = jr.activity({"encodr": jr.L1(1.0)}, strict=False)(MODEL.apply)(VARIABLES, X)
    assert float(terms.total) == 0.0


def test_an_output_that_its_penalty_cannot_take_is_named():
    forward = jr.activity({"encoder": jr.Slowness(1.0, axis=-3)})(MODEL.apply)
    with pytest.raises(ValueError, match=r'got axis=-3 for "encoder" of shape \(4, 5\)'):
        forward(VARIABLES, X)


def test_a_module_that_no_call_reaches_is_an_error():
    class Half(nn.Module):
        def setup(self):
            self.used, self.unused = nn.Dense(3), nn.Dense(3)

        def __call__(self, x):
            return self.used(x) + (self.unused(x) if self.is_initializing() else 0)

    variables = Half().init(KEY, X)
    with pytest.raises(ValueError, match=r'matches "unused", which no `__call__`'):
        jr.activity({"unused": jr.L1(1.0)})(Half().apply)(variables, X)
    jr.activity({"unused": None})(Half().apply)(variables, X)


def test_exempt_modules_come_first():
    rules = {"decoder": None, "*coder": jr.L1(1.0)}
    assert list(jr.activity(rules)(MODEL.apply)(VARIABLES, X)[1]) == ["encoder"]


def test_a_raising_model_leaves_no_trace():
    class Raises(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(5, name="encoder")(x)
            raise RuntimeError("from the model")

    with pytest.raises(RuntimeError, match="from the model"):
        jr.activity({"encoder": jr.L1(1.0)})(Raises().apply)(VARIABLES, X)
    assert MODEL.apply(VARIABLES, X, mutable=["batch_stats"])[1] == {}
    _, state = Sows().apply(VARIABLES, X, mutable=["intermediates"])
    assert state == {}
    assert "sow" not in vars(MODEL)


def test_another_thread_sees_nothing():
    inside, leave, found = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def __call__(self, x):
            inside.set()
            leave.wait(10)
            return x

    def other():
        inside.wait(10)
        found.append(Sows().apply(VARIABLES, X, mutable=["intermediates"])[1])
        leave.set()

    thread = threading.Thread(target=other)
    thread.start()
    jr.activity({".": jr.L1(1.0)})(Waits().apply)({}, X)
    thread.join()
    assert found == [{}]


def test_any_function_that_calls_linen_modules():
    def forward(params, x):
        return 1 + jnp.asarray(MODEL.apply({"params": params}, x))

    y, terms = jr.activity({"encoder": jr.L1(1.0)})(forward)(VARIABLES["params"], X)
    chex.assert_trees_all_equal(y, forward(VARIABLES["params"], X))
    np.testing.assert_allclose(terms.total, jnp.sum(jnp.abs(encoded(VARIABLES))) / 4, rtol=1e-6)
    bound = MODEL.bind(VARIABLES)
    assert jr.activity({"encoder": jr.L1(1.0)})(bound)(X)[1].total == terms.total


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_function_that_is_transformed_inside_is_an_error(wrap):
    forward = jr.activity({"encoder": jr.L1(1.0)})(wrap(MODEL.apply))
    with pytest.raises(ValueError, match=r'cannot take the term "encoder".*own `apply`'):
        forward(VARIABLES, X)


def test_strength_is_traced_vmapped_and_differentiated_without_recompiling():
    def total(strength):
        return jr.activity({"encoder": jr.L1(strength)})(MODEL.apply)(VARIABLES, X)[1].total

    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(n=1)(total))
    one = jitted(1.0)
    np.testing.assert_allclose(jitted(3.0), 3 * one, rtol=1e-6)
    strengths = jnp.arange(8.0)
    np.testing.assert_allclose(jax.vmap(total)(strengths), strengths * one, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(2.0), one, rtol=1e-6)


def test_a_strength_made_inside_a_scanned_layer_is_carried_with_its_term():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, strength):
            return jr.sow(self, "x", x, jr.L1(strength)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, strengths):
            scanned = nn.scan(Layer, variable_axes={"intermediates": 0})
            return scanned(name="layers")(x, strengths)[0]

    forward = jr.activity({})(Model().apply)
    value, gradient = jax.value_and_grad(lambda s: forward({}, X, s)[1].total)(jnp.arange(3.0))
    once = jnp.sum(jnp.abs(X)) / 4
    np.testing.assert_allclose(value, 3 * once, rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.full(3, once), rtol=1e-6)


def test_masked_tokens_do_not_count():
    tokens = jnp.arange(24.0).reshape(2, 3, 4)
    mask = jnp.array([[True, True, False], [True, False, False]])

    class Identity(nn.Module):
        def __call__(self, x):
            return x

    forward = jr.activity({".": jr.L1(1.0)}, reduction="token_mean", mask=mask)(Identity().apply)
    np.testing.assert_allclose(forward({}, tokens)[1].total, jnp.sum(tokens[mask]) / 3)
    wrong = jr.activity({".": jr.L1(1.0)}, mask=mask[:, :2])(Identity().apply)
    with pytest.raises(ValueError, match=r'got \(2, 2\) for "\." of shape \(2, 3, 4\)'):
        wrong({}, tokens)


def test_no_activation_is_returned_from_a_scan():
    model = Scanned()
    variables = model.init(KEY, X)

    def total(variables):
        return jr.activity({"blocks/dense": jr.L2(1.0)})(model.apply)(variables, X)[1].total

    jaxpr = jax.make_jaxpr(total)(variables)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    carry, stacked, nothing = X.shape, (3,), (3, 0)
    assert {v.aval.shape for v in scan.outvars} == {carry, stacked, nothing}


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        (jr.L1(1.0), {}, TypeError, r"got a bare penalty.*\"\.\""),
        ({"encoder": 1.0}, {}, TypeError, r"takes a Penalty, or None.*got 1.0 for 'encoder'"),
        ({3: jr.L1(1.0)}, {}, TypeError, r"got the pattern 3"),
        ({}, {"reduction": "batchmean"}, ValueError, r"one of 'batch_mean'.*got 'batchmean'"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(rules, options, error, message):
    with pytest.raises(error, match=message):
        jr.activity(rules, **options)


def test_an_empty_batch_gives_zero():
    forward = jr.activity({"encoder": jr.L1(1.0) + jr.KLSparsity(1.0, target=0.1)})(MODEL.apply)
    value, gradient = jax.value_and_grad(lambda v: forward(v, X[:0])[1].total)(VARIABLES)
    assert float(value) == 0.0
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, VARIABLES))


class Derived(nn.Dense):
    """Calls its base's `__call__`, as `nn.SelfAttention` does."""

    def __call__(self, inputs):
        return super().__call__(inputs)


class Aliased(nn.Module):
    def forward(self, x):
        return 2 * x

    __call__ = forward


@pytest.mark.parametrize("lift", [lambda cls: cls, nn.remat, nn.jit], ids=["plain", "remat", "jit"])
def test_a_base_class_call_does_not_count_again(lift):
    model = lift(Derived)(5)
    variables = {"params": VARIABLES["params"]["encoder"]}
    _, terms = jr.activity({".": jr.L1(1.0)})(model.apply)(variables, X)
    np.testing.assert_allclose(terms.total, jnp.sum(jnp.abs(encoded(VARIABLES))) / 4, rtol=1e-6)


def test_an_aliased_call_counts():
    _, terms = jr.activity({".": jr.L1(1.0)})(Aliased().apply)({}, X)
    np.testing.assert_allclose(terms.total, 2 * jnp.sum(jnp.abs(X)) / 4, rtol=1e-6)


def test_a_decorated_call_counts_once():
    class Model(nn.Module):
        @nn.remat
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="encoder")(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    _, terms = jr.activity({".": jr.L1(1.0)})(Model().apply)(variables, X)
    np.testing.assert_allclose(terms.total, jnp.sum(jnp.abs(encoded(VARIABLES))) / 4, rtol=1e-6)


JittedSows = nn.jit(Sows)


@pytest.mark.parametrize("mutable", [["intermediates"], True], ids=["some", "all"])
def test_a_trace_without_activity_is_not_replayed(mutable):
    model = JittedSows()
    model.apply(VARIABLES, X, mutable=mutable)
    expected = jnp.sum(nn.relu(encoded(VARIABLES))) / 4
    for _ in range(2):
        _, terms = jr.activity({})(model.apply)(VARIABLES, X, mutable=mutable)
        np.testing.assert_allclose(terms["code"], expected, rtol=1e-6)
    assert model.apply(VARIABLES, X, mutable=["intermediates"])[1] == {}


def test_a_jitted_function_that_ran_before_is_an_error_and_not_silence():
    jitted = jax.jit(Sows().apply)
    jitted(VARIABLES, X)
    with pytest.raises(ValueError, match=r'cannot take the term "code"'):
        jr.activity({})(jitted)(VARIABLES, X)


def test_an_equal_activity_built_anew_does_not_retrace():
    traces = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return x

    Jitted = nn.jit(Model)
    for strength in (1.0, 1.0, 2.0):
        jr.activity({".": jr.L1(strength)})(Jitted().apply)({}, X)
    assert len(traces) == 2


def test_a_sown_value_can_be_exempt():
    _, terms = jr.activity({"code": None, "**": jr.L1(1.0)})(MODEL.apply)(VARIABLES, X)
    assert sorted(terms) == [".", "decoder", "encoder"]


def test_init_inside_a_function_does_not_hide_a_misspelt_rule():
    def forward(x):
        return MODEL.apply(MODEL.init(KEY, x), x)

    with pytest.raises(ValueError, match=r'"encodr" wins none'):
        jr.activity({"encodr": jr.L1(1.0)})(forward)(X)


def test_a_module_without_output_is_an_error():
    class Silent(nn.Module):
        def __call__(self, x):
            return None

    with pytest.raises(TypeError, match=r'got "\." of dtype None'):
        jr.activity({".": jr.L1(1.0)})(Silent().apply)({}, X)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.vmap], ids=["checkpoint", "vmap"])
def test_jax_transformations_inside_a_module_are_an_error(wrap):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(5, name="encoder")
            dense(x)
            return wrap(lambda y: dense(y))(x)

    variables = {"params": {"encoder": VARIABLES["params"]["encoder"]}}
    with pytest.raises(
        ValueError, match=r'cannot carry the term "encoder".*lifted transformations'
    ):
        jr.activity({"encoder": jr.L1(1.0)})(Model().apply)(variables, X)


class Named(nn.Module):
    """Sows a value by a name of a submodule's."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return jr.sow(self, "layer", self.layer(x), jr.L1(1.0))


@pytest.mark.parametrize("run", ["apply", "function"])
@pytest.mark.parametrize("layer", [nn.Dense(3), nn.Dropout(0.0, deterministic=True)])
def test_a_value_named_as_a_submodule_is_an_error(layer, run):
    model = Named(layer)
    variables = model.init(jax.random.key(0), X)
    forward = model.apply if run == "apply" else lambda variables, x: model.apply(variables, x)
    with pytest.raises(ValueError, match='cannot name a value as a module is named: "layer" is'):
        jr.activity({})(forward)(variables, X)


def test_a_value_that_is_named_before_a_submodule_runs_is_an_error():
    class Early(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jr.sow(self, "drop", x, jr.L1(1.0))
            return nn.Dropout(0.0, deterministic=True, name="drop")(x)

    with pytest.raises(ValueError, match='"drop" is one'):
        jr.activity({})(Early().apply)({}, X)


def test_a_value_named_as_what_is_no_module_that_runs():
    class Code(nn.Module):
        @nn.compact
        def __call__(self, x):
            weights = self.param("code", lambda key: {"scale": jnp.ones(())})
            return jr.sow(self, "code", weights["scale"] * x, jr.L1(1.0))

    variables = Code().init(jax.random.key(0), X)
    _, terms = jr.activity({})(Code().apply)(variables, X)
    np.testing.assert_allclose(terms["code"], jr.penalize(X, jr.L1(1.0)), rtol=1e-6)


def test_a_value_without_a_penalty_of_its_own_has_that_of_a_rule():
    class Code(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jr.sow(self, "code", x, None)

    assert not jr.activity({})(Code().apply)({}, X)[1]
    _, terms = jr.activity({"code": jr.L1(2.0)})(Code().apply)({}, X)
    np.testing.assert_allclose(terms["code"], jr.penalize(X, jr.L1(2.0)), rtol=1e-6)
    layer = jr.linen.ActivityRegularization(None)
    assert not jr.activity({})(layer.apply)({}, X)[1]


class Distilled(nn.Module):
    """Applies another model, whose paths could be its own."""

    mutable: Any = False

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="student")(x), MODEL.apply(VARIABLES, x, mutable=self.mutable)


DISTILLED = {"params": {"student": VARIABLES["params"]["encoder"]}}


@pytest.mark.parametrize("mutable", [False, ["intermediates"]], ids=["bare", "collecting"])
@pytest.mark.parametrize("path", [".", "encoder", "code"])
def test_a_term_of_another_model_that_is_applied_inside_is_an_error(path, mutable):
    message = rf'cannot carry the term "{re.escape(path)}": it is another model\'s.*exempts it'
    with pytest.raises(ValueError, match=message):
        jr.activity({path: jr.L1(1.0)})(Distilled(mutable).apply)(DISTILLED, X)


@pytest.mark.parametrize("mutable", [False, ["intermediates"]], ids=["bare", "collecting"])
def test_a_function_of_the_model_may_apply_another_first(mutable):
    def method(module, x):
        return MODEL.apply(VARIABLES, x, mutable=mutable), module(x)

    def run(rules):
        forward = jr.activity(rules)(Distilled(mutable).apply)
        return forward(DISTILLED, X, method=method)[1]

    exempt = dict.fromkeys([".", "encoder", "code", "decoder"])
    expected = jnp.abs(encoded(VARIABLES)).sum() / 4
    np.testing.assert_allclose(run({**exempt, "student": jr.L1(1.0)}).total, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r'cannot carry the term "encoder": it is another model'):
        run({"encoder": jr.L1(1.0)})


def test_a_model_may_apply_another_that_no_rule_penalizes():
    expected = jnp.abs(encoded(VARIABLES)).sum() / 4
    exempt = dict.fromkeys([".", "encoder", "code", "decoder"])
    for rules in ({"student": jr.L1(1.0)}, {**exempt, "**": jr.L1(1.0)}):
        _, terms = jr.activity(rules)(Distilled().apply)(DISTILLED, X)
        assert sorted(terms) == ["student"]
        np.testing.assert_allclose(terms.total, expected, rtol=1e-6)


@pytest.mark.parametrize("run", [jr.penalize, None], ids=["penalize", "sow"])
def test_what_is_no_penalty_is_an_error(run):
    with pytest.raises(TypeError, match=r"takes a Penalty.*; got 0.1"):
        run(X, 0.1) if run else jr.sow(MODEL, "code", X, 0.1)  # type: ignore[arg-type]


def test_a_module_in_place_of_its_apply_is_an_error():
    with pytest.raises(TypeError, match="of a Linen module is its `apply`; got a Dense itself"):
        jr.activity({})(nn.Dense(3))


def test_an_unbound_module_has_no_path():
    class Twice(nn.Module):
        def __call__(self, x):
            return 2 * x

    out, terms = jr.activity({})(lambda x: Twice()(x))(jnp.ones(2))
    assert (out.tolist(), list(terms)) == ([2, 2], [])
