"""Which implementation of an op runs: decided when it is lowered for a platform, not before."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def choose(op: str, implementation: str | None, known: Mapping[str, Any]) -> str:
    """Return the name of the implementation to use.

    XLA unless another is asked for by name: no device has a recorded measurement yet that another
    one wins.

    Raises:
        ValueError: for a name that is not known.
    """
    names = ["xla", *known]
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"`jaxreg.ops.{op}(implementation=...)` must be None or one of"
            f" {', '.join(map(repr, names))}; got {implementation!r}."
        )
    return implementation or "xla"


def require(op: str, implementation: str, reason: str | None) -> None:
    """Raise a NotImplementedError if there is a reason why an implementation cannot run."""
    if reason is not None:
        raise NotImplementedError(
            f"`jaxreg.ops.{op}(implementation={implementation!r})` cannot run: {reason}."
            " `implementation=None` falls back to XLA."
        )


def only_on(
    platforms: tuple[str, ...], op: str, implementation: str, run: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the function, which raises where it is lowered for a platform other than these."""

    def dispatched(*operands: Any) -> Any:
        shapes, tree = jax.tree.flatten(jax.eval_shape(run, *operands))

        def refuse(*operands: Any) -> Any:
            outs = _refuse.bind(
                *jax.tree.leaves(operands),
                shapes=tuple((s.shape, s.dtype) for s in shapes),
                op=op,
                implementation=implementation,
                platforms=platforms,
            )
            return jax.tree.unflatten(tree, outs)

        return jax.lax.platform_dependent(
            *operands, default=refuse, **dict.fromkeys(platforms, run)
        )

    return dispatched


# What the other platforms would run: an equation that cannot be lowered, and says why.
_refuse: Any = Primitive("jaxreg_refuse")
_refuse.multiple_results = True


def _abstract(*_: Any, shapes: Any, **__: Any) -> Any:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _run(*operands: Any, **settings: Any) -> Any:
    return jax.jit(functools.partial(_refuse.bind, **settings))(*operands)


def _batch(operands: Any, axes: Any, *, shapes: Any, **settings: Any) -> Any:
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    shapes = tuple(((size, *shape), dtype) for shape, dtype in shapes)
    return _refuse.bind(*operands, shapes=shapes, **settings), [0] * len(shapes)


def _lower(ctx: Any, *_: Any, op: str, implementation: str, platforms: Any, **__: Any) -> Any:
    here = ", ".join(ctx.module_context.platforms)
    require(
        op, implementation, f"it needs the platform {' or '.join(platforms)}, and this is {here}"
    )


_refuse.def_abstract_eval(_abstract)
_refuse.def_impl(_run)
batching.primitive_batchers[_refuse] = _batch
mlir.register_lowering(_refuse, _lower)
