"""Penalties of parameter trees."""

import dataclasses
import re
from typing import Any, NamedTuple

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxreg as jr


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(5, 3, name="embed")(ids)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(2, bias_init=nn.initializers.ones, name="dense")(x)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(Net().init)(jax.random.key(0), jnp.zeros(2, jnp.int32))["params"]


def sum_of_squares(*leaves) -> Any:
    return sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves)


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_bare_penalty_means_kernels_and_embeddings(params, wrap):
    value = jr.kernel(jr.L2(0.5))(wrap(params))
    expected = 0.5 * sum_of_squares(params["dense"]["kernel"], params["embed"]["embedding"])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_bare_penalty_wants_the_whole_last_segment():
    tree = {"my_kernel": jnp.ones(1), "kernels": jnp.ones(2), "kernel": jnp.ones(4)}
    assert jr.kernel(jr.L1(1.0))(tree) == 4.0


def test_none_exempts(params):
    value = jr.kernel({"dense/*": None, "**": jr.L2(1.0)})(params)
    leaves = [params["embed"]["embedding"], params["norm"]["bias"], params["norm"]["scale"]]
    np.testing.assert_allclose(value, sum_of_squares(*leaves), rtol=1e-6)


class Weights(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    layers: list[Weights]
    pair: tuple[jax.Array, jax.Array]


def test_paths_of_any_pytree():
    ones = jnp.ones
    model = Model([Weights(ones(1), ones(2)), Weights(ones(4), ones(8))], (ones(16), ones(32)))
    assert jr.kernel({"layers/*/kernel": jr.L1(1.0)})(model) == 5.0
    assert jr.kernel({"layers/1/**": jr.L1(1.0)})(model) == 12.0
    assert jr.kernel({"pair/1": jr.L1(1.0)})(model) == 32.0
    gradient = jr.kernel({"pair/1": jr.L1(1.0)}).gradient(model)
    assert isinstance(gradient, Model)
    np.testing.assert_array_equal(gradient.pair[1], ones(32))
    np.testing.assert_array_equal(gradient.layers[0].bias, [0, 0])


class Tied(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.second = nnx.Linear(2, 2, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def test_nnx_state_counts_a_shared_variable_once():
    model = Tied()
    state = nnx.state(model, nnx.Param)
    expected = sum_of_squares(model.first.kernel[...])
    np.testing.assert_allclose(jr.kernel(jr.L2(1.0))(state), expected, rtol=1e-6)
    np.testing.assert_allclose(jr.kernel({"first/kernel": jr.L2(1.0)})(state), expected, rtol=1e-6)
    gradient = jr.kernel(jr.L2(1.0)).gradient(state)
    assert jax.tree.structure(gradient) == jax.tree.structure(state)  # type: ignore[operator]
    np.testing.assert_allclose(gradient.first.kernel[...], 2 * model.first.kernel[...], rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model}])
def test_nnx_module_itself_would_count_a_shared_variable_twice_and_is_an_error(wrap):
    with pytest.raises(TypeError, match=r"Pass `nnx.state\(model, nnx.Param\)`"):
        jr.kernel(jr.L2(1.0))(wrap(Tied()))


def test_sharding_metadata_adds_nothing_to_paths():
    dense = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    boxed = dense.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert isinstance(boxed["kernel"], nn.Partitioned)
    assert jr.kernel({"kernel": jr.L1(1.0)})(boxed) == 6.0
    assert jr.kernel(jr.L1(1.0))(boxed) == 6.0
    assert "/value" not in jr.kernel(jr.L1(1.0)).describe(boxed)
    gradient = jr.kernel(jr.L1(1.0)).gradient(boxed)
    assert isinstance(gradient["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(gradient["kernel"].value, jnp.ones((3, 2)))


def test_float64_leaves_are_added_up_in_float64():
    with jax.enable_x64():
        value = jr.kernel({"**": jr.L1(1.0)})({"a": jnp.ones(1) / 3, "b": jnp.float32(1)})
        assert value.dtype == jnp.float64
        assert value == 1 + 1 / 3
        for tree in ({}, {"a": jnp.ones(1, jnp.float32)}):
            assert jr.kernel({"**": jr.L1(1.0)})(tree).dtype == jnp.float32


UNPENALIZED = {
    "int": (jnp.arange(3), "of dtype int32"),
    "bool": (jnp.ones(2, bool), "of dtype bool"),
    "key": (jax.random.key(0), "of dtype key<"),
    "none": (None, "a NoneType"),
    "masked": (optax.MaskedNode(), "a MaskedNode"),
}


def tree_with(leaf):
    return {"layer": {"kernel": jnp.full(2, 3.0), "other": leaf}}


@pytest.mark.parametrize("leaf", [leaf for leaf, _ in UNPENALIZED.values()], ids=UNPENALIZED)
def test_wildcard_skips_what_is_no_parameter(leaf):
    kernel = jr.kernel({"**": jr.L1(1.0)})
    tree = tree_with(leaf)
    assert kernel(tree) == 6.0
    gradient = kernel.gradient(tree)
    assert jax.tree.structure(gradient) == jax.tree.structure(tree)  # type: ignore[operator]
    np.testing.assert_array_equal(gradient["layer"]["kernel"], [1.0, 1.0])
    shrunk = kernel.prox(tree, 1.0)
    np.testing.assert_array_equal(shrunk["layer"]["kernel"], [2.0, 2.0])
    assert shrunk["layer"]["other"] is leaf


@pytest.mark.parametrize("leaf", [leaf for leaf, _ in UNPENALIZED.values()], ids=UNPENALIZED)
def test_describe_shows_what_is_no_parameter_as_exempt(leaf):
    table = jr.kernel({"**": jr.L1(1.0)}).describe(tree_with(leaf))
    assert re.search(r"^layer/other .* exempt +-$", table, re.MULTILINE)


def test_rules_that_are_not_strict_may_spell_out_what_is_masked_but_nothing_else():
    kernel = jr.kernel({"layer/kernel": jr.L1(1.0), "layer/other": jr.L1(1.0)}, strict=False)
    assert kernel(tree_with(optax.MaskedNode())) == 6.0
    with pytest.raises(TypeError, match="this leaf is of dtype int32"):
        kernel(tree_with(jnp.arange(3)))


def test_parts_of_a_partition_share_rules_that_are_not_strict():
    kernel = jr.kernel({"a/kernel": jr.L1(1.0), "b/kernel": jr.L1(2.0)}, strict=False)
    parts = {name: jr.apply_prox(kernel, step) for name, step in (("x", 0.1), ("y", 0.2))}
    tx = optax.partition(parts, {"a": {"kernel": "x"}, "b": {"kernel": "y"}})
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.4, rtol=1e-6)


@pytest.mark.parametrize(("leaf", "kind"), UNPENALIZED.values(), ids=UNPENALIZED)
def test_spelling_out_what_is_no_parameter_is_an_error(leaf, kind):
    message = (
        '`jaxreg.kernel` cannot penalize "layer/other": it takes floating-point arrays, and this'
        f" leaf is {kind}"
    )
    kernel = jr.kernel({"layer/other": jr.L1(1.0), "**": jr.L1(1.0)})
    with pytest.raises(TypeError, match=re.escape(message)):
        kernel(tree_with(leaf))


def test_spelling_it_out_to_exempt_it_is_fine():
    kernel = jr.kernel({"layer/other": None, "**": jr.L1(1.0)})
    assert kernel(tree_with(jnp.arange(3))) == 6.0


def test_wildcard_that_only_finds_integers_wins_nothing():
    message = 'it matches "layer/other", which is not a floating-point array, or is masked.'
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.kernel({"**/other": jr.L1(1.0)})(tree_with(jnp.arange(3)))


def test_python_float_counts_the_same_with_and_without_jit():
    kernel = jr.kernel({"**": jr.L1(1.0)})
    tree = {"weight": jnp.ones(2), "gain": 3.0}
    assert kernel(tree) == jax.jit(kernel)(tree)


def test_axis_error_names_leaf_and_shape():
    kernel = jr.kernel({"**": jr.GroupLasso(1.0, axis=3)})
    message = (
        "`jaxreg.GroupLasso(axis=...)` must name an axis of the array, or several different ones;"
        ' got axis=3 for "head/kernel" of shape (64, 10).'
    )
    tree = {"head": {"kernel": jnp.ones((64, 10))}}
    for call in (kernel, kernel.gradient, kernel.describe, lambda p: kernel.prox(p, 0.1)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(tree)


def test_complex_leaf_error_names_leaf():
    kernel = jr.kernel({"**": jr.KLSparsity(1.0, target=0.1)})
    message = '`jaxreg.KLSparsity` takes a real array; got dtype complex64 for "a/b" of shape (2,)'
    with pytest.raises(TypeError, match=re.escape(message)):
        kernel({"a": {"b": jnp.ones(2, jnp.complex64)}})


@pytest.mark.parametrize("tree", [{}, {"a": {}}, (), None], ids=str)
def test_empty_tree_is_zero(tree):
    kernel = jr.kernel(jr.L1(1.0), strict=tree is not None)
    value = kernel(tree)
    assert value == 0.0
    assert value.dtype == jnp.float32
    assert kernel.gradient(tree) == tree


RULES = {
    "norm/*": None,
    "embed/*": jr.GroupLasso(0.1),
    "**/bias": jr.L1(0.2),
    "**/kernel": jr.L2(0.3) + jr.L1(0.4),
}


def test_gradient_is_that_of_jax_grad(params):
    kernel = jr.kernel(RULES)
    mixed = {**params, "dense": jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["dense"])}
    gradient, expected = jax.jit(lambda k, p: (k.gradient(p), jax.grad(k)(p)))(kernel, mixed)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, mixed)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient["norm"]["scale"], jnp.zeros(3))
    assert np.all(np.asarray(gradient["dense"]["bias"], np.float32) != 0)


