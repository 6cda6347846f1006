"""The kernel as a function of arrays, and what it takes."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.ops import _tiles
from jaxreg.ops._kernel import HALF, Finish, Results, kernel, pallas
from jaxreg.ops._tiles import COLUMNS, DEPTH, ROWS, Config, Problem

PLATFORMS: tuple[str, ...] = ("cuda",)


def refusal(m: int, n: int, k: int, what: tuple[str, str, str], *operands: jax.Array) -> str | None:
    """Return why these operands of an (m, k) by (k, n) product cannot be multiplied, or None.

    Args:
        m: rows.
        n: columns.
        k: depth.
        what: what the three are called.
        operands: arrays that must be of one narrow type.
    """
    sizes, multiples = (m, n, k), (2 * ROWS, COLUMNS, DEPTH)
    if jax.__version_info__ < (0, 11):
        return f"its kernel needs JAX 0.11 or newer; this is JAX {jax.__version__}"
    dtypes = [operand.dtype for operand in operands]
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.bfloat16, jnp.float16):
        return (
            "its matrices must all be bfloat16 or all float16; got"
            f" {', '.join(str(dtype) for dtype in dtypes)}"
        )
    if any(entry is not None for x in operands for entry in jax.typeof(x).sharding.spec):
        return "its arrays are split over devices; within `jax.shard_map` it takes its shards'"
    if not all(sizes) or any(map(operator.mod, sizes, multiples)):
        return (
            f"{what[0]}, {what[1]} and {what[2]} must be multiples of"
            f" {', '.join(map(str, multiples))}; got {m}, {n}, {k}"
        )
    return None


def problem(m: int, n: int, k: int, loaded: int, columns: int, results: Results) -> Problem:
    """Return the product as tiles are chosen for it."""
    return Problem(m, n, k, max(loaded, results.stored), columns, results.by_column)


def product(
    x: jax.Array,
    w: jax.Array,
    loaded: Sequence[jax.Array],
    columns: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    *,
    tiles: Config,
    epilogue: Finish,
    results: Results,
    transposed: bool,
    name: str,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return what the epilogue stores, and the sums of what it sums; see `ops._product`."""
    (m, k), n = x.shape, w.shape[0 if transposed else 1]
    sizes = problem(m, n, k, len(loaded), len(columns), results)
    array: Any = jax.ShapeDtypeStruct
    slots = {"examples": (m // ROWS, n), "all": (n // COLUMNS, m // ROWS * HALF)}
    # At least one, as an operand must not be empty.
    handed = jnp.stack([jnp.asarray(s, jnp.float32) for s in scalars or [jnp.zeros(())]])
    plgpu = pallas()
    body = functools.partial(
        kernel,
        tiles=tiles,
        sizes=sizes,
        epilogue=epilogue,
        results=results,
        transposed=transposed,
        loaded=len(loaded),
        columns=len(columns),
        scalars=len(scalars),
    )
    outs = plgpu.kernel(
        body,
        out_type=(
            *[array((m, n), x.dtype)] * results.stored,
            *[array(slots[over], jnp.float32) for over in results.summed],
        ),
        grid=(_tiles.BLOCKS // tiles.blocks,),
        grid_names=("cluster",),
        cluster=(tiles.blocks,),
        cluster_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=sizes.scratch,
        ),
    )(x, w, handed, *loaded, *[column.astype(jnp.float32) for column in columns])
    return list(outs[: results.stored]), results.total(outs[results.stored :])
