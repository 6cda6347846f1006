"""A penalty's moments as sums of elementwise functions, found by tracing them.

A kernel sees an activation tile by tile. It can measure a penalty whose moments are sums, over all
entries or over examples, of functions of single entries; what becomes of the sums afterwards is
plain JAX, outside of the kernel.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal as Constant

from jaxreg.penalties import Penalty
from jaxreg.terms import varying_as

Over = Literal["all", "examples"]

ELEMENTWISE = frozenset(
    (
        "abs",
        "add",
        "add_any",
        "and",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "exp",
        "ge",
        "gt",
        "integer_pow",
        "le",
        "log",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "one_minus_square",
        "or",
        "rsqrt",
        "select_n",
        "sign",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tanh",
    )
)
"""The primitives that a kernel can run on a tile."""


_CALLS = frozenset(("closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"))


class NotElementwise(Exception):
    """A function that cannot run tile by tile; says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value of the activation's shape: an equation, or the activation itself.

    Args:
        primitive: None for the activation.
        operands: nodes, columns, scalars or numbers.
    """

    primitive: Any = None
    params: Any = None
    operands: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A scalar that the kernel is handed, by position."""

    position: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Column:
    """A vector over the last axis that the kernel is handed, by position."""

    position: int
    dtype: Any


@dataclasses.dataclass
class Epilogue:
    """The sums that a penalty's moments need.

    Args:
        sums: what is summed, and over what.
        scalars: the settings that the functions read, such as a threshold.
        moments: given the sums, in order, returns the moments.
    """

    sums: list[tuple[Node, Over]]
    scalars: list[jax.Array]
    moments: Callable[[Sequence[jax.Array]], Any]


def epilogue(penalty: Penalty, shape: tuple[int, ...]) -> Epilogue:
    """Trace the moments of an activation of this shape, in float32.

    Raises:
        NotElementwise: where they are not sums of functions of single entries.
    """
    leaves, tree = _leaves(penalty)
    traced, out = jax.make_jaxpr(
        lambda x, leaves: jax.tree.unflatten(tree, leaves).moments(x), return_shape=True
    )(_array(shape), _alike(leaves))

    def run(sums: Sequence[jax.Array] | None) -> tuple["_Interpreter", Any]:
        interpreter = _Interpreter(shape, sums)
        values = interpreter.run(traced.jaxpr, traced.consts, [Node(), *leaves])
        if any(isinstance(value, Node) for value in values):
            raise NotElementwise("its moments are as large as the activation")
        return interpreter, jax.tree.unflatten(jax.tree.structure(out), values)

    found, _ = run(None)
    return Epilogue(found.found, found.scalars, lambda sums: run(sums)[1])


@dataclasses.dataclass
class Gradient:
    """The gradient of a penalty's moments by the activation, as a function of single entries.

    Args:
        node: the function: a node, or what is no function of the activation.
        scalars: the scalars that it reads.
        columns: the vectors over the last axis that it reads.
    """

    node: Any
    scalars: list[jax.Array]
    columns: list[jax.Array]


def gradient(penalty: Penalty, shape: tuple[int, ...], cotangents: Any) -> Gradient:
    """Trace the gradient by an activation of this shape, in float32, at cotangents of the moments.

    Raises:
        NotElementwise: where it is not a function of single entries, scalars and columns.
    """
    leaves, tree = _leaves(penalty)
    given, given_tree = jax.tree.flatten(cotangents)

    def by_activation(x: jax.Array, leaves: Any, given: Any) -> jax.Array:
        moments = jax.tree.unflatten(tree, leaves).moments
        (pulled,) = jax.vjp(moments, x)[1](jax.tree.unflatten(given_tree, given))
        return jnp.asarray(pulled)

    traced = jax.make_jaxpr(by_activation)(_array(shape), _alike(leaves), _alike(given))
    interpreter = _Interpreter(shape, None, gradient=True)
    arguments = [Node(), *leaves, *given]
    (node,) = interpreter.run(traced.jaxpr, traced.consts, arguments)
    return Gradient(interpreter.operand(node), interpreter.scalars, interpreter.columns)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32, weak_type: bool = False) -> Any:
    array: Any = jax.ShapeDtypeStruct
    return array(shape, dtype, weak_type=weak_type)


