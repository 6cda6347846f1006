"""The benchmarks' page is what their numbers give, and the README quotes it."""

import json
import re
import time
from pathlib import Path

import pytest

from benchmarks import _report
from benchmarks._report import Row
from benchmarks._timing import SHORTEST, interleaved

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


@pytest.mark.parametrize("queued", [False, True])
def test_queued_calls_are_waited_for_once_in_a_round(queued):
    events = []

    class Result:
        def block_until_ready(self):
            events.append("wait")

    def call():
        events.append("call")
        time.sleep(SHORTEST / 20)
        return Result()

    seconds = interleaved({"a": call}, 3, queued=queued)["a"]
    assert len(seconds) == 3
    assert min(seconds) >= SHORTEST / 20
    calls, waits = (events[4:].count(event) for event in ("call", "wait"))
    assert calls >= 6
    assert waits == (3 if queued else calls)
