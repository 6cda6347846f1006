"""A matrix product on Hopper whose epilogue is one's own.

A persistent grid; in each block one warpgroup loads tiles by TMA and two multiply them. What an
epilogue sums goes to a slot for each tile, without atomics, so that the result is deterministic.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxreg.ops._epilogue import Over

PLATFORMS: tuple[str, ...] = ("cuda",)

# H100's and H200's multiprocessors. A GPU with fewer runs the rest of the grid after the first.
_BLOCKS = 132
_SHARED_MEMORY = 232_448
_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # a warpgroup's tile; its accumulator is 128 registers


@dataclasses.dataclass(frozen=True)
class Config:
    """How the output is tiled.

    Args:
        stacked: whether a block's two warpgroups lie above each other, or side by side.
        stages: how many steps of the product are loaded ahead.
        width: how many blocks' columns are walked through before the next rows.
        part: how many columns go through the epilogue at a time.
    """

    stacked: bool
    stages: int
    width: int = 8
    part: int = 32

    @property
    def rows(self) -> int:
        """A block's rows."""
        return _ROWS * (2 if self.stacked else 1)

    @property
    def columns(self) -> int:
        """A block's columns."""
        return _COLUMNS * (1 if self.stacked else 2)


def config(m: int, n: int, k: int, arrays: int, part: int = 32) -> Config | None:
    """Return the heuristic's configuration for an (m, k) by (k, n) product; None if there is none.

    Args:
        m: rows.
        n: columns.
        k: depth.
        arrays: how many arrays of the output's shape the epilogue stores and loads.
        part: how many columns go through the epilogue at a time; fewer take fewer registers.
    """
    for stacked in (True, False):
        for stages in (4, 3, 2, 1):
            tiles = Config(stacked, stages, part=part)
            if fits(tiles, m, n, k, arrays):
                return tiles
    return None


def fits(tiles: Config, m: int, n: int, k: int, arrays: int) -> bool:
    """Return whether these tiles divide the product, and shared memory holds them; see `config`."""
    divide = m and n and k and not (m % tiles.rows or n % tiles.columns or k % _DEPTH)
    loaded = tiles.stages * 2 * _DEPTH * (tiles.rows + tiles.columns)
    buffers = arrays * 2 * 2 * 2 * _ROWS * tiles.part
    # 4 KiB for the barriers and the sums' own scratch.
    held = loaded + buffers + 4096 <= _SHARED_MEMORY
    return bool(divide) and held and tiles.stages <= k // _DEPTH


