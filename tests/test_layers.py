"""Dense layers that carry their penalties, in Linen and in NNX."""

import contextlib
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxreg as jr

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
KEYWORDS: dict[str, Any] = {
    "activation": jax.nn.relu,
    "kernel_regularizer": jr.L2(0.1),
    "bias_regularizer": jr.L1(0.2),
    "activity_regularizer": jr.L1(0.3),
}


def init(model, *inputs):
    return jax.jit(model.init)(jax.random.key(0), *inputs)


def measure(model, variables, *inputs):
    return jax.jit(jr.activity({})(model.apply))(variables, *inputs)


def linen(features=4, **keywords):
    layer = jr.linen.Dense(features, **(keywords or KEYWORDS), bias_init=nn.initializers.ones)
    return layer, init(layer, X)


def expected_terms(kernel, bias, x=X):
    a = np.maximum(np.asarray(x) @ np.asarray(kernel) + np.asarray(bias), 0)
    return {
        "kernel": 0.1 * np.square(kernel).sum(),
        "bias": 0.2 * np.abs(bias).sum(),
        "output": 0.3 * np.abs(a).sum() / x.shape[0],
    }


def assert_terms(terms, expected):
    assert set(terms) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(terms[path], value, rtol=1e-5, err_msg=path)


def test_parameters_and_outputs_are_flaxs_own():
    ours, theirs = jr.linen.Dense(4), nn.Dense(4)
    params = theirs.init(jax.random.key(3), X)
    chex.assert_trees_all_equal(ours.init(jax.random.key(3), X), params)
    chex.assert_trees_all_close(ours.apply(params, X), theirs.apply(params, X), rtol=1e-6)
    own, flaxs = jr.nnx.Dense(5, 4, rngs=nnx.Rngs(3)), nnx.Linear(5, 4, rngs=nnx.Rngs(3))
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(own, nnx.Param)), nnx.to_pure_dict(nnx.state(flaxs, nnx.Param))
    )
    np.testing.assert_allclose(own(X), flaxs(X), rtol=1e-6)
    for dtype in (None, jnp.bfloat16):
        y = jr.linen.Dense(4, use_bias=False, dtype=dtype).init_with_output(jax.random.key(0), X)[0]
        assert y.dtype == (dtype or jnp.float32)


def test_a_layer_of_plain_arrays_runs():
    layer = jr.nnx.Dense(5, 4, jax.nn.relu, activity_regularizer=jr.L1(0.1), rngs=nnx.Rngs(0))
    pure = nnx.as_pure(layer)
    np.testing.assert_array_equal(pure(X), layer(X))
    expected = jr.activity({})(layer)(X)[1].as_dict()
    chex.assert_trees_all_close(jr.activity({})(pure)(X)[1].as_dict(), expected)


def test_the_terms_are_kerass():
    # Keras's documented case: a kernel term of 0.25, and an activity term of 5 per batch of five.
    layer = jr.linen.Dense(
        5,
        kernel_regularizer=jr.L1(0.01),
        activity_regularizer=jr.L2(0.01),
        kernel_init=nn.initializers.ones,
    )
    x = jnp.full((5, 5), 2.0)
    _, terms = measure(layer, init(layer, x), x)
    assert_terms(terms, {"kernel": 0.25, "output": 5.0})


def test_linen_terms_and_their_gradient():
    layer, variables = linen()
    params = variables["params"]
    y, terms = jax.jit(jr.activity({})(layer.apply))(variables, X)
    np.testing.assert_allclose(y, layer.apply(variables, X), rtol=1e-6)
    assert_terms(terms, expected_terms(params["kernel"], params["bias"]))
    gradient = jax.grad(lambda v: jr.activity({})(layer.apply)(v, X)[1]["kernel"])(variables)
    np.testing.assert_allclose(gradient["params"]["kernel"], 0.2 * params["kernel"], rtol=1e-6)


