"""Cross-entropy of a linear layer's outputs, with z-loss, without holding them."""

from ._api import linear_cross_entropy as linear_cross_entropy
from ._forward import LinearCrossEntropy as LinearCrossEntropy
