"""Activity penalties: rules over what modules put out."""

from ._api import Activity as Activity
from ._api import activity as activity
from ._api import penalize as penalize
from ._api import site as site
from ._api import sow as sow
from ._pass import Parameter as Parameter
from ._pass import alike as alike