def test_nnx_terms_and_their_gradient():
    layer = jr.nnx.Dense(5, 4, **KEYWORDS, bias_init=nn.initializers.ones, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    for forward in (jr.activity({})(layer), nnx.jit(lambda x: jr.activity({})(layer)(x))):
        _, terms = forward(X)
        assert_terms(terms, expected_terms(layer.kernel[...], layer.bias[...]))
    gradient = nnx.grad(lambda m: jr.activity({})(m)(X)[1]["kernel"])(layer)
    np.testing.assert_allclose(gradient["kernel"][...], 0.2 * layer.kernel[...], rtol=1e-6)


def test_a_rule_replaces_the_activity_penalty_and_no_rule_reaches_the_parameters():
    layer, variables = linen()
    _, terms = jr.activity({"output": jr.L2(1.0), ".": None})(layer.apply)(variables, X)
    expected = expected_terms(**variables["params"])
    y = np.asarray(layer.apply(variables, X))
    assert_terms(terms, {**expected, "output": np.square(y).sum() / 6})
    _, terms = jr.activity({"**": None})(layer.apply)(variables, X)
    assert set(terms) == {"kernel", "bias"}
    with pytest.raises(ValueError, match='rule "kernel" wins none'):
        jr.activity({"kernel": jr.L1(1.0)})(layer.apply)(variables, X)


def test_a_mask_and_a_reduction_are_for_the_output_alone():
    layer, variables = linen()
    mask = jnp.arange(6) < 2
    _, terms = jr.activity({}, reduction="token_mean", mask=mask)(layer.apply)(variables, X)
    assert_terms(terms, expected_terms(**variables["params"], x=X[:2]))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = jr.linen.Dense(5, **KEYWORDS, name="layer")
        return layer(layer(x))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return jr.linen.Dense(5, kernel_regularizer=jr.L2(0.1), name="layer")(carry + x), None


def scanned(axis, **keywords):
    return nn.scan(
        Cell, **keywords, variable_axes={"intermediates": 0, **axis}, length=3, in_axes=nn.broadcast
    )()


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_a_parameter_counts_once_however_often_its_layer_runs(transform):
    model = transform(Shared)()
    variables = init(model, X)
    for _ in range(2):  # jit replays the second
        _, terms = jr.activity({})(model.apply)(variables, X)
        kernel = variables["params"]["layer"]["kernel"]
        np.testing.assert_allclose(terms["layer/kernel"], 0.1 * jnp.sum(kernel**2), rtol=1e-6)
        assert len(terms.measurements["layer/output"]) == 2


def test_a_scan_over_layers_counts_each_and_a_scan_over_time_counts_one():
    layers = scanned({"params": 0}, split_rngs={"params": True})
    time = scanned({}, variable_broadcast="params", split_rngs={"params": False})
    for model, shape in ((layers, (3, 5, 5)), (time, (5, 5))):
        variables = init(model, X, X)
        kernel = variables["params"]["layer"]["kernel"]
        assert kernel.shape == shape
        _, terms = measure(model, variables, X, X)
        np.testing.assert_allclose(terms["layer/kernel"], 0.1 * jnp.sum(kernel**2), rtol=1e-6)


def test_a_kernel_with_sharding_metadata_is_penalized():
    layer, plain = (
        jr.linen.Dense(4, kernel_regularizer=jr.L2(0.1), kernel_init=kernel_init)
        for kernel_init in (
            nn.with_partitioning(nn.initializers.ones, (None, "model")),
            nn.initializers.ones,
        )
    )
    variables = layer.init(jax.random.key(0), X)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    _, expected = measure(plain, init(plain, X), X)
    assert_terms(measure(layer, variables, X)[1], expected)


def test_microbatches_count_a_parameter_once():
    layer, variables = linen()

    @jax.jit
    def both(variables):
        whole, *parts = (jr.activity({})(layer.apply)(variables, x)[1] for x in (X, X[:2], X[2:]))
        return jr.combine(parts).as_dict(), whole.as_dict()

    chex.assert_trees_all_close(*both(variables), rtol=1e-5)


def test_nnx_layers_stacked_by_vmap_count_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return jr.nnx.Dense(5, 5, kernel_regularizer=jr.L2(0.1), rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model = Stack()
    _, terms = jr.activity({})(model)(X)
    kernel = model.layers.kernel[...]
    assert kernel.shape == (3, 5, 5)
    np.testing.assert_allclose(terms["layers/kernel"], 0.1 * jnp.sum(kernel**2), rtol=1e-6)


def test_a_traced_strength_and_what_has_no_parameters_to_look_at():
    layer, variables = linen()

    @jax.jit
    def kernel_term(strength):
        layer = jr.linen.Dense(4, kernel_regularizer=jr.L2(strength))
        return jr.activity({})(layer.apply)(variables, X)[1]["kernel"]

    np.testing.assert_allclose(kernel_term(0.2), 2 * kernel_term(0.1), rtol=1e-6)

    def forward(x):
        return layer.bind(variables)(x)

    with pytest.raises(ValueError, match=r'has no parameters to measure "kernel" by'):
        jr.activity({})(forward)(X)


def test_mlps_activate_and_penalize_all_but_the_last():
    own = jr.linen.MLP((8, 7, 2), **KEYWORDS)
    variables = init(own, X)
    flaxs = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(7), nn.relu, nn.Dense(2)])
    names = zip(
        ("Dense_0", "Dense_1", "Dense_2"), ("layers_0", "layers_2", "layers_4"), strict=True
    )
    theirs = {"params": {b: variables["params"][a] for a, b in names}}
    y, terms = measure(own, variables, X)
    np.testing.assert_allclose(y, jax.jit(flaxs.apply)(theirs, X), rtol=1e-5)
    outputs = {path for path in terms if path.endswith("output")}
    assert outputs == {"Dense_0/output", "Dense_1/output"}
    assert len(terms) == 8

    module = jr.nnx.MLP((5, 8, 7, 2), **KEYWORDS, rngs=nnx.Rngs(0))
    for i, layer in enumerate(module.layers):
        layer.kernel[...] = variables["params"][f"Dense_{i}"]["kernel"]
    y_nnx, terms_nnx = nnx.jit(lambda model, x: jr.activity({})(model)(x))(module, X)
    np.testing.assert_allclose(y_nnx, y, rtol=1e-5)
    np.testing.assert_allclose(terms_nnx.total, terms.total, rtol=1e-5)
    assert len(terms_nnx) == 8


