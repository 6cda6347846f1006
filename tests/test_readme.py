"""The Python of the README and of the pages in docs runs as written, and gives what they say."""

import contextlib
import functools
import io
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import scipy.optimize
from flax import nnx

import jaxreg as jr

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}


@functools.cache
def run(name) -> tuple[dict[str, Any], str]:
    """Return what a page's blocks define, and what they print."""
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in BLOCKS[name]:
            exec(compile(block, name, "exec"), namespace)
    return namespace, printed.getvalue()


@pytest.mark.parametrize("name", [name for name in PAGES if BLOCKS[name]])
def test_the_python_of_a_page_runs_as_written(name):
    run(name)


def test_the_quick_start_prints_and_computes_what_it_says():
    namespace, printed = run("README.md")
    assert re.search(r"head/kernel +\(100, 64\) +\"head/\*\*\" +exempt", printed)
    assert re.search(r"encoder/kernel +\(64, 100\) +\"\*\*/kernel\" +L2\(", printed)
    assert "{'code': " in printed
    assert "'encoder': " in printed
    assert bool((namespace["params"]["head"]["kernel"] == 0).any())
    assert float(namespace["penalty"]) > 0


@pytest.mark.parametrize(
    ("page", "name"),
    sorted({(page, name) for page in PAGES for name in re.findall(r"`jr\.(\w+)", PAGES[page])}),
)
def test_every_name_on_a_page_is_exported(page, name):
    assert hasattr(jr, name)


@pytest.fixture
def page():
    return run("optimizers.md")[0]


def follow(tx, steps, w=(0.7, -0.35)):
    """Return weights after each step on gradients that are always the same."""
    params, path = {"kernel": jnp.array(w)}, []
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update({"kernel": jnp.array([0.2, -0.1])}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["kernel"]))
    return np.array(path)


def test_the_five_ways_of_the_page_are_its_formulas(page):
    """Of a steady gradient Adam makes its sign."""
    s, peak = 0.5, 0.01

    def by_formula(move):
        w, path = np.array([0.7, -0.35]), []
        for t in range(5):
            c = float(page["schedule"](t))
            w = move(w, c, peak * c)
            path.append(w)
        return path

    g, adam = np.array([0.2, -0.1]), np.array([1.0, -1.0])

    def soft(w, t):
        return np.sign(w) * np.maximum(np.abs(w) - t, 0)

    formulas = {
        # With this penalty of this weight the sum's sign is that of the penalty.
        "coupled": lambda w, c, rate: w - rate * np.sign(g + s * np.sign(w)),
        "decoupled": lambda w, c, rate: w - rate * (adam + s * np.sign(w)),
        "paper": lambda w, c, rate: w - rate * adam - c * s * peak * np.sign(w),
        "proximal": lambda w, c, rate: soft(w - rate * adam, rate * s),
        "preconditioned": lambda w, c, rate: soft(w - rate * adam, rate * s / np.abs(g)),
    }
    for name, formula in formulas.items():
        np.testing.assert_allclose(follow(page[name], 5), by_formula(formula), rtol=1e-4)


def test_the_sign_of_what_is_added_after_the_learning_rate(page):
    """The paper's way with strength s times the peak is the other one with strength s."""
    np.testing.assert_allclose(follow(page["paper"], 20), follow(page["decoupled"], 20), rtol=1e-5)


def test_the_decoupled_way_of_the_page_is_adamw():
    decay = 0.1
    ours = optax.chain(
        optax.scale_by_adam(),
        jr.add_penalty_gradient(jr.kernel(jr.L2(decay / 2))),
        optax.scale_by_learning_rate(0.01),
    )
    theirs = optax.adamw(0.01, weight_decay=decay)
    np.testing.assert_allclose(follow(ours, 9), follow(theirs, 9), rtol=1e-6)


def test_the_table_of_entries_without_gradients_is_what_the_page_prints():
    _, printed = run("optimizers.md")
    rows = re.findall(r"\| (\w+)(?: \(both\))? \| (\S+) \| (\S+) \|", PAGES["optimizers.md"])
    shown = {name: cells for name, *cells in rows if re.match(r"[\d.]", cells[0])}
    assert shown.keys() == {"coupled", "decoupled", "proximal", "preconditioned"}
    for name, cells in shown.items():
        for penalty, cell in zip(("L1", "L2"), cells, strict=True):
            assert f"{penalty} {name} {cell}\n" in printed


