"""Flax NNX: measure at the module's output, carry by a Variable of the module's."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from ._pass import Measured, Pass, current, join, merge, under_way


class PenaltyTerm(nnx.Variable[Any]):
    """What was measured in one module during one forward pass, by path."""


@dataclasses.dataclass(frozen=True)
class _Site:
    """A module's path and the token of the activity that watches it.

    Static, so that both reach the cache key of a nested `nnx.jit`, which would otherwise replay a
    forward pass traced under other rules, or under none.
    """

    path: tuple[Any, ...]
    token: str


def module_of(forward: Any) -> nnx.Module | None:
    """Return the NNX module that this is, or is a method of; None if it is neither."""
    owner = forward.__self__ if inspect.ismethod(forward) else forward
    return owner if isinstance(owner, nnx.Module) else None


def run_module(
    forward: Any, new_pass: Callable[..., Pass], token: str, args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run a module, or a method of one, on a watched copy that shares the module's Variables."""
    module: Any = module_of(forward)
    copy = nnx.clone(module, variables=False)
    originals = [node for _, node in nnx.iter_modules(module)]
    copies: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
    for path, node in copies:
        node._jaxreg_site = nnx.static(_Site(path, token))
        node._jaxreg_terms = nnx.data(PenaltyTerm({}))
        if callable(node):
            cls: Any = type(node)
            node.__class__ = _watched(cls)
    before = [dict(vars(node)) for _, node in copies]

    paths = dict.fromkeys(join(*path) for path, _ in copies)
    run = new_pass(carry=_carry, seen=paths)
    call: Any = copy if forward is module else getattr(copy, forward.__name__)
    with under_way(run):
        out = call(*args, **kwargs)

    # What the forward pass assigned to its modules (a cache, a sown value) is the caller's.
    for original, (_, node), old in zip(originals, copies, before, strict=True):
        for name, value in vars(node).items():
            if value is not old.get(name) and not name.startswith(("_jaxreg", "_pytree")):
                setattr(original, name, value)
    measured: Measured = {}
    for _, node in copies:
        measured = merge(measured, node._jaxreg_terms.get_value())
    return out, run.finish(measured)


def path_of(module: Any) -> tuple[Any, ...] | None:
    """Return the path of a module in the watched copy; None for a module of no such copy."""
    site = getattr(module, "_jaxreg_site", None)
    return None if site is None else site.path


@functools.cache
def _watched(cls: Any) -> Any:
    """Return a subclass that measures what `__call__` puts out and what `sow` is given."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = cls.__call__(self, *args, **kwargs)
        run = current()
        if run is not None:
            run.record(self, join(*self._jaxreg_site.path), out)
        return out

    def sow(self: Any, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        run, path = current(), join(*self._jaxreg_site.path, name)
        if run is not None and run.penalty(path) is not None:
            run.record(self, path, value)
        return cls.sow(self, variable_type, name, value, *args, **kwargs)

    members = {"__call__": __call__, "sow": sow, "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), {**members, "__qualname__": cls.__qualname__})


def _carry(module: Any, measured: Measured) -> None:
    """Carry measurements in the module's own Variable."""
    terms = getattr(module, "_jaxreg_terms", None)
    if terms is None:
        raise ValueError(
            f'`jaxreg.activity` cannot carry the term "{join(*measured)}": its module is not part'
            " of the module that was wrapped."
        )
    for path, calls in merge(terms.get_value(), measured).items():
        terms[path] = calls