def test_mlps_hand_their_initializers_on():
    inits: Any = {"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.constant(2.0)}
    params = init(jr.linen.MLP((3, 2), **inits), X)["params"]
    module = jr.nnx.MLP((X.shape[-1], 3, 2), **inits, rngs=nnx.Rngs(0))
    for i, layer in enumerate(module.layers):
        assert layer.bias is not None
        for kernel, bias in (
            (params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]),
            (layer.kernel[...], layer.bias[...]),
        ):
            assert (kernel == 1).all()
            assert (bias == 2).all()


def test_mlps_hand_their_dtypes_on():
    dtypes: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16}
    own = jr.linen.MLP((3, 2), **dtypes)
    variables = init(own, X)
    module = jr.nnx.MLP((X.shape[-1], 3, 2), **dtypes, rngs=nnx.Rngs(0))
    outputs: list[Any] = [own.apply(variables, X), module(X)]
    for y, params in zip(outputs, (variables, nnx.state(module, nnx.Param)), strict=True):
        assert y.dtype == jnp.bfloat16
        assert [leaf.dtype for leaf in jax.tree.leaves(params)] == 4 * [jnp.float16]


def test_without_biases_there_are_no_terms_of_biases():
    own = jr.linen.MLP((3, 2), use_bias=False, **KEYWORDS)
    _, terms = measure(own, init(own, X), X)
    assert set(terms) == {"Dense_0/kernel", "Dense_0/output", "Dense_1/kernel"}
    module = jr.nnx.MLP((X.shape[-1], 3, 2), use_bias=False, **KEYWORDS, rngs=nnx.Rngs(0))
    _, terms = jr.activity({})(module)(X)
    assert set(terms) == {"layers/0/kernel", "layers/0/output", "layers/1/kernel"}


