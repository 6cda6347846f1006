"""What the settings of a penalty must satisfy, as far as they are concrete."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

NON_NEGATIVE = "a finite, non-negative scalar", lambda value: 0 <= value < math.inf
POSITIVE = "a positive, finite scalar", lambda value: 0 < value < math.inf


def require(argument: str, value: Any, what: str, holds: Callable[[float], bool]) -> None:
    """Raise unless the value is traced, or a concrete real scalar for which `holds`."""
    if isinstance(value, jax.core.Tracer):
        valid = value.shape == () and jnp.isrealobj(value)
    else:
        array = np.asarray(value)
        real = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
        # bfloat16 and its kin are no subtypes of np.floating.
        real = real or jnp.issubdtype(array.dtype, jnp.floating)
        valid = array.shape == () and real and holds(float(array))
    if not valid:
        raise ValueError(f"`jaxreg.{argument}` must be {what}; got {value!r}.")


def require_integer(argument: str, value: Any, *, least: int | None = None) -> None:
    """Raise unless the value is an integer, of Python's or NumPy's, and no less than this."""
    try:
        index = None if isinstance(value, bool | jax.Array) else operator.index(value)
    except TypeError:
        index = None
    if index is None or (least is not None and index < least):
        kind = {None: "an", 0: "a non-negative", 1: "a positive"}[least]
        raise ValueError(f"`jaxreg.{argument}` must be {kind} integer; got {value!r}.")


def require_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"`jaxreg.{argument}` must be one of {known}; got {value!r}.")


def require_real(function: str, argument: str, value: ArrayLike) -> jax.Array:
    """Return the argument of a function as an array; raise unless it is real and floating-point."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`jaxreg.{function}` takes a real floating-point array; got dtype {array.dtype} for"
            f' "{argument}" of shape {array.shape}.'
        )
    return array


def is_floating(value: Any) -> bool:
    """Return whether this is a floating-point array, or a number that is one under `jit`."""
    number = isinstance(value, float | complex)
    return number or (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact))


def require_order(penalty: Any, low: str, high: str) -> None:
    """Raise if two fields are concrete and not in this order, or NaN."""
    values: list[Any] = [getattr(penalty, name) for name in (low, high)]
    if all(map(is_concrete, values)) and not np.all(np.asarray(values[0]) <= np.asarray(values[1])):
        raise ValueError(
            f"`jaxreg.{type(penalty).__name__}({low}=..., {high}=...)` must be in this order;"
            f" got {low}={values[0]!r}, {high}={values[1]!r}."
        )


def is_concrete(value: Any) -> bool:
    """Return whether this is a number or an array that can be read here and now."""
    if isinstance(value, jax.Array):
        # One that other processes hold parts of cannot be read here.
        return not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
    return isinstance(value, int | float | np.generic | np.ndarray)


def check_step(penalty: Any, step: ArrayLike, x: jax.Array) -> None:
    """Raise unless a proximal step broadcasts to the array as it may, and is not negative."""
    name = f"`jaxreg.{type(penalty).__name__}.prox(x, step)`"
    shared = penalty.step_axes(x.ndim)
    shape = jnp.shape(step)
    sizes = (1,) * (x.ndim - len(shape)) + shape
    fits = len(sizes) == x.ndim and all(a in (1, b) for a, b in zip(sizes, x.shape, strict=True))
    if not fits or any(sizes[a] != 1 for a in (range(x.ndim) if shared is None else shared)):
        constant = "is a scalar" if shared is None else f"is constant along the axes {shared}"
        raise ValueError(
            f"{name} takes a step that broadcasts to x and {constant}; got shape {shape} for"
            f" {x.shape}."
        )
    # An array is not waited for.
    if isinstance(step, int | float | np.ndarray | np.generic) and not np.all(step >= 0):
        raise ValueError(f"{name} takes a non-negative step; got {step!r}.")


def check_broadcasts(penalty: Any, field: str, x: jax.Array, name: str) -> None:
    """Raise unless the field holds an array that broadcasts to `x`, and is real where that is."""
    value = getattr(penalty, field)
    if not jax.tree_util.all_leaves([value]):
        raise TypeError(
            f"`jaxreg.{type(penalty).__name__}({field}=...)` is a tree: only `jaxreg.kernel` can"
            f' take the array for "{name}" from it.'
        )
    shape = jnp.shape(value)
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"`jaxreg.{type(penalty).__name__}({field}=...)` must be real for a real array; got"
            f' dtype {jnp.result_type(value)} for "{name}" of dtype {x.dtype}.'
        )
    if len(shape) > x.ndim or any(
        a not in (1, b) for a, b in zip(shape[::-1], x.shape[::-1], strict=False)
    ):
        raise ValueError(
            f"`jaxreg.{type(penalty).__name__}({field}=...)` must broadcast to the array; got shape"
            f' {shape} for "{name}" of shape {x.shape}.'
        )
