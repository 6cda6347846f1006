"""What the registry says of a penalty, and points to evaluate it at."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxreg as jr

STRENGTH = 0.3


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """One penalty.

    Args:
        name: the test id.
        build: strength -> penalty; the value is linear in the strength.
        formula: (x, strength) -> value, in NumPy float64.
        sample: a point away from kinks, float64; one of its axes has size 8.
        domain: between which entries the formula is defined, and well conditioned in float32.
        any_shape: whether arrays of other shapes than the sample's are taken.
        has_prox: whether a closed form is known.
        fixed_point: what the proximal operator leaves as it is, whatever the step.
        elementwise: whether the value is a sum over entries.
        takes_complex: whether the formula is one of the modulus.
        convex: whether the value is a convex function.
        sparse: whether the proximal operator gives exact zeros.
        bounded: whether an infinite entry costs no more than a large one.
        gradient_at_zero: the gradient at an array of zeros, for a strength of one, up to
            broadcasting.
        curvature: the sums of the rows of the second derivative there, up to broadcasting; None
            where they are only known to be finite.
        nan_gradient: whether a NaN reaches the gradient as well as the value.
    """

    name: str
    build: Callable[[Any], jr.Penalty]
    formula: Callable[[Any, float], float]
    sample: Any
    domain: tuple[float, float] = (-math.inf, math.inf)
    any_shape: bool = True
    has_prox: bool = True
    fixed_point: Any = 0.0
    elementwise: bool = False
    takes_complex: bool = True
    convex: bool = True
    sparse: bool = True
    bounded: bool = False
    gradient_at_zero: Any = 0.0
    curvature: Any = 0.0
    nan_gradient: bool = True

    @property
    def penalty(self) -> jr.Penalty:
        return self.build(STRENGTH)

    def value(self, x: Any) -> float:
        return self.formula(np.asarray(x, np.complex128), STRENGTH)

    def __repr__(self) -> str:
        return self.name


@jax.jit
def derivatives(penalty: jr.Penalty, x: jax.Array, direction: jax.Array) -> tuple[Any, Any, Any]:
    """Return the value, the gradient, and the derivative of the gradient along a direction."""
    gradient, curvature = jax.jvp(penalty.gradient, (x,), (direction,))
    return penalty(x), gradient, curvature


def away_from_zero(*shape: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.25, 2.0, shape)


def probabilities(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape)


MATRIX = away_from_zero(8, 3, seed=0)
CONV = away_from_zero(2, 1, 3, 8, seed=1)
CODES = probabilities(2, 8, 3, seed=2)
