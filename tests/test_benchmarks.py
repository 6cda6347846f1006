"""The benchmarks' page is what their numbers give, the README quotes it, and they check first."""

import functools
import importlib
import itertools
import json
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxreg as jr
from benchmarks import _report, activity, matrix, optimizer, scaling
from benchmarks._report import Row
from benchmarks._timing import SHORTEST, compilations, interleaved, ratios, shuffled

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


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ([2.0] * 15, "2.000"),
        ([1.0, 2.0, 3.0], "2.000 ± 0.500 (3 rounds)"),
        ([2.0], "2.000 (one round)"),
    ],
)
def test_row_says_of_how_many_rounds_it_is_where_the_table_is_of_others(seconds, shown):
    row = Row("a ÷ b", ratios({"a": seconds, "b": [1.0] * len(seconds)}, "a", "b"))
    assert row.shown(15) == shown
    result = {"title": "", "about": _report.about(), "rounds": 15, "rows": [vars(row)]}
    assert f"| a ÷ b | {shown} |" in _report.page({"claim": result})


def test_one_round_has_no_spread_to_show_and_a_number_without_rounds_needs_none():
    assert Row("a ÷ b", ratios({"a": [2.0], "b": [1.0]}, "a", "b")).shown(1) == "2.000 (one round)"
    assert Row.exactly("bytes", 2.0).shown(1) == "2.000"


@pytest.mark.parametrize(("claim", "peer"), [("lasso", "jaxopt"), ("ordered", "pyproximal")])
def test_peer_that_is_not_installed_is_a_row_that_says_so(claim, peer, monkeypatch):
    monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.delitem(sys.modules, f"benchmarks.{claim}", raising=False)
    rows = list(importlib.import_module(f"benchmarks.{claim}").rows(True, 1))
    assert [row.measured is None for row in rows] == [peer in row.what for row in rows]
    assert {row.note for row in rows if row.measured is None} == {'needs the extra "bench"'}


def test_each_round_has_its_own_order():
    names = list(shuffled("abc", 20))
    orders = list(zip(*[iter(names)] * 3, strict=True))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2


def test_compilations_start_with_empty_caches_once_a_round(monkeypatch):
    events = []
    monkeypatch.setattr(jax, "clear_caches", lambda: events.append("clear"))
    seconds = compilations({name: functools.partial(events.append, name) for name in "ab"}, 8)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 8, "b": 8}
    assert events[::2] == ["clear"] * 16
    assert events[1::2] == list(shuffled("ab", 8))


def test_each_matrix_penalty_is_timed_against_its_own_formula():
    what = [row.what.split(": ")[1] for row in matrix.orthogonality((8, 32), 1)]
    assert what == [
        "jr.Orthogonal ÷ Keras's formula",
        "jr.SoftOrthogonal ÷ the formula of Bansal et al.",
        "jr.OffDiagonalOrthogonal ÷ Sonnet's formula",
    ]


@pytest.mark.parametrize("formula", ["keras_orthogonal", "soft_orthogonal", "off_diagonal"])
def test_matrix_penalty_that_differs_from_its_formula_is_not_timed(formula, monkeypatch):
    monkeypatch.setattr(matrix, formula, lambda w: 1.001 * jnp.sum(jnp.square(w)))
    with pytest.raises(AssertionError, match="differs from"):
        list(matrix.orthogonality((8, 32), 1))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("add_penalty_gradient", lambda reg: optax.identity()),
        ("apply_prox", lambda reg, step: optax.identity()),
        ("proximal_adam", lambda step, reg: optax.adam(step)),
    ],
    ids=["add_penalty_gradient", "apply_prox", "proximal_adam"],
)
def test_optimizer_that_leaves_the_penalty_out_is_not_timed(name, without, monkeypatch):
    monkeypatch.setattr(jr, name, without)
    for rows in (optimizer.step_cost(40_000, 1), scaling.parameters((40_000,), 1)):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            next(rows)


@pytest.mark.parametrize(
    ("rows", "penalty", "match"),
    [
        (lambda: scaling.leaves((2,), 1), "L2", "Not equal to tolerance"),
        (lambda: optimizer.compile_cost((2,), 1), "L2", "Not equal to tolerance"),
        (lambda: scaling.sites((2,), 1), "L1", "2 sites, with"),
        (lambda: activity.compilation(activity.SMOKE, 1), "L1", "and that of captured"),
        (lambda: activity.step(activity.SMOKE, 1), "L1", "and that of captured"),
    ],
    ids=["leaves", "compile_cost", "sites", "compilation", "step"],
)
def test_penalty_that_is_off_is_not_timed(rows, penalty, match, monkeypatch):
    right = getattr(jr, penalty)
    monkeypatch.setattr(jr, penalty, lambda strength: right(1.1 * strength))
    with pytest.raises(AssertionError, match=match):
        next(rows())


def test_leaves_are_also_penalized_by_hand():
    curves = [row.details["curve"] for row in scaling.leaves((2,), 1)]
    own = "leaves", "leaves, trace and compile"
    assert curves == list(itertools.chain(*((curve, f"{curve}, by hand") for curve in own)))


def test_a_sweep_one_by_one_takes_no_array_apart_where_it_is_timed(monkeypatch):
    timed = {}

    def keep(functions, rounds):
        timed.update(functions)
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(optimizer, "interleaved", keep)
    optimizer.sweep("linear", 3, 1, 1)
    array = type(jnp.ones(1))
    monkeypatch.setattr(array, "__iter__", lambda _: pytest.fail("an array was taken apart"))
    assert len(timed["one by one"]()) == 3


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