def test_prox_moves_penalized_leaves_and_nothing_else(params):
    kernel = jr.kernel({"dense/kernel": jr.L1(1.0), "embed/*": jr.L2(1.0)})
    moved = kernel.prox(params, 0.25)
    expected = jr.L1(1.0).prox(params["dense"]["kernel"], 0.25)
    np.testing.assert_array_equal(moved["dense"]["kernel"], expected)
    np.testing.assert_allclose(
        moved["embed"]["embedding"], params["embed"]["embedding"] / 1.5, rtol=1e-6
    )
    assert moved["norm"]["scale"] is params["norm"]["scale"]
    assert moved["dense"]["bias"] is params["dense"]["bias"]


def test_prox_without_a_closed_form_is_an_error(params):
    kernel = jr.kernel({"**/kernel": jr.KLSparsity(1.0, target=0.1)})
    with pytest.raises(NotImplementedError, match=r"`jaxreg\.KLSparsity` has no closed-form"):
        kernel.prox(params, 0.1)


def test_map_takes_other_leaves_from_the_exempt_tree(params):
    kernel = jr.kernel({"dense/kernel": jr.L2(0.5)})
    other = jax.tree.map(jnp.ones_like, params)
    seen = []

    def function(penalty, leaf, one):
        seen.append((penalty, leaf.shape, one.shape))
        return leaf - one

    mapped = kernel.map(function, params, other, exempt=other)
    assert seen == [(jr.L2(0.5), (3, 2), (3, 2))]
    assert mapped["norm"]["bias"] is other["norm"]["bias"]
    np.testing.assert_array_equal(mapped["dense"]["kernel"], params["dense"]["kernel"] - 1)


