"""Arrays on a mesh of explicit axes, whose types say how they are split."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

Moments = TypeVar("Moments", bound=Callable[..., Any])


def partitioned(moments: Moments) -> Moments:
    """Leave it to the compiler how these moments are computed; every device gets them all.

    There JAX asks of each product and each slice how its result is to be split. Moments are small:
    they are not.
    """

    @functools.wraps(moments)
    def anywhere(penalty: Any, x: jax.Array, where: jax.Array | None = None) -> Any:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.explicit_axes:
            return moments(penalty, x, where)
        return jax.sharding.auto_axes(
            functools.partial(moments, penalty),
            axes=mesh.explicit_axes,
            out_sharding=NamedSharding(mesh, PartitionSpec()),  # type: ignore[no-untyped-call]
        )(x, where)

    return anywhere  # type: ignore[return-value]
