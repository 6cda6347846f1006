"""Sums and multiples of penalties."""

import jaxreg as jr

from ._case import CODES, MATRIX, Case
from .group import columns
from .ordered import total_variation
from .separable import l1, l2
from .statistic import kl

CASES = [
    Case(
        "L2+GroupLasso+L2",
        lambda s: jr.L2(s) + jr.GroupLasso(2 * s) + jr.L2(s),
        lambda x, s: columns(x, 2 * s) + l2(x, 2 * s),
        MATRIX,
        curvature=4,
    ),
    Case(
        "L1+L2+TotalVariation+L1",
        lambda s: jr.L1(s) + jr.L2(s) + jr.TotalVariation(2 * s, axis=0) + jr.L1(s),
        lambda x, s: l1(x, 2 * s) + l2(x, s) + total_variation(x, 2 * s),
        MATRIX,
        takes_complex=False,
        curvature=2,
    ),
    Case(
        "2*(L1+KLSparsity)",
        lambda s: 2 * (jr.L1(s) + jr.KLSparsity(s, target=0.2)),
        lambda x, s: l1(x, 2 * s) + kl(x, 2 * s),
        CODES,
        domain=(0.0625, 0.9375),
        has_prox=False,
        takes_complex=False,
    ),
]