def test_describe_shows_every_leaf_and_the_total(params):
    kernel = jr.kernel(RULES)
    header, *rows, total = [re.split(r"\s{2,}", row) for row in kernel.describe(params).split("\n")]
    assert header == ["leaf", "shape", "rule", "penalty", "value"]
    table = {path: (shape, rule, penalty) for path, shape, rule, penalty, _ in rows}
    assert table == {
        "dense/bias": ("(2,)", '"**/bias"', repr(RULES["**/bias"])),
        "dense/kernel": ("(3, 2)", '"**/kernel"', repr(RULES["**/kernel"])),
        "embed/embedding": ("(5, 3)", '"embed/*"', repr(RULES["embed/*"])),
        "norm/bias": ("(3,)", '"norm/*"', "exempt"),
        "norm/scale": ("(3,)", '"norm/*"', "exempt"),
    }
    values = [float(value) for *_, value in rows if value != "-"]
    np.testing.assert_allclose(sum(values), kernel(params), rtol=1e-5)
    assert total[0] == "total"
    np.testing.assert_allclose(float(total[1]), kernel(params), rtol=1e-5)


def test_describe_marks_leaves_without_a_rule():
    table = jr.kernel({"a": jr.L1(1.0)}).describe({"a": jnp.ones(2), "b": jnp.ones(2)})
    assert re.search(r"^b +\(2,\) +- +exempt +-$", table, re.MULTILINE)


