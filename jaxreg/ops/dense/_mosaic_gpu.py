"""The dense layer's forward pass on Hopper: the penalty's sums in the matrix product's epilogue.

A persistent grid; in each block one warpgroup loads tiles by TMA and two multiply them. Where XLA
would read the activation again to measure it, here each tile is measured before it is stored: its
sums go to a slot of their own, without atomics, so that the result is deterministic.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxreg.ops._epilogue import Epilogue, NotElementwise, elementwise, epilogue, evaluate
from jaxreg.penalties import Penalty
from jaxreg.terms import varying_axes

PLATFORMS: tuple[str, ...] = ("cuda",)

# H100's and H200's multiprocessors. A GPU with fewer runs the rest of the grid after the first.
_BLOCKS = 132
_SHARED_MEMORY = 232_448
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # a warpgroup's tile; its accumulator is 128 registers

_STORED_COLUMNS = 32  # how much of it is stored at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """How the output is tiled.

    Args:
        stacked: whether a block's two warpgroups lie above each other, or side by side.
        stages: how many steps of the product are loaded ahead.
        width: how many blocks' columns are walked through before the next rows.
    """

    stacked: bool
    stages: int
    width: int = 8

    @property
    def rows(self) -> int:
        """A block's rows."""
        return _ROWS * (2 if self.stacked else 1)

    @property
    def columns(self) -> int:
        """A block's columns."""
        return _COLUMNS * (1 if self.stacked else 2)


