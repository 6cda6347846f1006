"""What is measured of a kernel, where it is kept, and what it decides."""

import contextlib
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxreg as jr
from jaxreg.ops import _mosaic_gpu, _product, _tiles, _tuning
from jaxreg.ops._dispatch import by_device
from jaxreg.ops._kernel import Results
from jaxreg.ops._tuning import candidates

from ._interpret import interpreted, needs_kernels, product_by_xla

KIND = jax.devices()[0].device_kind
X, W = jnp.ones((256, 64), jnp.bfloat16), jnp.ones((64, 128), jnp.bfloat16)
dense = functools.partial(jr.ops.dense, activation=jax.nn.relu, penalty=jr.L1(0.1))


def problem(m, n, k, arrays=1):
    return _tiles.Problem(m, n, k, arrays, columns=1, by_column=arrays == 2)


def test_at_most_13_configurations_are_tried_and_all_fit():
    for m, n, k in ((8192, 16384, 512), (256, 128, 64), (256, 256, 4096)):
        for arrays in (1, 2):
            tried = candidates(problem(m, n, k, arrays))
            assert 1 <= len(set(tried)) == len(tried) <= 13
            assert all(tiles.fits(problem(m, n, k, arrays)) for tiles in tried)
            assert _tiles.config(problem(m, n, k, arrays), loads=arrays == 2) in tried


@pytest.fixture
def kernels(monkeypatch):
    """Put a kernel that runs anywhere in the place of the real one; list the tiles it takes."""
    ran = []

    def kernel(*operands, tiles, name, **settings):
        ran.append(tiles)
        stored, sums = product_by_xla(*operands, **settings)
        # Off by less than a kernel may be.
        return [value * 65 / 64 for value in stored], sums

    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(_mosaic_gpu, "PLATFORMS", ("cpu",))
    monkeypatch.setattr(_mosaic_gpu, "product", kernel)
    return ran


def tune(file, *, xla: float):
    """Tune the layer, by a timer for which the second configuration wins, and XLA takes so long."""
    timed, tried = [], candidates(problem(256, 128, 64))

    def timer(run):
        timed.append(run)
        # The kernels are timed in turn, then the best of them and XLA.
        place = list(dict.fromkeys(timed)).index(run)
        return {1: 1.0, len(tried): xla}.get(place, 2.0)

    with jr.ops.tuned(file, measure=True, timer=timer):
        jax.jit(functools.partial(dense, implementation="mosaic_gpu")).trace(X, W)
        before = len(timed)
        jax.jit(functools.partial(dense, implementation="mosaic_gpu")).trace(X, W)
        assert len(timed) == before, "what is recorded is not timed again"
    jax.block_until_ready(timed[1]())  # what is timed can run, after the trace
    return tried[1]


def test_the_fastest_tiles_are_written_and_taken(tmp_path, kernels):
    file = tmp_path / "tiles.json"
    best = tune(file, xla=3.0)
    (key,) = json.loads(file.read_text())[KIND]
    assert key == "jaxreg_dense 256x128x64 bfloat16"
    layer = functools.partial(dense, implementation="mosaic_gpu")
    kernels.clear()
    with jr.ops.tuned(file):
        jax.jit(layer)(X, W)
        assert best in kernels
        kernels.clear()
    jax.jit(lambda x, w: layer(x, w))(X, W)
    assert set(kernels) == {_tiles.config(problem(256, 128, 64), loads=False)}


@pytest.mark.parametrize(("xla", "wins"), [(3.0, True), (0.5, False)])
def test_xla_runs_but_where_a_win_is_recorded(tmp_path, kernels, xla, wins):
    file = tmp_path / "tiles.json"
    tune(file, xla=xla)
    expected = jax.jit(dense)(X, W)[0]
    with jr.ops.tuned(file):
        a, value = jax.jit(lambda x, w: dense(x, w))(X, W)
        other, _ = jax.jit(lambda x, w: dense(x[:, :32], w[:32]))(X, W)
        # Another class, and what a kernel cannot take, are XLA's.
        np.testing.assert_array_equal(other, expected / 2)
        assert dense(X.astype(jnp.float32), W.astype(jnp.float32))[0][0, 0] == 64
        gradient = jax.jit(jax.grad(lambda w: dense(X, w)[1]))(W)
    np.testing.assert_array_equal(a, (65 / 64 if wins else 1) * expected)
    np.testing.assert_allclose(value, 0.1 * 64 * 128, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.full(W.shape, 0.1), rtol=1e-2)


