"""The kernels of dense layers, compiled for Hopper."""

import re

import jax
import pytest

from benchmarks.aot import compiled_for, registers, report
from benchmarks.aot.cases import FUSED, fused, fused_loss, fused_step

H = (8192, 16384)


@pytest.mark.parametrize("name", FUSED)
def test_no_register_spills(name, capsys):
    forward, gradient = (registers(*fused(name, gradient=g), "H100") for g in (False, True))
    backward = registers(*fused_step(name), "H100")
    with capsys.disabled():
        print(f"\n{name}: forward {forward}, for the gradient {gradient or 'the same'}")
        print(f"backward {backward}")
    # For the gradient another kernel runs only where it also stores what comes before the
    # activation. Two layers' step runs that, and one more.
    assert (len(forward), len(gradient)) == (1, name.startswith(("gelu", "silu")))
    assert len(backward) == 1
    for kernel in forward + gradient + backward:
        assert (kernel.used, kernel.spilled) == (168, 0), kernel


def test_the_activation_is_written_and_not_read_again():
    for device in ("H100", "H200"):
        xla, ours = (
            report(*fused("relu, L1", i), device, donate=(), touching=H)
            for i in ("xla", "mosaic_gpu")
        )
        assert (xla["touching"], ours["touching"]) == (2, 1), (device, xla, ours)
        assert ours["bytes"] <= 0.535 * xla["bytes"], (device, xla, ours)


def test_the_backward_pass_touches_the_hidden_layer_no_more_than_its_products():
    # Two kernels write h and dz; three products read them.
    xla, ours, without = (
        report(*fused_step("relu, L1", i), "H200", donate=(), touching=H)
        for i in ("xla", "mosaic_gpu", None)
    )
    assert (xla["touching"], ours["touching"]) == (7, 5), (xla, ours)
    assert ours["bytes"] <= 0.695 * xla["bytes"], (xla, ours)
    assert ours["bytes"] <= 0.775 * without["bytes"], (without, ours)
    assert ours["temporary"] <= 1.01 * without["temporary"], (without, ours)


def test_remat_runs_the_kernel_again_and_vmap_runs_one():
    def kernels(function, arguments):
        text = compiled_for(function, arguments, "H200").as_text()
        return len(re.findall(r'custom_call_target="mosaic_gpu', text))

    loss, shapes = fused_loss("relu, L1")
    assert kernels(jax.value_and_grad(loss), shapes) == 2
    assert kernels(jax.value_and_grad(jax.checkpoint(loss)), shapes) == 3
    forward, (x, w, b) = fused("relu, L1")
    batch = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    assert kernels(jax.vmap(forward, (0, None, None)), (batch, w, b)) == 1


def test_another_platform_is_refused():
    with pytest.raises(NotImplementedError, match="needs the platform cuda, and this is tpu"):
        report(*fused("relu, L1"), "TPU v5e", donate=())
