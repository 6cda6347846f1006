"""What a benchmark yields, and how it is shown."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, Self

import jax

PACKAGES = ("jax", "flax", "optax", "keras", "torch", "jaxopt", "pyproximal", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        what: what over what.
        measured: its quartiles, and of how many rounds, if of any; None where it was not measured,
            and `note` then says why.
        target: "≤ 0.90", "≥ 1.5", or None.
        details: anything else that was measured, for the JSON.
        note: a remark, for instance why a target is missed.
    """

    what: str
    measured: dict[str, float] | None
    target: str | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @classmethod
    def skipped(cls, what: str, why: str, target: str | None = None) -> Self:
        """Return a row that was not measured."""
        return cls(what, None, target, note=why)

    @classmethod
    def exactly(cls, what: str, value: float, target: str | None = None, **details: Any) -> Self:
        """Return a row of a number that has no spread, such as compiled memory."""
        return cls(what, {"low": value, "median": value, "high": value}, target, details)

    def shown(self, rounds: int | None = None) -> str:
        """Return the median, half of the interquartile range, and of how many rounds.

        Args:
            rounds: as many as go without saying, unless it is one: that has no spread to show.
        """
        if self.measured is None:
            return "not measured"
        low, median, high = (self.measured[q] for q in ("low", "median", "high"))
        digits = 3 if abs(median) < 10 else 1
        spread = f" ± {(high - low) / 2:.{digits}f}" if low < high else ""
        own = self.measured.get("rounds")
        of = "" if own in (None, rounds) else f" ({own} rounds)"
        return f"{median:.{digits}f}{spread}{' (one round)' if own == 1 else of}"

    @property
    def verdict(self) -> str:
        """How it stands to 1, and to its target."""
        if self.measured is None:
            return ""
        low, median, high = (self.measured[q] for q in ("low", "median", "high"))
        same = low < 1 < high
        if self.target is None:
            return "no difference" if same else ""
        sign, bound = self.target.split()
        met = median <= float(bound) if sign == "≤" else median >= float(bound)
        if same and float(bound) == 1:
            return "no difference"
        return ("met" if met else "missed") + (", no difference" if same else "")

    def line(self, rounds: int | None = None) -> str:
        """Return the row of a Markdown table that is of so many rounds."""
        cells = self.what, self.shown(rounds), self.target or "", self.verdict, self.note
        return f"| {' | '.join(cells)} |"


HEAD = "| measure | result | target | | |\n| --- | --- | --- | --- | --- |"


def about() -> dict[str, Any]:
    """Return when and on what this runs."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def keep(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put results, by claim, into the JSON of all claims, and write the page anew.

    Args:
        folder: that of the benchmarks.
        results: for each claim its title, what it ran on, how often, and its rows.
    """
    path = folder / "results" / "cpu.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept | results, indent=1, ensure_ascii=False) + "\n")
    (folder / "RESULTS.md").write_text(page(kept | results))


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return all results as Markdown."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks`; do not edit. A ratio is the median of rounds that are"
        " interleaved in one process, ± half of its interquartile range; where the quartiles"
        " lie on both sides of 1, there is no difference.",
    ]
    for claim, result in results.items():
        ran = result["about"]
        versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
        lines = (Row(**row).line(result["rounds"]) for row in result["rows"])
        parts += [
            f"## {claim}",
            result["title"],
            f"`python -m benchmarks --only {claim} --rounds {result['rounds']}`, {ran['date']}, on"
            f" {ran['cores']} cores of a {ran['device']} ({ran['machine']}), Python"
            f" {ran['python']}, {versions}.",
            "\n".join([HEAD, *lines]),
        ]
    return "\n\n".join(parts) + "\n"
