"""Run the benchmarks, each of which is one claim, and write what they give.

    python -m benchmarks [--only NAME ...] [--smoke] [--rounds N] [--json FILE] [--list]

Without `--smoke`, results go into `benchmarks/results/cpu.json`, and `benchmarks/RESULTS.md` is
written anew from it.
"""

import argparse
import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Any

# PyTorch's threads would spin on while another is timed.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from tqdm import tqdm

from ._report import HEAD, about, keep

CLAIMS = (
    "train_step",
    "activity",
    "linear_cross_entropy",
    "lasso",
    "optimizer",
    "scaling",
    "matrix",
    "ordered",
)
"""Each is a module with `rows(smoke, rounds)`, and perhaps `draw(rows, folder)` for a figure."""


def run(claim: str, smoke: bool, rounds: int, bar: Any) -> dict[str, Any]:
    """Return a claim's title, what it ran on, how often, and its rows, printing each."""
    module = importlib.import_module(f"benchmarks.{claim}")
    rows = []
    tqdm.write(f"\n{claim}: {_title(module)}\n{HEAD}")
    for row in module.rows(smoke, rounds):
        tqdm.write(row.line(rounds))
        bar.set_postfix_str(f"{claim}, {len(rows) + 1} rows")
        rows.append(row)
    if not smoke and hasattr(module, "draw"):
        module.draw(rows, Path(__file__).parent.parent / "docs")
    return {
        "title": _title(module),
        "about": about(),
        "rounds": rounds,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _title(module: Any) -> str:
    return " ".join(module.__doc__.split("\n\n")[0].split())


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=CLAIMS, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the claims")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round, nothing kept")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the results as well")
    options = parser.parse_args()
    if options.list:
        for claim in CLAIMS:
            print(f"{claim:22}{_title(importlib.import_module(f'benchmarks.{claim}'))}")
        return
    results = {}
    with tqdm(options.only, disable=None) as bar:
        for claim in bar:
            results[claim] = run(claim, options.smoke, 1 if options.smoke else options.rounds, bar)
            if not options.smoke:
                keep(Path(__file__).parent, {claim: results[claim]})
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
