"""Eight devices, partitioned by `jit`: one device's values, and only sums to exchange."""

from collections import Counter
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxreg as jr

from ._programs import Exchange, assert_all_close, exchanges, put

RNG = np.random.default_rng(0)
BATCH, TIME, FEATURES = 8, 16, 64
CODES = RNG.uniform(0.1, 0.9, (BATCH, TIME, FEATURES)) * np.linspace(0.2, 1.0, FEATURES)
CODES = CODES.astype(np.float32)
MASK = RNG.uniform(size=(BATCH, TIME)) < 0.7

ACTIVITY: dict[str, Any] = {
    "L1": jr.L1(0.5) + jr.L2(0.1),
    "GroupLasso-columns": jr.GroupLasso(0.5),
    "HoyerSquare-rows": jr.HoyerSquare(0.5, axis=-1),
    "KLSparsity": jr.KLSparsity(0.5, target=0.2),
    "VarianceHinge": jr.VarianceHinge(0.5),
    "LabelEntropy": jr.LabelEntropy(0.5),
    "RouterZLoss": jr.RouterZLoss(0.5),
    "TopKLoadBalance": jr.TopKLoadBalance(0.5, k=2),
    "Cosine": jr.Cosine(0.5, reference=CODES[0, 0]),
}
OVER_TIME: dict[str, Any] = {
    "TemporalDifference": jr.TemporalDifference(0.5),
    "TotalVariation": jr.TotalVariation(0.5, axis=1),
}


@jax.jit
def of_activations(x: jax.Array, mask: jax.Array) -> Any:
    """Return each penalty's value and gradient; masked for those of sequences, which are more."""

    def both(penalty: jr.Penalty, mask: jax.Array | None) -> Any:
        return jax.value_and_grad(
            lambda x: jr.penalize(x, penalty, reduction="token_mean", mask=mask)
        )(x)

    return {
        **{name: both(penalty, mask) for name, penalty in ACTIVITY.items()},
        **{name: both(penalty, None) for name, penalty in OVER_TIME.items()},
    }


@pytest.fixture(scope="module")
def on_one_device():
    return of_activations(CODES, MASK)


@pytest.mark.parametrize(
    "axes",
    [("data",), (None, "model"), ("data", None, "model")],
    ids=["data", "sequence", "data-and-features"],
)
def test_activations_whatever_their_sharding(axes, on_one_device):
    x, mask = put(CODES, *axes), put(MASK, *axes[:2])
    compiled = of_activations.lower(x, mask).compile()
    assert_all_close(compiled(x, mask), on_one_device)
    shards = x.size // x.addressable_shards[0].data.size
    for kind, entries in exchanges(compiled):
        match kind:
            case "all-reduce":  # a statistic; or a number for each token, whose features are apart
                assert entries <= max(FEATURES, BATCH * TIME)
            case "collective-permute":  # the neighbours at the ends of the shards
                assert "model" in axes[1:2]
                assert entries <= BATCH * FEATURES
            case _:  # the best expert of each shard, for each token
                assert kind == "all-gather"
                assert "model" in axes[2:]
                assert entries <= BATCH * TIME * shards < x.size / 2


LEAVES: dict[str, Any] = {
    "MCP": jr.MCP(0.5, knot=0.2),
    "GroupLasso": jr.GroupLasso(0.5),
    "L1Inf": jr.L1Inf(0.5),
    "HoyerSquare": jr.HoyerSquare(0.5),
    "following": jr.SpectralNorm(0.5, vector=np.ones(1, np.float32)),
}
SPLITS: dict[str, Any] = {
    "rows": ("data",),
    "columns": (None, "model"),
    "both": ("data", "model"),
}


def test_leaves_whatever_their_sharding():
    weights = RNG.uniform(0.01, 0.3, (48, 64)).astype(np.float32)
    kernel = jr.kernel({f"**/{name}": penalty for name, penalty in LEAVES.items()})
    params = {split: dict.fromkeys(LEAVES, put(weights, *axes)) for split, axes in SPLITS.items()}
    both = jax.jit(lambda params: (kernel.values(params), kernel.gradient(params)))
    compiled = both.lower(params).compile()
    values, gradients = compiled(params)
    on_one_device, gradient = both(dict.fromkeys(LEAVES, weights))
    for split in SPLITS:
        assert_all_close({name: values[f"{split}/{name}"] for name in LEAVES}, on_one_device)
        assert_all_close(gradients[split], gradient)
    for exchange in exchanges(compiled):
        assert exchange.kind == "all-reduce"
        assert exchange.entries <= 64


