"""Flax NNX: measure at the module's output, carry by a Variable of the module's."""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import bridge

from jaxreg.penalties import Penalty
from jaxreg.penalties._checks import is_concrete
from jaxreg.terms import measure_parameter

from ._linen import run_inside
from ._pass import Measured, Pass, current, failed, found_before, join, merge, trace, under_way

Path = tuple[Any, ...]


class PenaltyTerm(nnx.Variable[Any]):
    """What was measured in one module during one forward pass, by path."""


def module_of(forward: Any) -> nnx.Module | None:
    """Return the NNX module that this is, or is a method of; None if it is neither."""
    owner = forward.__self__ if inspect.ismethod(forward) else forward
    return owner if isinstance(owner, nnx.Module) else None


def run_module(
    forward: Any, new_pass: Callable[..., Pass], args: Any, kwargs: Any
) -> tuple[Any, Measured]:
    """Run a module, or a method of one, on a watched copy that shares the module's Variables."""
    module: Any = module_of(forward)
    copy = nnx.clone(module, variables=False)
    copies: list[tuple[Path, Any]] = list(nnx.iter_modules(copy))
    for path, node in copies:
        # Inside another activity this is a copy of a copy, which is watched for that one.
        if hasattr(node, "_jaxreg_terms"):
            del node._jaxreg_terms
        if not isinstance(node, nnx.List | nnx.Dict):
            cls: Any = type(node)
            node.__class__ = _watched(getattr(cls, "_jaxreg_class", cls), path)
    originals = {
        id(node): original
        for (_, node), (_, original) in zip(copies, nnx.iter_modules(module), strict=True)
    }
    before = {id(node): dict(vars(node)) for _, node in copies}

    inside, carried = current() is not None, Carried()
    run = new_pass(seen=dict.fromkeys(join(*path) for path, _ in copies), carry=carried.carry)
    for path, node in copies:
        # Made before the forward pass, so that a transformation without an axis for it drops it in
        # a way that can be told. Modules that no rule matches stay as they are until they sow.
        own = getattr(node, "_jaxreg_output_penalty", lambda: None)()
        penalties = run.penalty(join(*path)), run.penalty(join(*path, "output"), own)
        if penalties != (None, None):
            node._jaxreg_terms = nnx.data(PenaltyTerm({}))
    call: Any = copy
    if forward is not module and forward.__func__ is not type(module).__call__:
        call = types.MethodType(forward.__func__, copy)
    measured: Measured = {}
    try:
        with under_way(run):
            out = call(*args, **kwargs)
        for _, node in copies:
            if hasattr(node, "_jaxreg_terms"):
                measured = merge(measured, node._jaxreg_terms.get_value())
        carried.require(measured)
    except Exception as error:
        if carried.notes:
            failed()
        if "_jaxreg_terms" in str(error):
            raise ValueError(_refused(carried.notes)) from error
        if carried.notes and "out of bounds" in str(error):
            # A term has no other axis than the first.
            error.add_note(f"Unless the model itself is at fault: {_refused(carried.notes)}")
        raise
    exempt = found_before("exempt", run.key, *((path, type(node)) for path, node in copies))
    exempt.update(dict.fromkeys(carried.exempt))
    run.seen.update(exempt)
    # What the forward pass assigned to its modules (a cache, a sown value) is the caller's.
    for _, node in copies:
        for name, value in vars(node).items():
            new = value is not before[id(node)].get(name)
            if new and not name.startswith(("_jaxreg", "_pytree")):
                setattr(originals[id(node)], name, originals.get(id(value), value))
    run.require_wins(measured)
    # The parameters of a module that is penalized around this one are measured there.
    own = [
        (path, node)
        for path, node in copies
        if not (inside and hasattr(originals[id(node)], "_jaxreg_path"))
    ]
    return out, {**measured, **_parameters(own)}


def _parameters(modules: list[tuple[Path, Any]]) -> Measured:
    """Measure the parameters that have penalties of their own, each once."""
    measured: Measured = {}
    first: dict[int, tuple[str, Penalty]] = {}
    for path, module in modules:
        for name, (penalty, shape) in getattr(module, "_jaxreg_penalties", dict)().items():
            where, variable = join(*path, name), getattr(module, name)
            if id(variable) not in first:
                first[id(variable)] = where, penalty
                measured[where] = (measure_parameter(variable[...], penalty, shape, where),)
            before, other = first[id(variable)]
            if _differ(penalty, other):
                raise ValueError(
                    f'`jaxreg.activity` counts a shared parameter once, but "{before}" and'
                    f' "{where}" are one parameter with two penalties: {other!r} and {penalty!r}.'
                    " Give one of the layers the sum, and the others none."
                )
    return measured


def _differ(one: Penalty, other: Penalty) -> bool:
    """Return whether two penalties differ, as far as they are concrete."""
    structures = set(map(jax.tree.structure, (one, other)))
    return len(structures) > 1 or any(
        not np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        if is_concrete(a) and is_concrete(b)
    )


def path_of(module: Any) -> Path:
    """Return the path of a module in the watched copy, and () for any other module."""
    path: Path = getattr(module, "_jaxreg_path", ())
    return path


def is_foreign(module: Any) -> bool:
    """Return whether a pass is under way that this module is not part of."""
    return current() is not None and not hasattr(module, "_jaxreg_path")


