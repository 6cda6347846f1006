"""The kernel: a matrix product on Hopper whose epilogue is one's own.

A persistent grid; in each block one warpgroup loads tiles by TMA into a ring of buffers and two
multiply them. What an epilogue sums goes to a slot for each tile, without atomics, so that the
result is deterministic.
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
from jaxreg.ops._tiles import COLUMNS, DEPTH, ROWS, Config, Problem

# How many rows go through the epilogue at a time.
HALF = ROWS // 2

# Of the loading warpgroup and of the two that multiply: together no more than a block has.
_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Results:
    """What an epilogue makes.

    Args:
        stored: how many arrays of the output's shape.
        summed: for each sum whether it is over everything, or one for each column.
    """

    stored: int
    summed: tuple[Over, ...]

    @property
    def by_column(self) -> bool:
        """Whether there are sums for each column."""
        return "examples" in self.summed

    def total(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the sums of arrays; over everything, or over the first axis, which is of tiles."""
        pairs = zip(values, self.summed, strict=True)
        return [jnp.sum(value, axis=None if over == "all" else 0) for value, over in pairs]


Finish = Callable[
    [jax.Array, Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]],
    tuple[Sequence[jax.Array], Sequence[jax.Array]],
]


def pallas() -> Any:
    """Return Pallas for GPUs, which takes long to import."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _store(ref: Any, values: jax.Array) -> None:
    """Store a part's sums, which need not fill the lines of 128 bytes."""
    if jax.__version_info__ < (0, 12):
        ref[...] = values
    else:
        pallas().store(ref, values, optimized=False)