TALL, WIDE = (64, 16), (16, 64)
GRAM: dict[str, Any] = {
    "Orthogonal": jr.Orthogonal(0.5),
    "SoftOrthogonal": jr.SoftOrthogonal(0.5),
    "OffDiagonalOrthogonal": jr.OffDiagonalOrthogonal(0.5),
    "SpectralNorm": jr.SpectralNorm(0.5),
}


def compiled_for(penalty: jr.Penalty, *arrays: jax.Array) -> Any:
    """Return the program of the penalty's values and gradients at each array."""
    return jax.jit(lambda xs: [jax.value_and_grad(penalty)(x) for x in xs]).lower(arrays).compile()


def matrix(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_a_gram_matrix_is_a_statistic_where_the_longer_axis_is_split():
    # `Orthogonal` is of pairs of columns, whichever axis is longer.
    both_ways = {"tall": (TALL, ("data",)), "wide": (WIDE, (None, "data"))}
    shapes = {
        f"{name}-{way}": matrix(shape)
        for name in GRAM
        for way, (shape, _) in both_ways.items()
        if way == "tall" or name != "Orthogonal"
    }
    kernel = jr.kernel({f"{name}-*": penalty for name, penalty in GRAM.items()})
    both = jax.jit(lambda params: (kernel.values(params), kernel.gradient(params)))
    params = {name: put(x, *both_ways[name.split("-")[1]][1]) for name, x in shapes.items()}
    compiled = both.lower(params).compile()
    assert_all_close(compiled(params), both(shapes), rtol=2e-5)
    for exchange in exchanges(compiled):
        # An eigendecomposition takes the whole Gram matrix on each device.
        assert exchange.kind in ("all-reduce", "all-gather")
        assert exchange.entries <= 16 * 16


@pytest.mark.parametrize(
    ("penalty", "shape", "axes"),
    [
        *((GRAM[name], TALL, (None, "data")) for name in GRAM),
        (jr.SoftOrthogonal(0.5), WIDE, ("data",)),
        (jr.Nuclear(0.5), TALL, ("data",)),
        (jr.Decorrelation(0.5), TALL, (None, "data")),
    ],
    ids=[*GRAM, "SoftOrthogonal-wide", "Nuclear", "Decorrelation"],
)
def test_what_needs_the_whole_array_on_each_device(penalty, shape, axes):
    # docs/scale.md lists these. Should one no longer gather, then there, too.
    x = put(matrix(shape), *axes)
    compiled = compiled_for(penalty, x)
    assert Exchange("all-gather", x.size) in exchanges(compiled) or penalty == jr.Decorrelation(0.5)
    assert any(e.entries >= x.size / 2 for e in exchanges(compiled))
    expected = jax.jit(jax.value_and_grad(penalty))(matrix(shape))
    assert_all_close(compiled((x,))[0], expected, rtol=2e-5)


@pytest.mark.parametrize("axes", [("data",), (None, "data")], ids=["within", "between"])
def test_proximal_operators_by_a_threshold_exchange_sums_of_groups(axes):
    x = put(matrix((64, 48)), *axes)
    compiled = jax.jit(lambda x: [PROXES[name].prox(x, 0.5) for name in THRESHOLDS]).lower(x)
    exchanged = exchanges(compiled.compile())
    assert all(kind == "all-reduce" and entries <= 48 for kind, entries in exchanged), exchanged


@pytest.mark.parametrize("name", ["SparseTopK", "top_k"])
def test_on_devices_of_a_cpu_a_selection_gathers_what_it_is_of(name):
    # docs/scale.md says so. Should one no longer gather, then there, too.
    select = PROXES[name].project if name in PROXES else SELECTIONS[name]
    compiled = jax.jit(select).lower(put(matrix((64, 48)), "data")).compile()
    assert Exchange("all-gather", 64 * 48) in exchanges(compiled)


EXPLICIT: dict[str, Any] = {
    "SoftOrthogonal": jr.SoftOrthogonal(0.5),
    "Nuclear": jr.Nuclear(0.5),
    "Decorrelation": jr.Decorrelation(0.5),
    "GroupLasso": jr.GroupLasso(0.5),
    "TopKLoadBalance": jr.TopKLoadBalance(0.5, k=2),
    "TotalVariation": jr.TotalVariation(0.5, axis=(0, 1), isotropic=True),
    "SmoothL2": jr.SmoothL2(0.5, axis=0),
    "TrendFiltering": jr.TrendFiltering(0.5, axis=0),
    "TemporalDifference": jr.TemporalDifference(0.5),
    "Slowness": jr.Slowness(0.5),
}


def test_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    assert mesh.explicit_axes == ("data", "model")
    weights = RNG.uniform(0.1, 0.9, TALL).astype(np.float32)
    mask = np.arange(TALL[0]) % 5 > 0
    masked = {"TemporalDifference", "Decorrelation"}

    @jax.jit
    def both(x, mask):
        return {
            name: jax.value_and_grad(
                lambda x, p=penalty, m=mask if name in masked else None: jr.penalize(x, p, mask=m)
            )(x)
            for name, penalty in EXPLICIT.items()
        }

    expected = both(weights, mask)
    with jax.set_mesh(mesh):
        x = jax.device_put(weights, PartitionSpec("data", "model"))
        found = both(x, jax.device_put(mask, PartitionSpec("data")))
    assert_all_close(found, expected, rtol=2e-5)
    assert {gradient.sharding for _, gradient in found.values()} == {x.sharding}


@pytest.mark.parametrize("name", ["SoftOrthogonal", "TotalVariation"])
def test_an_array_on_no_device_of_an_explicit_mesh_has_a_gradient_outside_of_jit(name):
    penalty, x = EXPLICIT[name], jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
    expected = penalty.gradient(x)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        np.testing.assert_allclose(x - penalty.gradient(x), x - expected, rtol=1e-5)


PROXES: dict[str, Any] = {
    "L1": jr.L1(0.2) + jr.L2(0.1),
    "L1Inf": jr.L1Inf(0.5),
    "ExclusiveLasso": jr.ExclusiveLasso(0.1),
    "TotalVariation": jr.TotalVariation(0.1, axis=0),
    "Nuclear": jr.Nuclear(0.5),
    "polar": jr.Nuclear(0.5, method="polar"),
    "SpectralNorm": jr.SpectralNorm(0.5),
    "Simplex": jr.Simplex(axis=0),
    "L1Ball": jr.L1Ball(2.0),
    "SparseTopK": jr.SparseTopK(3, axis=1),
    "Orthonormal": jr.Orthonormal(),
    "SpectralBall": jr.SpectralBall(3.0),
    "MaxNorm": jr.MaxNorm(0.5),
}
THRESHOLDS = ("L1Inf", "ExclusiveLasso", "Simplex", "L1Ball")
SELECTIONS: dict[str, Any] = {
    "top_k": partial(jr.gates.top_k, k=2),
    "top_k-rows": partial(jr.gates.top_k, k=2, axis=0),
    "batch_top_k": partial(jr.gates.batch_top_k, k=2),
}


def moved(x: jax.Array, reference: jax.Array) -> Any:
    """Return what is of the shape of `x`, and gradients through it; and what is not."""
    proxes = {name: partial(p.prox, step=0.5) for name, p in PROXES.items()}
    proxes["L2To"] = partial(jr.L2To(0.5, reference=reference).prox, step=0.5)
    moved = {
        name: (f(x), jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3))(x))
        for name, f in (proxes | SELECTIONS).items()
    }
    leading = jr.SpectralNorm(0.5).leading_vector(x)
    following = jr.SpectralNorm(0.5, vector=leading)
    return moved, {
        "leading": jnp.abs(leading),
        "following": following(x),
        "followed": jnp.abs(following.leading_vector(x)),
        "bound": jr.functional.lipschitz_bound([x]),
    }


