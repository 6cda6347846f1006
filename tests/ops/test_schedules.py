"""Every way to share a product between warpgroups, in the interpreter, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.ops import _mosaic_gpu, _tuning
from jaxreg.ops._kernel import Results
from jaxreg.ops._tiles import Config, Problem

from ._interpret import assert_close, interpreted, needs_kernels

M, N, K = 512, 256, 192
# Fewer stages than steps, which they do not divide: what lies in the ring is another tile's, too.
CONFIGS = [
    Config("resident", 2, part=64),
    Config("alternate", 2, slots=4),
    Config("alternate", 2, paired=True),
    Config("together", 2),
    Config("together", 2, paired=True, part=16, slots=4),
]


def run(function, transposed, *operands, **settings):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(M, K)), rng.normal(size=(K, N)) / K**0.5
    given = [jnp.asarray(a, jnp.bfloat16) for a in (x, w, *operands)]
    exact = [np.asarray(a, np.float64) for a in given]
    if transposed:
        given[1] = given[1].T
    with interpreted():
        f = functools.partial(_mosaic_gpu.product, transposed=transposed, name="test", **settings)
        got = jax.jit(functools.partial(function, f))(*given)
    return got, exact[0] @ exact[1], *exact[2:]


@needs_kernels
@pytest.mark.parametrize("tiles", CONFIGS, ids=str)
def test_what_is_stored_and_summed(tiles):
    def epilogue(part, _, columns, __):
        value = part + columns[0]
        return (value,), (jnp.abs(value),)

    (stored, sums), product, b = run(
        lambda f, x, w, b: f(x, w, [], [b], []),
        False,
        np.random.default_rng(1).normal(size=N),
        tiles=tiles,
        epilogue=epilogue,
        results=Results(1, ("all",)),
    )
    assert_close(stored, [product + b], 2**-8)
    assert_close(sums, [np.abs(product + b).sum()], 1e-5)


@needs_kernels
@pytest.mark.parametrize("tiles", CONFIGS, ids=str)
def test_what_is_loaded_and_summed_both_ways(tiles):
    def epilogue(part, loaded, _, scalars):
        value = part * loaded[0].astype(jnp.float32) * scalars[0]
        return (value,), (value, jnp.abs(value))

    (stored, sums), product, h = run(
        lambda f, x, w, h: f(x, w, [h], [], [jnp.float32(3)]),
        True,
        np.random.default_rng(1).normal(size=(M, N)),
        tiles=tiles,
        epilogue=epilogue,
        results=Results(1, ("examples", "all")),
    )
    value = 3 * product * h
    assert_close(stored, [value], 2**-8)
    assert_close(sums, [value.sum(0), np.abs(value).sum()], 1e-5)


def test_no_configuration_would_wait_for_itself():
    # What was multiplied is freed once the next step is under way, which takes a second buffer.
    for k in (64, 128, 256, 512, 1024, 4096):
        for arrays in (1, 2):
            for by_column in (True, False):
                problem = Problem(8192, 16384, k, arrays, 1, by_column)
                for tiles in _tuning.candidates(problem):
                    assert tiles.stages >= min(2, k // 64), (k, tiles)
