"""A dense layer with its activity penalty."""

from ._api import dense as dense
from ._api import measured as measured