def _alike(leaves: list[Any]) -> list[Any]:
    """Return what tells of arrays no more than a function of one device can know."""
    types = [(jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)) for x in leaves]
    return [_array(*type_) for type_ in types]


def _leaves(penalty: Penalty) -> tuple[list[Any], Any]:
    """Return a penalty's leaves; a plain number stays one: no kernel need be handed it."""
    leaves, tree = jax.tree.flatten(penalty)
    as_array = [
        x if isinstance(x, jax.Array) else np.asarray(x, jnp.result_type(x)) for x in leaves
    ]
    return as_array, tree


def elementwise(function: Callable[[jax.Array], Any]) -> list[Any]:
    """Return what a function of an array makes of its single entries, in float32.

    Raises:
        NotElementwise: where that is not what it does.
    """
    shape = (8, 128)
    traced = jax.make_jaxpr(lambda x: jax.tree.leaves(function(x)))(_array(shape))
    interpreter = _Interpreter(shape, None, forward_mode=True)
    nodes = interpreter.run(traced.jaxpr, traced.consts, [Node()])
    if interpreter.found or not any(isinstance(node, Node) for node in nodes):
        raise NotElementwise("it is not a function of single entries")
    operands = [interpreter.operand(node) for node in nodes]
    if interpreter.scalars:
        raise NotElementwise("it reads a traced array, by which it could not be differentiated")
    return operands


def evaluate(
    nodes: Sequence[Any], tile: jax.Array, scalars: Sequence[Any], columns: Sequence[Any] = ()
) -> list[jax.Array]:
    """Return the nodes' values on a tile; what they share is computed once.

    Args:
        nodes: what to compute.
        tile: the activation's, or any part of it.
        scalars: what the kernel is handed.
        columns: the same, each of the tile's shape.
    """
    values: dict[int, jax.Array] = {}

    def value(operand: Any) -> Any:
        if isinstance(operand, Scalar):
            return jnp.full(tile.shape, scalars[operand.position].astype(operand.dtype))
        if isinstance(operand, Column):
            return columns[operand.position].astype(operand.dtype)
        if not isinstance(operand, Node):
            return jnp.full(tile.shape, operand.item(), operand.dtype)
        if operand.primitive is None:
            return tile
        if id(operand) not in values:
            operands = [value(o) for o in operand.operands]
            values[id(operand)] = _bind(operand.primitive, operands, operand.params)
        return values[id(operand)]

    return [value(node) for node in nodes]


def _bind(primitive: Any, operands: Sequence[Any], params: Any) -> Any:
    # What was traced knows nothing of a `shard_map`; its numbers are the same on every shard.
    return primitive.bind(*varying_as(list(operands), operands), **params)


def _now(operands: Sequence[Any]) -> Any:
    """Return the context in which what is made of numbers is one, under `jit` as well."""
    known = operands and not any(isinstance(o, jax.core.Tracer) or o.ndim for o in operands)
    return jax.ensure_compile_time_eval() if known else contextlib.nullcontext()


# A value that is made of sums, where those are not known.
_FORGOTTEN = object()


