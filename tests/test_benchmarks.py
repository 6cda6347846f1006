"""The benchmarks' page is what their numbers give, and the README quotes it."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import _report
from benchmarks._report import Row

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_page_is_what_the_numbers_give():
    numbers = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    assert _report.page(numbers) == RESULTS


def test_readme_quotes_rows_of_the_page():
    table = (ROOT / "README.md").read_text().split("## Measured")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+ ÷ .+?) \| (.+?) \|", table, re.M)
    assert len(rows) > 5
    for what, result in rows:
        assert f"| {what} | {result} |" in RESULTS


@pytest.mark.parametrize(
    ("quartiles", "target", "verdict"),
    [
        ((0.8, 0.85, 0.9), "≤ 0.90", "met"),
        ((0.9, 0.95, 1.1), "≤ 0.90", "missed, no difference"),
        ((0.9, 1.05, 1.1), "≤ 1.00", "no difference"),
        ((1.01, 1.05, 1.1), "≤ 1.00", "missed"),
        ((1.4, 1.6, 1.7), "≥ 1.5", "met"),
        ((1.4, 1.6, 1.7), None, ""),
        ((0.9, 1.6, 1.7), None, "no difference"),
    ],
)
def test_ratio_within_the_noise_is_no_difference(quartiles, target, verdict):
    row = Row("a ÷ b", dict(zip(("low", "median", "high"), quartiles, strict=True)), target)
    assert row.verdict == verdict


def test_row_that_was_not_measured_says_why():
    row = Row.skipped("a ÷ b", "needs b", "≤ 1.00")
    assert row.line() == "| a ÷ b | not measured | ≤ 1.00 |  | needs b |"
