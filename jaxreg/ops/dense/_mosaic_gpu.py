"""The dense layer's forward pass on Hopper: the penalty's sums in the matrix product's epilogue.

Where XLA would read the activation again to measure it, here each tile is measured before it is
stored.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.ops._epilogue import Epilogue, NotElementwise, elementwise, epilogue, evaluate
from jaxreg.ops._mosaic_gpu import Results, config, product, refusal
from jaxreg.penalties import Penalty


def supports(
    x: jax.Array, w: jax.Array, activation: Callable[..., Any], penalty: Penalty
) -> str | None:
    """Return why the kernel cannot run on these operands, or None."""
    (k, n), m = w.shape, x.size // max(x.shape[-1], 1)
    what = ("the examples", "features", "the input's features")
    reason = refusal(m, n, k, what, x, w)
    if reason is not None:
        return reason
    try:
        elementwise(activation)
    except NotElementwise as error:
        return f"the activation is not one that a tile can take: {error}"
    try:
        epilogue(penalty, (*x.shape[:-1], n))
    except NotElementwise as error:
        return f"`jaxreg.{type(penalty).__name__}` cannot be measured tile by tile: {error}"
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    scalars: Sequence[jax.Array],
    *,
    activation: Callable[[jax.Array], jax.Array],
    sums: Epilogue,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None, list[jax.Array]]:
    """Return the activation (m, n), the value before it or None, and the penalty's sums.

    Args:
        x: (m, k).
        w: (k, n).
        b: (n,).
        scalars: those of `sums`.
        activation: a function of single entries.
        sums: what to sum.
        keep: whether to return the value before the activation.
    """
    tiles = config(x.shape[0], w.shape[1], x.shape[1], arrays=2 if keep else 1)
    assert tiles is not None
    nodes = [node for node, _ in sums.sums]

    def finish(part: jax.Array, _: Any, columns: Any, scalars: Any) -> Any:
        z = part + columns[0]
        a = activation(z).astype(x.dtype)
        # What is measured is what is returned: the rounded activation.
        return (a, z) if keep else (a,), evaluate(nodes, a.astype(jnp.float32), scalars)

    stored, partials = product(
        x,
        w,
        tiles=tiles,
        columns=[b],
        scalars=scalars,
        epilogue=finish,
        results=Results(
            stored=2 if keep else 1,
            summed=len(nodes),
            # Sums over examples add up to sums over everything, so one direction is enough. By row
            # is less work, but its running sums are registers too many beside two stores.
            by_column=keep or any(over == "examples" for _, over in sums.sums),
        ),
        name="jaxreg_dense",
    )
    totals = [
        jnp.sum(partial, axis=None if over == "all" else 0)
        for partial, (_, over) in zip(partials, sums.sums, strict=True)
    ]
    return stored[0], stored[1] if keep else None, totals
