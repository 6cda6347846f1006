"""Flax Linen: measure at the module's output."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict, freeze
from flax.core.scope import in_filter, union_filters
from flax.nnx import bridge

from jaxreg.terms import measure_parameter

from ._intermediates import COLLECTION, take_sown
from ._lifted import Calls, running
from ._pass import Measured, Parameter, Pass, join, merge, only_measured, under_way


def is_apply(forward: Any) -> bool:
    """Return whether this is the `apply` of a Linen module."""
    return isinstance(getattr(forward, "__self__", None), nn.Module) and forward.__name__ == "apply"


def is_unbound(forward: Any) -> bool:
    """Return whether this is a Linen module that has no variables."""
    return isinstance(forward, nn.Module) and forward.scope is None


def run_apply(
    forward: Any, new_pass: Callable[..., Pass], args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run a module's `apply`; what a lifted transformation carries is in its intermediates."""
    variables = args[0] if args else kwargs["variables"]
    before = variables.get(COLLECTION, {})
    wanted = kwargs.get("mutable", False)
    if kwargs.get("capture_intermediates"):
        wanted = union_filters(wanted, COLLECTION)
    mutable = union_filters(wanted, COLLECTION)
    method = kwargs.get("method")
    if callable(method) and not inspect.ismethod(method):
        kwargs = {**kwargs, "method": _of_the_model(method)}
    forward = partial(forward, *args, **{**kwargs, "mutable": mutable})
    asked = in_filter(wanted, COLLECTION)
    run, measured, (out, state) = _run(
        forward, new_pass, _modules(variables), collects=True, keeps=asked
    )
    rest, sown = take_sown(run, state.get(COLLECTION, {}))
    measured = merge(measured, sown)
    if not kwargs.get("capture_intermediates"):
        _require_measured(run, measured, set(_leaves(rest)) - set(_leaves(before)))
    run.require_wins(measured)
    measured = _with_parameters(measured, variables)
    if wanted is False:
        return out, measured
    kept = {name: state[name] for name in state if name != COLLECTION}
    if rest and asked:
        kept[COLLECTION] = rest
    return (out, freeze(kept) if isinstance(state, FrozenDict) else kept), measured


def _of_the_model(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `apply` runs, which may call another model before its own."""

    @wraps(method)
    def of_the_model(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running(module)
        return method(module, *args, **kwargs)

    return of_the_model


def run_function(
    forward: Any, new_pass: Callable[..., Pass], args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run any function that calls Linen modules."""
    run, measured, out = _run(partial(forward, *args, **kwargs), new_pass, {}, collects=False)
    _require_no_parameters(measured)
    run.require_wins(measured)
    return out, measured


def run_inside(outer: Pass, prefix: str, forward: Callable[[], Any]) -> tuple[Any, Measured]:
    """Run a function that calls Linen modules inside another pass, their paths below a prefix."""
    new_pass = partial(dataclasses.replace, outer, prefix=prefix)
    inner, measured, out = _run(forward, new_pass, outer.seen, collects=False)
    outer.seen.update(inner.seen)
    _require_no_parameters(measured)
    return out, measured


def _run(
    forward: Callable[[], Any],
    new_pass: Callable[..., Pass],
    seen: dict[str, None],
    *,
    collects: bool,
    keeps: bool = True,
) -> tuple[Pass, Measured, Any]:
    """Run a forward pass; return what was measured outside of its lifted transformations.

    Args:
        forward: the forward pass.
        new_pass: returns what its modules consult.
        seen: the paths of the modules that are known before.
        collects: see `Calls`.
        keeps: whether anyone asked for what the modules sow of their own.
    """
    branches: dict[tuple[str, int], Measured] = {}
    while True:
        calls = Calls(collects=collects, branches=branches)
        run = new_pass(carry=calls.carry, seen=dict(seen))
        # A jitted module lets terms out in another way.
        run.key = (run.key, collects)
        try:
            with (
                calls.begin(),
                under_way(run),
                nn.intercept_methods(partial(_intercept, run, calls, keeps)),
            ):
                out = forward()
        except Exception:
            if not calls.learned_branches:
                raise
        else:
            return run, only_measured(calls.innermost.measured), out


def _intercept(
    run: Pass,
    calls: Calls,
    keeps: bool,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Call a module's method, and measure what its `__call__` puts out."""
    module = context.module
    if module.scope is None:
        return call(*args, **kwargs)
    if module.is_initializing():
        run.initializing = True
        return call(*args, **kwargs)
    # By name is not enough: `__call__` may be an alias. By name is too much within `__call__`: that
    # is a `super().__call__`.
    is_call = context.orig_method.func is getattr(type(module).__call__, "__wrapped__", None) or (
        context.method_name == "__call__" and not calls.calling(module)
    )
    is_call = is_call and not calls.share_scope(module)
    inside: Any = nullcontext()
    if isinstance(module, bridge.ToLinen):
        # What the NNX module inside of it names has its path below it.
        inside = under_way(dataclasses.replace(run, prefix=run.at(*module.path)))
    with calls.entered(module, is_call=is_call) as entered:
        # Transformations need not let it out, as bare they do not see it.
        with _watched(run, module, keeps or not entered.lifts), inside:
            out = call(*args, **kwargs)
        if is_call:
            path = run.at(*module.path)
            run.tell_apart(path, run.called)
            run.record(module, path, out)
    return calls.leave(run, entered, out)


@contextmanager
def _watched(run: Pass, module: nn.Module, keeps: bool) -> Iterator[None]:
    """Measure what the module itself sows, and let it sow that if it is to be kept.

    A bound module is a copy made for one forward pass.
    """
    watched: Any = vars(module).get("sow")
    around = getattr(watched, "_jaxreg_run", None)
    # A field of the user's stays as it is: the model reads it.
    is_field = not callable(module.sow) or (watched is not None and around is None)
    if is_field or around is run:
        yield
        return

    def sow(col: str, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        if col == COLLECTION:
            run.record(module, run.at(*module.path, name), value)
            if not keeps:
                return False
        # That of an activity around this one, too.
        through = watched or partial(type(module).sow, module)
        sown: bool = through(col, name, value, *args, **kwargs)
        return sown

    setattr(sow, "_jaxreg_run", run)
    object.__setattr__(module, "sow", sow)
    try:
        yield
    finally:
        # Unless `setup` has assigned a field of that name.
        if vars(module).get("sow") is sow:
            object.__delattr__(module, "sow")
            if watched is not None:
                object.__setattr__(module, "sow", watched)


def _require_no_parameters(measured: Measured) -> None:
    """Raise if a parameter is to be measured where there are no variables to take it from."""
    for path, calls in measured.items():
        if isinstance(calls[0], Parameter):
            raise ValueError(
                f'`jaxreg.activity` has no parameters to measure "{path}" by. Give it the'
                " module's own `apply`, `jaxreg.activity(rules)(model.apply)(variables, x)`, or"
                " penalize the parameter by `jaxreg.kernel`."
            )


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
                measure_parameter(nn.meta.unbox(leaf), calls[0].penalty, calls[0].shape, path),
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