def test_an_mlps_implementation_is_that_of_its_hidden_layers():
    keywords: Any = {"activity_regularizer": jr.L1(0.1), "implementation": "mosaic_gpu"}
    own = jr.linen.MLP((4, 2), **keywords)
    variables = init(jr.linen.MLP((4, 2)), X)
    module = jr.nnx.MLP((X.shape[-1], 4, 2), **keywords, rngs=nnx.Rngs(0))
    for forward in (lambda x: jr.activity({})(own.apply)(variables, x), jr.activity({})(module)):
        with pytest.raises(NotImplementedError, match=r"its kernel needs JAX|must all be bfloat16"):
            forward(X)


def test_an_implementation_that_cannot_run_says_why():
    layer, variables = linen(4, activity_regularizer=jr.L1(0.1), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"its kernel needs JAX|must all be bfloat16"):
        jr.activity({})(layer.apply)(variables, X)


def test_each_microbatch_has_its_share_of_a_parameters_gradient():
    layer, variables = linen()

    def terms(variables, x):
        return jr.activity({})(layer.apply)(variables, x)[1]

    @jax.jit
    def gradients(variables):
        whole = jax.grad(lambda v: terms(v, X)["kernel"])(variables)
        parts = [X[:3], X[3:]]
        constants = [terms(variables, x) for x in parts]
        shares = [
            jax.grad(
                lambda v, i=i: jr.combine(
                    [terms(v, x) if j == i else constants[j] for j, x in enumerate(parts)]
                )["kernel"]
            )(variables)
            for i in range(2)
        ]
        return whole, jax.tree.map(lambda a, b: a + b, *shares), shares[0]

    whole, summed, first = gradients(variables)
    chex.assert_trees_all_close(summed, whole, rtol=1e-6)
    chex.assert_trees_all_close(first, jax.tree.map(lambda g: g / 2, whole), rtol=1e-6)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        over_time = nn.scan(
            Cell,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=5,
            in_axes=nn.broadcast,
        )
        return over_time(name="time")(x, x)[0], None


def test_a_scan_over_time_inside_a_scan_over_layers():
    model = nn.scan(
        Layers,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=4,
        in_axes=nn.broadcast,
    )()
    variables = init(model, X, None)
    _, terms = jax.jit(jr.activity({})(model.apply))(variables, X, None)
    kernel = variables["params"]["time"]["layer"]["kernel"]
    assert kernel.shape == (4, 5, 5)
    np.testing.assert_allclose(terms["time/layer/kernel"], 0.1 * jnp.sum(kernel**2), rtol=1e-6)


def test_layers_stacked_on_another_axis_are_an_error():
    model = nn.scan(
        Cell,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=3,
        in_axes=nn.broadcast,
    )()
    variables = init(model, X, X)
    with pytest.raises(ValueError, match=r'"layer/kernel" .* got shape \(5, 3, 5\), of layers of'):
        jr.activity({})(model.apply)(variables, X, X)


