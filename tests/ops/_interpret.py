"""Mosaic GPU kernels on the CPU: the one place that knows JAX's interpreter of them, or XLA."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.ops import _dispatch, _kernel, _mosaic_gpu, _tiles

needs_kernels = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="kernels need JAX 0.11; `test_dense.py` tests the refusal",
)


@contextlib.contextmanager
def interpreted(*, dispatched: bool = True) -> Iterator[None]:
    """Run kernels in the interpreter, which fills what is not initialized with NaN and finds races.

    The kernel is then lowered for the CPU, where nothing else can run in its stead: the reference
    is chosen before, and the other platforms' branch cannot be lowered.

    Args:
        dispatched: whether the platform is looked at. `vmap` of that and of the interpreter's
            effects together is what JAX cannot do.
    """
    plgpu = _kernel.pallas()
    params = plgpu.InterpretGPUParams(detect_races=True)
    with pytest.MonkeyPatch.context() as patch, plgpu.force_gpu_interpret_mode(params):
        patch.setattr(_mosaic_gpu, "PLATFORMS", ("cpu",))
        patch.setattr(_tiles, "BLOCKS", 2)
        if not dispatched:
            patch.setattr(_dispatch, "only_on", lambda platforms, op, implementation, run: run)
        yield


def assert_close(got: Any, expected: Any, rtol: float) -> None:
    """Compare by the largest entry: a product's rounding errors are not relative to each entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=rtol * np.abs(b).max())


def product_by_xla(
    x: Any,
    w: Any,
    loaded: Any,
    columns: Any,
    scalars: Any,
    *,
    epilogue: Any,
    results: Any,
    transposed: bool,
    **tiling: Any,
) -> Any:
    """Return what a kernel does, by its own epilogue."""
    z = jnp.matmul(x, w.T if transposed else w, preferred_element_type=jnp.float32)
    wide = [jnp.broadcast_to(column.astype(jnp.float32), z.shape) for column in columns]
    stored, summed = epilogue(z, loaded, wide, scalars)
    return [value.astype(x.dtype) for value in stored], results.total(summed)


@contextlib.contextmanager
def by_xla() -> Iterator[None]:
    """Let XLA compute what kernels do: what is around them runs on any JAX and several devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "__version_info__", (0, 12, 0))
        patch.setattr(_dispatch, "only_on", lambda platforms, op, implementation, run: run)
        patch.setattr(_mosaic_gpu, "product", product_by_xla)
        yield
