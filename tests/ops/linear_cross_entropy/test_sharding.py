"""Tokens and words over eight devices: the same numbers, and nothing large moved."""

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxreg as jr

BATCH, LENGTH, FEATURES, WORDS = 8, 6, 5, 48
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, WORDS, (BATCH, LENGTH))
LABELS[0] = -100  # so that one device's mean is not the mean
ARRAYS = (
    RNG.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32),
    RNG.normal(size=(FEATURES, WORDS)).astype(np.float32),
    RNG.normal(size=WORDS).astype(np.float32),
    LABELS,
)
OPTIONS: dict[str, Any] = {"z_loss": 0.1, "label_smoothing": 0.1, "soft_cap": 5.0, "chunk": 8}

COLLECTIVE = (
    r"= (\(.*?\)|\S+)"
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)

# The mesh axes of tokens and of words.
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "tokens": ("data", None),
    "words": (None, "model"),
    "both": ("data", "model"),
}
WHOLE: list[Any] = [P()]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def result_of(hidden, weight, bias, labels, **options):
    return jr.ops.linear_cross_entropy(hidden, weight, labels, bias=bias, **OPTIONS | options)


def differentiate(function):
    """Return a function that gives the total's gradient, and the whole result."""

    def value(hidden, weight, bias, labels):
        result = function(hidden, weight, bias, labels)
        return result.total, result

    return jax.value_and_grad(value, (0, 1, 2), has_aux=True)


@pytest.fixture(scope="module")
def expected():
    return jax.jit(differentiate(result_of))(*ARRAYS)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def specs_of(layout):
    tokens, words = LAYOUTS[layout]
    return P(tokens), P(None, words), P(words), P(tokens)


def run(function, mesh, specs):
    """Return what the compiled function gives, and its text."""
    arrays = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(ARRAYS, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*arrays).compile()
        return program(*arrays), re.sub(r"/\*.*?\*/", "", program.as_text() or "")


def assert_same(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # Relative to the largest entry: small ones are sums of larger ones that cancel.
        largest = np.max(np.abs(b), initial=0)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=4e-6 * largest)


def collectives(text) -> list[tuple[str, str, bool]]:
    """Return each one's kind, the shapes of its result, and whether it is in a loop."""
    found = []
    for computation in text.split("\n\n"):
        in_loop = not computation.lstrip().startswith("ENTRY")
        for shape, kind in re.findall(COLLECTIVE, computation):
            found.append((kind, shape, in_loop))
    return found


def sizes(shape):
    return [
        int(np.prod([int(n) for n in s.split(",") if n]))
        for s in re.findall(r"\[([\d,]*)\]", shape)
    ]


def assert_nothing_large_moves(text, layout):
    """Only sums: of statistics of tokens in the loop, and of gradients."""
    tokens, words = LAYOUTS[layout]
    found = collectives(text)
    assert {kind for kind, *_ in found} == {"all-reduce"}
    in_loop = [size for _, shape, in_loop in found if in_loop for size in sizes(shape)]
    assert all(size <= OPTIONS["chunk"] for size in in_loop), in_loop
    assert bool(in_loop) == (words is not None)
    block = FEATURES * WORDS // (2 if words else 1)
    outside = [size for _, shape, in_loop in found if not in_loop for size in sizes(shape)]
    assert outside.count(block) == (1 if tokens else 0)


@each_layout
def test_under_jit_with_shardings_that_the_types_do_not_say(layout, expected):
    found, text = run(differentiate(result_of), mesh_of(AxisType.Auto), specs_of(layout))
    assert_same(found, expected)
    # XLA sums the weight's gradient in each step of the loop; it gathers neither it nor logits.
    assert {kind for kind, *_ in collectives(text)} == {"all-reduce"}


@each_layout
def test_under_jit_with_shardings_that_the_types_say(layout, expected):
    found, text = run(differentiate(result_of), mesh_of(AxisType.Explicit), specs_of(layout))
    assert_same(found, expected)
    assert_nothing_large_moves(text, layout)


def shard_mapped(mesh, layout, **options):
    tokens, words = LAYOUTS[layout]
    out = jr.ops.LinearCrossEntropy(*WHOLE * 3, *[P(tokens)] * 2, *WHOLE * 2)

    def local(*arrays):
        return result_of(*arrays, batch_axis_name=tokens, vocab_axis_name=words)

    return jax.shard_map(local, mesh=mesh, in_specs=specs_of(layout), out_specs=out, **options)


@each_layout
def test_the_gradient_of_a_shard_map(layout, expected):
    mesh = mesh_of(AxisType.Auto)
    found, text = run(differentiate(shard_mapped(mesh, layout)), mesh, specs_of(layout))
    assert_same(found, expected)
    assert_nothing_large_moves(text, layout)


def test_the_gradient_of_a_shard_map_that_does_not_check_types(expected):
    mesh = mesh_of(AxisType.Auto)
    function = differentiate(shard_mapped(mesh, "both", check_vma=False))
    assert_same(run(function, mesh, specs_of("both"))[0], expected)


def test_the_gradient_inside_of_a_shard_map(expected):
    mesh, specs = mesh_of(AxisType.Auto), specs_of("both")
    out = jr.ops.LinearCrossEntropy(*WHOLE * 3, *[P("data")] * 2, *WHOLE * 2)
    inside = differentiate(
        lambda *arrays: result_of(*arrays, batch_axis_name="data", vocab_axis_name="model")
    )
    outputs = (P(), out), specs[:3]
    function = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=outputs)
    found, text = run(function, mesh, specs)
    assert_same(found, expected)
    assert_nothing_large_moves(text, "both")


