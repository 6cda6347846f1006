"""A dense layer with its activity penalty."""

from ._api import dense as dense
from ._api import measured as measured
from ._reference import Activation as Activation
from ._reference import reference as reference