def test_describe_takes_shapes_alone(params):
    shapes = jax.eval_shape(lambda: params)
    given, abstract = (jr.kernel(RULES).describe(tree).split("\n") for tree in (params, shapes))
    cells = [[re.split(r"\s{2,}", row) for row in table] for table in (given, abstract)]
    assert [row[:4] for row in cells[0][:-1]] == [row[:4] for row in cells[1][:-1]]
    assert {row[-1] for row in cells[1][1:]} == {"-"}
    matrix = {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(ValueError, match=r'takes a matrix, .* got "kernel" of shape \(3,\)'):
        jr.kernel(jr.Nuclear(1.0)).describe(matrix)


def test_describe_has_no_total_where_one_leaf_is_a_shape():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    table = jr.kernel({"**": jr.L1(1.0)}).describe({"a": shape, "b": jnp.ones(2)}).split("\n")
    assert [line.split()[-1] for line in table[1:]] == ["-", "2", "-"]


def test_columns_of_describe_line_up(params):
    lines = jr.kernel(RULES).describe(params).split("\n")
    column = lines[0].index("value")
    assert all(re.search(r"\s{2}$", line[:column]) for line in lines)
    assert all(line[column] != " " for line in lines)


def test_kernel_is_a_pytree_of_strengths_that_does_not_retrace(params):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def penalty(kernel, params):
        return kernel(params)

    assert jax.tree.leaves(jr.kernel(RULES)) == [0.1, 0.2, 0.3, 0.4]
    for factor in (1.0, 2.0):
        kernel = jax.tree.map(lambda s, factor=factor: s * factor, jr.kernel(RULES))
        expected = factor * jr.kernel(RULES)(params)
        np.testing.assert_allclose(penalty(kernel, params), expected, rtol=1e-6)
    # Rebuilt in every step, with a regular expression too.
    for strength in (0.5, 1.0):
        rules: Any = {re.compile(".*kernel"): jr.L1(strength)}
        rebuilt = jr.kernel(rules)
        chex.clear_trace_counter()
        np.testing.assert_allclose(penalty(rebuilt, params), rebuilt(params), rtol=1e-6)


def test_strength_can_be_differentiated_and_scheduled_inside_a_step(params):
    def penalty(strength):
        return jr.kernel(jr.L2(strength))(params)

    slope = jax.jit(jax.grad(penalty))(0.1)
    np.testing.assert_allclose(slope, jr.kernel(jr.L2(1.0))(params), rtol=1e-6)


def test_sharded_parameters_give_what_one_device_gives():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    weights = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    kernel = jr.kernel({"rows": jr.GroupLasso(0.3), "columns": jr.L1(0.2) + jr.L2(0.1)})
    tree = {"rows": weights, "columns": weights}
    sharded = {
        "rows": jax.device_put(weights, NamedSharding(mesh, PartitionSpec("data"))),
        "columns": jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "data"))),
    }
    assert len(sharded["rows"].sharding.device_set) == 8
    both = jax.jit(lambda p: (kernel(p), kernel.gradient(p)))
    chex.assert_trees_all_close(both(sharded), both(tree), rtol=1e-5)
    np.testing.assert_allclose(both(sharded)[0], kernel(tree), rtol=1e-5)


def test_gradient_does_not_compute_the_value():
    weights = {"kernel": jnp.ones((8, 8))}
    kernel = jr.kernel(jr.L1(0.1) + jr.L2(0.1))
    value, gradient = (
        str(jax.jit(f).lower(weights).compile().as_text()) for f in (kernel, kernel.gradient)
    )
    assert " reduce(" in value
    assert " reduce(" not in gradient


