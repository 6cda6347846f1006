"""The dense layer with its penalty: the reference, and which implementation runs."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import jaxreg as jr
from jaxreg.ops import _tiles

L1 = jr.L1(0.1)
RNG = np.random.default_rng(0)
X, W, B = RNG.normal(size=(6, 5)), RNG.normal(size=(5, 8)), RNG.normal(size=8)


def single(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def test_value_and_activation_are_the_formula():
    a, value = jr.ops.dense(*single(X, W, B), activation=jax.nn.relu, penalty=jr.L1(0.3))
    expected = np.maximum(X @ W + B, 0)
    np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, 0.3 * np.abs(expected).sum() / 6, rtol=1e-6)
    linear, value = jr.ops.dense(*single(X, W), penalty=jr.L2(0.3), reduction="sum")
    np.testing.assert_allclose(linear, X @ W, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, 0.3 * np.square(X @ W).sum(), rtol=1e-6)


def test_leading_axes_and_reductions_are_those_of_penalize():
    x = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    for reduction in ("batch_mean", "sum", "mean", "token_mean"):
        a, value = jr.ops.dense(
            x, *single(W, B), activation=jnp.tanh, penalty=jr.L2(0.1), reduction=reduction
        )
        assert a.shape == (2, 3, 8)
        np.testing.assert_array_equal(value, jr.penalize(a, jr.L2(0.1), reduction=reduction))


def test_the_derivative_in_both_modes():
    with jax.enable_x64():
        operands = [jnp.asarray(array) for array in (X, W, B)]

        @jax.jit
        def loss(x, w, b):
            a, value = jr.ops.dense(x, w, b, activation=jnp.tanh, penalty=jr.L2(0.3))
            return jnp.sum(jnp.sin(a)) + value

        check_grads(loss, operands, order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_a_batch_or_features_split_over_devices_are_not_gathered():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x, w, b = jnp.ones((16, 8)), jnp.full((8, 32), 0.1), jnp.zeros(32)
    step = jax.jit(
        jax.value_and_grad(
            lambda w, b, x: jr.ops.dense(
                x, w, b, activation=jax.nn.sigmoid, penalty=jr.KLSparsity(0.1, target=0.2)
            )[1]
        )
    )
    expected = step(w, b, x)
    for specs in ([(None, None), (None,), ("d", None)], [(None, "d"), ("d",), (None, None)]):
        placed = [
            jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
            for array, spec in zip((w, b, x), specs, strict=True)
        ]
        chex.assert_trees_all_close(step(*placed), expected, rtol=1e-5)
        assert "all-gather" not in str(step.lower(*placed).compile().as_text())


@pytest.mark.parametrize("reduction", ["batch_mean", "sum"])
def test_shards_of_a_batch_have_the_penalty_of_the_whole(reduction):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
    w, b = single(W / 5, B)

    def layer(w, b, x, axis_name=None):
        return jr.ops.dense(
            x,
            w,
            b,
            activation=jax.nn.sigmoid,
            penalty=jr.KLSparsity(0.1, target=0.2) + jr.L1(0.1),
            reduction=reduction,
            axis_name=axis_name,
        )

    shards = jax.shard_map(
        lambda w, b, x: layer(w, b, x, "d"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("d")),
        out_specs=(PartitionSpec("d"), PartitionSpec()),
    )

    def step(f):
        return jax.jit(jax.value_and_grad(lambda *operands: f(*operands)[1], argnums=(0, 1)))

    chex.assert_trees_all_close(step(shards)(w, b, x), step(layer)(w, b, x), rtol=1e-4, atol=1e-7)
    assert "all-gather" not in str(step(shards).lower(w, b, x).compile().as_text())


def test_bad_operands_are_named():
    x, w, b = single(X, W, B)
    with pytest.raises(ValueError, match=r"takes x of shape \(\.\.\., d\).*got \(6, 5\), \(8, 5\)"):
        jr.ops.dense(x, w.T, penalty=jr.L1(0.1))
    with pytest.raises(ValueError, match=r"b of shape \(n,\); got .*\(5,\)"):
        jr.ops.dense(x, w, x[0], penalty=jr.L1(0.1))
    with pytest.raises(TypeError, match="floating-point arrays; got dtype int32"):
        jr.ops.dense(jnp.ones((6, 5), int), w, b, penalty=jr.L1(0.1))
    with pytest.raises(TypeError, match=r"dense\(penalty=\.\.\.\)` must be a Penalty; got 0\.1"):
        jr.ops.dense(x, w, b, penalty=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation must return .*; got \(6,\) for \(6, 8\)"):
        jr.ops.dense(x, w, b, penalty=jr.L1(0.1), activation=lambda z: z.sum(-1))
    with pytest.raises(ValueError, match="A reduction must be one of"):
        jr.ops.dense(x, w, b, penalty=jr.L1(0.1), reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be one of None, 'xla', 'mosaic_gpu'; got 'cuda'"):
        jr.ops.dense(x, w, b, penalty=jr.L1(0.1), implementation="cuda")  # type: ignore[arg-type]


def test_an_activation_need_have_no_hash_and_a_batch_no_size():
    class Scaled:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, z):
            return 2 * z

    @jax.jit
    def layer(x):
        return jr.ops.dense(x, *single(W, B), activation=Scaled(), penalty=L1, reduction="sum")

    (x,) = single(X)
    batch = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 5), x.dtype)
    exported = jax.export.export(layer)(batch)
    chex.assert_trees_all_close(exported.call(x), layer(x), rtol=1e-6)


def half(m=256, n=128, k=128, dtype: Any = jnp.bfloat16) -> Any:
    return jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    def refused(match, operands, activation=jax.nn.relu, penalty=L1):
        with pytest.raises(NotImplementedError, match=match):
            jr.ops.dense(
                *operands, activation=activation, penalty=penalty, implementation="mosaic_gpu"
            )

    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    refused("its kernel needs JAX 0.11 or newer", half())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    refused("must all be bfloat16 or all float16; got float32, float32", half(dtype=jnp.float32))
    for sizes in ((255, 128, 128), (256, 127, 128), (256, 128, 100), (1, 1, 1), (128, 128, 64)):
        refused(f"multiples of 256, 128, 64; got {', '.join(map(str, sizes))}", half(*sizes))
    refused("the activation is not one that a tile can take", half(), activation=jax.nn.softmax)
    refused("bias and activation the result would be float32", (*half(), jnp.ones(128)))
    refused("would be float32", half(), activation=lambda z: z * np.float32(2))
    # JAX would take the derivative by what a function closes over to be zero.
    slope = jnp.float32(0.1)
    with pytest.raises(NotImplementedError, match="it reads a traced array"):
        jax.grad(
            lambda a: jr.ops.dense(
                *half(),
                activation=lambda z: z * a.astype(z.dtype),
                penalty=L1,
                implementation="mosaic_gpu",
            )[1]
        )(slope)
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = half()
        refused("its arrays are split over devices", (jax.reshard(x, PartitionSpec("d")), w))
    refused(
        r"`jaxreg.TemporalDifference` cannot be measured tile by tile: it takes",
        (jnp.ones((2, 128, 128), jnp.bfloat16), half()[1]),
        penalty=jr.TemporalDifference(0.1),
    )
    refused("`implementation=None` falls back to XLA", half(255))


def test_a_kernel_for_another_platform_is_refused_when_it_is_lowered(monkeypatch):
    if jax.__version_info__ < (0, 11):
        with pytest.raises(
            NotImplementedError, match=r"needs JAX 0\.11 or newer; this is JAX 0\.1"
        ):
            jr.ops.dense(*half(), penalty=jr.L1(0.1), implementation="mosaic_gpu")
        return

    def run(x, w):
        return jr.ops.dense(x, w, penalty=jr.L1(0.1), implementation="mosaic_gpu")[1]

    x, w = half()
    step = jax.jit(jax.value_and_grad(run))
    step.trace(x, w)  # the platform is not known yet
    for lower in (lambda: step(x, w), lambda: jax.vmap(run, (0, None))(x[None], w)):
        with pytest.raises(NotImplementedError, match="needs the platform cuda, and this is cpu"):
            lower()


def test_tilings_fill_shared_memory_and_no_more():
    for shape in ((8192, 16384, 512), (256, 128, 64), (256, 128, 4096)):
        for arrays in (1, 2):
            problem = _tiles.Problem(*shape, arrays, columns=1, by_column=arrays == 2)
            tiles = _tiles.config(problem, loads=arrays == 2)
            assert tiles is not None
            assert 1 <= tiles.stages <= min(6, shape[2] // 64)
            kept = max(tiles.stages, shape[2] // 64 * (tiles.schedule == "resident"))
            loaded = 2 * 64 * 128 * (tiles.stages * tiles.high + kept)
            stored = arrays * 2 * tiles.slots * 2 * 128 * tiles.part
            assert loaded + stored <= tiles.bytes(problem) <= 232_448
