"""A linear function whose transpose is one's own.

What `jax.custom_derivatives.linear_call` is, and with `vmap` and derivatives by what the function
is not linear in. So a kernel in the backward pass leaves forward mode as it is, which
`jax.custom_vjp` would take away.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def linear(
    function: Callable[..., Any], transpose: Callable[..., Any], residuals: Any, operands: Any
) -> Any:
    """Return function(residuals, operands), which must be linear in the operands.

    Reverse mode calls the transpose; its own derivatives are those of plain JAX's.

    Args:
        function: in plain JAX, of trees of arrays.
        transpose: given the residuals, the cotangents of the function's results, and a tree like
            these that says which are known to be zero, returns the cotangents of the operands, or
            None to leave it to JAX.
        residuals: what the function is not linear in.
        operands: what it is linear in.
    """
    held, held_tree = jax.tree.flatten(residuals)
    flat, tree = jax.tree.flatten(operands)
    out_tree: Any = None

    def run(*arguments: Any) -> list[jax.Array]:
        nonlocal out_tree
        residuals = jax.tree.unflatten(held_tree, arguments[: len(held)])
        outs, out_tree = jax.tree.flatten(
            function(residuals, jax.tree.unflatten(tree, arguments[len(held) :]))
        )
        return outs

    def transposed(held: Any, cotangents: Any, zero: Any) -> Any:
        outs = transpose(
            jax.tree.unflatten(held_tree, held),
            *(jax.tree.unflatten(out_tree, given) for given in (cotangents, zero)),
        )
        return None if outs is None else jax.tree.leaves(outs)

    outs = _bind(run, transposed, held, flat)
    return jax.tree.unflatten(out_tree, outs)


def _bind(run: Callable[..., Any], transpose: Any, held: list[Any], operands: list[Any]) -> Any:
    return _linear.bind(
        *held,
        *operands,
        jaxpr=jax.make_jaxpr(run)(*held, *operands),
        transpose=transpose,
        residuals=len(held),
    )


_linear: Any = Primitive("jaxreg_linear")
_linear.multiple_results = True


def _run(*arguments: Any, jaxpr: Any, **_: Any) -> Any:
    return jaxpr_as_fun(jaxpr)(*arguments)


def _derive(primals: Any, tangents: Any, **settings: Any) -> Any:
    residuals = settings["residuals"]
    held, by_held = primals[:residuals], tangents[:residuals]
    run = functools.partial(_linear.bind, **settings)
    outs = run(*primals)
    # The part that is linear keeps its transpose.
    found = run(*held, *map(_instantiate, tangents[residuals:]))
    if not all(type(tangent) is ad.Zero for tangent in by_held):
        plain = functools.partial(_run, jaxpr=settings["jaxpr"])
        _, own = jax.jvp(
            lambda *held: plain(*held, *primals[residuals:]),
            tuple(held),
            (*map(_instantiate, by_held),),
        )
        found = [a + b for a, b in zip(found, own, strict=True)]
    return outs, found


_instantiate: Any = ad.instantiate_zeros


def _transpose(
    cotangents: Any, *arguments: Any, jaxpr: Any, transpose: Any, residuals: int
) -> list[Any]:
    held, operands = arguments[:residuals], arguments[residuals:]

    def plain(held: Any, cotangents: Any) -> Any:
        function = functools.partial(jaxpr_as_fun(jaxpr), *held)
        return jax.linear_transpose(function, *jaxpr.in_avals[residuals:])(cotangents)

    zero = [type(cotangent) is ad.Zero for cotangent in cotangents]
    outs = _transposed(
        lambda *given: transpose(*given, zero),
        plain,
        list(held),
        [*map(_instantiate, cotangents)],
    )
    wanted: Any = ad.is_undefined_primal
    found = [out if wanted(operand) else None for operand, out in zip(operands, outs, strict=True)]
    return [None] * residuals + found


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _transposed(
    transpose: Callable[..., Any], plain: Callable[..., Any], held: Any, cotangents: Any
) -> Any:
    outs = transpose(held, cotangents)
    return plain(held, cotangents) if outs is None else tuple(outs)


@_transposed.defjvp
def _derive_transposed(transpose: Any, plain: Any, primals: Any, tangents: Any) -> Any:
    return _transposed(transpose, plain, *primals), jax.jvp(plain, primals, tangents)[1]


def _batch(arguments: Any, axes: Any, *, jaxpr: Any, transpose: Any, residuals: int) -> Any:
    size = next(x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None)
    # Each example has operands of its own, as its transpose returns cotangents of its own.
    operands = [
        jax.numpy.broadcast_to(x, (size, *x.shape)) if a is None else jax.numpy.moveaxis(x, a, 0)
        for x, a in zip(arguments[residuals:], axes[residuals:], strict=True)
    ]
    held_axes = list(axes[:residuals])

    def transposed(held: Any, cotangents: Any, zero: Any) -> Any:
        one = functools.partial(transpose, zero=zero)
        return jax.vmap(one, in_axes=(held_axes, 0))(held, cotangents)

    function = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=(*held_axes, *[0] * len(operands)))
    outs = _bind(function, transposed, list(arguments[:residuals]), operands)
    return outs, [0] * len(outs)


_linear.def_impl(_run)
_linear.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[_linear] = _derive
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))
