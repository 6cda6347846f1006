"""How a penalty's fields are declared, and which of them are leaves of the pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from ._checks import POSITIVE

ArrayOrTree: TypeAlias = Any  # JAX has no type for trees.


def static(**kwargs: Any) -> Any:
    """Declare a field that is part of the pytree's structure, not a leaf."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def setting(what: str, holds: Callable[[float], bool], **kwargs: Any) -> Any:
    """Declare a leaf, a scalar that is `what`: `holds` tells of a concrete one."""
    return dataclasses.field(metadata={"requires": (what, holds)}, **kwargs)


def positive(**kwargs: Any) -> Any:
    """Declare a leaf that is a positive, finite scalar."""
    return setting(*POSITIVE, **kwargs)


def array(**kwargs: Any) -> Any:
    """Declare a leaf that is an array, a tree of arrays by the paths of a parameter tree, or None.

    `moments` and the proximal operator may read it; `finish` does not.
    """
    return dataclasses.field(metadata={"array": True}, **kwargs)


def held(value: Any) -> Any:
    """Return what a setting holds now.

    A Variable of Flax's, or a dict, may hold something else later: it moves with its model.
    """
    if isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        return value
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    return jax.tree.map(lambda leaf: leaf, value)


def register(cls: type) -> None:
    """Make a dataclass a pytree."""
    fields = dataclasses.fields(cls)
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    settings = [f.name for f in fields if f.metadata.get("static")]

    def flatten_with_keys(penalty: Any) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.GetAttrKey(n), getattr(penalty, n)) for n in leaves]
        return keyed, tuple(getattr(penalty, n) for n in settings)

    def unflatten(values: Any, children: Any) -> Any:
        # The leaves may be stacked, abstract or placeholders, which `__post_init__` refuses.
        penalty: Any = object.__new__(cls)
        for name, value in zip((*leaves, *settings), (*children, *values), strict=True):
            object.__setattr__(penalty, name, value)
        return penalty

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
