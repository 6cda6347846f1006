"""Arrays on a mesh of explicit axes, whose types say how they are split."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

Moments = TypeVar("Moments", bound=Callable[..., Any])


def on_any_mesh(
    function: Callable[..., Any], x: jax.Array, *others: Any, split: bool = False
) -> Any:
    """Return `function(x, *others)`, and leave it to the compiler how that is computed.

    On a mesh of explicit axes JAX asks of each product and each slice how its result is to be
    split.

    Args:
        function: a function of trees of arrays, which closes over none that is on a mesh.
        x: the array whose mesh it is.
        others: further arguments.
        split: whether the result, of the shape of `x`, is split as `x` is. Every device gets all of
            another.
    """
    sharding = jax.typeof(x).sharding
    axes = sharding.mesh.explicit_axes
    # Nothing is asked of what is not split; and a derivative that is not compiled would be of
    # another type than the array, where that is on no device of the mesh yet.
    if not axes or not any(map(_is_split, jax.tree.leaves((x, others)))):
        return function(x, *others)
    result = sharding if split else NamedSharding(sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=result)(x, *others)


def _is_split(x: Any) -> bool:
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def partitioned(moments: Moments) -> Moments:
    """Compute these moments on any mesh; they are small."""

    @functools.wraps(moments)
    def anywhere(penalty: Any, x: jax.Array, where: jax.Array | None = None) -> Any:
        return on_any_mesh(lambda x, p, where: moments(p, x, where), x, penalty, where)

    return anywhere  # type: ignore[return-value]
