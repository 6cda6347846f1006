"""Flax NNX layers that carry their penalties."""

import jax
from flax import nnx

from jaxreg.activity import sow
from jaxreg.activity._nnx import PenaltyTerm as PenaltyTerm
from jaxreg.penalties import Penalty


class ActivityRegularization(nnx.Module):
    """A layer that penalizes what passes through it, as Keras's layer of that name.

    The penalty is collected by a surrounding `jaxreg.activity` (with no rules: `activity({})`),
    under the layer's path and `output`.

    Args:
        penalty: the penalty of the output.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxreg as jr
        >>> model = nnx.Sequential(jax.nn.relu, jr.nnx.ActivityRegularization(jr.L1(0.1)))
        >>> y, terms = jr.activity({})(model)(jnp.array([[1.0, -1.0, 2.0]]))
        >>> {path: round(float(value), 4) for path, value in terms.items()}
        {'layers/1/output': 0.3}
    """

    def __init__(self, penalty: Penalty):
        # An array must be data to NNX; numbers stay out of the module's state.
        arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(penalty))
        self.penalty = nnx.data(penalty) if arrays else penalty

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`, of any shape."""
        return sow(self, "output", x, self.penalty)