@pytest.mark.parametrize(
    ("activation", "penalty"),
    [
        (jax.nn.relu, jr.L1(0.1)),
        (jax.nn.gelu, jr.Huber(0.1, delta=1.0)),
        (jax.nn.sigmoid, jr.KLSparsity(0.1, target=0.2)),
    ],
    ids=["relu, L1", "gelu, Huber", "sigmoid, KL"],
)
def test_where_the_win_is_another_devices_the_op_is_as_without_a_kernel(
    monkeypatch, activation, penalty
):
    asked = []

    def won_elsewhere(key):
        asked.append(key.split()[0])
        tiles = candidates(problem(256, 128, 64, 2))[0]
        return {"a device that is not here": _tuning.Record(tiles, 1.0, 2.0)}

    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(_tuning, "known", won_elsewhere)
    shapes = ((256, 64), (64, 128), (128,), (128, 128), (128,))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    operands = [
        jax.random.normal(k, s, jnp.bfloat16) / 8 for k, s in zip(keys, shapes, strict=True)
    ]

    def step(implementation, *operands):
        def loss(*operands):
            settings = {"activation": activation, "penalty": penalty}
            y, _, value = jr.ops.mlp(*operands, **settings, implementation=implementation)
            return jnp.mean(jnp.square(y.astype(jnp.float32))) + value

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))
        return step.lower(*operands).as_text(), step(*operands)

    lowered, got = step(None, *operands)
    assert "dot_general" in lowered
    assert not re.search(r"dot_general.*-> tensor<\w+xf32>", lowered)
    keep = "_keep" * (activation is jax.nn.gelu)
    assert {f"jaxreg_dense{keep}", f"jaxreg_mlp_backward{keep}"} <= set(asked)
    _, without = step("xla", *operands)
    _, exact = step("xla", *[operand.astype(jnp.float32) for operand in operands])
    for a, b, e in zip(*map(jax.tree.leaves, (got, without, exact)), strict=True):
        ours, plain = (np.abs(np.asarray(c, np.float32) - e).max() for c in (a, b))
        assert ours <= 1.5 * plain


def test_what_is_kept_before_the_activation_has_the_dtype_of_the_operands(monkeypatch, kernels):
    tiles = candidates(problem(256, 128, 64, 2))[0]
    won = {KIND: _tuning.Record(tiles, 1.0, 2.0)}
    monkeypatch.setattr(_tuning, "known", lambda key: won)

    def loss(w, b):
        return dense(X, w, b, activation=lambda z: jax.nn.gelu(z).astype(jnp.bfloat16))[1]

    b = jnp.zeros(128, jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(W, b)
    assert tiles in kernels
    assert jax.tree.map(lambda g: g.dtype, gradient) == (W.dtype, b.dtype)


@needs_kernels
def test_the_kernel_itself_runs_while_a_step_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(_mosaic_gpu, "PLATFORMS", ("cpu",))
    first: list[Any] = []

    def timer(run):
        first.append(jax.block_until_ready(run()))
        return float(len(first))

    measure, tried = _tuning._measure, _tuning.candidates

    def interpreting(*settings):  # in the thread that measures
        with interpreted():
            measure(*settings)

    monkeypatch.setattr(_tuning, "_measure", interpreting)
    # One is enough: the interpreter is slow.
    monkeypatch.setattr(_tuning, "candidates", lambda problem: tried(problem)[:1])

    def step(x):
        mesh, spec = Mesh(np.array(jax.devices()[:2]), ("d",)), PartitionSpec("d")
        layer = functools.partial(dense, axis_name="d", implementation="mosaic_gpu")
        shards = jax.shard_map(
            lambda x: layer(x, W)[1], mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )
        return shards(x)

    with jr.ops.tuned(tmp_path / "tiles.json", measure=True, timer=timer):
        jax.jit(jax.grad(step)).trace(jnp.concatenate([X, X]))
    assert len(first) == 9
    close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=0.05)
    jax.tree.map(close, first[0], first[-1])


def test_what_is_measured_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(_mosaic_gpu, "product", product_by_xla)
    layer = functools.partial(dense, implementation="mosaic_gpu")
    with (
        pytest.raises(NotImplementedError, match="needs the platform cuda, and this is cpu"),
        jr.ops.tuned(tmp_path / "tiles.json", measure=True),
    ):
        jax.jit(layer).trace(X, W)


@pytest.mark.parametrize("measure", [False, True])
def test_without_tiles_the_kernel_is_refused(tmp_path, measure):
    settings: Any = {"epilogue": None, "plain": None, "results": Results(1, ())}
    many = [jnp.zeros(128)] * 250
    tuning = jr.ops.tuned(tmp_path / "tiles.json", measure=True)
    with (
        pytest.raises(NotImplementedError, match="reads 250 vectors, for which"),
        tuning if measure else contextlib.nullcontext(),
    ):
        _product.product(X, W, columns=many, name="test", asked_by="dense", **settings)


