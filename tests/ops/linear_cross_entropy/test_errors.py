"""What bad input gets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxreg as jr

HIDDEN, WEIGHT, LABELS = np.ones((4, 3), np.float32), np.ones((3, 6), np.float32), np.arange(4)


def call(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **options):
    return jr.ops.linear_cross_entropy(hidden, weight, labels, **options)


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0, 6, 1, 7], "got 6, and 2"), ([0, -1, 1, 2], "got -1, and 1"), ([0, -99, 1, 2], "got -99")],
)
def test_concrete_labels_out_of_range_are_named(labels, found):
    with pytest.raises(
        ValueError, match=re.escape("must be in [0, 6), or ignore_index") + f".*{found}"
    ):
        call(labels=np.array(labels))


def test_without_an_ignored_label_each_must_be_a_word():
    with pytest.raises(ValueError, match=r"\(None\); got -100"):
        call(labels=np.array([0, 1, 2, -100]), ignore_index=None)


@pytest.mark.parametrize("layout", ["DV", "VD"])
def test_a_square_weight_must_say_its_layout(layout):
    square = np.arange(9, dtype=np.float32).reshape(3, 3)
    labels = np.array([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r'kernel or a tied embedding.*layout="DV"'):
        call(weight=square, labels=labels)
    kernel = square if layout == "DV" else square.T
    lse = call(weight=square, labels=labels, layout=layout).lse
    np.testing.assert_allclose(lse, jax.nn.logsumexp(HIDDEN @ kernel, axis=-1), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": np.ones((4, 6), "f")}, ValueError, r"must be DV or VD, of D = 3.*\(4, 6\)"),
        ({"layout": "VD"}, ValueError, r"must be VD, of D = 3.*\(3, 6\)"),
        ({"layout": "vd"}, ValueError, r"layout=\.\.\.\)` must be one of None, 'DV', 'VD'"),
        ({"weight": np.ones((3, 0), "f")}, ValueError, "at least one word"),
        ({"weight": np.ones(3, "f")}, ValueError, r"got shape \(3,\)"),
        ({"weight": np.ones((3, 6), int)}, TypeError, r'real floating.*int32 for "weight"'),
        ({"hidden": np.ones((4, 3), "F")}, TypeError, r'real floating.*complex64 for "hidden"'),
        ({"labels": np.ones(4)}, TypeError, r"must be integers; got float.*argmax"),
        ({"labels": np.ones((4, 1), int)}, ValueError, r"labels \(4, 1\) and hidden \(4, 3\)"),
        ({"bias": np.ones(3, "f")}, ValueError, r"bias=.* shape \(6,\)"),
        ({"weights": np.ones(3)}, ValueError, r"weights=.* labels' shape \(4,\); got \(3,\)"),
        ({"weights": np.ones(4, "F")}, TypeError, r"weights=.* must be real"),
        ({"z_loss": -1.0}, ValueError, r"z_loss=.* finite, non-negative scalar; got -1"),
        ({"z_loss": np.ones(4)}, ValueError, "finite, non-negative scalar"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing=.* in \[0, 1\); got 1"),
        ({"soft_cap": 0.0}, ValueError, r"soft_cap=.* positive; got 0"),
        ({"chunk": 0}, ValueError, r"chunk=.* a positive integer; got 0"),
        ({"ignore_index": "pad"}, ValueError, r"ignore_index=.* an integer; got 'pad'"),
        ({"ignore_index": (0, 1)}, ValueError, r"ignore_index=.* an integer; got \(0, 1\)"),
        ({"chunk": 2.5}, ValueError, r"chunk=.* a positive integer; got 2.5"),
        (
            {"reduction": "token_mean"},
            ValueError,
            r"reduction=.* 'mean', 'sum', 'none'; got 'token",
        ),
        ({"implementation": "triton"}, ValueError, r"implementation=.* 'chunked', 'reference'"),
        ({"dtype": int}, TypeError, r"dtype=.* floating-point; got int"),
        ({"gradient_dtype": int}, TypeError, r"gradient_dtype=.* floating-point; got int"),
        (
            {"implementation": "reference", "vocab_axis_name": "model"},
            NotImplementedError,
            "holds the logits of whole vocabularies",
        ),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize("name", ["label_smoothing", "soft_cap"])
def test_what_must_be_static(name):
    with pytest.raises(TypeError, match=f"{name}=.*a traced value. Make it a static argument"):
        jax.jit(lambda s: call(**{name: s}).total)(0.5)


def test_tokens_and_words_that_are_split_beside_a_shard_map():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"))
    spec = jax.sharding.PartitionSpec

    def local(hidden, weight, labels):
        return call(hidden=hidden, weight=weight, labels=labels, batch_axis_name="data").total

    def of_type(*entries):
        return lambda x: jax.reshard(x, jax.sharding.NamedSharding(mesh, spec(*entries)))

    @jax.jit
    def loss(hidden, weight, labels):
        tokens = of_type(("data", "fsdp"))
        arrays = tokens(hidden), of_type(None, "model")(weight), tokens(labels)
        specs = spec("data"), spec(), spec("data")
        sharded = jax.shard_map(local, axis_names={"data"}, in_specs=specs, out_specs=spec())
        return sharded(*arrays)

    arrays = jnp.ones((8, 4)), jnp.ones((4, 6)), jnp.zeros(8, jnp.int32)
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match=r"tokens or words .* and not both"),
    ):
        jax.eval_shape(loss, *arrays)


def test_the_reference_takes_no_words_that_types_split():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    with pytest.raises(NotImplementedError, match="whole vocabularies"):
        call(weight=jax.device_put(jnp.asarray(WEIGHT), sharding), implementation="reference")


def test_an_infinite_soft_cap_is_an_error():
    with pytest.raises(ValueError, match=r"soft_cap=\.\.\.\)` must be positive; got inf"):
        jr.ops.linear_cross_entropy(
            jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.zeros(2, int), soft_cap=np.inf
        )