def config(m: int, n: int, k: int, keep: bool) -> Config | None:
    """Return the heuristic's configuration for an (m, k) by (k, n) product; None if there is none.

    Args:
        m: rows.
        n: columns.
        k: depth.
        keep: whether the value before the activation is stored too.
    """
    for stacked in (True, False):
        tiles = Config(stacked, 1)
        if m and n and k and not (m % tiles.rows or n % tiles.columns or k % _DEPTH):
            stage = 2 * _DEPTH * (tiles.rows + tiles.columns)
            stored = 2 * 2 * 2 * _ROWS * _STORED_COLUMNS * (2 if keep else 1)
            # 4 KiB for the barriers and the sums' own scratch.
            stages = (_SHARED_MEMORY - stored - 4096) // stage
            return dataclasses.replace(tiles, stages=min(stages, 4, k // _DEPTH))
    return None


def supports(
    x: jax.Array, w: jax.Array, activation: Callable[..., Any], penalty: Penalty, keep: bool
) -> str | None:
    """Return why the kernel cannot run on these operands, or None."""
    if jax.__version_info__ < (0, 12):
        return f"its kernel needs JAX 0.12 or newer; this is JAX {jax.__version__}"
    if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x and w must both be bfloat16 or float16; got {x.dtype} and {w.dtype}"
    (k, n), m = w.shape, x.size // max(x.shape[-1], 1)
    if config(m, n, k, keep) is None:
        return (
            f"the examples and features must be multiples of {2 * _ROWS} and {_COLUMNS}, or of"
            f" {_ROWS} and {2 * _COLUMNS}, and the input's features of {_DEPTH}; got {m}, {n}, {k}"
        )
    try:
        elementwise(activation)
    except NotElementwise as error:
        return f"the activation is not one that a tile can take: {error}"
    try:
        epilogue(penalty, (*x.shape[:-1], n))
    except NotElementwise as error:
        return f"`jaxreg.{type(penalty).__name__}` cannot be measured tile by tile: {error}"
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    scalars: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    sums: Epilogue,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None, list[jax.Array]]:
    """Return the activation (m, n), the value before it or None, and the penalty's sums.

    Args:
        x: (m, k).
        w: (k, n).
        b: (n,), in float32.
        scalars: those of `sums`, stacked; at least one.
        activation: a function of single entries.
        sums: what to sum.
        keep: whether to return the value before the activation.
    """
    (m, k), n = x.shape, w.shape[1]
    tiles = config(m, n, k, keep)
    assert tiles is not None
    # Sums over examples add up to sums over everything, so one direction is enough. By row is less
    # work, but its running sums are registers too many beside two stores.
    by_column = keep or any(over == "examples" for _, over in sums.sums)
    slots = (m // _ROWS, n) if by_column else (n // _COLUMNS, m)
    array: Any = jax.ShapeDtypeStruct
    whole = array((m, n), x.dtype)
    outs = _call(
        functools.partial(
            _body, tiles=tiles, activation=activation, sums=sums, keep=keep, by_column=by_column
        ),
        out=(
            *[whole] * (2 if keep else 1),
            *[array(slots, jnp.float32)] * len(sums.sums),
        ),
    )(x, w, b, scalars)
    a, *partials = outs
    z = partials.pop(0) if keep else None
    totals = [
        jnp.sum(partial, axis=None if over == "all" else 0)
        for partial, (_, over) in zip(partials, sums.sums, strict=True)
    ]
    return a, z, totals


def varying_as(outs: Any, operands: Any) -> Any:
    """Mark results as varying over the axes of a `shard_map` that the operands vary over.

    Pallas does not; what is computed with them would be refused.
    """
    wanted = varying_axes(*map(jax.typeof, operands))

    def mark(out: Any) -> Any:
        missing = tuple(wanted - varying_axes(jax.typeof(out)))
        return lax.pcast(out, missing, to="varying") if missing else out

    return jax.tree.map(mark, outs)


def _pallas() -> Any:
    """Return Pallas for GPUs, which takes long to import."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _call(body: Callable[..., None], out: Any) -> Any:
    plgpu = _pallas()
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(_BLOCKS,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="jaxreg_dense",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _body(
    # inputs
    x_ref: Any,  # (m, k)
    w_ref: Any,  # (k, n)
    b_ref: Any,  # (n,)
    scalars_ref: Any,  # (number of scalars,)
    # outputs: (m, n); if kept, z (m, n); for each sum (tiles, n) by column or (tiles, m) by row
    *out_refs: Any,
    tiles: Config,
    activation: Callable[[jax.Array], jax.Array],
    sums: Epilogue,
    keep: bool,
    by_column: bool,
) -> None:
    plgpu = _pallas()
    (m, k), n, dtype = x_ref.shape, w_ref.shape[1], x_ref.dtype
    whole_refs, partial_refs = out_refs[: 1 + keep], out_refs[1 + keep :]
    grid = (m // tiles.rows, n // tiles.columns)

    def swizzled(columns: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(columns * 16)
        return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    def pipeline(step: Callable[..., Any], epilogue: Callable[..., Any]) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // _DEPTH,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (tiles.rows, _DEPTH), lambda i: (0, i), transforms=swizzled(_DEPTH)
                ),
                plgpu.BlockSpec((_DEPTH, tiles.columns), lambda i: (i, 0), transforms=swizzled(64)),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=epilogue,
        )

    def nothing(*_: Any, **__: Any) -> None: ...

    stored = plgpu.SMEM((2, 2, _ROWS, _STORED_COLUMNS), dtype, transforms=swizzled(_STORED_COLUMNS))

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing).get_allocations(x_ref, w_ref),
        buffers=[stored] * len(whole_refs),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, buffers: Any) -> None:
        mine = lax.axis_index("warpgroup")

        def tile(loop: Any) -> None:
            i, j = plgpu.planar_snake(loop.index[0], grid, 1, tiles.width)
            # In warpgroups' tiles.
            row = i * 2 + mine if tiles.stacked else i
            column = j if tiles.stacked else j * 2 + mine

            def compute(run: Callable[..., Any]) -> None:
                @functools.partial(pl.run_scoped, sum_ref=plgpu.ACC((_ROWS, _COLUMNS), jnp.float32))
                def _(sum_ref: Any) -> None:
                    run(sum_ref)
                    finish(sum_ref[...])

            def finish(product: jax.Array) -> None:
                by_row: list[Any] = [0.0] * len(partial_refs)
                scalars = [scalars_ref[s] for s in range(len(sums.scalars))]
                rows = pl.ds(row * _ROWS, _ROWS)
                for part in range(_COLUMNS // _STORED_COLUMNS):
                    start = part * _STORED_COLUMNS
                    columns = pl.ds(column * _COLUMNS + start, _STORED_COLUMNS)
                    bias = plgpu.load(
                        b_ref.at[columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                    )
                    z = product[:, start : start + _STORED_COLUMNS]
                    z = z + lax.broadcast_in_dim(bias, z.shape, (1,))
                    a = activation(z).astype(dtype)
                    # The copy of two parts ago has left its buffer.
                    plgpu.wait_smem_to_gmem(len(whole_refs), wait_read_only=True)
                    for ref, buffer, value in zip(whole_refs, buffers, (a, z), strict=False):
                        slot = buffer.at[mine, part % 2]
                        slot[...] = value.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(slot, ref.at[rows, columns])
                    # What is measured is what is returned: the rounded activation.
                    values = evaluate([s for s, _ in sums.sums], a.astype(jnp.float32), scalars)
                    for s, (ref, value) in enumerate(zip(partial_refs, values, strict=True)):
                        if by_column:
                            ref[row, columns] = jnp.sum(value, axis=0)
                        else:
                            by_row[s] += jnp.sum(value, axis=1)
                for ref, total in zip(partial_refs, by_row, strict=True):
                    if not by_column:
                        ref[column, rows] = total

            def step(_: Any, x_tile: Any, w_tile: Any, sum_ref: Any) -> Any:
                if tiles.stacked:
                    x_tile = x_tile.at[pl.ds(mine * _ROWS, _ROWS)]
                else:
                    w_tile = w_tile.at[:, pl.ds(mine * _COLUMNS, _COLUMNS)]
                plgpu.wgmma(sum_ref, x_tile, w_tile)
                plgpu.wgmma_wait(0)
                return sum_ref

            pipeline(step, compute)(
                x_ref.at[pl.ds(i * tiles.rows, tiles.rows), :],
                w_ref.at[:, pl.ds(j * tiles.columns, tiles.columns)],
                allocations=allocations,
            )

        plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")(tile)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
