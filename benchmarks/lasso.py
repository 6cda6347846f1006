"""The lasso: `jaxreg.fista` against jaxopt's proximal gradient, and a path against scikit-learn's.

In float64, on 2,000 examples of 500 correlated features. Each solver stops at the loosest
tolerance, in powers of ten, that brings it within 1e-8 of the optimum that scikit-learn finds at
1e-12; for the path, of every strength's.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import Lasso, lasso_path

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary

GAP = 1e-8
MOST = 100_000
TOLERANCES = 10.0 ** np.arange(-1, -10, -1)


def problem(examples: int, features: int) -> tuple[Any, Any, float]:
    """Return inputs, targets, and a strength that leaves a small part of the features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, features)) + rng.normal(size=(examples, 1))
    x -= x.mean(0)
    w = np.where(rng.uniform(size=features) < 0.1, rng.normal(size=features), 0)
    y = x @ w + rng.normal(size=examples)
    y -= y.mean()
    return x, y, float(0.05 * np.max(np.abs(x.T @ y)) / examples)


def ours(x: Any, y: Any, lipschitz: float) -> Callable[..., Any]:
    """Return a solver, given a strength and a tolerance, by `jaxreg.fista` with restarts."""

    def solve(strength: Any, tolerance: Any) -> Any:
        tx = jr.fista(1 / lipschitz, jr.kernel({"w": jr.L1(strength)}), restart="gradient")

        def loss(params: Any) -> Any:
            return jnp.sum(jnp.square(x @ params["w"] - y)) / (2 * len(y))

        def step(carry: Any) -> Any:
            params, state, _ = carry
            before = jr.fista_params(state)["w"]
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            moved = lipschitz * jnp.linalg.norm(jr.fista_params(state)["w"] - before)
            return optax.apply_updates(params, updates), state, moved

        params = {"w": jnp.zeros(x.shape[1])}
        start = (params, tx.init(params), jnp.inf)
        return jr.fista_params(jax.lax.while_loop(lambda c: c[2] > tolerance, step, start)[1])["w"]

    return jax.jit(solve)


def theirs(x: Any, y: Any, step: float) -> Callable[..., Any]:
    """Return a solver by jaxopt; a step size of 0 searches along a line."""
    import jaxopt

    def loss(w: Any, _: Any) -> Any:
        return jnp.sum(jnp.square(x @ w - y)) / (2 * len(y))

    def solve(strength: Any, tolerance: Any) -> Any:
        solver = jaxopt.ProximalGradient(
            loss, jaxopt.prox.prox_lasso, stepsize=step, maxiter=MOST, tol=tolerance
        )
        return solver.run(jnp.zeros(x.shape[1]), strength, None).params

    return jax.jit(solve)


def scikit_learn(x: Any, y: Any) -> Callable[..., Any]:
    """Return a solver by scikit-learn, from the Gram matrix: that is its faster way here."""

    def solve(strength: float, tolerance: float) -> Any:
        lasso = Lasso(strength, fit_intercept=False, precompute=True, max_iter=MOST, tol=tolerance)
        return lasso.fit(x, y).coef_

    return solve


def scikit_learn_path(x: Any, y: Any) -> Callable[..., Any]:
    """Return scikit-learn's solver for many strengths, the largest first."""

    def solve(strengths: Any, tolerance: float) -> Any:
        return lasso_path(x, y, alphas=strengths, max_iter=MOST, tol=tolerance)[1].T

    return solve


def loosest(solve: Callable[..., Any], strengths: Any, objective: Any, best: Any) -> float:
    """Return the loosest tolerance that reaches the optimum to within GAP, of every strength."""
    for tolerance in TOLERANCES:
        if np.all(objective(solve(strengths, tolerance), strengths) <= best * (1 + GAP)):
            return float(tolerance)
    raise AssertionError("no tolerance reaches the optimum")


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios of times."""
    with jax.enable_x64():
        x, y, strength = problem(*((60, 20) if smoke else (2000, 500)))
        lipschitz = float(np.linalg.norm(x, 2) ** 2 / len(y))

        def objective(w: Any, strengths: Any) -> Any:
            squares = np.sum((w @ x.T - y) ** 2, axis=-1)
            return squares / (2 * len(y)) + strengths * np.sum(np.abs(w), axis=-1)

        def times(
            solvers: dict[str, Callable[..., Any]], strengths: Any, best: Any
        ) -> tuple[dict[str, list[float]], dict[str, Any]]:
            tolerances = {n: loosest(s, strengths, objective, best) for n, s in solvers.items()}
            timed = {n: functools.partial(s, strengths, tolerances[n]) for n, s in solvers.items()}
            seconds = interleaved(timed, rounds)
            medians = {name: summary(seconds[name])["median"] for name in timed}
            return seconds, {"seconds": medians, "tolerances": tolerances}

        solvers = {"jaxreg.fista": ours(x, y, lipschitz), "scikit-learn": scikit_learn(x, y)}
        best = objective(solvers["scikit-learn"](strength, 1e-12), strength)
        if importlib.util.find_spec("jaxopt"):
            solvers["jaxopt, its line search"] = theirs(x, y, 0.0)
            solvers["jaxopt, step size 1/L"] = theirs(x, y, 1 / lipschitz)
        seconds, details = times(solvers, strength, best)
        for name, target in {
            "jaxopt, its line search": "≥ 1.5",
            "jaxopt, step size 1/L": "≥ 1.5",
            "scikit-learn": None,
        }.items():
            what = f"one strength: {name} ÷ jaxreg.fista"
            if name not in solvers:
                yield Row.skipped(what, 'needs the extra "bench"', target)
                continue
            yield Row(what, ratios(seconds, name, "jaxreg.fista"), target, details)

        strengths = strength * np.logspace(1, -1, 64)
        paths = {
            "jaxreg": jax.jit(jax.vmap(ours(x, y, lipschitz), (0, None))),
            "scikit-learn": scikit_learn_path(x, y),
        }
        best = objective(paths["scikit-learn"](strengths, 1e-12), strengths)
        seconds, details = times(paths, strengths, best)
        what = "path of 64 strengths: one vmap of jaxreg.fista ÷ scikit-learn"
        yield Row(what, ratios(seconds, "jaxreg", "scikit-learn"), details=details)
