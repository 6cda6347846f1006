"""Kernels, and the bytes they move, read off an optimized HLO module."""

import dataclasses
import math
import re
from collections.abc import Iterator

# What starts no kernel, or only names what another instruction made.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# A pair of instructions for one transfer, which counts where it starts.
_STARTS = {"copy-start", "slice-start"}
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a kernel reads or writes.

    Args:
        entries: how many it has.
        size: in bytes.
        main: whether it lies in the device's main memory (HBM), and not in VMEM.
    """

    entries: int
    size: int
    main: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that the device executes.

    Args:
        name: the instruction's.
        opcode: of HLO, such as "fusion" or "custom-call".
        arrays: what it reads and writes.
        times: how often it runs, for the body of a loop of known length.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    times: int

    @property
    def bytes(self) -> int:
        """What it moves to and from the main memory, each array once, whole."""
        return self.times * sum(array.size for array in self.arrays if array.main)

    def touches(self, shape: tuple[int, ...]) -> bool:
        """Return whether it reads or writes an array of as many entries.

        By their number, since XLA reshapes, transposes and pads at will.
        """
        return any(array.entries == math.prod(shape) for array in self.arrays)


def kernels(text: str) -> list[Kernel]:
    """Return the kernels of an optimized module, in order; a loop's as often as it runs.

    A prefetch into a TPU's VMEM is no kernel of its own; it counts in `transfers`.
    """
    return [k for k in _walk(_computations(text), "ENTRY", 1) if k.opcode not in _STARTS]


def transfers(text: str) -> list[Kernel]:
    """Return the copies between HBM and VMEM that run beside the kernels."""
    return [k for k in _walk(_computations(text), "ENTRY", 1) if k.opcode in _STARTS]


def _computations(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation, by name; the entry is "ENTRY"."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.replace("%", "").split(None, 1)[0]
            lines = computations.setdefault(name, [])
        else:
            lines.append(line)
    return computations


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Kernel]:
    results: dict[str, tuple[Array, ...]] = {}
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        result, shape, opcode, rest = match.groups()
        results[result] = arrays = _arrays(shape)
        inner = re.search(r"(?:body|to_apply)=%?([\w.-]+)", rest)
        if opcode == "while" and inner:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            if not trips:
                raise ValueError(f"XLA does not say how often the loop {result} runs.")
            yield from _walk(computations, inner[1], times * int(trips[1]))
        elif opcode == "call" and inner:
            yield from _walk(computations, inner[1], times)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            read = tuple(a for operand in operands for a in results.get(operand, ()))
            if opcode in _STARTS:  # its result also names the source; only a slice of that may move
                moved = arrays[0]
                read, arrays = (dataclasses.replace(moved, main=read[0].main),), (moved,)
            yield Kernel(result, opcode, read + arrays, times)


def _arrays(shape: str) -> tuple[Array, ...]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        entries = math.prod(int(size) for size in sizes.split(",") if size)
        main = re.search(r"S\(\d+\)", layout) is None
        found.append(Array(entries, entries * _WIDTH.get(dtype, 4), main))
    return tuple(found)
