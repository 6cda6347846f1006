"""The dense layer's forward pass on Hopper: the penalty's sums in the matrix product's epilogue.

Where XLA would read the activation again to measure it, here each tile is measured before it is
stored.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.ops._epilogue import Epilogue, NotElementwise, elementwise, epilogue, evaluate
from jaxreg.ops._kernel import Results
from jaxreg.ops._mosaic_gpu import refusal
from jaxreg.ops._product import product, sizes
from jaxreg.penalties import Penalty

from ._reference import Activation, reference


def supports(
    x: jax.Array, w: jax.Array, b: jax.Array | None, activation: Activation, penalty: Penalty
) -> str | None:
    """Return why the kernel cannot run on these operands, or None."""
    what = ("the examples", "features", "the input's features")
    reason = refusal(*sizes(x, w), what, x, w)
    if reason is not None:
        return reason
    try:
        elementwise(activation)
    except NotElementwise as error:
        return f"the activation is not one that a tile can take: {error}"
    dtype = jax.eval_shape(functools.partial(reference, activation=activation), x, w, b).dtype
    if dtype != x.dtype:
        return (
            f"it stores the matrices' {x.dtype}, and with this bias and activation the result would"
            f" be {dtype}"
        )
    try:
        epilogue(penalty, (*x.shape[:-1], w.shape[1]))
    except NotElementwise as error:
        return f"`jaxreg.{type(penalty).__name__}` cannot be measured tile by tile: {error}"
    return None


def kernel_name(keep: bool) -> str:
    """Return what the kernel is called; `keep` as of `forward`."""
    return "jaxreg_dense_keep" if keep else "jaxreg_dense"


def forward(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    scalars: Sequence[jax.Array],
    *,
    activation: Activation,
    sums: Epilogue,
    keep: bool,
    asked_by: str | None,
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
        asked_by: see `product`.
    """
    # Traced, as a kernel cannot close over arrays.
    before = elementwise(activation)
    nodes = [node for node, _ in sums.sums]

    def finish(part: jax.Array, _: Any, columns: Any, scalars: Any) -> Any:
        z = part + columns[0]
        (a,) = evaluate(before, z, ())
        a = a.astype(x.dtype)
        # What is measured is what is returned: the rounded activation.
        return (a, z) if keep else (a,), evaluate(nodes, a.astype(jnp.float32), scalars)

    results = Results(2 if keep else 1, tuple(over for _, over in sums.sums))

    def plain(x: jax.Array, w: jax.Array, _: Any, columns: Any, scalars: Any) -> Any:
        z = reference(x, w, columns[0], None)
        a = activation(z)
        stored = [value.astype(x.dtype) for value in ((a, z) if keep else (a,))]
        return stored, results.total(evaluate(nodes, a.astype(jnp.float32), scalars))

    stored, totals = product(
        x,
        w,
        columns=[b],
        scalars=scalars,
        epilogue=finish,
        results=results,
        plain=plain,
        name=kernel_name(keep),
        asked_by=asked_by,
    )
    return stored[0], stored[1] if keep else None, totals