def test_a_tied_kernel_counts_once_and_a_foreign_layer_is_an_error():
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = (
                jr.nnx.Dense(5, 5, kernel_regularizer=jr.L2(0.1), rngs=nnx.Rngs(i)) for i in (0, 1)
            )
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    model = Tied()
    _, terms = jr.activity({})(model)(X)
    np.testing.assert_allclose(terms.total, 0.1 * jnp.sum(model.a.kernel[...] ** 2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"not part of the NNX module .* `jaxreg.kernel`"):
        jr.activity({})(lambda x: model.a(x))(X)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (jr.L1(0.1), True),
        (jr.L2(0.2), True),
        (jr.L2(0.1) + jr.L1(0.1), True),
        (jr.L2(jnp.float32(0.2)), True),
        (jr.L2(jnp.float32(0.1)), False),
    ],
    ids=repr,
)
def test_a_tied_kernel_with_two_penalties_is_an_error(other, differs):
    class Tied(nnx.Module):
        def __init__(self):
            self.a = jr.nnx.Dense(5, 5, kernel_regularizer=jr.L2(0.1), rngs=nnx.Rngs(0))
            self.b = jr.nnx.Dense(5, 5, kernel_regularizer=other, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    message = '"a/kernel" and "b/kernel" are one parameter with two penalties'
    with pytest.raises(ValueError, match=message) if differs else contextlib.nullcontext():
        jr.activity({})(Tied())(X)


def test_a_regularizer_that_is_no_penalty_is_an_error():
    with pytest.raises(TypeError, match=r"nnx.Dense\(kernel_regularizer=...\)` must be a Penalty"):
        jr.nnx.Dense(5, 4, kernel_regularizer=1e-4, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linen.Dense\(kernel_regularizer=...\)` must be a Pen"):
        init(jr.linen.Dense(4, kernel_regularizer="l2"), X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linen.Dense\(activity_regularizer=...\)` must be a Pen"):
        init(jr.linen.Dense(4, activity_regularizer="l2"), X)  # type: ignore[arg-type]
    layer = jr.linen.Dense(4, kernel_regularizer=jr.NonNegative())
    with pytest.raises(TypeError, match="is a constraint"):
        measure(layer, init(layer, X), X)


def test_an_activation_that_is_no_function_is_an_error():
    name: Any = "relu"
    given = {"activation": name, "penalty": jr.L1(0.1), "implementation": "mosaic_gpu"}
    calls: list[Callable[[], Any]] = [
        lambda: init(jr.linen.Dense(4, name), X),
        lambda: jr.nnx.Dense(5, 4, name, rngs=nnx.Rngs(0))(X),
        lambda: jr.ops.dense(X, jnp.ones((5, 4)), **given),
        lambda: jr.ops.mlp(X, jnp.ones((5, 4)), None, jnp.ones((4, 2)), None, **given),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be a function .* `jax.nn.relu`; got 'relu'"):
            call()
    pair: Any = jnp.frexp
    with pytest.raises(ValueError, match=r"of the shape that it is given; got tuple"):
        init(jr.linen.Dense(4, pair), X)


def test_an_mlp_has_layers():
    none: Any
    for none in ((), 5):
        with pytest.raises(ValueError, match="at least one layer"):
            init(jr.linen.MLP(none), X)
    features: Any
    for features in ((), (4,), 5):
        with pytest.raises(ValueError, match="the input and of at least one layer"):
            jr.nnx.MLP(features, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["kernel", "bias", "activity"])
def test_which_regularizer_is_no_penalty_is_said(name):
    given: dict[str, Any] = {f"{name}_regularizer": 0.1}
    with pytest.raises(TypeError, match=rf"linen\.Dense\({name}_regularizer=\.\.\.\)"):
        jr.linen.Dense(2, **given).init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.raises(TypeError, match=rf"nnx\.Dense\({name}_regularizer=\.\.\.\)"):
        jr.nnx.Dense(3, 2, rngs=nnx.Rngs(0), **given)


def test_a_renamed_parameter_is_an_error():
    def rename(**names):
        return lambda tree: {
            kind: {names[name]: leaf for name, leaf in params.items()}
            for kind, params in tree.items()
        }

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.map_variables(
                jr.linen.Dense,
                "params",
                rename(w="kernel"),
                rename(kernel="w"),
                init=self.is_initializing(),
            )
            return lifted(2, use_bias=False, kernel_regularizer=jr.L2(1.0), name="layer")(x)

    x = jnp.ones((1, 3))
    variables = Model().init(jax.random.key(0), x)
    assert list(variables["params"]["layer"]) == ["w"]
    with pytest.raises(ValueError, match='finds no parameter "layer/kernel" to penalize'):
        jr.activity({})(Model().apply)(variables, x)