def test_settings_of_any_type_are_measured(tmp_path, kernels):
    def run(flag, strength):
        scalars = [flag, strength]

        def epilogue(part, _, __, scalars):
            return (part + jnp.where(scalars[0] > 0, scalars[1], 0),), ()

        def plain(x, w, _, __, scalars):
            return [(x @ w + jnp.where(scalars[0] > 0, scalars[1], 0)).astype(x.dtype)], []

        settings: Any = {"results": Results(1, ()), "name": "test", "asked_by": "dense"}
        return _product.product(X, W, scalars=scalars, epilogue=epilogue, plain=plain, **settings)

    with jr.ops.tuned(tmp_path / "tiles.json", measure=True, timer=lambda run: 1.0):
        jax.jit(run).trace(jnp.array(True), jnp.int32(2))


def test_what_was_measured_before_an_error_is_kept(tmp_path, kernels):
    file = tmp_path / "tiles.json"

    def interrupted(x):
        dense(x, W, implementation="mosaic_gpu")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), jr.ops.tuned(file, measure=True, timer=lambda run: 1.0):
        jax.jit(interrupted).trace(X)
    assert json.loads(file.read_text())[KIND]


def wrong(value):
    return 2 * value


def unsupported(value):
    raise NotImplementedError("a layout that is not there")


def wordless(value):
    raise AssertionError


def unlaunched(value):
    def launch(value):
        raise RuntimeError("out of resources")

    return jax.pure_callback(launch, jax.ShapeDtypeStruct(value.shape, value.dtype), value)


@pytest.mark.parametrize("fault", [wrong, unsupported, wordless, unlaunched])
def test_tiles_that_fail_are_left_out(tmp_path, kernels, monkeypatch, fault):
    tried, kernel, timed = candidates(problem(256, 128, 64)), _mosaic_gpu.product, []

    def failing(*operands, tiles, **settings):
        stored, sums = kernel(*operands, tiles=tiles, **settings)
        return [fault(value) if tiles == tried[1] else value for value in stored], sums

    def timer(run):
        timed.append(run)
        return 1.0

    monkeypatch.setattr(_mosaic_gpu, "product", failing)
    file = tmp_path / "tiles.json"
    tuning = jr.ops.tuned(file, measure=True, timer=timer)
    with tuning:
        with pytest.warns(UserWarning, match="left out"):
            jax.jit(functools.partial(dense, implementation="mosaic_gpu")).trace(X, W)
        assert json.loads(file.read_text())[KIND], "written at once"
    assert len(set(timed)) == len(tried)  # and XLA's, without the one


def test_what_is_recorded_is_not_compiled_again(tmp_path, kernels):
    with jr.ops.tuned(tmp_path / "tiles.json", measure=True, timer=lambda run: 1.0):
        for again in (False, True):
            kernels.clear()
            layer = functools.partial(dense, implementation="mosaic_gpu")
            jax.jit(lambda x, w, layer=layer: layer(x, w)).trace(X, W)
            assert (len(set(kernels)) <= 2) == again


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), jr.ops.tuned(tmp_path / "none.json"):
        pass


def test_the_device_is_looked_at_when_the_function_is_lowered():
    def run(kinds):
        return by_device({kind: lambda x: {"y": 2 * x} for kind in kinds}, lambda x: {"y": x})

    x = jnp.arange(8.0)
    here = jax.jit(lambda x: run([KIND])(x)["y"])
    np.testing.assert_array_equal(here(x), 2 * x)
    # By itself it is not compiled as part of anything.
    np.testing.assert_array_equal(run([KIND])(x)["y"], x)
    np.testing.assert_array_equal(jax.jit(lambda x: run(["other"])(x)["y"])(x), x)
    np.testing.assert_array_equal(jax.vmap(here)(x[:, None])[:, 0], 2 * x)
    # A kernel is not partitioned: split arrays are XLA's.
    mesh, spec = Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d")
    split = jax.device_put(x, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(here(split), x)
    shards = jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(shards)(split), 2 * x)
    # Here the compiler may split them further.
    both = Mesh(np.array(jax.devices()).reshape(2, -1), ("d", "m"))
    shards = jax.shard_map(here, mesh=both, in_specs=spec, out_specs=spec, axis_names={"d"})
    np.testing.assert_array_equal(jax.jit(shards)(x), x)