def test_gradient_leaves_alone_what_is_no_array():
    tree = {"kernel": jnp.array([2.0]), "activation": jnp.tanh, "steps": jnp.arange(2)}
    gradient = jr.kernel(jr.L2(1.0)).gradient(tree)
    assert gradient["activation"] is jnp.tanh
    np.testing.assert_array_equal(gradient["kernel"], [4.0])
    np.testing.assert_array_equal(gradient["steps"], [0, 0])


def test_a_name_with_brackets_can_be_spelt_out():
    assert jr.kernel({"a[0]": jr.L1(1.0)})({"a[0]": jnp.ones(2), "b": jnp.ones(3)}) == 2.0


def test_a_bare_array_is_the_top():
    assert jr.kernel({".": jr.L1(1.0)})(jnp.ones(3)) == 3.0


@pytest.mark.parametrize("rules", [0.1, None, [("**", jr.L1(1.0))]], ids=["float", "none", "list"])
def test_rules_that_are_no_mapping_are_an_error(rules):
    with pytest.raises(TypeError, match=r"`jaxreg\.kernel` takes a mapping from patterns"):
        jr.kernel(rules)


PRETRAINED: Any = {
    "a": {"kernel": np.array([[1.0, 2.0]], np.float32), "bias": np.array([5.0], np.float32)},
    "b": {"kernel": np.array([3.0], np.float32)},
}
TUNED: Any = jax.tree.map(lambda x: x + 2, PRETRAINED)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        flax.core.freeze,
        lambda tree: jax.tree.map(nn.Partitioned, tree, jax.tree.map(lambda _: (None,), tree)),
    ],
    ids=["dict", "FrozenDict", "boxed"],
)
def test_each_leaf_takes_its_reference_from_a_tree(wrap):
    fisher = jax.tree.map(lambda x: x * 10, PRETRAINED)
    penalty = jr.L2To(0.5, reference=wrap(PRETRAINED), weight=fisher) + jr.L2(1.0)
    kernel = jr.kernel({"**/kernel": penalty})
    expected = 0.5 * 4 * (10 + 20 + 30) + 9 + 16 + 25
    value, gradient = jax.jit(lambda k, p: (k(p), k.gradient(p)))(kernel, TUNED)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient["b"]["kernel"], [2 * 30 + 2 * 5])
    np.testing.assert_array_equal(gradient["a"]["bias"], [0])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: {"w": nn.Partitioned({"a": a, "b": b}, (None,))},
        lambda a, b: nnx.State({"w": nnx.Param((a, b))}),
        lambda a, b: {"w/a": a, "w": {"a": b}},
    ],
    ids=["boxed", "Variable", "slash"],
)
def test_leaves_of_one_path_each_take_their_own_reference(wrap):
    kernel = jr.kernel({"**": jr.L2To(1.0, reference=wrap(np.ones(2), 5 * np.ones(2)))})
    assert kernel(wrap(np.full(2, 2.0), np.full(2, 8.0))) == 2 * 1 + 2 * 9
    one = jr.kernel({"**": jr.L2To(1.0, reference={"w": np.ones(2), "w/a": np.ones(2)})})
    with pytest.raises(ValueError, match=r'leaf "w(/a)?" needs an array there'):
        one(wrap(np.ones(2), np.ones(2)))


def test_one_reference_array_serves_every_leaf():
    kernel = jr.kernel({"**/kernel": jr.L2To(1.0, reference=1.0)})
    assert kernel(TUNED) == 4 + 9 + 16


def test_prox_with_a_reference_from_a_tree():
    kernel = jr.kernel({"**/kernel": jr.L2To(0.5, reference=PRETRAINED)})
    moved = kernel.prox(TUNED, 1.0)
    np.testing.assert_allclose(moved["a"]["kernel"], PRETRAINED["a"]["kernel"] + 1)
    np.testing.assert_array_equal(moved["a"]["bias"], TUNED["a"]["bias"])


def test_reference_of_nnx_state():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    kernel = jr.kernel({"kernel": jr.L2To(1.0, reference=state)})
    assert kernel(state) == 0
    moved = jax.tree.map(lambda x: x + 1, state)
    np.testing.assert_allclose(kernel(moved), 6, rtol=1e-6)