@pytest.mark.parametrize("named", ["data", "model"])
def test_the_axes_of_a_shard_map_whose_other_axes_are_explicit(named, expected):
    def of(axis):
        return axis if axis == named else None

    def local(*arrays):
        return result_of(*arrays, batch_axis_name=of("data"), vocab_axis_name=of("model"))

    mesh, specs = mesh_of(AxisType.Explicit), specs_of("both")
    own = P(of("data")), P(None, of("model")), P(of("model")), P(of("data"))
    out = jr.ops.LinearCrossEntropy(*WHOLE * 3, *[own[3]] * 2, *WHOLE * 2)
    function = jax.shard_map(
        differentiate(local), axis_names={named}, in_specs=own, out_specs=((P(), out), own[:3])
    )
    assert_same(run(function, mesh, specs)[0], expected)


def test_the_largest_word_of_a_device_without_the_label_is_not_the_labels():
    @jax.jit
    @partial(jax.shard_map, mesh=mesh_of(AxisType.Auto), in_specs=P("model"), out_specs=P())
    def correct(bias):
        hidden, weight = jnp.zeros((4, 1)), jnp.zeros((1, 2))
        return jr.ops.linear_cross_entropy(
            hidden, weight, jnp.arange(4), bias=bias, vocab_axis_name="model"
        ).correct

    np.testing.assert_array_equal([correct(bias) for bias in np.eye(4)], np.eye(4, dtype=bool))


def test_second_derivatives_over_tokens_and_words():
    def along(function):
        def curvature(hidden, *others):
            slope = jax.grad(lambda h: function(h, *others).total)
            return jax.jvp(slope, (hidden,), (jnp.cos(hidden),))[1]

        return curvature

    mesh = mesh_of(AxisType.Auto)
    found, _ = run(along(shard_mapped(mesh, "both")), mesh, specs_of("both"))
    assert_same(found, jax.jit(along(result_of))(*ARRAYS))


def test_the_cotangent_of_each_token_over_tokens_and_words():
    def sines(hidden, weight, bias, labels):
        result = result_of(hidden, weight, bias, labels, reduction="none")
        return jnp.sum(jnp.sin(result.total)) + jnp.sum(jnp.cos(result.lse))

    slopes = jax.grad(sines, (0, 1, 2))
    found, text = run(slopes, mesh_of(AxisType.Explicit), specs_of("both"))
    assert_same(found, jax.jit(slopes)(*ARRAYS))
    assert_nothing_large_moves(text, "both")


def test_a_weight_with_sharded_features_is_gathered_as_fsdp_does(expected):
    mesh = mesh_of(AxisType.Explicit)
    features = FEATURES + 3  # a multiple of the devices

    def padded(hidden, weight, bias, labels):
        wide = jnp.pad(hidden, ((0, 0), (0, 0), (0, 3)))
        tall = jax.reshard(jnp.pad(weight, ((0, 3), (0, 0))), NamedSharding(mesh, P("data", None)))
        assert tall.shape[0] == features
        return result_of(wide, tall, bias, labels)

    found, _ = run(differentiate(padded), mesh, specs_of("tokens"))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("tokens", "words", "gathered"),
    [
        (P("data", "model"), None, False),  # the sequence too
        (P(("data", "model")), None, False),
        (P("data"), "data", True),  # words along the tokens' axis: FSDP
        (P("data"), ("model",), False),
    ],
)
def test_other_ways_to_lay_out_tokens_and_words(tokens, words, gathered, expected):
    specs = tokens, P(None, words), P(words), P("data")
    found, text = run(result_of, mesh_of(AxisType.Explicit), specs)
    assert_same(found, expected[0][1])
    kinds = {kind for kind, *_ in collectives(text)}
    assert ("all-gather" in kinds) == gathered


@pytest.mark.parametrize("alone", [2, 3], ids=["bias", "labels"])
def test_the_type_of_one_small_array_is_enough(alone, expected):
    specs = [spec if i == alone else P() for i, spec in enumerate(specs_of("both"))]
    found, _ = run(differentiate(result_of), mesh_of(AxisType.Explicit), specs)
    assert_same(found, expected)


def test_labels_out_of_range_on_any_device_make_nan():
    mesh = mesh_of(AxisType.Auto)
    function = jax.jit(shard_mapped(mesh, "both"))
    for wrong in (WORDS, -1):
        labels = LABELS.copy()
        labels[-1, -1] = wrong
        assert np.isnan(function(*ARRAYS[:3], labels).total)


def test_the_type_of_the_labels_alone_is_enough_outside_of_a_mesh():
    explicit = (AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=explicit)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    labels = jax.device_put(jnp.zeros(8, jnp.int32), sharding)
    loss = jax.jit(lambda *arrays: jr.ops.linear_cross_entropy(*arrays).loss)
    np.testing.assert_allclose(loss(jnp.ones((8, 3)), jnp.ones((3, 5)), labels), np.log(5))


def test_explicit_axes_without_a_bias():
    explicit = (AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("words",), axis_types=explicit)
    with jax.set_mesh(mesh):
        weight = jax.device_put(jnp.ones((3, 8)), jax.sharding.PartitionSpec(None, "words"))
        loss = jr.ops.linear_cross_entropy(jnp.ones((2, 3)), weight, jnp.zeros(2, int)).loss
        np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)