def test_proximal_operators_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    weights = matrix((16, 8))
    x = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("data", "model")))
    expected = jax.jit(moved)(weights, 2 * weights)
    found = jax.jit(moved)(x, 2 * x)
    assert_all_close(found, expected, rtol=1e-4)
    assert {a.sharding for a in jax.tree.leaves(found[0])} == {x.sharding}


def test_contractive_of_a_layer_whose_units_are_split_on_a_mesh_of_explicit_axes():
    x, weights = matrix((4, 6)), matrix((6, 8))
    value = jax.value_and_grad(partial(jr.functional.contractive, jnp.tanh), argnums=(0, 1))
    expected = value(x, weights)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        split = jax.device_put(weights, PartitionSpec(None, "model"))
        found = jax.jit(value)(jax.device_put(x, PartitionSpec()), split)
    assert_all_close(found, expected, rtol=1e-5)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        code = nn.sigmoid(nn.Dense(64, name="encoder")(x))
        code = jr.sow(self, "code", code, jr.KLSparsity(0.3, target=0.2) + jr.L1(0.1))
        return nn.Dense(48, name="decoder")(code)


KERNEL = jr.kernel(
    {"encoder/kernel": jr.GroupLasso(0.1), "decoder/kernel": jr.SoftOrthogonal(0.1) + jr.L2(0.1)}
)
IMAGES = RNG.uniform(size=(32, 48)).astype(np.float32)
AUTOENCODER = jax.device_get(Autoencoder().init(jax.random.key(0), IMAGES)["params"])


