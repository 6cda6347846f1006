"""How a kernel's product is cut into tiles, and by whom they are multiplied."""

import dataclasses
from typing import Literal, NamedTuple

ROWS, COLUMNS, DEPTH = 128, 128, 64  # a warpgroup's tile; its accumulator is 128 registers

# H100's and H200's multiprocessors. A GPU with fewer runs the rest of the grid after the first.
BLOCKS = 132
_SHARED_MEMORY = 232_448

Schedule = Literal["resident", "alternate", "together"]


class Problem(NamedTuple):
    """A product of (m, k) by (k, n), and what its epilogue takes.

    Args:
        m: rows.
        n: columns.
        k: depth.
        arrays: how many arrays of the output's shape the epilogue loads, or stores, whichever are
            more.
        columns: how many arrays (n,) it loads.
        by_column: whether it has sums for each column.
    """

    m: int
    n: int
    k: int
    arrays: int
    columns: int
    by_column: bool

    @property
    def scratch(self) -> int:
        """The bytes through which sums over rows go from warp to warp."""
        return 4096 if self.by_column else 0


@dataclasses.dataclass(frozen=True)
class Config:
    """How a block works.

    Args:
        schedule: "together": its two warpgroups multiply halves of one taller tile. "alternate":
            each has tiles of its own, and one multiplies while the other is in its epilogue.
            "resident": so, and the block keeps its columns of w for all the rows.
        stages: how many steps of the product are loaded ahead.
        paired: whether two blocks beside each other load their rows of x once.
        part: how many columns go through the epilogue at a time.
        slots: how many parts have a buffer.
        width: how many blocks' columns are walked through before the next rows.
    """

    schedule: Schedule
    stages: int
    paired: bool = False
    part: int = 32
    slots: int = 2
    width: int = 8

    @property
    def high(self) -> int:
        """How many warpgroups multiply what is loaded in one step."""
        return 2 if self.schedule == "together" else 1

    @property
    def blocks(self) -> int:
        """How many blocks load their rows together."""
        return 2 if self.paired else 1

    def bytes(self, problem: Problem) -> int:
        """Return the shared memory of a block."""
        x, w = (2 * DEPTH * size for size in (ROWS * self.high, COLUMNS))
        resident = self.schedule == "resident"
        steps = problem.k // DEPTH
        loaded = self.stages * x + (steps if resident else self.stages) * w
        buffers = problem.arrays * 2 * self.slots * ROWS * self.part * 2
        # 1 KiB for the barriers.
        return loaded + buffers + problem.columns * 2 * COLUMNS * 4 + problem.scratch + 1024

    def fits(self, problem: Problem) -> bool:
        """Return whether the tiles divide the product, and shared memory holds them."""
        m, n, k = problem[:3]
        divide = m and n and k and not (m % (2 * ROWS) or n % (COLUMNS * self.blocks) or k % DEPTH)
        # A buffer is freed once the next step is under way, which takes a second one.
        steps = k // DEPTH
        works = min(2, steps) <= self.stages <= steps
        return bool(divide) and works and self.bytes(problem) <= _SHARED_MEMORY

    def filled(self, problem: Problem) -> "Config":
        """Return the configuration with as many stages as fit, six at most; else with one."""
        stages = range(min(6, problem.k // DEPTH), 1, -1)
        tried = (dataclasses.replace(self, stages=count) for count in stages)
        return next((t for t in tried if t.fits(problem)), dataclasses.replace(self, stages=1))

    def chunks(self, problem: Problem) -> int:
        """Return into how many parts the rows are cut, each a piece of work for a block."""
        pairs = problem.m // (2 * ROWS)
        if self.schedule != "resident":
            return pairs
        # What loading the columns takes is as long as four tiles.
        strips = problem.n // COLUMNS

        def cost(chunks: int) -> float:
            return -(-strips * chunks // BLOCKS) * (2 * pairs // chunks + 4)

        return min((c for c in range(1, pairs + 1) if pairs % c == 0), key=cost)


def config(problem: Problem, loads: bool) -> Config | None:
    """Return the heuristic's configuration; None if there is none.

    Args:
        problem: the product.
        loads: whether the epilogue loads arrays of the output's shape.
    """
    # An epilogue that loads takes long: then it pays most to multiply meanwhile.
    schedules: list[tuple[Schedule, int]] = [("resident", 4 if loads else 2)]
    schedules += [("alternate" if loads else "together", 2), ("alternate", 2)]
    tried = [
        Config(schedule, 1, paired, slots=slots).filled(problem)
        for schedule, slots in schedules
        for paired in (schedule != "resident", False)
    ]
    # With fewer stages the others, which need not have room for all columns, are faster.
    enough = min(4, problem.k // DEPTH)
    tried = [t for t in tried if t.stages >= enough] + tried
    return next((tiles for tiles in tried if tiles.fits(problem)), None)
