"""Every penalty, with its formula transcribed in NumPy float64 from the paper or from Keras."""

from . import (
    algebra,
    distance,
    gates,
    group,
    logits,
    matrix,
    ordered,
    routing,
    separable,
    statistic,
    temporal,
)
from ._case import CODES as CODES
from ._case import CONV as CONV
from ._case import MATRIX as MATRIX
from ._case import STRENGTH as STRENGTH
from ._case import Case as Case
from ._case import derivatives as derivatives

FAMILIES = (
    separable,
    group,
    statistic,
    temporal,
    logits,
    routing,
    distance,
    gates,
    matrix,
    ordered,
    algebra,
)

CASES = [case for family in FAMILIES for case in family.CASES]
WITH_PROX = [case for case in CASES if case.has_prox]