def test_projected_descent_of_the_page_is_nnls(page):
    expected, _ = scipy.optimize.nnls(np.asarray(page["x"]), np.asarray(page["y"]))
    ours = np.asarray(page["nonnegative"]["kernel"])
    np.testing.assert_array_equal(ours == 0, expected == 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_a_prox_in_schedule_free_finds_the_lasso_and_one_after_it_runs_away(page):
    rate, lasso, train = page["step_size"], page["lasso"], page["train"]
    solution = np.asarray(jr.fista_params(train(jr.fista(rate, lasso), 1000)[1])["kernel"])
    assert 0 < (solution == 0).sum() < 8
    np.testing.assert_allclose(page["averaged"]["kernel"], solution, atol=1e-3)
    last = page["proximal_step"](page["averaged"])["kernel"]
    np.testing.assert_array_equal(last == 0, solution == 0)

    after = optax.chain(
        optax.contrib.schedule_free(optax.sgd(rate), rate), jr.apply_prox(lasso, rate)
    )
    farthest = [np.abs(train(after, steps)[1][0].z["kernel"]).max() for steps in (100, 1000)]
    assert farthest[0] > 10
    assert farthest[1] > 5 * farthest[0]


def test_slow_weights_are_not_zero_where_the_fast_are_and_one_step_makes_them_so(page):
    tx = page["ahead"]
    params = optax.LookaheadParams.init_synced({"kernel": jnp.ones(8)})
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(page["loss"])(params.fast), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(58):  # between two synchronizations
        params, state = step(params, state)
    zero = params.fast["kernel"] == 0
    assert 0 < zero.sum() < 8
    assert (params.slow["kernel"] != 0).all()
    np.testing.assert_array_equal(page["proximal_step"](params.slow)["kernel"] == 0, zero)


def test_what_the_page_builds_can_train(page):
    for name in ("parts", "accumulated", "injected", "muon"):
        train = page["train"]
        params, _ = train(page[name], 4)
        assert np.isfinite(params["kernel"]).all(), name


def test_the_injected_strength_is_that_of_the_schedule():
    _, printed = run("optimizers.md")
    assert re.search(r"^9\.(89|90)\d*e-05$", printed, re.MULTILINE)


def test_the_record_of_the_page_is_read_by_leaf(page):
    record = optax.tree.get(page["train"](page["recorded"], 11)[1], "values")
    assert record.keys() == {"kernel"}
    assert record["kernel"] > 0


def test_fista_of_the_page_ends_at_exact_zeros(page):
    assert 0 < (page["solution"] == 0).sum() < 8


def test_the_penalties_of_plain_functions_equinox_and_haiku_are_those_of_the_page():
    namespace, _ = run("activity.md")
    x = namespace["x"]
    code = x @ namespace["params"]["encoder"]
    penalty = namespace["autoencoder"](namespace["params"], x)[1]
    np.testing.assert_allclose(penalty, 1e-3 * np.sum(code) / 4, rtol=1e-6)
    linear = namespace["haiku_params"]["encoder"]
    code = np.maximum(x @ linear["w"] + linear["b"], 0)
    np.testing.assert_allclose(namespace["penalty"], 1e-3 * np.sum(code) / 4, rtol=1e-6)
    model, gradient = (namespace[name] for name in ("model", "equinox_gradient"))
    bias = gradient(model, x).encoder.bias

    def loss(bias):
        code = jax.nn.relu(x @ model.encoder.weight.T + bias)
        y = code @ model.decoder.weight.T + model.decoder.bias
        return jnp.mean((y - x) ** 2) + 1e-3 * jnp.sum(code) / 4

    np.testing.assert_allclose(bias, jax.grad(loss)(model.encoder.bias), rtol=1e-5)


@pytest.fixture(scope="module")
def autoencoders():
    return run("sparse_autoencoders.md")[0]


def _linear(layer):
    return layer.kernel[...], layer.bias[...]


X = jax.random.normal(jax.random.key(3), (16, 8))
OF_CODES = {
    "SparseAutoencoder": lambda f, rows: 5 * f,
    "Weighted": lambda f, rows: 5 * f * jnp.sqrt(jnp.sum(rows**2, axis=1)),
    "WithTanh": lambda f, rows: 5 * jnp.tanh(2 * f * jnp.sqrt(jnp.sum(rows**2, axis=1))),
}


@pytest.mark.parametrize("name", OF_CODES)
def test_the_penalties_of_codes_are_those_of_the_page(autoencoders, name):
    model = autoencoders[name](8, 32, rngs=nnx.Rngs(1))

    def by_hand(encoder, decoder):
        f = jnp.maximum(X @ encoder[0] + encoder[1], 0)
        error = jnp.sum((f @ decoder[0] + decoder[1] - X) ** 2, axis=-1)
        return jnp.mean(error + jnp.sum(OF_CODES[name](f, decoder[0]), axis=-1))

    (value, _), gradient = nnx.value_and_grad(autoencoders["loss"], has_aux=True)(model, X)
    layers = _linear(model.encoder), _linear(model.decoder)
    expected = jax.value_and_grad(by_hand, (0, 1))(*layers)
    found = value, (_linear(gradient["encoder"]), _linear(gradient["decoder"]))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [None, 4.0])