@functools.cache
def _watched(cls: Any, path: Path) -> Any:
    """Return a subclass that measures what `__call__` puts out and what `sow` is given.

    The path is the class's and not the instance's, so that transformations see no new attribute.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = current()
        if run is None:
            return cls.__call__(self, *args, **kwargs)
        if issubclass(cls, bridge.ToNNX):
            # What the wrapper puts out the Linen module inside does, under the same path.
            return _run_linen(run, self, functools.partial(cls.__call__, self, *args, **kwargs))
        out = cls.__call__(self, *args, **kwargs)
        run.tell_apart(run.at(*path), run.called)
        run.record(self, run.at(*path), out)
        return out

    def sow(self: Any, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        run = current()
        if run is not None:
            run.record(self, run.at(*path, name), value)
        return cls.sow(self, variable_type, name, value, *args, **kwargs)

    members: dict[str, Any] = {"sow": sow, "_jaxreg_path": path, "_jaxreg_class": cls}
    if any("__call__" in vars(base) for base in cls.__mro__):
        members["__call__"] = __call__
    for name in ("__module__", "__qualname__", "__doc__"):
        members[name] = getattr(cls, name)
    watched = type(cls)(cls.__name__, (nnx.Module,), members)
    # Only now, so that an `__init_subclass__` of the user's does not hear of it.
    watched.__bases__ = (cls,)
    return watched


def _run_linen(run: Pass, module: Any, call: Callable[[], Any]) -> Any:
    """Run a Linen module that NNX wraps, and carry what is measured inside it."""
    terms = getattr(module, "_jaxreg_terms", None)
    if terms is not None:
        del module._jaxreg_terms  # which the wrapper would give to the Linen module
    try:
        out, measured = run_inside(run, join(*path_of(module)), call)
    finally:
        if terms is not None:
            module._jaxreg_terms = nnx.data(terms)
    if measured:
        run.carry(module, measured)
    return out


class Carried:
    """What was measured in one forward pass, carried in the modules' own Variables.

    Args:
        here: the trace that the pass runs in.
        notes: for each path its calls, as far as they can be told apart: a transformation may trace
            one several times, and that notes the same again.
        exempt: the paths that transformations traced and no penalty measures.
        holders: the Variables that hold calls, each after the trace and the path.
    """

    def __init__(self) -> None:
        self.here = trace()
        self.notes: dict[str, set[Any]] = {}
        self.exempt: list[str] = []
        self.holders: list[tuple[Any, str, Any]] = []

    def carry(self, module: Any, measured: Measured) -> None:
        """Carry measurements in a module's own Variable, and note each."""
        if not any(measured.values()):
            self.exempt += measured if trace() != self.here else []
            return
        if not hasattr(module, "_jaxreg_path"):
            raise ValueError(
                f'`jaxreg.activity` cannot carry the term "{next(iter(measured))}": its module is'
                " not part of the module that was wrapped."
            )
        if not hasattr(module, "_jaxreg_terms"):
            module._jaxreg_terms = nnx.data(PenaltyTerm({}))
        terms = module._jaxreg_terms
        try:
            terms.set_value(terms.get_value())
        except TraceContextError as error:
            raise ValueError(
                f'`jaxreg.activity` cannot carry the term "{next(iter(measured))}" out of the'
                " transformation around it. Use NNX's transformations (`nnx.vmap`, `nnx.remat`,"
                " `nnx.grad`) rather than JAX's own, and give them the module."
            ) from error
        for path in measured:
            calls_before = len(terms.get_value().get(path, ()))
            note = calls_before, trace() == self.here, self._copy(path, terms)
            self.notes.setdefault(path, set()).add(note)
        for path, calls in merge(terms.get_value(), measured).items():
            terms[path] = calls

    def _copy(self, path: str, terms: Any) -> int:
        """Return which of the modules with this path holds these terms, in order of their calls.

        A module has others beside it where it was cloned, or split and merged.
        """
        now = trace()
        held = [held for where, of, held in self.holders if of == path and where == now]
        if not any(other is terms for other in held):
            self.holders.append((now, path, terms))
            held.append(terms)
        return next(i for i, other in enumerate(held) if other is terms)

    def require(self, measured: Measured) -> None:
        """Raise if a transformation dropped what was measured inside it."""
        for path, notes in self.notes.items():
            if len(measured.get(path, ())) < len(notes):
                raise ValueError(
                    f'`jaxreg.activity` lost the term "{path}" in a transformation around it. Use'
                    " `nnx.scan` or `nnx.vmap` rather than JAX's own, and give the term an axis:"
                    " `nnx.StateAxes({jaxreg.nnx.PenaltyTerm: 0, ...})`. In place of `nnx.merge` or"
                    " `nnx.clone`, which make another module, `nnx.update` the one that it was."
                )


def _refused(carried: Mapping[str, Any]) -> str:
    """Return what to do where a transformation does not take the Variable that carries a term."""
    term = f'the term "{[*carried][-1]}"' if carried else "a term"
    return (
        f"`jaxreg.activity` cannot carry {term} out of the transformation around it."
        " `nnx.vmap` and `nnx.scan` need an axis for it, by `nnx.StateAxes({"
        "jaxreg.nnx.PenaltyTerm: 0, ...})`, and `nnx.split` a filter, by `...`. The branches of"
        " `nnx.cond` and `nnx.switch` must call the same modules, and `nnx.while_loop` and"
        " `nnx.fori_loop` cannot carry any: penalize what they return, by `jaxreg.sow`; a rule that"
        " maps the path to None exempts it inside."
    )
