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
        convex: whether the value is a convex function.
        sparse: whether the proximal operator gives exact zeros.
        bounded: whether an infinite entry costs no more than a large one.
        curvature: the second derivative at 0, for a strength of one.
    """

    name: str
    build: Callable[[Any], jr.Penalty]
    formula: Callable[[Any, float], float]
    sample: Any
    has_prox: bool = True
    elementwise: bool = False
    takes_complex: bool = True
    convex: bool = True
    sparse: bool = True
    bounded: bool = False
    curvature: float = 0.0

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


def _largest(x: Any, s: float) -> float:
    return s * math.fsum(max(abs(v) for v in x[:, j]) for j in range(x.shape[1]))


def _exclusive(x: Any, s: float) -> float:
    return s * math.fsum(math.fsum(abs(v) for v in row.ravel()) ** 2 for row in x)


def _sparse_columns(x: Any, s: float, alpha: float = 0.3) -> float:
    return alpha * _l1(x, s) + (1 - alpha) * _columns(x, s)


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


def _entrywise(phi: Callable[[float], float]) -> Callable[[Any, float], float]:
    return lambda x, s: s * math.fsum(phi(v) for v in np.real(x).ravel().tolist())


def _huber(v: float, delta: float = 0.8) -> float:
    return v * v / 2 if abs(v) <= delta else delta * (abs(v) - delta / 2)


def _log_cosh(v: float) -> float:
    return math.log(math.cosh(v))


def _range_hinge(power: int) -> Callable[[float], float]:
    return lambda v: max(-0.5 - v, 0.0) ** power + max(v - 1.1, 0.0) ** power


def _lp(v: float, p: float = 0.5, epsilon: float = 0.1) -> float:
    return float((v * v + epsilon * epsilon) ** (p / 2) - epsilon**p)


def _log_sum(v: float, epsilon: float = 0.5) -> float:
    return math.log(1 + abs(v) / epsilon)


def _mcp(v: float, knot: float = 1.5) -> float:
    # Zhang's definition: the integral of max(1 - t / knot, 0) from 0 to |v|.
    return abs(v) - v * v / (2 * knot) if abs(v) <= knot else knot / 2


def _scad(v: float, threshold: float = 0.6, a: float = 2.5) -> float:
    # Fan and Li's definition by cases, divided by lambda.
    if abs(v) <= threshold:
        return abs(v)
    if abs(v) <= a * threshold:
        middle = 2 * a * threshold * abs(v) - v * v - threshold**2
        return middle / (2 * (a - 1) * threshold)
    return threshold * (a + 1) / 2


def _capped_l1(v: float, cap: float = 1.2) -> float:
    return min(abs(v), cap)


def _l0(v: float) -> float:
    return float(v != 0)


def _real(
    name: str, build: Callable[[Any], jr.Penalty], phi: Callable[[float], float], **flags: Any
) -> Case:
    formula = _entrywise(phi)
    return Case(name, build, formula, MATRIX, elementwise=True, takes_complex=False, **flags)


MATRIX = _away_from_zero(8, 3, seed=0)
CONV = _away_from_zero(2, 1, 3, 8, seed=1)
CODES = _probabilities(2, 8, 3, seed=2)

CASES = [
    Case("L1", jr.L1, _l1, MATRIX, elementwise=True),
    Case("L2", jr.L2, _l2, MATRIX, elementwise=True, sparse=False, curvature=2),
    Case(
        "L1L2",
        lambda s: jr.L1L2(l1=s, l2=2 * s),
        lambda x, s: _l1(x, s) + _l2(x, 2 * s),
        MATRIX,
        elementwise=True,
        curvature=4,
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
        curvature=4,
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

CASES += [
    Case("L1Inf", jr.L1Inf, _largest, MATRIX, takes_complex=False),
    Case(
        "ExclusiveLasso",
        lambda s: jr.ExclusiveLasso(s, axis=(1, 2, 3)),
        _exclusive,
        CONV,
        takes_complex=False,
    ),
    Case(
        "SparseGroupLasso",
        lambda s: jr.SparseGroupLasso(s, alpha=0.3),
        _sparse_columns,
        MATRIX,
    ),
    _real("Huber", lambda s: jr.Huber(s, delta=0.8), _huber, sparse=False, curvature=1),
    _real("LogCosh", jr.LogCosh, _log_cosh, has_prox=False, curvature=1),
    _real(
        "RangeHinge",
        lambda s: jr.RangeHinge(s, lower=-0.5, upper=1.1),
        _range_hinge(1),
        sparse=False,
    ),
    _real(
        "RangeHinge-squared",
        lambda s: jr.RangeHinge(s, lower=-0.5, upper=1.1, power=2),
        _range_hinge(2),
        sparse=False,
    ),
    _real(
        "Lp",
        lambda s: jr.Lp(s, p=0.5, epsilon=0.1),
        _lp,
        has_prox=False,
        convex=False,
        curvature=0.5 * 0.1**-1.5,
    ),
    _real("LogSum", lambda s: jr.LogSum(s, epsilon=0.5), _log_sum, convex=False),
    _real(
        "MCP", lambda s: jr.MCP(s, knot=1.5), _mcp, convex=False, bounded=True, curvature=-1 / 1.5
    ),
    _real(
        "SCAD",
        lambda s: jr.SCAD(s, threshold=0.6, a=2.5),
        _scad,
        convex=False,
        bounded=True,
    ),
    _real("CappedL1", lambda s: jr.CappedL1(s, cap=1.2), _capped_l1, convex=False, bounded=True),
    _real("L0", jr.L0, _l0, convex=False, bounded=True),
]

WITH_PROX = [case for case in CASES if case.has_prox]
