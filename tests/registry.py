"""Every penalty, with its formula transcribed in NumPy float64 from the paper or from Keras."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import jaxreg as jr

STRENGTH = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """One penalty.

    Args:
        name: the test id.
        build: strength -> penalty; the value is linear in the strength.
        formula: (x, strength) -> value, in NumPy float64.
        sample: a point away from kinks, float64; one of its axes has size 8.
        has_prox: whether a closed form is known.
        elementwise: whether the value is a sum over entries.
        takes_complex: whether the formula is one of the modulus.
    """

    name: str
    build: Callable[[Any], jr.Penalty]
    formula: Callable[[Any, float], float]
    sample: Any
    has_prox: bool = True
    elementwise: bool = False
    takes_complex: bool = True

    @property
    def penalty(self) -> jr.Penalty:
        return self.build(STRENGTH)

    def value(self, x: Any) -> float:
        return self.formula(np.asarray(x, np.complex128), STRENGTH)

    def __str__(self) -> str:
        return self.name


def _away_from_zero(*shape: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.25, 2.0, shape)


def _probabilities(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape)


def _l1(x: Any, s: float) -> float:
    return s * math.fsum(abs(v) for v in x.ravel())


def _l2(x: Any, s: float) -> float:
    return s * math.fsum(abs(v) ** 2 for v in x.ravel())


def _norms(groups: Any) -> list[float]:
    return [math.sqrt(sum(abs(v) ** 2 for v in np.ravel(group))) for group in groups]


def _columns(x: Any, s: float) -> float:
    return s * math.sqrt(x.shape[0]) * sum(_norms(x[:, j] for j in range(x.shape[1])))


def _rows_unweighted(x: Any, s: float) -> float:
    return s * sum(_norms(x[i] for i in range(x.shape[0])))


def _output_channels(x: Any, s: float) -> float:
    size = x.shape[0] * x.shape[1] * x.shape[2]
    return s * math.sqrt(size) * sum(_norms(x[..., j] for j in range(x.shape[3])))


def _kl(x: Any, s: float, target: float = 0.2) -> float:
    x = np.real(x)
    examples = x.reshape(-1, x.shape[-1])
    total = 0.0
    for unit in range(examples.shape[1]):
        mean = sum(examples[:, unit]) / examples.shape[0]
        total += target * math.log(target / mean)
        total += (1 - target) * math.log((1 - target) / (1 - mean))
    return s * total


MATRIX = _away_from_zero(8, 3, seed=0)
CONV = _away_from_zero(2, 1, 3, 8, seed=1)
CODES = _probabilities(2, 8, 3, seed=2)

CASES = [
    Case("L1", jr.L1, _l1, MATRIX, elementwise=True),
    Case("L2", jr.L2, _l2, MATRIX, elementwise=True),
    Case(
        "L1L2",
        lambda s: jr.L1L2(l1=s, l2=2 * s),
        lambda x, s: _l1(x, s) + _l2(x, 2 * s),
        MATRIX,
        elementwise=True,
    ),
    Case("GroupLasso", jr.GroupLasso, _columns, MATRIX),
    Case(
        "GroupLasso-rows-unweighted",
        lambda s: jr.GroupLasso(s, axis=-1, weighted=False),
        _rows_unweighted,
        MATRIX,
    ),
    Case("GroupLasso-conv", jr.GroupLasso, _output_channels, CONV),
    Case(
        "KLSparsity",
        lambda s: jr.KLSparsity(s, target=0.2),
        _kl,
        CODES,
        has_prox=False,
        takes_complex=False,
    ),
    Case(
        "L2+GroupLasso+L2",
        lambda s: jr.L2(s) + jr.GroupLasso(2 * s) + jr.L2(s),
        lambda x, s: _columns(x, 2 * s) + _l2(x, 2 * s),
        MATRIX,
    ),
    Case(
        "2*(L1+KLSparsity)",
        lambda s: 2 * (jr.L1(s) + jr.KLSparsity(s, target=0.2)),
        lambda x, s: _l1(x, 2 * s) + _kl(x, 2 * s),
        CODES,
        has_prox=False,
        takes_complex=False,
    ),
]

WITH_PROX = [case for case in CASES if case.has_prox]
