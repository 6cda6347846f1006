"""The formula and its gradient, written out in NumPy's float64."""

from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    hidden: Any
    weight: Any  # (D, V)
    labels: Any
    bias: Any
    weights: Any


def problem(seed=0, tokens=13, features=5, words=11) -> Problem:
    """Return one of these sizes; if there are several tokens, the last has a weight of 0."""
    rng = np.random.default_rng(seed)
    found = Problem(
        rng.normal(size=(tokens, features)),
        rng.normal(size=(features, words)),
        rng.integers(0, words, tokens),
        rng.normal(size=words),
        rng.uniform(0.1, 2, tokens),
    )
    if tokens > 1:
        found.weights[-1] = 0
    return found


class Answer(NamedTuple):
    loss: Any
    z_loss: Any
    lse: Any
    correct: Any
    gradient: dict[str, Any]  # of loss + z_loss


def by_formula(p, *, z_loss=0.0, label_smoothing=0.0, soft_cap=None, reduction="mean") -> Answer:
    """Return what `linear_cross_entropy` is to return; a weight of 0 for what is ignored."""
    h, w, b, weights = (np.asarray(x, np.float64) for x in (p.hidden, p.weight, p.bias, p.weights))
    tokens = np.arange(len(h))
    raw = h @ w + b
    z = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    largest = z.max(axis=1)
    sums = np.exp(z - largest[:, None]).sum(axis=1)
    lse = largest + np.log(sums)
    target = np.full_like(z, label_smoothing / z.shape[1])
    target[tokens, p.labels] += 1 - label_smoothing
    losses = np.log(sums) - np.sum(target * (z - largest[:, None]), axis=1)
    total_weight = weights.sum()
    divisor = (total_weight or 1) if reduction == "mean" else 1
    loss, penalty = np.sum(weights * losses) / divisor, np.sum(weights * lse**2) / divisor

    probabilities = np.exp(z - largest[:, None]) / sums[:, None]
    slope = probabilities * (1 + 2 * z_loss * lse)[:, None] - target
    slope *= weights[:, None] / divisor
    if soft_cap is not None:
        slope *= 1 / np.cosh(raw / soft_cap) ** 2
    of_token = losses + z_loss * lse**2
    mean = (loss + z_loss * penalty) if reduction == "mean" else 0
    gradient = {
        "hidden": slope @ w.T,
        "weight": h.T @ slope,
        "bias": slope.sum(axis=0),
        "weights": (of_token - mean) / divisor,
        "z_loss": penalty,
    }
    correct = (np.argmax(raw, axis=1) == p.labels) & (weights != 0)
    return Answer(loss, z_loss * penalty, lse, correct, gradient)