def test_the_penalties_of_active_units_are_those_of_the_page(autoencoders, target):
    penalty = autoencoders["L0"](0.1) if target is None else autoencoders["TargetL0"](1, target=4)
    model = autoencoders["JumpReLU"](8, 32, penalty, rngs=nnx.Rngs(1))
    (value, terms), gradient = nnx.value_and_grad(autoencoders["loss"], has_aux=True)(model, X)
    (w, a), (rows, b) = _linear(model.encoder), _linear(model.decoder)
    theta = np.exp(-1.0)
    pre = np.asarray(X @ w + a, np.float64)
    active = pre > theta
    l0 = active.sum() / len(X)
    expected = 0.1 * l0 if target is None else (l0 / target - 1) ** 2
    error = (pre * active) @ rows + b - X
    np.testing.assert_allclose(terms.total, expected, rtol=1e-5)
    np.testing.assert_allclose(value, expected + np.mean(np.sum(error**2, axis=-1)), rtol=1e-5)
    # The derivative by log θ is θ times that by θ: -θ/ε K of the code, and -K/ε of the step.
    near = (np.abs(pre - theta) < 0.25) / 0.5 / len(X)
    by_l0 = 0.1 if target is None else 2 * (l0 / target - 1) / target
    by_theta = -np.sum(near * (theta * 2 * error @ rows.T + by_l0), axis=0)
    assert np.abs(by_theta).max() > 0.1
    np.testing.assert_allclose(
        gradient["log_threshold"][...], theta * by_theta, rtol=1e-3, atol=1e-5
    )


def test_a_decoder_row_of_zeros_has_a_gradient(autoencoders):
    model = autoencoders["Weighted"](8, 32, rngs=nnx.Rngs(1))
    model.decoder.kernel[...] = model.decoder.kernel[...].at[0].set(0)
    gradient = nnx.grad(autoencoders["loss"], has_aux=True)(model, X)[0]
    assert np.all(np.isfinite(gradient["decoder"].kernel[...]))


def test_the_error_of_the_error_is_that_of_dead_units_alone(autoencoders):
    model = autoencoders["TopK"](8, 32, rngs=nnx.Rngs(1))
    dead = jnp.arange(32) % 3 == 0
    value, gradient = nnx.value_and_grad(autoencoders["loss_with_auxiliary"])(model, X, dead)
    (w, a), (rows, b) = _linear(model.encoder), _linear(model.decoder)
    units = np.maximum(np.asarray(X @ w + a, np.float64), 0)

    def largest(units, k):
        return np.where(units >= np.sort(units, axis=-1)[:, [-k]], units, 0)

    error = X - (largest(units, 4) @ rows + b)
    revived = largest(units * np.asarray(dead), 8)
    auxiliary = np.mean(np.sum((error - revived @ rows) ** 2, axis=-1))
    np.testing.assert_allclose(
        value, np.mean(np.sum(error**2, axis=-1)) + auxiliary / 32, rtol=1e-5
    )
    # A unit that is neither dead nor among the largest has no gradient; a dead one has.
    alone = np.asarray(dead) & ~(largest(units, 4) > 0).any(axis=0) & (revived > 0).any(axis=0)
    assert alone.any()
    assert np.all(np.any(np.asarray(gradient["encoder"].kernel[...])[:, alone] != 0, axis=0))


def test_the_decoder_of_the_page_has_rows_of_norm_one(autoencoders):
    model = autoencoders["SparseAutoencoder"](8, 32, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, autoencoders["tx"], wrt=nnx.Param)
    optimizer.update(model, nnx.grad(autoencoders["loss"], has_aux=True)(model, X)[0])
    np.testing.assert_allclose(autoencoders["norms"](model.decoder), 1, rtol=1e-5)
    metrics = autoencoders["metrics"](model, X)
    code = np.maximum(np.asarray(model.encoder(X)), 0)
    error = np.asarray(model(X) - X)
    assert metrics["active units"] == (code > 0).sum() / len(X)
    assert metrics["dead units"] == (~(code > 0).any(axis=0)).sum()
    np.testing.assert_allclose(
        metrics["explained variance"],
        1 - np.sum(error**2) / np.sum((X - X.mean(axis=0)) ** 2),
        rtol=1e-5,
    )