def refusal(m: int, n: int, k: int, what: tuple[str, str, str], *operands: jax.Array) -> str | None:
    """Return why these operands of an (m, k) by (k, n) product cannot be multiplied, or None.

    Args:
        m: rows.
        n: columns.
        k: depth.
        what: what the three are called.
        operands: arrays that must be of one narrow type.
    """
    if jax.__version_info__ < (0, 12):
        return f"its kernel needs JAX 0.12 or newer; this is JAX {jax.__version__}"
    dtypes = [operand.dtype for operand in operands]
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.bfloat16, jnp.float16):
        return (
            "its matrices must all be bfloat16 or all float16; got"
            f" {', '.join(str(dtype) for dtype in dtypes)}"
        )
    if any(entry is not None for x in operands for entry in jax.typeof(x).sharding.spec):
        return "its arrays are split over devices; within `jax.shard_map` it takes its shards'"
    if config(m, n, k, 2) is None:
        return (
            f"{what[0]} and {what[1]} must be multiples of {2 * _ROWS} and {_COLUMNS}, or of"
            f" {_ROWS} and {2 * _COLUMNS}, and {what[2]} of {_DEPTH}; got {m}, {n}, {k}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Results:
    """What an epilogue makes.

    Args:
        stored: how many arrays of the output's shape.
        summed: for each sum whether it is over everything, or one for each column.
        by_column: whether the kernel adds up over rows first; else over columns.
    """

    stored: int
    summed: tuple[Over, ...]
    by_column: bool

    def total(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the sums of arrays whose first axis is of rows, or of rows of tiles."""
        pairs = zip(values, self.summed, strict=True)
        return [jnp.sum(value, axis=None if over == "all" else 0) for value, over in pairs]


Finish = Callable[
    [jax.Array, Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]],
    tuple[Sequence[jax.Array], Sequence[jax.Array]],
]


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
    m, n = x.shape[0], w.shape[0 if transposed else 1]
    slots = (m // _ROWS, n) if results.by_column else (n // _COLUMNS, m)
    array: Any = jax.ShapeDtypeStruct
    # At least one, as an operand must not be empty.
    handed = jnp.stack([jnp.asarray(s, jnp.float32) for s in scalars or [jnp.zeros(())]])
    outs = _call(
        functools.partial(
            _body,
            tiles=tiles,
            epilogue=epilogue,
            results=results,
            transposed=transposed,
            loaded=len(loaded),
            columns=len(columns),
            scalars=len(scalars),
        ),
        name,
        out=(
            *[array((m, n), x.dtype)] * results.stored,
            *[array(slots, jnp.float32)] * len(results.summed),
        ),
    )(x, w, handed, *loaded, *[column.astype(jnp.float32) for column in columns])
    return list(outs[: results.stored]), results.total(outs[results.stored :])


def _pallas() -> Any:
    """Return Pallas for GPUs, which takes long to import."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _call(body: Callable[..., None], name: str, out: Any) -> Any:
    plgpu = _pallas()
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(_BLOCKS,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _body(
    # inputs
    x_ref: Any,  # (m, k)
    w_ref: Any,  # (k, n), or (n, k)
    scalars_ref: Any,  # (number of scalars,)
    # inputs: loaded (m, n); columns (n,)
    # outputs: stored (m, n); sums, each (tiles, n) by column or (tiles, m) by row
    *refs: Any,
    tiles: Config,
    epilogue: Finish,
    results: Results,
    transposed: bool,
    loaded: int,
    columns: int,
    scalars: int,
) -> None:
    plgpu = _pallas()
    (m, k), n, dtype = x_ref.shape, w_ref.shape[0 if transposed else 1], x_ref.dtype
    loaded_refs, refs = refs[:loaded], refs[loaded:]
    column_refs, refs = refs[:columns], refs[columns:]
    stored_refs, sum_refs = refs[: results.stored], refs[results.stored :]
    grid = (m // tiles.rows, n // tiles.columns)
    parts = _COLUMNS // tiles.part

    def swizzled(columns: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(columns * 16)
        return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    def pipeline(step: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        w_shape = (tiles.columns, _DEPTH) if transposed else (_DEPTH, tiles.columns)
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // _DEPTH,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (tiles.rows, _DEPTH), lambda i: (0, i), transforms=swizzled(_DEPTH)
                ),
                plgpu.BlockSpec(
                    w_shape,
                    (lambda i: (0, i)) if transposed else (lambda i: (i, 0)),
                    transforms=swizzled(64),
                ),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=compute,
        )

    def nothing(*_: Any, **__: Any) -> None: ...

    buffer = plgpu.SMEM((2, 2, _ROWS, tiles.part), dtype, transforms=swizzled(tiles.part))

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(nothing, nothing).get_allocations(x_ref, w_ref),
        loads=[buffer] * loaded,
        arrived=[plgpu.Barrier(num_barriers=4)] * loaded,
        stores=[buffer] * results.stored,
        collective_axes="warpgroup",
    )
    def _(allocations: Any, loads: Any, arrived: Any, stores: Any) -> None:
        mine = lax.axis_index("warpgroup")

        def tile(loop: Any) -> None:
            i, j = plgpu.planar_snake(loop.index[0], grid, 1, tiles.width)
            # In warpgroups' tiles.
            row = i * 2 + mine if tiles.stacked else i
            column = j if tiles.stacked else j * 2 + mine
            rows = pl.ds(row * _ROWS, _ROWS)

            def at(part: int) -> Any:
                return pl.ds(column * _COLUMNS + part * tiles.part, tiles.part)

            def fetch(part: int) -> None:
                for ref, slots, barriers in zip(loaded_refs, loads, arrived, strict=True):
                    slot, barrier = slots.at[mine, part % 2], barriers.at[mine * 2 + part % 2]
                    plgpu.copy_gmem_to_smem(ref.at[rows, at(part)], slot, barrier)

            def compute(run: Callable[..., Any]) -> None:
                for part in range(2):
                    fetch(part)

                @functools.partial(pl.run_scoped, sum_ref=plgpu.ACC((_ROWS, _COLUMNS), jnp.float32))
                def _(sum_ref: Any) -> None:
                    run(sum_ref)
                    finish(sum_ref[...])

            def arrive(part: int) -> list[jax.Array]:
                tiles = []
                for slots, barriers in zip(loads, arrived, strict=True):
                    plgpu.barrier_wait(barriers.at[mine * 2 + part % 2])
                    tiles.append(slots[mine, part % 2])
                return tiles

            def vector(ref: Any, part: int) -> jax.Array:
                layout = plgpu.Layout.WGMMA.reduce(0)
                values = plgpu.load(ref.at[at(part)], layout=layout, optimized=False)
                return lax.broadcast_in_dim(values, (_ROWS, tiles.part), (1,))

            def finish(product: jax.Array) -> None:
                by_row: list[Any] = [0.0] * len(sum_refs)
                numbers = [scalars_ref[s] for s in range(scalars)]
                for part in range(parts):
                    whole, summed = epilogue(
                        product[:, part * tiles.part : (part + 1) * tiles.part],
                        arrive(part),
                        [vector(ref, part) for ref in column_refs],
                        numbers,
                    )
                    # The copy of two parts ago has left its buffer.
                    plgpu.wait_smem_to_gmem(len(stored_refs), wait_read_only=True)
                    for ref, slots, value in zip(stored_refs, stores, whole, strict=True):
                        slot = slots.at[mine, part % 2]
                        slot[...] = value.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(slot, ref.at[rows, at(part)])
                    # All have read what was loaded: they have met, to store.
                    if part + 2 < parts:
                        fetch(part + 2)
                    for s, (ref, value) in enumerate(zip(sum_refs, summed, strict=True)):
                        if results.by_column:
                            plgpu.store(
                                ref.at[row, at(part)], jnp.sum(value, axis=0), optimized=False
                            )
                        else:
                            by_row[s] += jnp.sum(value, axis=1)
                for ref, total in zip(sum_refs, by_row, strict=True):
                    if not results.by_column:
                        ref[column, rows] = total

            def step(_: Any, x_tile: Any, w_tile: Any, sum_ref: Any) -> Any:
                if tiles.stacked:
                    x_tile = x_tile.at[pl.ds(mine * _ROWS, _ROWS)]
                elif transposed:
                    w_tile = w_tile.at[pl.ds(mine * _COLUMNS, _COLUMNS)]
                else:
                    w_tile = w_tile.at[:, pl.ds(mine * _COLUMNS, _COLUMNS)]
                plgpu.wgmma(sum_ref, x_tile, w_tile.transpose((1, 0)) if transposed else w_tile)
                plgpu.wgmma_wait(0)
                return sum_ref

            its_columns = pl.ds(j * tiles.columns, tiles.columns)
            pipeline(step, compute)(
                x_ref.at[pl.ds(i * tiles.rows, tiles.rows), :],
                w_ref.at[its_columns, :] if transposed else w_ref.at[:, its_columns],
                allocations=allocations,
            )

        plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")(tile)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
