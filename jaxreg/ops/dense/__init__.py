"""A dense layer with its activity penalty."""

from ._api import check as check
from ._api import dense as dense
from ._layer import penalized as penalized
from ._mosaic_gpu import supports as supports
from ._reference import Activation as Activation
from ._reference import check_activation as check_activation
from ._reference import reference as reference
from ._rule import instantiate as instantiate
from ._rule import keeps_input as keeps_input
from ._rule import layer as layer
from ._rule import layer_wins as layer_wins
from ._rule import product_tangent as product_tangent
from ._rule import with_slope as with_slope
