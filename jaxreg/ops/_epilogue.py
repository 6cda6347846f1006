"""A penalty's moments as sums of elementwise functions, found by tracing them.

A kernel sees an activation tile by tile. It can measure a penalty whose moments are sums, over all
entries or over examples, of functions of single entries; what becomes of the sums afterwards is
plain JAX, outside of the kernel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal as Constant

from jaxreg.penalties import Penalty

Over = Literal["all", "examples"]

ELEMENTWISE = frozenset(
    (
        "abs",
        "add",
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
        operands: nodes, scalars' positions among the scalars that the kernel is handed, or numbers.
    """

    primitive: Any = None
    params: Any = None
    operands: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A scalar that the kernel is handed, by position."""

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
    array: Any = jax.ShapeDtypeStruct
    leaves, tree = jax.tree.flatten(penalty)
    # A plain number stays one: it need not be handed to the kernel.
    leaves = [x if isinstance(x, jax.Array) else np.asarray(x, jnp.result_type(x)) for x in leaves]
    traced, out = jax.make_jaxpr(
        lambda x, leaves: jax.tree.unflatten(tree, leaves).moments(x), return_shape=True
    )(array(shape, jnp.float32), leaves)

    def run(sums: Sequence[jax.Array] | None) -> tuple["_Interpreter", Any]:
        interpreter = _Interpreter(shape, sums)
        values = interpreter.run(traced.jaxpr, traced.consts, [Node(), *leaves])
        if any(isinstance(value, Node) for value in values):
            raise NotElementwise("its moments are as large as the activation")
        return interpreter, jax.tree.unflatten(jax.tree.structure(out), values)

    found, _ = run(None)
    return Epilogue(found.found, found.scalars, lambda sums: run(sums)[1])


def elementwise(function: Callable[[jax.Array], jax.Array]) -> None:
    """Raise NotElementwise unless a function of an array can run tile by tile."""
    shape = (8, 128)
    traced = jax.make_jaxpr(function)(jnp.zeros(shape))
    interpreter = _Interpreter(shape, None)
    (value,) = interpreter.run(traced.jaxpr, traced.consts, [Node()])
    if not isinstance(value, Node) or interpreter.found or interpreter.scalars:
        raise NotElementwise("it is not a function of single entries")


def evaluate(nodes: Sequence[Node], tile: jax.Array, scalars: Sequence[Any]) -> list[jax.Array]:
    """Return the nodes' values on a tile; what they share is computed once."""
    values: dict[int, jax.Array] = {}

    def value(operand: Any) -> Any:
        if isinstance(operand, Scalar):
            return jnp.full(tile.shape, scalars[operand.position].astype(operand.dtype))
        if not isinstance(operand, Node):
            return jnp.full(tile.shape, operand.item(), operand.dtype)
        if operand.primitive is None:
            return tile
        if id(operand) not in values:
            operands = [value(o) for o in operand.operands]
            values[id(operand)] = operand.primitive.bind(*operands, **operand.params)
        return values[id(operand)]

    return [value(node) for node in nodes]


class _Interpreter:
    """Runs a jaxpr whose first argument is the activation, of which nothing is known.

    What does not depend on the activation, and what depends on its sums alone, is computed as it
    goes along; the rest becomes nodes.
    """

    def __init__(self, shape: tuple[int, ...], sums: Sequence[jax.Array] | None):
        self.shape = shape
        self.sums = sums
        self.found: list[tuple[Node, Over]] = []
        self.scalars: list[jax.Array] = []

    def run(self, jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
        values: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True)
        )

        def read(atom: Any) -> Any:
            constant = isinstance(atom, Constant)
            return np.asarray(atom.val, jnp.result_type(atom.val)) if constant else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name in _CALLS:
                inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
                outs = self.run(inner.jaxpr, inner.consts, operands)
            else:
                outs = self._equation(equation, operands)
            values.update(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        if not any(isinstance(o, Node) for o in operands):
            if name == "broadcast_in_dim" and operands[0].ndim == 0 and shape == self.shape:
                return operands  # nodes take scalars as they are
            outs = equation.primitive.bind(*operands, **equation.params)
            return list(outs) if equation.primitive.multiple_results else [outs]
        if name == "reduce_sum":
            return [self._sum(operands[0], tuple(equation.params["axes"]))]
        if name in ("broadcast_in_dim", "reshape", "squeeze") and shape == self.shape:
            return operands[:1]
        if name not in ELEMENTWISE or shape != self.shape:
            raise NotElementwise(f"it takes {name} of the activation")
        return [Node(equation.primitive, equation.params, tuple(map(self._operand, operands)))]

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Node):
            return value
        if value.ndim:
            raise NotElementwise("it holds an array of which a tile would need its part")
        if not isinstance(value, jax.core.Tracer):
            return value
        self.scalars.append(value)
        return Scalar(len(self.scalars) - 1, value.dtype)

    def _sum(self, node: Node, axes: tuple[int, ...]) -> jax.Array:
        every = tuple(range(len(self.shape)))
        if sorted(axes) not in ([*every], [*every[:-1]]):
            raise NotElementwise(f"it sums over the axes {axes} of {len(self.shape)}")
        over: Over = "all" if len(axes) == len(every) else "examples"
        self.found.append((node, over))
        if self.sums is None:
            return jnp.zeros(() if over == "all" else self.shape[-1:])
        return self.sums[len(self.found) - 1]
