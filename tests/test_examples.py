"""The examples run, and what they claim holds already in their quick runs."""

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# One worker makes what the tests of this module share.
pytestmark = pytest.mark.xdist_group("examples")

EXAMPLES = Path(__file__).parents[1] / "examples"

Rows = dict[tuple[str, float], dict[str, float]]


def run(script, directory):
    """Return what an example prints; it runs as a user runs it."""
    completed = subprocess.run(
        [sys.executable, EXAMPLES / script, "--quick"],
        cwd=directory,
        env={
            **os.environ,
            "MPLBACKEND": "Agg",
            "JAX_PLATFORMS": "cpu",
            "PYTHONIOENCODING": "utf-8",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def table(printed: str, first_line: str) -> Rows:
    """Return a printed table's means, by network and strength; shares as fractions."""
    lines = iter(printed.splitlines())
    assert any(line.startswith(first_line) for line in lines), f"no {first_line!r} in:\n{printed}"
    header: list[str] = []
    rows: Rows = {}
    for line in lines:
        if not header:
            header = re.split(r"\s{2,}", line)
        elif "±" in line:
            name, strength, *cells = re.split(r"\s{2,}", line)
            means = [re.fullmatch(r"(\S+?)(%?) ± \S+", cell) for cell in cells]
            values = [float(m[1]) / (100 if m[2] else 1) for m in means if m]
            rows[name, float(strength)] = dict(zip(header[2:], values, strict=True))
        else:
            break
    return rows


def cells(printed: str, first_line: str) -> dict[str, list[str]]:
    """Return the cells of a printed table's rows, by their first."""
    _, _, rest = printed.partition(f"\n{first_line}")
    rows = [re.split(r"\s{2,}", line) for line in rest.split("\n\n")[0].splitlines()[1:]]
    assert rows, f"no {first_line!r} in:\n{printed}"
    return {name: row for name, *row in rows}


def load(script):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_is_a_figure(path, least, most):
    """Assert that a file is a PNG with something on it, and how wide it is for its height."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 4000
    assert least < width / height < most
    assert len(data) > 20_000


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernel_vs_activity")
    return run("kernel_vs_activity.py", directory), directory


@pytest.fixture(scope="module")
def nnx(tmp_path_factory):
    return run("sparse_autoencoder_nnx.py", tmp_path_factory.mktemp("nnx"))


def test_only_the_activity_penalty_unsaturates_without_harm(linen):
    rows = table(linen[0], "1. Saturation")
    assert len(rows) == 9
    plain = rows["no penalty", 0]
    assert plain["largest |weight|"] < 0.3
    assert plain["saturated"] > 0.4

    for strength in (1e-4, 1e-3, 1e-2):
        helped = rows["activity L2", strength]
        assert helped["saturated"] < 0.05
        assert helped["accuracy"] > plain["accuracy"] + 0.03

    assert rows["kernel L2", 1e-3]["saturated"] > plain["saturated"] - 0.1
    for strength in (1e-4, 1e-3, 1e-2, 1e-1):
        network = rows["kernel L2", strength]
        assert network["saturated"] > 0.2 or network["accuracy"] < plain["accuracy"] - 0.1


def assert_soft_limit_beats_hard(rows):
    hard, wide = rows["10 units", 0], rows["100 units", 0]
    assert hard["active units"] <= 10
    assert wide["active units"] > 60
    sweep = [row for (name, strength), row in rows.items() if name == "100 units"]
    active = [row["active units"] for row in sweep]
    assert active == sorted(active, reverse=True)
    # Fewer epochs need a weaker penalty than the full run's 0.02 for about ten active units.
    soft = rows["100 units", 0.01]
    assert 8 < soft["active units"] < 14
    assert soft["test error (MSE)"] < 0.8 * hard["test error (MSE)"]


def test_a_soft_limit_reconstructs_better_than_a_hard_one(linen):
    rows = table(linen[0], "2. Soft limit")
    assert len(rows) == 7
    assert_soft_limit_beats_hard(rows)


def test_only_prox_gives_exact_zeros(linen):
    rows = table(linen[0], "3. Exact zeros")
    assert len(rows) == 3
    subgradient, prox = rows["subgradient", 1e-3], rows["prox", 1e-3]
    assert rows["no penalty", 0]["exactly zero"] == 0
    assert subgradient["exactly zero"] == 0
    assert subgradient["below 0.001"] > 0.2
    assert prox["exactly zero"] > 0.2
    assert abs(prox["accuracy"] - subgradient["accuracy"]) < 0.03


def test_the_figure_is_a_png_of_three_panels(linen):
    assert_is_a_figure(linen[1] / "kernel_vs_activity.png", 2, 5)


def test_nnx_tells_the_same_story(nnx):
    rows = table(nnx, "Soft limit")
    assert len(rows) == 5
    assert_soft_limit_beats_hard(rows)


@pytest.fixture(scope="module")
def lasso(tmp_path_factory):
    directory = tmp_path_factory.mktemp("regularization_path")
    return run("regularization_path.py", directory), directory


def test_the_vmapped_path_is_that_of_scikit_learn(lasso):
    rows = cells(lasso[0], "1. Path")
    assert rows["coefficients"] == ["640"]
    assert float(rows["largest difference to scikit-learn"][0]) < 1e-9
    assert 100 < int(rows["exact zeros"][0]) < 500
    assert rows["zero in only one of the two"] == ["0"]


def test_the_derivative_through_twenty_steps_is_near_that_of_the_solution(lasso):
    cold, warm, exact = map(float, cells(lasso[0], "2. Hypergradient")["20"])
    assert abs(cold - exact) < 0.01 * exact
    assert abs(warm - exact) < 0.001 * exact


def test_the_descent_ends_at_the_minimum_of_the_sweep(lasso):
    rows = cells(lasso[0], "3. Descent")
    strength, _, error, slope = map(float, rows["end of the descent"])
    best, _, best_error, _ = rows["best of the sweep"]
    assert 1 / 1.2 < strength / float(best) < 1.2
    assert error <= float(best_error)
    assert abs(slope) < 1e-5 < float(rows["start of the descent"][3])


def test_the_figure_of_the_path_is_a_png(lasso):
    assert_is_a_figure(lasso[1] / "regularization_path.png", 2, 5)


@pytest.mark.parametrize("strength", [0.3, 0.03])
def test_the_hypergradient_is_the_difference_quotient(strength):
    example = load("regularization_path.py")
    training, validation = example.load()
    start = {"kernel": np.linspace(-0.1, 0.1, 10)}

    @jax.jit
    def value(log_strength):
        return example.validate(log_strength, start, training, validation, 7)[0]

    with jax.enable_x64(True):
        at, h = jnp.log(strength), 1e-6
        expected = (value(at + h) - value(at - h)) / (2 * h)
        assert abs(expected) > 1e-4
        np.testing.assert_allclose(jax.grad(value)(at), expected, rtol=1e-6)


ALIKE = ("decoupled, × rate", "decoupled, not × rate", "prox after Adam")  # shrink all weights so
EXACT = ("coupled", "proximal Adam")  # minimize loss + penalty

both_penalties = pytest.mark.parametrize("penalty", ["L1(0.5)", "L2(0.25)"])


@pytest.fixture(scope="module")
def one_weight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one_weight")
    return run("one_weight.py", directory), directory


def numbers(row):
    return [float(cell.split()[0]) for cell in row]


@both_penalties
def test_coupled_and_proximal_adam_end_at_the_minimum_of_loss_and_penalty(one_weight, penalty):
    rows = cells(one_weight[0], penalty)
    minimum = numbers(rows["minimum of loss + penalty"])
    shrunk_alike = numbers(rows["g + rms(g) × penalty' = 0"])
    for way in EXACT:
        np.testing.assert_allclose(numbers(rows[way][:3]), minimum, atol=0.02)
        np.testing.assert_allclose(numbers(rows[way][6:]), minimum[:2], atol=1e-3)  # no noise
    for way in ALIKE:
        np.testing.assert_allclose(numbers(rows[way][:3]), shrunk_alike, atol=0.02)
        np.testing.assert_allclose(numbers(rows[way][6:]), [1, 1], atol=0.01)


@both_penalties
def test_only_what_is_not_scaled_by_the_rate_ends_elsewhere_at_another_rate(one_weight, penalty):
    rows = cells(one_weight[0], penalty)
    for way in EXACT + ALIKE:
        at_peak, at_a_quarter = numbers(rows[way][:2]), numbers(rows[way][4:6])
        if way == "decoupled, not × rate":
            assert all(b < a - 0.3 for a, b in zip(at_peak, at_a_quarter, strict=True))
        else:
            np.testing.assert_allclose(at_peak, at_a_quarter, atol=0.04)


@both_penalties
def test_only_the_prox_of_l1_ends_at_exact_zeros(one_weight, penalty):
    rows = cells(one_weight[0], penalty)
    for way in EXACT + ALIKE:
        steep, flat, useless = map(int, rows[way][3].split(" / "))
        prox = penalty == "L1(0.5)" and way in ("prox after Adam", "proximal Adam")
        assert steep == 0
        assert flat == (100 if prox and way == "proximal Adam" else 0)
        assert useless > 80 if prox else useless == 0


def test_the_figure_of_one_weight_is_a_png(one_weight):
    assert_is_a_figure(one_weight[1] / "one_weight.png", 2, 5)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    printed = run("language_model.py", tmp_path_factory.mktemp("language_model"))
    rows = cells(printed, "Mean lse of unseen text")
    return {name: numbers(row) for name, row in rows.items() if name}


def test_lse_drifts_unless_a_z_loss_holds_it(language_model):
    plain, held = language_model["cross-entropy"], language_model["z-loss, 0.01"]
    assert plain[:4] == sorted(plain[:4])
    assert plain[3] > plain[0] + 0.2
    assert held[:4] == sorted(held[:4], reverse=True)
    assert held[3] < plain[3] - 2
    # And it costs nothing that this quick run could see.
    assert abs(held[5] - plain[5]) < 0.1
    assert abs(held[6] - plain[6]) < 0.03


def test_a_penalty_of_squared_logits_does_not_hold_lse(language_model):
    assert language_model["L2 of the logits, 0.0001"][3] > language_model["z-loss, 0.01"][3] + 2
