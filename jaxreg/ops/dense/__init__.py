"""A dense layer with its activity penalty."""

from ._api import dense as dense
from ._layer import penalized as penalized
from ._reference import Activation as Activation