def test_references_stay_where_they_are_when_the_model_moves():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state, dicts = nnx.state(model, nnx.Param), {"kernel": jnp.zeros((2, 3))}
    of_state = jr.kernel({"kernel": jr.L2To(1.0, reference=state, weight=state)})
    of_variable = jr.kernel({"kernel": jr.L2To(1.0, reference=model.kernel)})
    of_dict = jr.kernel({"kernel": jr.L2To(1.0, reference=dicts)})
    start = model.kernel[...]
    model.kernel[...] += 1.0
    dicts["kernel"] = jnp.ones((2, 3))
    moved = nnx.state(model, nnx.Param)
    np.testing.assert_allclose(of_state(moved), jnp.sum(start), rtol=1e-5)
    np.testing.assert_allclose(of_variable(moved), 6, rtol=1e-6)
    assert of_dict({"kernel": jnp.ones((2, 3))}) == 6


def test_leaf_that_the_tree_of_references_lacks_is_an_error():
    kernel = jr.kernel({"**/kernel": jr.L2To(1.0, reference={"a": PRETRAINED["a"]})})
    with pytest.raises(ValueError, match=r"leaf \"b/kernel\" needs an array there.*'a/bias', 'a/k"):
        kernel(TUNED)


def test_reference_of_another_shape_is_an_error_that_names_the_leaf():
    reference = jax.tree.map(lambda x: np.zeros((*x.shape, 7)), PRETRAINED)
    kernel = jr.kernel({"a/kernel": jr.L2To(1.0, reference=reference)})
    message = r'must broadcast to the array; got shape \(1, 2, 7\) for "a/kernel" of shape \(1, 2\)'
    with pytest.raises(ValueError, match=message):
        kernel(TUNED)


def test_tree_of_references_without_a_kernel_is_an_error():
    with pytest.raises(TypeError, match=r"`jaxreg.L2To\(weight=...\)` is a tree: only `jaxreg.ker"):
        jr.L2To(1.0, reference=0.0, weight=PRETRAINED)(jnp.ones(2))


def test_describe_shows_shapes_of_references_and_no_value_of_constraints():
    rules = {"a/kernel": jr.L2To(0.5, reference=PRETRAINED), "b/kernel": jr.NonNegative()}
    lines = jr.kernel(rules).describe(TUNED).split("\n")
    assert "L2To(strength=0.5, reference=array(1, 2), weight=None)  4" in lines[2]
    assert re.search(r"NonNegative\(\) +-$", lines[3])
    assert lines[-1].split() == ["total", "4"]


def test_constraint_in_a_loss_is_an_error():
    with pytest.raises(
        TypeError, match=r"`jaxreg.NonNegative` is a constraint: .* `jaxreg.project\("
    ):
        jr.kernel({"b/kernel": jr.NonNegative()})(TUNED)


def test_leaves_of_one_path_are_added_up():
    params = {"a/kernel": jnp.ones(2), "a": {"kernel": jnp.ones(3)}}
    kernel = jr.kernel(jr.L1(1.0))
    assert kernel(params) == 5
    assert kernel.values(params) == {"a/kernel": 5}


def test_gradient_of_exempt_numbers_is_zero_without_jit_too():
    gradient = jr.kernel({"w": jr.L1(1.0)}).gradient({"w": jnp.ones(2), "gain": 3.0})
    assert gradient["gain"] == 0


def test_leaves_of_one_shape_and_other_shardings_have_no_more_than_scalars_to_exchange():
    mesh = Mesh(np.array(jax.devices()), ("model",))
    rows, columns = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("model",), (None, "model"))
    )
    ones = np.ones((16, 16), np.float32)
    params = {
        "q": {"kernel": jax.device_put(ones, rows)},
        "o": {"kernel": jax.device_put(ones, columns)},
    }
    compiled = jax.jit(jr.kernel(jr.L2(1.0) + jr.L1(1.0))).lower(params).compile()
    assert compiled(params) == 2 * 2 * 256
    text = str(compiled.as_text())
    assert "all-reduce" in text
    assert not re.search(r"all-to-all|all-gather|collective-permute", text)


