"""Registers of the kernels in a function, as NVIDIA's assembler reports them."""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # before the first kernel is compiled

from ._report import compiled_for


@dataclasses.dataclass(frozen=True)
class Registers:
    """What one kernel uses.

    Args:
        kernel: its name.
        used: registers a thread.
        spilled: bytes that did not fit and go through memory, stored and loaded, a thread.
    """

    kernel: str
    used: int
    spilled: int


def registers(function: Callable[..., Any], arguments: Any, device: str) -> list[Registers]:
    """Compile a function for a GPU and return what each of its Mosaic kernels uses.

    Those alone that this process has not compiled before, for that GPU or one of the same
    architecture: the assembler sees no kernel twice.
    """
    with tempfile.TemporaryFile("w+") as file:
        with _printed_to(file.fileno()):
            compiled_for(function, arguments, device)
        file.seek(0)
        text = file.read()
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    return [Registers(name, int(used), int(out) + int(back)) for name, out, back, used in found]


@contextmanager
def _printed_to(target: int) -> Iterator[None]:
    """Send what the process prints to a file; the assembler does not print through Python."""
    sys.stdout.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    for descriptor in saved:
        os.dup2(target, descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        for descriptor, copy in saved.items():
            os.dup2(copy, descriptor)
            os.close(copy)