def loss_and_gradient(penalized, params, x):
    def loss(params):
        forward = jr.activity({"encoder": jr.L2(0.1)} if penalized else {"**": None})
        y, terms = forward(Autoencoder().apply)({"params": params}, x)
        return jnp.mean((y - x) ** 2) + terms.total + (KERNEL(params) if penalized else 0)

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def trained_on_one_device():
    return jax.jit(partial(loss_and_gradient, True))(AUTOENCODER, IMAGES)


@pytest.mark.parametrize(
    ("batch", "encoder", "decoder"),
    [
        (("data", "model"), (), ()),
        (("data", "model"), (("data", "model"),), (("data", "model"),)),
        (None, (None, "model"), ("model",)),
        ("data", (None, "model"), ("model",)),
        ("data", ("data", "model"), ("model", "data")),
    ],
    ids=["data-parallel", "FSDP", "tensor-parallel", "data-and-tensor", "FSDP-and-tensor"],
)
def test_penalties_add_sums_to_a_step_and_no_more(batch, encoder, decoder, trained_on_one_device):
    axes = {"encoder": encoder, "decoder": decoder}
    params = {
        name: {"kernel": put(layer["kernel"], *axes[name]), "bias": put(layer["bias"])}
        for name, layer in AUTOENCODER.items()
    }
    x = put(IMAGES, batch)
    like_params = None, jax.tree.map(lambda leaf: leaf.sharding, params)
    step, bare = (
        jax.jit(partial(loss_and_gradient, penalized), out_shardings=like_params)
        .lower(params, x)
        .compile()
        for penalized in (True, False)
    )
    assert_all_close(step(params, x), trained_on_one_device)
    with_penalties, without = Counter(exchanges(step)), Counter(exchanges(bare))
    added = with_penalties - without
    assert not any(kind == "all-gather" for kind, _ in added)
    # The means of 64 units, and where the decoder is split its Gram matrix, forth and back.
    gram = 1.5 * 48 * 48 if decoder else 0
    assert 0 < total(with_penalties) - total(without) < 64 + 16 + gram


def total(found):
    return sum(entries * times for (_, entries), times in found.items())


def test_leaves_of_one_shape_on_a_mesh_of_explicit_axes_may_be_split_in_different_ways():
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh, spec = jax.make_mesh((4, 2), ("a", "b"), axis_types=explicit), jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        params = {
            name: {"kernel": jax.device_put(jnp.ones((8, 8)), spec(name))} for name in ("a", "b")
        }
        assert jr.kernel(jr.L2(1.0))(params) == 128
