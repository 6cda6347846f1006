"""JAX's transformations around a forward pass, in Linen and in NNX; plain functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import Mesh, PartitionSpec

import jaxreg as jr

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
PARAMS = {"kernel": jnp.asarray(RNG.normal(size=(3, 4)), "f"), "bias": jnp.ones(4)}
PENALTY = jr.L2(0.5) + jr.KLSparsity(0.5, target=0.2)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.sigmoid(nn.Dense(4, name="dense")(x)) ** 2


def test_a_partial_forward_pass_is_that_of_what_it_is_of():
    activity, variables = jr.activity({".": PENALTY}), {"params": {"dense": PARAMS}}
    _, expected = activity(Linen().apply)(variables, X)
    _, terms = activity(partial(Linen().apply, variables))(X)
    chex.assert_trees_all_equal(terms.as_dict(), expected.as_dict())

    class Model(nnx.Module):
        def __call__(self, x, *, scale):
            return scale * x

    _, terms = jr.activity({".": jr.L2(1.0)}, reduction="sum")(partial(Model(), scale=2.0))(X)
    np.testing.assert_allclose(terms["."], 4 * np.sum(X**2), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["batch_mean", "mean", "token_mean"])
def test_an_exported_forward_pass_takes_any_batch_size(reduction):
    forward = jr.activity({".": PENALTY + jr.GroupLasso(0.1)}, reduction=reduction)(Linen().apply)

    def total(x):
        return forward({"params": {"dense": PARAMS}}, x)[1].total

    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(total))(jax.ShapeDtypeStruct((batch, 3), np.float32))
    np.testing.assert_allclose(exported.call(X[:5]), total(X[:5]), rtol=1e-6)


class Scanned(nn.Module):
    """The same, whose term leaves beside the output of a scan."""

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            return x, module(x)

        scanned = nn.scan(body, variable_broadcast="params", length=1)
        return scanned(Linen(name="inner"), x, None)[1][0]


class Nnx(nnx.Module):
    def __init__(self, params):
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        nnx.update(self.dense, {name: nnx.Param(value) for name, value in params.items()})

    def __call__(self, x):
        return jr.sow(self, "code", nnx.sigmoid(self.dense(x)) ** 2, PENALTY)


def linen(params, x):
    forward = jr.activity({".": PENALTY})(Linen().apply)
    return forward({"params": {"dense": params}}, x)[1]


def beside(params, x):
    variables = {"params": {"inner": {"dense": params}}}
    return jr.activity({"inner": PENALTY})(Scanned().apply)(variables, x)[1]


def in_nnx(params, x):
    return jr.activity({})(Nnx(params))(x)[1]


def code(params, x):
    return jax.nn.sigmoid(x @ params["kernel"] + params["bias"]) ** 2


def by_hand(params, x):
    """The L2 of the codes by batch mean, and the KL divergence of their means."""
    h = code(params, x)
    mean, target = jnp.mean(h, 0), 0.2
    divergence = target * jnp.log(target / mean) + (1 - target) * jnp.log((1 - target) / (1 - mean))
    return 0.5 * jnp.sum(h**2) / len(x) + 0.5 * jnp.sum(divergence)


FORWARDS: dict[str, Callable[..., Any]] = {"linen": linen, "beside": beside, "nnx": in_nnx}
WEIGHTS = jnp.arange(1.0, 5.0)


def ordinary(loss):
    return jax.value_and_grad(loss)(PARAMS, X)


def mapped(loss):
    """Over four batches of two examples each, with weights of their own."""
    batches = X.reshape(4, 2, 3)

    def total(params):
        return jnp.sum(WEIGHTS * jax.vmap(loss, in_axes=(None, 0))(params, batches))

    return jax.value_and_grad(total)(PARAMS)


def ensemble(loss):
    stacked = jax.tree.map(lambda p: jnp.stack([p, -p, 2 * p]), PARAMS)
    return jax.vmap(jax.value_and_grad(loss), in_axes=(0, None))(stacked, X)


def checkpointed(loss):
    return jax.value_and_grad(jax.checkpoint(loss))(PARAMS, X)


def scanned(loss):
    """The sum of each microbatch's penalty; for one penalty of all see `combine`."""

    def total(params):
        step = lambda total, x: (total + loss(params, x), None)  # noqa: E731
        return jax.lax.scan(step, 0.0, X.reshape(4, 2, 3))[0]

    return jax.value_and_grad(total)(PARAMS)


def conditional(loss):
    def chosen(params, flag):
        return jax.lax.cond(flag, loss, lambda params, x: 2 * loss(params, 3 * x), params, X)

    return [jax.value_and_grad(chosen)(PARAMS, flag) for flag in (True, False)]


def linearized(loss):
    value, push = jax.linearize(lambda params: loss(params, X), PARAMS)
    return value, push(PARAMS), jax.linear_transpose(push, PARAMS)(1.0)


def forward_mode(loss):
    value, tangent = jax.jvp(lambda params: loss(params, X), (PARAMS,), (PARAMS,))
    return value, tangent, jax.jacfwd(loss)(PARAMS, X)


def curvature(loss):
    """Forward over reverse."""
    return jax.jvp(lambda params: jax.grad(loss)(params, X), (PARAMS,), (PARAMS,))[1]


