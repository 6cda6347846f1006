"""Two dense layers with the activity penalty of what lies between them."""

from ._api import mlp as mlp