@pytest.mark.parametrize(
    "penalty",
    [jr.L2(0.5), jr.L1L2(0.5, 0.25), jr.L1(0.5) + jr.L2(0.25), jr.Huber(0.5, delta=0.3)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_small_leaves_of_one_type_are_added_up_before_they_are_summed(penalty):
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 8)] * 5 + [(8,)] * 2 + [(3, 4)]
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    params += [leaf.astype(jnp.bfloat16) for leaf in params]
    both = jax.jit(
        jax.value_and_grad(lambda penalty, params: jr.kernel({"**": penalty})(params), 1)
    )
    value, gradient = both(penalty, params)
    np.testing.assert_allclose(value, sum(penalty(leaf) for leaf in params), rtol=1e-6)
    for ours, leaf in zip(gradient, params, strict=True):
        assert ours.dtype == leaf.dtype
        np.testing.assert_allclose(ours, penalty.gradient(leaf), rtol=1e-6)


def test_many_small_leaves_end_in_one_sum_and_large_ones_each_in_their_own():
    def sums_to_a_scalar(shape, count=20):
        params = {
            str(i): {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for i in range(count)
        }
        text = jax.jit(jr.kernel(jr.L2(1.0))).lower(params).as_text()
        return len(re.findall(r"reduce.*-> tensor<f32>", text))

    assert sums_to_a_scalar((16, 16)) == 1
    assert sums_to_a_scalar((1024, 1025)) == 20
    assert sums_to_a_scalar((16, 4)) == 20


def test_each_leaf_keeps_its_own_reference_when_others_are_alike():
    params = {"a": jnp.zeros((2, 8)), "b": jnp.zeros((2, 8))}
    references = {"a": jnp.ones((2, 8)), "b": 2 * jnp.ones((2, 8))}
    assert jr.kernel({"*": jr.L2To(1.0, reference=references)})(params) == 16 + 64


def test_leaves_of_one_shape_and_other_shardings_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(np.full((8, 16), 2, np.float32), PartitionSpec(*axes))
            for name, axes in {"q": ("model",), "o": (None, "model"), "k": ("model",)}.items()
        }
        kernel = jr.kernel({"*": jr.L2(1.0)})
        value, gradient = jax.jit(jax.value_and_grad(kernel))(params)
        assert value == 3 * 128 * 4
        for name, leaf in params.items():
            assert jax.typeof(gradient[name]) == jax.typeof(leaf)
            np.testing.assert_array_equal(gradient[name], np.full((8, 16), 4))


def test_a_penalty_of_ones_own_declares_its_fields():
    class Power(jr.penalties.Separable):
        _: dataclasses.KW_ONLY
        order: int = jr.penalties.static(default=2)
        unit: Any = jr.penalties.array(default=None)

        def phi(self, x):
            return (x * self.unit) ** self.order

    params = {"a": jnp.full(2, 2.0), "b": jnp.full(2, 3.0)}
    kernel = jr.kernel({"*": Power(0.5, order=3, unit={"a": jnp.ones(2), "b": jnp.zeros(2)})})
    assert kernel(params) == 0.5 * 2 * 8
    assert len(jax.tree.leaves(kernel)) == 3


def test_a_penalty_of_ones_own_may_hold_an_array():
    class To(jr.penalties.Separable):
        _: dataclasses.KW_ONLY
        reference: Any

        def phi(self, x):
            return jnp.square(x - self.reference)

    penalty = To(1.0, reference=jnp.arange(32.0).reshape(4, 8))
    params = {"a": jnp.zeros((4, 8)), "b": jnp.zeros((4, 8))}
    assert jr.kernel({"*": penalty})(params) == 2 * penalty(params["a"])


def test_a_sum_with_a_penalty_of_groups_is_no_sum_of_rows():
    params = {
        name: jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
        for name in "ab"
    }
    penalty = jr.L1(0.5) + jr.GroupLasso(0.25)
    found = jr.kernel({"*": penalty})(params)
    np.testing.assert_allclose(found, sum(map(penalty, params.values())), rtol=1e-6)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()], ids=["none", "masked"])
def test_a_tree_of_references_may_lack_what_is_not_penalized(absent):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    reference = {"a": absent, "b": jnp.zeros(3)}
    assert jr.kernel({"b": jr.L2To(1.0, reference=reference)})(params) == 3
    with pytest.raises(ValueError, match=r'leaf "a" needs an array there in the tree'):
        jr.kernel({"*": jr.L2To(1.0, reference=reference)})(params)
