"""The dense layer's kernel, compiled for Hopper."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.aot import compiled_for, registers, report
from benchmarks.aot.cases import FUSED, fused

H = (8192, 16384)


@pytest.mark.parametrize("name", FUSED)
def test_no_register_spills(name, capsys):
    forward, gradient = (registers(*fused(name, gradient=g), "H100") for g in (False, True))
    with capsys.disabled():
        print(f"\n{name}: forward {forward}, for the gradient {gradient or 'the same'}")
    # For the gradient another kernel runs only where it also stores what comes before the
    # activation.
    assert (len(forward), len(gradient)) == (1, name.startswith(("gelu", "silu")))
    for kernel in forward + gradient:
        assert kernel.used <= 168, kernel
        assert kernel.spilled == 0, kernel


def test_the_activation_is_written_and_not_read_again():
    for device in ("H100", "H200"):
        xla, ours = (
            report(*fused("relu, L1", i), device, donate=(), touching=H)
            for i in ("xla", "mosaic_gpu")
        )
        assert (xla["touching"], ours["touching"]) == (2, 1), (device, xla, ours)
        assert ours["bytes"] <= 0.54 * xla["bytes"], (device, xla, ours)


def test_remat_runs_the_kernel_again_and_vmap_runs_one():
    forward, shapes = fused("relu, L1")

    def loss(w, x, b):
        a, value = forward(x, w, b)
        return jnp.mean(jnp.square(a.astype(jnp.float32))) + value

    x, w, b = shapes

    def kernels(function, arguments):
        text = compiled_for(function, arguments, "H200").as_text()
        return len(re.findall(r'custom_call_target="mosaic_gpu', text))

    assert kernels(jax.value_and_grad(loss), (w, x, b)) == 1
    assert kernels(jax.value_and_grad(jax.checkpoint(loss)), (w, x, b)) == 2
    batch = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    assert kernels(jax.vmap(forward, (0, None, None)), (batch, w, b)) == 1


def test_another_platform_is_refused():
    with pytest.raises(NotImplementedError, match="needs the platform cuda, and this is tpu"):
        report(*fused("relu, L1"), "TPU v5e", donate=())
