"""The cost of a function on a device that is not there."""

from collections.abc import Callable
from typing import Any

from ._devices import sharding_on  # first: it says which platforms JAX may start
from ._hlo import kernels, transfers

import jax  # isort: skip


def compiled_for(
    function: Callable[..., Any], arguments: Any, device: str, donate: tuple[int, ...] = ()
) -> Any:
    """Compile a function for a device.

    Args:
        function: any function that can be jitted.
        arguments: a tuple of its arguments, whose leaves need only a shape and a dtype.
        device: a key of `DEVICES`.
        donate: the positions of the arguments whose memory it may reuse.
    """
    sharding = sharding_on(device)
    array: Any = jax.ShapeDtypeStruct
    shapes = jax.tree.map(lambda x: array(x.shape, x.dtype, sharding=sharding), arguments)
    return jax.jit(function, donate_argnums=donate).lower(*shapes).compile()


def report(
    function: Callable[..., Any],
    arguments: Any,
    device: str,
    *,
    donate: tuple[int, ...] = (0, 1),
    touching: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """Compile a function for a device, its first two arguments donated, and return its cost there.

    Args:
        function: any function that can be jitted.
        arguments: a tuple of its arguments, whose leaves need only a shape and a dtype.
        device: a key of `DEVICES`.
        donate: the positions of the arguments whose memory it may reuse.
        touching: a shape to look for.

    Returns:
        "kernels": how many it starts; "bytes": what they read from and write to the main memory,
        each operand whole and once (of a prefetch into a TPU's VMEM the side in HBM only);
        "temporary": the peak of the memory for intermediate results, in bytes; and, if asked for,
        "touching": how many kernels read or write an array of as many entries as that shape.
    """
    compiled = compiled_for(function, arguments, device, donate)
    text = compiled.as_text()
    run = kernels(text)
    cost = {
        "kernels": sum(kernel.times for kernel in run),
        "bytes": sum(kernel.bytes for kernel in run + transfers(text)),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    if touching is not None:
        cost["touching"] = sum(kernel.times for kernel in run if kernel.touches(touching))
    return cost
