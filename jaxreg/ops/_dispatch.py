"""Which implementation of an op runs: decided when it is lowered for a platform, not before."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxreg.penalties._checks import require_choice

Implementation = Literal["xla", "mosaic_gpu"]


def choose(
    op: str, implementation: Implementation | None, wins: bool, reason: Callable[[], str | None]
) -> tuple[bool, str | None]:
    """Return whether kernels may run, and the op's name if they were asked for.

    Args:
        op: the op's name.
        implementation: as the op was given it.
        wins: whether a kernel is recorded to be faster than XLA on any device.
        reason: returns why the kernels cannot run, or None.

    Raises:
        ValueError: for an implementation that is not known.
        NotImplementedError: if the kernels were asked for and cannot run.
    """
    known = (None, *get_args(Implementation))
    require_choice(f"ops.{op}(implementation=...)", implementation, known)
    if implementation == "xla" or (implementation is None and not wins):
        return False, None
    why = reason()
    if implementation is None:
        return why is None, None
    require(op, implementation, why)
    return True, op


def require(op: str, implementation: str, reason: str | None) -> None:
    """Raise a `NotImplementedError` if there is a reason why an implementation cannot run."""
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


def by_device(kinds: Mapping[str, Callable[..., Any]], otherwise: Callable[..., Any]) -> Any:
    """Return the function that runs on a device of its kind, and elsewhere the other one.

    It is decided where it is lowered. It is the other one where it runs by itself, not compiled as
    part of something; for several platforms at once; for a device that is not there; and where
    arrays may be split over devices, outside of a `shard_map` over all axes.
    Its derivative is for the caller to define.
    """
    if not kinds:
        return otherwise

    def dispatched(*operands: Any) -> Any:
        flat, tree = jax.tree.flatten(operands)
        outs: Any = None

        def on_leaves(run: Callable[..., Any]) -> Callable[..., Any]:
            def flattened(*flat: Any) -> Any:
                nonlocal outs
                leaves, outs = jax.tree.flatten(run(*jax.tree.unflatten(tree, flat)))
                return leaves

            return flattened

        choices = tuple(map(on_leaves, [*kinds.values(), otherwise]))
        leaves = _choose.bind(*flat, kinds=tuple(kinds), choices=choices)
        return jax.tree.unflatten(outs, leaves)

    return dispatched


_choose: Any = Primitive("jaxreg_choose")
_choose.multiple_results = True


def _run_chosen(*operands: Any, choices: Any, **_: Any) -> Any:
    # Nothing is compiled as a whole, and a kernel alone would be compiled anew in each call.
    return choices[-1](*operands)


def _batch_choices(operands: Any, axes: Any, *, kinds: Any, choices: Any) -> Any:
    batched = tuple(jax.vmap(choice, in_axes=tuple(axes)) for choice in choices)
    outs = _choose.bind(*operands, kinds=kinds, choices=batched)
    return outs, [0] * len(outs)


def _lower_chosen(ctx: Any, *operands: Any, kinds: Any, choices: Any) -> Any:
    try:
        backend = ctx.module_context.get_backend(optional=True)
    except RuntimeError:  # compiled for a device that is not there
        backend = None
    whole = _is_whole(ctx.module_context.axis_context)
    kind = backend.devices()[0].device_kind if backend and whole else None
    chosen = choices[kinds.index(kind) if kind in kinds else -1]
    return mlir.lower_fun(chosen, multiple_results=True)(ctx, *operands)


def _is_whole(context: Any) -> bool:
    """Return whether no array is split: on one device, or within `shard_map` over all axes."""
    if hasattr(context, "manual_axes"):
        return bool(set(context.mesh.axis_names) <= context.manual_axes)
    return getattr(context, "num_devices", 1) in (None, 1)


_choose.def_abstract_eval(
    lambda *operands, choices, **_: jax.make_jaxpr(choices[-1])(*operands).out_avals
)
_choose.def_impl(_run_chosen)
batching.primitive_batchers[_choose] = _batch_choices
mlir.register_lowering(_choose, _lower_chosen)

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
