"""Every constraint, with its projection transcribed in NumPy float64 from the definition.

Thresholds are found by bisection and polar factors by an eigendecomposition: not as jaxreg does.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import jaxreg as jr

from ._case import CONV, MATRIX, away_from_zero


@dataclasses.dataclass(frozen=True)
class ConstraintCase:
    """One constraint.

    Args:
        name: the test id.
        build: setting -> constraint; its set grows in proportion to the setting.
        setting: what the tests build it with; None where it takes none.
        formula: (x, setting) -> projection, in NumPy float64 or complex128.
        contains: (x, setting, tolerance) -> whether x lies in the set.
        member: (generator, shape, setting) -> a random member.
        sample: a point outside of the set, away from kinks; one of its axes has size 8.
        convex: whether the set is.
        interior: whether random members lie in its interior, where the projection does nothing.
        takes_complex: whether the set is one of the moduli.
        any_shape: whether arrays of all ranks are taken.
        projects: whether the projection ends in the set, and is not only on its way.
        degree: 1 if the projection of a multiple is that multiple of the projection (with the
            setting multiplied as well), 0 if it is the projection itself.
    """

    name: str
    build: Callable[[Any], jr.Constraint]
    setting: Any
    formula: Callable[[Any, Any], Any]
    contains: Callable[[Any, Any, float], Any]
    member: Callable[[Any, tuple[int, ...], Any], Any]
    sample: Any
    convex: bool = True
    interior: bool = True
    takes_complex: bool = True
    any_shape: bool = True
    projects: bool = True
    degree: int = 1

    @property
    def constraint(self) -> jr.Constraint:
        return self.build(self.setting)

    def projection(self, x: Any) -> Any:
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        return self.formula(np.asarray(x, wide), self.setting)

    def __str__(self) -> str:
        return self.name


def _norm(vector: Any) -> float:
    return math.sqrt(math.fsum(abs(entry) ** 2 for entry in np.ravel(vector)))


def _each(function: Callable[..., Any], vectors: Callable[[Any], Iterator[Any]]) -> Any:
    """Return the function applied in place to each of the vectors, which are views."""

    def apply(x: Any, setting: Any) -> Any:
        out = x.copy()
        for vector in vectors(out):
            vector[...] = function(vector.copy(), setting)
        return out

    return apply


def _all(
    holds: Callable[..., Any], vectors: Callable[[Any], Iterator[Any]]
) -> Callable[[Any, Any, float], Any]:
    return lambda x, setting, atol: all(holds(vector, setting, atol) for vector in vectors(x))


def _members(
    member: Callable[..., Any], vectors: Callable[[Any], Iterator[Any]]
) -> Callable[..., Any]:
    def sample(rng: Any, shape: tuple[int, ...], setting: Any) -> Any:
        out = np.zeros(shape)
        for vector in vectors(out):
            vector[...] = member(rng, vector.shape, setting)
        return out

    return sample


def _whole(x: Any) -> Iterator[Any]:
    yield x


def _units(x: Any) -> Iterator[Any]:
    return (x[..., j] for j in range(x.shape[-1]))


def _rows(x: Any) -> Iterator[Any]:
    return (x[i] for i in range(x.shape[0]))


def _shorten(vector: Any, radius: float) -> Any:
    return vector * min(1.0, radius / _norm(vector))


def _inside_ball(vector: Any, radius: float, atol: float) -> bool:
    return _norm(vector) <= radius + atol


def _of_sphere(rng: Any, shape: tuple[int, ...], _: Any) -> Any:
    direction = rng.normal(size=shape)
    return direction / _norm(direction)


def _of_ball(rng: Any, shape: tuple[int, ...], radius: float) -> Any:
    return 0.99 * radius * rng.uniform() * _of_sphere(rng, shape, None)


def _in_range(vector: Any, low: float) -> Any:
    norm = _norm(vector)
    return vector / norm * min(max(norm, low), 1.5 * low)


def _of_range(rng: Any, shape: tuple[int, ...], low: float) -> Any:
    return rng.uniform(1.01, 1.49) * low * _of_sphere(rng, shape, None)


def _onto_simplex(vector: Any, scale: float) -> Any:
    """Return max(x − τ, 0), with τ found by bisection."""
    below_top = vector - np.max(vector)
    low, high = -scale, 0.0
    for _ in range(100):
        threshold = (low + high) / 2
        over = np.sum(np.maximum(below_top - threshold, 0)) > scale
        low, high = (threshold, high) if over else (low, threshold)
    return np.maximum(below_top - high, 0)


def _on_simplex(vector: Any, scale: float, atol: float) -> bool:
    return bool(np.all(vector >= 0) and abs(np.sum(vector) - scale) <= atol)


def _of_simplex(rng: Any, shape: tuple[int, ...], scale: float) -> Any:
    return scale * rng.dirichlet(np.ones(math.prod(shape))).reshape(shape)


def _onto_l1_ball(vector: Any, radius: float) -> Any:
    sizes = np.abs(vector)
    if np.sum(sizes) <= radius:
        return vector
    return vector / sizes * _onto_simplex(sizes, radius)


def _in_l1_ball(vector: Any, radius: float, atol: float) -> bool:
    return float(np.sum(np.abs(vector))) <= radius + atol


def _of_l1_ball(rng: Any, shape: tuple[int, ...], radius: float) -> Any:
    return 0.99 * rng.uniform() * rng.choice([-1, 1], shape) * _of_simplex(rng, shape, radius)


def _keep(k: int) -> Callable[[Any, Any], Any]:
    def keep(vector: Any, _: Any) -> Any:
        flat = np.ravel(vector)
        order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[:k]
        return np.array([flat[i] if i in order else 0 for i in range(flat.size)]).reshape(
            vector.shape
        )

    return keep


def _kept(k: int) -> Callable[[Any, Any, float], Any]:
    return lambda vector, _, __: np.count_nonzero(vector) <= k


def _of_kept(k: int) -> Callable[..., Any]:
    def member(rng: Any, shape: tuple[int, ...], _: Any) -> Any:
        flat = np.zeros(math.prod(shape))
        flat[rng.choice(flat.size, k, replace=False)] = rng.normal(size=k)
        return flat.reshape(shape)

    return member


def _polar_factor(matrix: Any, _: Any) -> Any:
    """Return W (W*W)^(-1/2), or that of the adjoint for a wide one."""
    if matrix.shape[0] < matrix.shape[1]:
        return _polar_factor(matrix.conj().T, _).conj().T
    values, vectors = np.linalg.eigh(matrix.conj().T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.conj().T


def _is_orthonormal(matrix: Any, _: Any, atol: float) -> bool:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.conj().T
    return bool(np.abs(tall.conj().T @ tall - np.eye(tall.shape[1])).max() <= atol)


def _of_stiefel(rng: Any, shape: tuple[int, ...], _: Any) -> Any:
    tall = rng.normal(size=sorted(shape, reverse=True))
    q, _ = np.linalg.qr(tall)
    return q if shape[0] >= shape[1] else q.T


def _stretch_no_more(matrix: Any, radius: float) -> Any:
    """Return W min(1, r (W*W)^(-1/2)), or that of the adjoint for a wide one."""
    if matrix.shape[0] < matrix.shape[1]:
        return _stretch_no_more(matrix.conj().T, radius).conj().T
    values, vectors = np.linalg.eigh(matrix.conj().T @ matrix)
    factors = radius / np.sqrt(np.maximum(values, radius**2))
    return matrix @ (vectors * factors) @ vectors.conj().T


def _in_spectral_ball(matrix: Any, radius: float, atol: float) -> bool:
    return bool(np.linalg.norm(matrix, 2) <= radius * (1 + atol))


def _of_spectral_ball(rng: Any, shape: tuple[int, ...], radius: float) -> Any:
    return 0.99 * radius * rng.uniform() * _of_stiefel(rng, shape, None)


def _one_matrix(x: Any) -> Iterator[Any]:
    """Yield the matrix whose columns are the vectors along the first axis."""
    yield x.reshape(x.shape[0], -1)


CAPS = np.array([0.2, 0.5, 1.5])
WIDE = away_from_zero(3, 8, seed=3)
LAYERS = away_from_zero(2, 8, 3, seed=4)
HEADS = away_from_zero(8, 2, 3, seed=5)

CASES = [
    ConstraintCase(
        "NonNegative",
        lambda _: jr.NonNegative(),
        None,
        lambda x, _: np.where(x > 0, x, 0),
        lambda x, _, atol: np.all(x >= -atol),
        lambda rng, shape, _: rng.uniform(0.01, 2, shape),
        MATRIX,
        takes_complex=False,
    ),
    ConstraintCase(
        "Box",
        lambda s: jr.Box(-0.6 * s, s),
        1.1,
        lambda x, s: np.minimum(np.maximum(x, -0.6 * s), s),
        lambda x, s, atol: np.all(x >= -0.6 * s - atol) and np.all(x <= s + atol),
        lambda rng, shape, s: rng.uniform(-0.59 * s, 0.99 * s, shape),
        MATRIX,
        takes_complex=False,
    ),
    ConstraintCase(
        "Box-arrays",
        lambda s: jr.Box(upper=s * CAPS),
        1.1,
        lambda x, s: np.minimum(x, s * CAPS),
        lambda x, s, atol: np.all(x <= s * CAPS + atol),
        lambda rng, shape, s: s * CAPS - rng.uniform(0.01, 3, shape),
        MATRIX,
        takes_complex=False,
        any_shape=False,
    ),
    ConstraintCase(
        "LinfBall",
        jr.LinfBall,
        0.7,
        lambda x, s: np.where(np.abs(x) <= s, x, s * x / np.abs(x)),
        lambda x, s, atol: np.all(np.abs(x) <= s + atol),
        lambda rng, shape, s: rng.uniform(-0.99 * s, 0.99 * s, shape),
        MATRIX,
    ),
    ConstraintCase(
        "L2Ball",
        jr.L2Ball,
        1.5,
        _each(_shorten, _whole),
        _all(_inside_ball, _whole),
        _members(_of_ball, _whole),
        MATRIX,
    ),
    ConstraintCase(
        "L1Ball",
        jr.L1Ball,
        2.5,
        _each(_onto_l1_ball, _whole),
        _all(_in_l1_ball, _whole),
        _members(_of_l1_ball, _whole),
        MATRIX,
    ),
    ConstraintCase(
        "L1Ball-units",
        lambda s: jr.L1Ball(s, axis=(0, 1, 2)),
        0.9,
        _each(_onto_l1_ball, _units),
        _all(_in_l1_ball, _units),
        _members(_of_l1_ball, _units),
        CONV,
        any_shape=False,
    ),
    ConstraintCase(
        "Simplex",
        jr.Simplex,
        3.0,
        _each(_onto_simplex, _whole),
        _all(_on_simplex, _whole),
        _members(_of_simplex, _whole),
        MATRIX,
        interior=False,
        takes_complex=False,
    ),
    ConstraintCase(
        "Simplex-rows",
        lambda s: jr.Simplex(s, axis=-1),
        1.3,
        _each(_onto_simplex, _rows),
        _all(_on_simplex, _rows),
        _members(_of_simplex, _rows),
        MATRIX,
        interior=False,
        takes_complex=False,
    ),
    ConstraintCase(
        "SparseTopK",
        lambda _: jr.SparseTopK(5),
        None,
        _each(_keep(5), _whole),
        _all(_kept(5), _whole),
        _members(_of_kept(5), _whole),
        MATRIX,
        convex=False,
    ),
    ConstraintCase(
        "SparseTopK-units",
        lambda _: jr.SparseTopK(2, axis=0),
        None,
        _each(_keep(2), _units),
        _all(_kept(2), _units),
        _members(_of_kept(2), _units),
        MATRIX,
        convex=False,
    ),
    ConstraintCase(
        "MaxNorm",
        jr.MaxNorm,
        1.2,
        _each(_shorten, _units),
        _all(_inside_ball, _units),
        _members(_of_ball, _units),
        CONV,
    ),
    ConstraintCase(
        "UnitNorm",
        lambda _: jr.UnitNorm(axis=-1),
        None,
        _each(lambda vector, _: vector / _norm(vector), _rows),
        _all(lambda vector, _, atol: abs(_norm(vector) - 1) <= atol, _rows),
        _members(_of_sphere, _rows),
        MATRIX,
        convex=False,
        interior=False,
        degree=0,
    ),
    ConstraintCase(
        "MinMaxNorm",
        lambda s: jr.MinMaxNorm(s, 1.5 * s),
        2.0,
        _each(_in_range, _units),
        _all(lambda v, low, atol: low - atol <= _norm(v) <= 1.5 * low + atol, _units),
        _members(_of_range, _units),
        MATRIX,
        convex=False,
    ),
    ConstraintCase(
        "MinMaxNorm-rate",
        lambda s: jr.MinMaxNorm(s, 1.5 * s, rate=0.3),
        2.0,
        _each(lambda v, low: v + 0.3 * (_in_range(v, low) - v), _units),
        _all(lambda v, low, atol: low - atol <= _norm(v) <= 1.5 * low + atol, _units),
        _members(_of_range, _units),
        MATRIX,
        convex=False,
        projects=False,
    ),
    ConstraintCase(
        "Orthonormal",
        lambda _: jr.Orthonormal(),
        None,
        _polar_factor,
        _is_orthonormal,
        _of_stiefel,
        MATRIX,
        convex=False,
        interior=False,
        any_shape=False,
        degree=0,
    ),
    ConstraintCase(
        "Orthonormal-wide",
        lambda _: jr.Orthonormal(),
        None,
        _polar_factor,
        _is_orthonormal,
        _of_stiefel,
        WIDE,
        convex=False,
        interior=False,
        any_shape=False,
        degree=0,
    ),
    ConstraintCase(
        "Orthonormal-layers",
        lambda _: jr.Orthonormal(batch_axes=0),
        None,
        _each(_polar_factor, _rows),
        _all(_is_orthonormal, _rows),
        _members(_of_stiefel, _rows),
        LAYERS,
        convex=False,
        interior=False,
        any_shape=False,
        degree=0,
    ),
    ConstraintCase(
        "SpectralBall",
        jr.SpectralBall,
        2.0,
        _stretch_no_more,
        _in_spectral_ball,
        _of_spectral_ball,
        MATRIX,
        any_shape=False,
    ),
    ConstraintCase(
        "SpectralBall-wide",
        jr.SpectralBall,
        3.0,
        _stretch_no_more,
        _in_spectral_ball,
        _of_spectral_ball,
        WIDE,
        any_shape=False,
    ),
    ConstraintCase(
        "SpectralBall-layers",
        lambda s: jr.SpectralBall(s, batch_axes=0),
        3.0,
        _each(_stretch_no_more, _rows),
        _all(_in_spectral_ball, _rows),
        _members(_of_spectral_ball, _rows),
        LAYERS,
        any_shape=False,
    ),
    ConstraintCase(
        "SpectralBall-heads",
        lambda s: jr.SpectralBall(s, axis=0),
        2.0,
        _each(_stretch_no_more, _one_matrix),
        _all(_in_spectral_ball, _one_matrix),
        _members(_of_spectral_ball, _one_matrix),
        HEADS,
        any_shape=False,
    ),
]