def kernel(
    x_ref: Any,
    w_ref: Any,
    scalars_ref: Any,
    *refs: Any,
    tiles: Config,
    sizes: Problem,
    epilogue: Finish,
    results: Results,
    transposed: bool,
    loaded: int,
    columns: int,
    scalars: int,
) -> None:
    """Run in each of a block's three warpgroups; the first two multiply, the last loads.

    Args:
        x_ref: (m, k).
        w_ref: (k, n), or transposed (n, k).
        scalars_ref: (scalars,), at least one.
        *refs: inputs: loaded (m, n); columns (n,); then outputs: stored (m, n); sums, each for
            columns (m // ROWS, n), for everything (n // COLUMNS, m // 2).
        tiles: how the product is cut, and by whom it is multiplied.
        sizes: the product.
        epilogue: as that of `ops._product.product`.
        results: how much it returns.
        transposed: whether w is (n, k).
        loaded: how many arrays (m, n) it reads.
        columns: how many arrays (n,) it reads.
        scalars: how many numbers it reads.
    """
    plgpu = pallas()
    dtype = x_ref.dtype
    loaded_refs, refs = refs[:loaded], refs[loaded:]
    column_refs, refs = refs[:columns], refs[columns:]
    stored_refs, sum_refs = refs[: results.stored], refs[results.stored :]

    resident, together = tiles.schedule == "resident", tiles.schedule == "together"
    # In turns, each of the two warpgroups has steps of its own in the ring.
    turns = 1 if together else 2
    steps, parts = sizes.k // DEPTH, COLUMNS // tiles.part
    chunks = tiles.chunks(sizes)
    pairs = sizes.m // (2 * ROWS * chunks)
    grid = (chunks, sizes.n // (COLUMNS * tiles.blocks))

    def swizzled(columns: int) -> tuple[Any, ...]:
        swizzle = plgpu.find_swizzle(columns * 16)
        return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    barriers = 2 * tiles.stages
    freed = plgpu.Barrier(num_arrivals=tiles.high, num_barriers=barriers)
    if tiles.paired:  # by both blocks
        freed = plgpu.ClusterBarrier(
            collective_axes=("block",), num_arrivals=tiles.high, num_barriers=barriers
        )
    w_shape = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    part_buffer = plgpu.SMEM(
        (2, tiles.slots, ROWS, tiles.part), dtype, transforms=swizzled(tiles.part)
    )

    @functools.partial(
        pl.run_scoped,
        x_ring=plgpu.SMEM(
            (tiles.stages, ROWS * tiles.high, DEPTH), dtype, transforms=swizzled(DEPTH)
        ),
        w_ring=plgpu.SMEM(
            (steps if resident else tiles.stages, *w_shape), dtype, transforms=swizzled(64)
        ),
        full=plgpu.Barrier(num_arrivals=1 if resident else 2, num_barriers=barriers),
        freed=freed,
        w_full=plgpu.Barrier(num_arrivals=steps),
        w_freed=plgpu.Barrier(num_arrivals=2),
        buffers=[part_buffer] * sizes.arrays,
        arrived=[plgpu.Barrier(num_barriers=2 * tiles.slots)] * loaded,
        column_buffers=[plgpu.SMEM((2, COLUMNS), jnp.float32)] * columns,
        columns_arrived=[plgpu.Barrier(num_barriers=2)] * columns,
        sums_turn=plgpu.Barrier(num_barriers=2),
        collective_axes="warpgroup",
    )
    def _(
        x_ring: Any,
        w_ring: Any,
        full: Any,
        freed: Any,
        w_full: Any,
        w_freed: Any,
        buffers: Any,
        arrived: Any,
        column_buffers: Any,
        columns_arrived: Any,
        sums_turn: Any,
    ) -> None:
        mine = lax.axis_index("warpgroup")

        def walk(work: Callable[[Any, Any, Any, jax.Array], jax.Array]) -> jax.Array:
            """Do the block's pieces of work; carry the place in the ring."""

            def piece(loop: Any, carry: jax.Array) -> jax.Array:
                chunk, j = plgpu.planar_snake(loop.index[0], grid, 1, tiles.width)
                j = j * tiles.blocks + lax.axis_index("block")
                return work(loop.local_index, chunk * pairs, j, carry)

            loop = plgpu.nd_loop(
                (grid[0] * grid[1],), collective_axes="cluster", init_carry=jnp.int32(0)
            )
            end: jax.Array = loop(piece)
            return end

        def after(slot: jax.Array) -> jax.Array:
            """Return the next place in the ring: not by a remainder, which takes registers."""
            return jnp.where(slot == tiles.stages - 1, 0, slot + 1)

        def before(slot: jax.Array) -> jax.Array:
            """Return the last place in the ring."""
            return jnp.where(slot == 0, tiles.stages - 1, slot - 1)

        def skip(slot: jax.Array) -> jax.Array:
            """Return the place that is a tile's steps later."""
            later = slot + steps % tiles.stages
            return jnp.where(later >= tiles.stages, later - tiles.stages, later)

        def load() -> None:
            plgpu.set_max_registers(_REGISTERS[0], action="decrease")

            def load_w(step: Any, j: Any, buffer: Any, barrier: Any) -> None:
                depth, its_columns = pl.ds(step * DEPTH, DEPTH), pl.ds(j * COLUMNS, COLUMNS)
                at = (its_columns, depth) if transposed else (depth, its_columns)
                plgpu.copy_gmem_to_smem(w_ref.at[at], buffer, barrier)

            def work(piece: Any, first: Any, j: Any, slot: jax.Array) -> jax.Array:
                if resident:

                    @pl.when(piece > 0)
                    def _() -> None:
                        plgpu.barrier_wait(w_freed)

                    for step in range(steps):
                        load_w(step, j, w_ring.at[step], w_full)

                def load_step(turn: int, pair: Any, step: Any, slot: jax.Array) -> jax.Array:
                    rows = pl.ds(((first + pair) * 2 + turn) * ROWS, ROWS * tiles.high)
                    again = step >= tiles.stages
                    # The ring is no longer than a tile's steps: whose was what lies here?
                    owner = jnp.where(again, turn, turns - 1 - turn)

                    @pl.when(again | (piece > 0) | (pair > 0) | (turn > 0))
                    def _() -> None:
                        plgpu.barrier_wait(freed.at[owner * tiles.stages + slot])

                    barrier = full.at[turn * tiles.stages + slot]
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[rows, pl.ds(step * DEPTH, DEPTH)],
                        x_ring.at[slot],
                        barrier,
                        collective_axes="block" if tiles.paired else None,
                    )
                    if not resident:
                        load_w(step, j, w_ring.at[slot], barrier)
                    return after(slot)

                def load_pair(pair: Any, slot: jax.Array) -> jax.Array:
                    for turn in range(turns):
                        one = functools.partial(load_step, turn, pair)
                        slot = lax.fori_loop(0, steps, one, slot)
                    return slot

                end: jax.Array = lax.fori_loop(0, pairs, load_pair, slot)
                return end

            slot = walk(work)

            # No block may end while another tells it what is free.
            @pl.when(lax.axis_index("cluster") < grid[0] * grid[1])
            def _() -> None:
                if resident:
                    plgpu.barrier_wait(w_freed)

                def wait(_: Any, slot: jax.Array) -> jax.Array:
                    plgpu.barrier_wait(freed.at[(turns - 1) * tiles.stages + slot])
                    return after(slot)

                lax.fori_loop(0, tiles.stages, wait, slot)

        def multiply() -> None:
            plgpu.set_max_registers(_REGISTERS[1], action="increase")

            @pl.when(mine == 1)
            def _() -> None:
                plgpu.barrier_arrive(sums_turn.at[0])

            def work(_: Any, first: Any, j: Any, slot: jax.Array) -> jax.Array:
                if resident:
                    plgpu.barrier_wait(w_full)

                def turn_of(pair: Any, slot: jax.Array) -> jax.Array:
                    # The other one's steps are half a turn of both.
                    own = slot if together else jnp.where(mine == 0, slot, skip(slot))
                    tile((first + pair) * 2 + mine, j, own)
                    return skip(slot) if together else skip(skip(slot))

                slot = lax.fori_loop(0, pairs, turn_of, slot)
                if resident:
                    plgpu.barrier_arrive(w_freed)
                return slot

            walk(work)

            @pl.when(mine == 0)
            def _() -> None:
                plgpu.barrier_wait(sums_turn.at[0])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def tile(row: Any, j: Any, first: jax.Array) -> None:
            rows = pl.ds(row * ROWS, ROWS)

            def at(part: int) -> Any:
                return pl.ds(j * COLUMNS + part * tiles.part, tiles.part)

            def fetch(part: int) -> None:
                slot = part % tiles.slots
                for ref, slots, barriers in zip(loaded_refs, buffers, arrived, strict=False):
                    plgpu.copy_gmem_to_smem(
                        ref.at[rows, at(part)],
                        slots.at[mine, slot],
                        barriers.at[mine * tiles.slots + slot],
                    )

            # What is stored leaves from where what is loaded has arrived.
            if loaded:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for part in range(min(tiles.slots, parts)):
                fetch(part)
            for ref, held, barriers in zip(
                column_refs, column_buffers, columns_arrived, strict=True
            ):
                plgpu.copy_gmem_to_smem(
                    ref.at[pl.ds(j * COLUMNS, COLUMNS)], held.at[mine], barriers.at[mine]
                )

            turn = 0 if together else mine * tiles.stages

            def multiply_step(sum_ref: Any, step: Any, slot: jax.Array) -> jax.Array:
                plgpu.barrier_wait(full.at[turn + slot])
                x_tile = x_ring.at[slot]
                if together:
                    x_tile = x_ring.at[slot, pl.ds(mine * ROWS, ROWS)]
                w_tile = w_ring.at[step if resident else slot]
                plgpu.wgmma(sum_ref, x_tile, w_tile.transpose((1, 0)) if transposed else w_tile)
                # All but this step's are done.
                plgpu.wgmma_wait(1)

                @pl.when(step > 0)
                def _() -> None:
                    plgpu.barrier_arrive(freed.at[turn + before(slot)])

                return after(slot)

            def vector(held: Any, part: int) -> jax.Array:
                layout = plgpu.Layout.WGMMA.reduce(0)
                its_part = held.at[mine, pl.ds(part * tiles.part, tiles.part)]
                values = plgpu.load(its_part, layout=layout, optimized=False)
                return lax.broadcast_in_dim(values, (HALF, tiles.part), (1,))

            def finish(product: jax.Array) -> None:
                numbers = [scalars_ref[s] for s in range(scalars)]
                for barriers in columns_arrived:
                    plgpu.barrier_wait(barriers.at[mine])
                # One array for everything, or one for each part.
                sums: list[list[jax.Array]] = [[] for _ in results.summed]
                for part in range(parts):
                    its_columns = product[:, part * tiles.part : (part + 1) * tiles.part]
                    finish_part(its_columns, part, numbers, sums)
                for ref, over, held in zip(sum_refs, results.summed, sums, strict=True):
                    if over == "all":
                        ref[j, pl.ds(row * HALF, HALF)] = jnp.sum(held[0], axis=1)
                if results.by_column:
                    # A sum over rows goes from warp to warp through scratch, of which a block has
                    # one: its warpgroups take turns.
                    plgpu.barrier_wait(sums_turn.at[mine])
                    for ref, over, held in zip(sum_refs, results.summed, sums, strict=True):
                        if over == "examples":
                            for part, value in enumerate(held):
                                _store(ref.at[row, at(part)], jnp.sum(value, axis=0))
                    plgpu.barrier_arrive(sums_turn.at[1 - mine])

            def finish_part(
                product: jax.Array, part: int, numbers: Any, sums: list[list[jax.Array]]
            ) -> None:
                slot = part % tiles.slots
                if not loaded:
                    # What was stored from this buffer has left it.
                    outstanding = results.stored * (tiles.slots - 1)
                    plgpu.wait_smem_to_gmem(outstanding, wait_read_only=True)
                elif part > 0 and tiles.slots <= part + 1 < parts:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    fetch(part + 1)
                for barriers in arrived:
                    plgpu.barrier_wait(barriers.at[mine * tiles.slots + slot])
                vectors = [vector(held, part) for held in column_buffers]
                # All rows at once would take more registers than there are.
                for half in range(2):
                    its_rows = pl.ds(half * HALF, HALF)
                    given = [slots[mine, slot, its_rows] for slots in buffers[:loaded]]
                    its_product = product[half * HALF : (half + 1) * HALF]
                    whole, summed = epilogue(its_product, given, vectors, numbers)
                    for slots, value in zip(buffers, whole, strict=False):
                        slots[mine, slot, its_rows] = value.astype(dtype)
                    # What lies in one thread is added up as it comes.
                    for held, over, value in zip(sums, results.summed, summed, strict=True):
                        if not held or (over == "examples" and half == 0):
                            held.append(value)
                        else:
                            held[-1] += value
                plgpu.commit_smem()
                for ref, slots in zip(stored_refs, buffers, strict=False):
                    plgpu.copy_smem_to_gmem(slots.at[mine, slot], ref.at[rows, at(part)])

            @functools.partial(pl.run_scoped, sum_ref=plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            def _(sum_ref: Any) -> None:
                end = lax.fori_loop(0, steps, functools.partial(multiply_step, sum_ref), first)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(freed.at[turn + before(end)])
                finish(sum_ref[...])

        lax.cond(mine == 2, load, multiply)