def sharded(loss):
    """A device for each two examples, each with a penalty of its own batch."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    data, all_of_it = PartitionSpec("data"), PartitionSpec()

    @jax.shard_map(mesh=mesh, in_specs=(all_of_it, data), out_specs=all_of_it)
    def total(params, x):
        return jax.lax.psum(loss(params, x), "data")

    return jax.value_and_grad(total)(PARAMS, jnp.asarray(X))


AROUND = [
    ordinary,
    mapped,
    ensemble,
    checkpointed,
    scanned,
    conditional,
    linearized,
    forward_mode,
    curvature,
    sharded,
]


@pytest.mark.parametrize("around", AROUND)
def test_value_and_derivatives_are_those_of_a_loss_written_by_hand(around):
    @jax.jit
    def all_of_them():
        losses = {n: lambda params, x, f=f: f(params, x).total for n, f in FORWARDS.items()}
        return {name: around(loss) for name, loss in ({"by hand": by_hand} | losses).items()}

    results = all_of_them()
    expected = results.pop("by hand")
    for name, result in results.items():
        chex.assert_trees_all_close(
            result, expected, rtol=2e-5, atol=1e-6, custom_message=f"{name} under {around.__name__}"
        )


@pytest.mark.parametrize("name", FORWARDS)
def test_microbatches_of_a_scan_combine(name):
    forward = FORWARDS[name]

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        step = lambda _, x: (None, forward(params, x))  # noqa: E731
        return jr.combine(jax.lax.scan(step, None, X.reshape(4, 2, 3))[1]).total

    chex.assert_trees_all_close(
        ours(PARAMS), jax.value_and_grad(by_hand)(PARAMS, X), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", FORWARDS)
def test_no_tracer_leaks(name):
    """Models are kept across steps, and so are activities; terms are not."""
    forward = FORWARDS[name]
    with jax.checking_leaks():
        total = jax.jit(jax.value_and_grad(lambda params, x: forward(params, x).total))(PARAMS, X)[
            0
        ]
    np.testing.assert_allclose(total, by_hand(PARAMS, X), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["batch_mean", "sum", "mean", "token_mean"])
def test_penalize_is_the_arithmetic_of_an_activity(reduction):
    """For plain functions, Equinox and Haiku."""
    forward = jr.activity({".": PENALTY}, reduction=reduction)(Linen().apply)

    def ours(params):
        return forward({"params": {"dense": params}}, X)[1].total

    def plain(params):
        return jr.penalize(code(params, X), PENALTY, reduction=reduction)

    chex.assert_trees_all_close(
        *(jax.jit(jax.value_and_grad(loss))(PARAMS) for loss in (ours, plain)), rtol=1e-6
    )


def test_each_layers_and_each_steps_value_can_be_read():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3, name="dense")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return lifted(name="layers")(x, None)[0]

    variables = Model().init(jax.random.key(0), X)
    forward = jr.activity({"layers/dense": jr.L1(0.5)})(Model().apply)
    expected, x = [], X
    for kernel in variables["params"]["layers"]["dense"]["kernel"]:
        x = x @ kernel
        expected.append(0.5 * jnp.sum(jnp.abs(x)) / len(x))
    terms = forward(variables, X)[1]
    (call,) = terms.measurements["layers/dense"]
    layers = jax.vmap(lambda call: call.value)(call)
    np.testing.assert_allclose(layers, expected, rtol=1e-5)
    _, stacked = jax.lax.scan(lambda _, x: (_, forward(variables, x)[1]), None, X.reshape(2, -1, 3))
    steps = jax.vmap(lambda terms: terms.as_dict())(stacked)["layers/dense"]
    expected = [forward(variables, x)[1].total for x in X.reshape(2, -1, 3)]
    np.testing.assert_allclose(steps, expected, rtol=1e-5)


def test_activities_with_masks_of_their_own():
    first, second = jnp.arange(len(X)) < 1, jnp.arange(len(X)) < 2
    model = nn.Sequential([nn.Dense(4), nn.Dense(2)])
    variables = model.init(jax.random.key(0), X)
    inner = jr.activity({"layers_1": PENALTY}, mask=second)(model.apply)
    (y, inside), outside = jr.activity({"layers_0": PENALTY}, mask=first)(inner)(variables, X)
    h: Any = model.apply(variables, X, method=lambda m, x: m.layers[0](x))
    assert (list(inside), list(outside)) == (["layers_1"], ["layers_0"])
    np.testing.assert_allclose(inside.total, jr.penalize(y, PENALTY, mask=second), rtol=1e-6)
    np.testing.assert_allclose(outside.total, jr.penalize(h, PENALTY, mask=first), rtol=1e-6)

    class Parts(nnx.Module):
        def __init__(self):
            self.one, self.two = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))

        def __call__(self, x):
            h, terms = jr.activity({".": PENALTY}, mask=first)(self.one)(x)
            return self.two(h), terms

    parts = Parts()
    (y, inside), outside = jr.activity({"two": PENALTY}, mask=second)(parts)(X)
    np.testing.assert_allclose(
        inside.total, jr.penalize(parts.one(jnp.asarray(X)), PENALTY, mask=first), rtol=1e-6
    )
    np.testing.assert_allclose(outside.total, jr.penalize(y, PENALTY, mask=second), rtol=1e-6)


def test_the_forward_pass_keeps_its_name():
    def forward(x):
        """Say what it does."""
        return x

    wrapped = jr.activity({})(forward)
    assert (wrapped.__name__, wrapped.__doc__) == ("forward", "Say what it does.")


def test_an_nnx_layer_of_its_own_inside_another_activity_has_its_parameters():
    layer = jr.nnx.Dense(3, 2, kernel_regularizer=jr.L2(1.0), rngs=nnx.Rngs(0))
    (_, inner), outer = jr.activity({})(lambda x: jr.activity({})(layer)(x))(jnp.ones((1, 3)))
    assert (list(inner), list(outer)) == (["kernel"], [])
