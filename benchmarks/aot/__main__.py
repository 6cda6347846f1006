"""Print what penalties cost on accelerators that are not there."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import DEVICES, Registers, registers, report
from .cases import CASES, FUSED, LARGE, SMALL, chains, fused, fused_step, update

import jax  # isort: skip

KEYS = ("kernels", "touching", "bytes", "temporary")


def main() -> None:
    """Print two tables for each device: models with a penalty ÷ without, and optimizer chains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument(
        "--device", action="append", choices=DEVICES, help="all of them if not given"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for device in options.device or DEVICES:
        try:
            DEVICES[device]()
        except jax.errors.JaxRuntimeError as error:
            # A newer device than the installed compiler; a missing plugin is an error of its own.
            if "Invalid TPU" not in str(error):
                raise
            print(f"\n{device}: unknown to the installed libtpu")
            continue
        print(f"\n{device}: with a penalty (÷ without); touching: kernels that see the activation")
        print(f"{'':42}" + "".join(f"{key:>24}" for key in KEYS))
        rows.extend(_models(device))
        rows.extend(_optimizers(device))
        if device in ("H100", "H200"):
            rows.extend(_kernels(device))
            rows.extend(_widths(device))
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1))


def _models(device: str) -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        without, penalized = (
            report(*case.step(p), device, donate=(), touching=case.code) for p in (False, True)
        )
        _show(name, penalized, without)
        yield {"device": device, "case": name, "with": penalized, "without": without}


def _optimizers(device: str) -> Iterator[dict[str, Any]]:
    for leaves, params in (("4 leaves of 25 million", LARGE), ("200 leaves of 65,536", SMALL)):
        print(f"{leaves} (÷ AdamW)")
        baseline: dict[str, float] = {}
        for name, chain in chains().items():
            cost = report(*update(chain, params), device)
            baseline = baseline or cost
            _show(name, cost, baseline)
            yield {"device": device, "leaves": leaves, "chain": name, **cost}


def _kernels(device: str) -> Iterator[dict[str, Any]]:
    for what, case in (("ops.dense, forward", fused), ("ops.mlp, autoencoder's step", fused_step)):
        print(f"{what}: the Hopper kernels (÷ XLA)")
        for name in FUSED:
            used = registers(*case(name), device)
            xla, ours = (
                report(*case(name, i), device, donate=(), touching=(8192, 16384))
                for i in ("xla", "mosaic_gpu")
            )
            _show(name, ours, xla)
            yield {
                "device": device,
                "fused": what,
                "case": name,
                "xla": xla,
                "mosaic_gpu": ours,
                "registers": _show_registers(used),
            }


def _widths(device: str) -> Iterator[dict[str, Any]]:
    print("ops.mlp, autoencoder's step with ReLU and L1, by width (÷ XLA without the penalty)")
    for width in (256, 512, 1024, 4096):
        used = registers(*fused_step("relu, L1", "mosaic_gpu", width), device)
        without, xla, ours = (
            report(*fused_step("relu, L1", i, width), device, donate=(), touching=(8192, 16384))
            for i in (None, "xla", "mosaic_gpu")
        )
        _show(f"{width}, XLA", xla, without)
        _show(f"{width}, kernels", ours, without)
        yield {
            "device": device,
            "width": width,
            "without": without,
            "xla": xla,
            "mosaic_gpu": ours,
            "registers": _show_registers(used),
        }


def _show_registers(used: list[Registers]) -> list[dict[str, Any]]:
    for kernel in used:
        print(f"  {kernel.used} registers, {kernel.spilled} bytes spilled")
    return [dataclasses.asdict(kernel) for kernel in used]


def _show(name: str, cost: dict[str, float], baseline: dict[str, float]) -> None:
    cells = [
        f"{cost[key]:,} ({cost[key] / baseline[key]:.3f})"
        if baseline.get(key)
        else f"{cost[key]:,}"
        for key in KEYS
        if key in cost
    ]
    if "touching" not in cost:
        cells.insert(1, "")
    print(f"{name:42}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
