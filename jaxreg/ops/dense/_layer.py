"""What the dense layers of Linen and of NNX have in common."""

from typing import Any

import jax

from jaxreg.activity import site
from jaxreg.ops._dispatch import Implementation
from jaxreg.penalties import Penalty

from ._api import measured
from ._reference import Activation, reference


def penalized(
    module: Any,
    operands: tuple[jax.Array, jax.Array, jax.Array | None],
    activation: Activation | None,
    penalty: Penalty | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Return the layer's output, and report its penalty to the pass under way, if any."""
    found = site(module, "output")
    if penalty is not None and found is not None:
        run, path = found
        chosen = run.meet(module, path, penalty)
        if chosen is not None:
            a, measurement = measured(
                *operands,
                activation=activation,
                penalty=chosen,
                reduction=run.reduction,
                implementation=implementation,
                mask=run.mask,
            )
            run.keep(module, path, chosen, measurement)
            return a
    return reference(*operands, activation)
