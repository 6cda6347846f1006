"""Penalties of arrays whose entries have an order."""

import math
from typing import Any

import numpy as np

import jaxreg as jr

from ._case import MATRIX, Case, away_from_zero

IMAGES = away_from_zero(2, 8, 3, seed=4)


def total_variation(x: Any, s: float) -> float:
    x = np.real(x)
    return s * math.fsum(
        abs(x[i + 1, j] - x[i, j]) for i in range(x.shape[0] - 1) for j in range(x.shape[1])
    )


def _image_steps(x: Any) -> Any:
    """Forward differences of each pixel along the last two axes; 0 beyond the last."""
    x = np.real(x)
    for image in x:
        height, width = image.shape
        for i in range(height):
            for j in range(width):
                down = image[i + 1, j] - image[i, j] if i + 1 < height else 0.0
                right = image[i, j + 1] - image[i, j] if j + 1 < width else 0.0
                yield down, right


def _anisotropic(x: Any, s: float) -> float:
    return s * math.fsum(abs(down) + abs(right) for down, right in _image_steps(x))


def _isotropic(x: Any, s: float) -> float:
    return s * math.fsum(math.hypot(down, right) for down, right in _image_steps(x))


def _smooth(x: Any, s: float) -> float:
    return s * math.fsum(down**2 + right**2 for down, right in _image_steps(x))


def _second_differences(x: Any, s: float) -> float:
    x = np.real(x)
    return s * math.fsum(
        abs(x[i, j] - 2 * x[i + 1, j] + x[i + 2, j])
        for i in range(x.shape[0] - 2)
        for j in range(x.shape[1])
    )


CASES = [
    Case(
        "TotalVariation",
        lambda s: jr.TotalVariation(s, axis=0),
        total_variation,
        MATRIX,
        takes_complex=False,
        sparse=False,
    ),
    Case(
        "TotalVariation-anisotropic",
        lambda s: jr.TotalVariation(s, axis=(-2, -1)),
        _anisotropic,
        IMAGES,
        takes_complex=False,
        has_prox=False,
    ),
    Case(
        "TotalVariation-isotropic",
        lambda s: jr.TotalVariation(s, axis=(-2, -1), isotropic=True),
        _isotropic,
        IMAGES,
        takes_complex=False,
        has_prox=False,
    ),
    Case(
        "SmoothL2",
        lambda s: jr.SmoothL2(s, axis=(-2, -1)),
        _smooth,
        IMAGES,
        takes_complex=False,
        sparse=False,
    ),
    Case(
        "TrendFiltering",
        lambda s: jr.TrendFiltering(s, axis=0),
        _second_differences,
        MATRIX,
        takes_complex=False,
        has_prox=False,
    ),
]
