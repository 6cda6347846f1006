"""Flax Linen: measure at the module's output, carry by `sow`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict, freeze
from flax.core.scope import in_filter, union_filters

from jaxreg.terms import measure_parameter

from ._pass import Measured, Parameter, Pass, join, merge, trace, under_way

_COLLECTION = "intermediates"
_NAME = "jaxreg_terms"


def is_apply(forward: Any) -> bool:
    """Return whether this is the `apply` of a Linen module."""
    return isinstance(getattr(forward, "__self__", None), nn.Module) and forward.__name__ == "apply"


def run_apply(
    forward: Any, new_pass: Callable[..., Pass], args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run a module's `apply`; measurements travel in its intermediates."""
    variables = args[0] if args else kwargs["variables"]
    before = variables.get(_COLLECTION, {})
    wanted = kwargs.get("mutable", False)
    if kwargs.get("capture_intermediates"):
        wanted = union_filters(wanted, _COLLECTION)
    run = new_pass(carry=_sow, seen=_modules(variables))
    with under_way(run), nn.intercept_methods(partial(_intercept, run, [])):
        mutable = union_filters(wanted, _COLLECTION)
        out, state = forward(*args, **{**kwargs, "mutable": mutable})
    rest, measured = _take(state.get(_COLLECTION, {}))
    if not kwargs.get("capture_intermediates"):
        _require_measured(run, measured, set(_leaves(rest)) - set(_leaves(before)))
    measured = _with_parameters(run.finish(measured), variables)
    if wanted is False:
        return out, measured
    kept = {name: state[name] for name in state if name != _COLLECTION}
    if rest and in_filter(wanted, _COLLECTION):
        kept[_COLLECTION] = rest
    return (out, freeze(kept) if isinstance(state, FrozenDict) else kept), measured


def run_function(
    forward: Any, new_pass: Callable[..., Pass], args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run any function that calls Linen modules; measurements are kept where they are made."""
    here = trace()
    measured: Measured = {}

    def keep(module: Any, more: Measured) -> None:
        if trace() != here:
            raise ValueError(
                f'`jaxreg.activity` cannot take the term "{join(*more)}" out of the transformation'
                " around it. Give it the module's own `apply`, inside the transformation:"
                " `out, terms = jaxreg.activity(rules)(model.apply)(variables, x)`."
            )
        for path, calls in more.items():
            if isinstance(calls[0], Parameter):
                raise ValueError(
                    f'`jaxreg.activity` has no parameters to measure "{path}" by. Give it the'
                    " module's own `apply`: `jaxreg.activity(rules)(model.apply)(variables, x)`."
                )
        measured.update(merge(measured, more))

    run = new_pass(carry=keep)
    with under_way(run), nn.intercept_methods(partial(_intercept, run, [])):
        out = forward(*args, **kwargs)
    return out, run.finish(measured)


def _intercept(
    run: Pass,
    calling: list[nn.Module],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Call a module's method, and measure what its `__call__` puts out.

    `calling` holds the modules that are inside their `__call__`.
    """
    module = context.module
    if module.scope is None:
        return call(*args, **kwargs)
    if module.is_initializing():
        run.initializing = True
        return call(*args, **kwargs)
    # By name is not enough: `__call__` may be an alias. By name is too much within `__call__`: that
    # is a `super().__call__`.
    is_call = context.orig_method.func is getattr(type(module).__call__, "__wrapped__", None) or (
        context.method_name == "__call__" and not any(module is other for other in calling)
    )
    if not is_call:
        with _watched(run, module):
            return call(*args, **kwargs)
    calling.append(module)
    try:
        with _watched(run, module):
            out = call(*args, **kwargs)
    finally:
        calling.pop()
    run.record(module, join(*module.path), out)
    return out


@contextmanager
def _watched(run: Pass, module: nn.Module) -> Iterator[None]:
    """Measure what the module itself sows. A bound module is a copy made for one forward pass."""
    if "sow" in vars(module):
        yield
        return

    def sow(col: str, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        if col == _COLLECTION:
            run.record(module, join(*module.path, name), value)
        return type(module).sow(module, col, name, value, *args, **kwargs)

    object.__setattr__(module, "sow", sow)
    try:
        yield
    finally:
        object.__delattr__(module, "sow")


def _sow(module: Any, measured: Measured) -> None:
    """Carry measurements in the module's intermediates."""
    if module.scope.trace_level != trace():
        raise ValueError(
            f'`jaxreg.activity` cannot carry the term "{join(*measured)}" out of the transformation'
            " around it. Use Flax's lifted transformations inside modules (`nn.vmap`, `nn.remat`,"
            " `nn.cond`) rather than JAX's own, and in a lifted function call the submodules of the"
            " module that it is given."
        )
    if not nn.Module.sow(module, _COLLECTION, _NAME, measured, reduce_fn=merge, init_fn=dict):
        raise ValueError(
            f'`jaxreg.activity` cannot carry the term "{join(*measured)}" out of the lifted'
            ' transformation around it. Add "intermediates": 0 to its `variable_axes`, as in'
            ' `nn.scan(..., variable_axes={"params": 0, "intermediates": 0})`; so for `nn.vmap`.'
            " Another model's module that is applied inside this one cannot carry any; a rule that"
            " maps its path to None exempts it."
        )


def _take(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Measured]:
    """Split intermediates into what the user's model sowed and what was measured."""
    rest: dict[str, Any] = {}
    measured: Measured = dict(tree.get(_NAME, {}))
    for name in tree:
        if name == _NAME:
            continue
        child = tree[name]
        if isinstance(child, Mapping):
            child, more = _take(child)
            measured = merge(measured, more)
            if more and not child:
                continue
        rest[name] = child
    return rest, measured


def _with_parameters(measured: Measured, variables: Mapping[str, Any]) -> Measured:
    """Measure the parameters that have penalties of their own, each once."""
    done = dict(measured)
    for path, calls in measured.items():
        if isinstance(calls[0], Parameter):
            leaf: Any = variables.get("params", {})
            for name in path.split("/"):
                if not isinstance(leaf, Mapping) or name not in leaf:
                    raise ValueError(
                        f'`jaxreg.activity` finds no parameter "{path}" to penalize. A'
                        " transformation that renames parameters is around it; use"
                        " `jaxreg.kernel` for this one."
                    )
                leaf = leaf[name]
            done[path] = (
                measure_parameter(nn.meta.unbox(leaf), calls[0].penalty, calls[0].ndim, path),
            )
    return done


def _modules(variables: Mapping[str, Any]) -> dict[str, None]:
    """Return the paths of the modules that have variables."""
    paths = dict.fromkeys([join()])

    def visit(tree: Any, path: tuple[str, ...]) -> None:
        if isinstance(tree, Mapping):
            paths[join(*path)] = None
            for name in tree:
                visit(tree[name], (*path, name))

    for collection in variables.values():
        visit(collection, ())
    return paths


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    for name in tree:
        if isinstance(tree[name], Mapping):
            yield from _leaves(tree[name], (*path, name))
        else:
            yield join(*path, name)


def _require_measured(run: Pass, measured: Measured, sown: set[str]) -> None:
    """Raise if a penalized value was sown where it could not be measured."""
    for path in sown:
        if run.penalty(path) is not None and path not in measured:
            raise ValueError(
                f'`jaxreg.activity` cannot measure "{path}": it is sown from outside of the methods'
                " of its module. Use `jaxreg.sow` there."
            )
