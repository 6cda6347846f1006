"""The lasso: `jaxreg.fista` against jaxopt's proximal gradient, and a path against scikit-learn's.

In float64, on 2,000 examples of 500 correlated features. Each solver stops at the loosest
tolerance, in powers of ten, that brings it within 1e-8 of the optimum that scikit-learn finds at
1e-12.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
from sklearn.linear_model import Lasso, lasso_path

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary

GAP = 1e-8
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

    def loss(w: Any, _: Any) -> Any:
        return jnp.sum(jnp.square(x @ w - y)) / (2 * len(y))

    def solve(strength: Any, tolerance: Any) -> Any:
        solver = jaxopt.ProximalGradient(
            loss, jaxopt.prox.prox_lasso, stepsize=step, maxiter=100_000, tol=tolerance
        )
        return solver.run(jnp.zeros(x.shape[1]), strength, None).params

    return jax.jit(solve)


def loosest(solve: Callable[..., Any], strength: float, objective: Any, best: float) -> float:
    """Return the loosest tolerance that reaches the optimum to within GAP."""
    for tolerance in TOLERANCES:
        if objective(solve(strength, tolerance)) <= best * (1 + GAP):
            return float(tolerance)
    raise AssertionError("no tolerance reaches the optimum")


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios of times."""
    with jax.enable_x64():
        x, y, strength = problem(*((60, 20) if smoke else (2000, 500)))
        lipschitz = float(np.linalg.norm(x, 2) ** 2 / len(y))

        def objective(w: Any) -> float:
            return float(np.sum((x @ w - y) ** 2) / (2 * len(y)) + strength * np.abs(w).sum())

        exact = {"fit_intercept": False, "tol": 1e-12, "max_iter": 100_000}
        best = objective(Lasso(strength, **exact).fit(x, y).coef_)
        solvers = {
            "jaxreg.fista": ours(x, y, lipschitz),
            "jaxopt, its line search": theirs(x, y, 0.0),
            "jaxopt, step size 1/L": theirs(x, y, 1 / lipschitz),
        }
        tolerances = {n: loosest(s, strength, objective, best) for n, s in solvers.items()}
        timed = {n: functools.partial(solvers[n], strength, tolerances[n]) for n in solvers}
        timed["scikit-learn"] = lambda: Lasso(strength, fit_intercept=False, tol=1e-6).fit(x, y)
        seconds = interleaved(timed, rounds)
        medians = {name: summary(seconds[name])["median"] for name in timed}
        for name, target in {
            "jaxopt, its line search": "≥ 1.5",
            "jaxopt, step size 1/L": "≥ 1.5",
            "scikit-learn": None,
        }.items():
            details = {"seconds": medians, "tolerances": tolerances}
            ratio = ratios(seconds, name, "jaxreg.fista")
            yield Row(f"one strength: {name} ÷ jaxreg.fista", ratio, target, details)

        strengths = strength * np.logspace(1, -1, 64)
        together = jax.jit(jax.vmap(ours(x, y, lipschitz), (0, None)))
        path = {
            "jaxreg": lambda: together(strengths, tolerances["jaxreg.fista"]),
            "scikit-learn": lambda: lasso_path(x, y, alphas=strengths, tol=1e-6, max_iter=100_000),
        }
        np.testing.assert_allclose(path["jaxreg"](), path["scikit-learn"]()[1].T, atol=1e-2)
        seconds = interleaved(path, rounds)
        ratio = ratios(seconds, "jaxreg", "scikit-learn")
        yield Row("path of 64 strengths: one vmap of jaxreg.fista ÷ scikit-learn", ratio)