class _Interpreter:
    """Runs a jaxpr whose first argument is the activation, of which nothing is known.

    What does not depend on the activation, and what depends on its sums alone, is computed as it
    goes along; the rest becomes nodes. A scalar stands for an array of it, of the activation's
    shape.

    Args:
        shape: the activation's.
        sums: the sums, or None where they are to be found.
        gradient: whether this is the gradient by the activation, made of scalars and columns.
        forward_mode: whether this is to be differentiated in forward mode.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sums: Sequence[jax.Array] | None,
        *,
        gradient: bool = False,
        forward_mode: bool = False,
    ):
        self.shape = shape
        self.sums = sums
        self.gradient = gradient
        self.forward_mode = forward_mode
        self.found: list[tuple[Node, Over]] = []
        self.scalars: list[jax.Array] = []
        self.columns: list[jax.Array] = []

    def run(self, jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
        values: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True)
        )

        def read(atom: Any) -> Any:
            constant = isinstance(atom, Constant)
            return np.asarray(atom.val, jnp.result_type(atom.val)) if constant else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name == "custom_vjp_call" and self.forward_mode:
                raise NotElementwise(
                    "its derivative is a `jax.custom_vjp`, which forward mode cannot take; it can"
                    " take a `jax.custom_jvp`"
                )
            if equation.primitive.name in _CALLS:
                inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
                outs = self.run(inner.jaxpr, inner.consts, operands)
            else:
                outs = self._equation(equation, operands)
            values.update(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        if any(operand is _FORGOTTEN for operand in operands):
            return [_FORGOTTEN] * len(equation.outvars)
        if not any(isinstance(operand, Node | Column) for operand in operands):
            if name == "broadcast_in_dim" and shape == self.shape:
                if operands[0].ndim == 0:
                    return operands  # nodes take scalars as they are
                if self.gradient and self._is_column(equation, operands[0]):
                    self.columns.append(operands[0].reshape(-1))
                    return [Column(len(self.columns) - 1, operands[0].dtype)]
            stands = any(
                atom.aval.shape != operand.shape
                for atom, operand in zip(equation.invars, operands, strict=True)
            )
            if stands and name == "reduce_sum":
                size = math.prod(self.shape[axis] for axis in equation.params["axes"])
                return [jnp.full(shape, size * operands[0])]
            if stands and (name not in ELEMENTWISE or any(o.ndim for o in operands)):
                raise NotElementwise(f"it takes {name} of an array that is constant")
            with _now(operands):
                outs = _bind(equation.primitive, operands, equation.params)
            return list(outs) if equation.primitive.multiple_results else [outs]
        if name == "reduce_sum":
            return [self._sum(operands[0], tuple(equation.params["axes"]))]
        if name in ("broadcast_in_dim", "reshape", "squeeze") and shape == self.shape:
            return operands[:1]
        if name not in ELEMENTWISE or shape != self.shape:
            raise NotElementwise(f"it takes {name} of the activation")
        # How derivatives add up; kernels know the sum alone.
        primitive = lax.add_p if name == "add_any" else equation.primitive
        return [Node(primitive, equation.params, tuple(map(self.operand, operands)))]

    def _is_column(self, equation: Any, operand: Any) -> bool:
        last = len(self.shape) - 1
        along = equation.params["broadcast_dimensions"][-1:] == (last,)
        return bool(along and operand.size == operand.shape[-1] == self.shape[-1])

    def operand(self, value: Any) -> Any:
        """Return what a node reads for a value."""
        if value is _FORGOTTEN:
            raise NotElementwise("its gradient needs the sums themselves")
        if isinstance(value, Node | Column):
            return value
        if value.ndim:
            raise NotElementwise("it holds an array of which a tile would need its part")
        if not isinstance(value, jax.core.Tracer):
            return value
        self.scalars.append(value)
        return Scalar(len(self.scalars) - 1, value.dtype)

    def _sum(self, node: Any, axes: tuple[int, ...]) -> Any:
        if self.gradient:
            return _FORGOTTEN
        every = tuple(range(len(self.shape)))
        if sorted(axes) not in ([*every], [*every[:-1]]):
            raise NotElementwise(f"it sums over the axes {axes} of {len(self.shape)}")
        over: Over = "all" if len(axes) == len(every) else "examples"
        self.found.append((node, over))
        if self.sums is None:
            return jnp.zeros(() if over == "all" else self.shape[-1:])
        return self.sums[len(self.found) - 1]
