"""Flax Linen layers that carry their penalties."""

import flax.linen as nn
import jax

from jaxreg.activity import sow
from jaxreg.penalties import Penalty


class ActivityRegularization(nn.Module):
    """A layer that penalizes what passes through it, as Keras's layer of that name.

    The penalty is collected by a surrounding `jaxreg.activity` (with no rules: `activity({})`),
    under the layer's path and `output`.

    Args:
        penalty: the penalty of the output.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import jaxreg as jr
        >>> model = nn.Sequential([nn.relu, jr.linen.ActivityRegularization(jr.L1(0.1))])
        >>> y, terms = jr.activity({})(model.apply)({}, jnp.array([[1.0, -1.0, 2.0]]))
        >>> {path: round(float(value), 4) for path, value in terms.items()}
        {'layers_1/output': 0.3}
    """

    penalty: Penalty

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`, of any shape."""
        return sow(self, "output", x, self.penalty)
