"""How measurements leave the lifted transformations of Linen.

Each method call that is under way holds what was measured in it. Where it returns to a caller in
the same JAX trace, that goes to the caller as it is. Where a lifted transformation lies between, it
leaves with the values that the transformation itself lets out: as a variable in `intermediates`
where the transformation carries that collection (`_intermediates.py`), and else beside the method's
output (`_beside.py`).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from ._beside import Beside, takers, with_last_leaf
from ._branches import placeholder, take
from ._intermediates import ADD_AXIS, NOT_ELSEWHERE, cannot, collects, sow
from ._pass import Measured, Pass, join, merge, only_measured, trace

# What stacks its outputs, and what else returns them once and as they are.
_STACKING = ("scan", "vmap")
_PASSING = {*_STACKING, "remat", "jit", "cond", "switch", "map_variables", "fold_rngs"}


@dataclasses.dataclass
class Call:
    """A method call that is under way; the outermost one stands for the caller of the forward pass.

    Args:
        module: the module whose method it is; None for the outermost one.
        lifts: how often each lifted transformation lies around it.
        is_call: whether the method is the module's `__call__`.
        trace: the JAX trace that it runs in.
        measured: what has been measured in it.
    """

    module: nn.Module | None = None
    lifts: Counter[str] = dataclasses.field(default_factory=Counter)
    is_call: bool = False
    trace: Any = dataclasses.field(default_factory=trace)
    measured: Measured = dataclasses.field(default_factory=dict)

    @property
    def branches(self) -> int:
        """How many branches lie around it, one within another."""
        return self.lifts["cond"] + self.lifts["switch"]


def _lifts(module: nn.Module) -> Counter[str]:
    """Return how often each lifted transformation lies around a bound module."""
    # Flax writes the transformations around a scope into its path for error messages.
    path = "/".join(map(str, module.scope.debug_path)) if module.scope is not None else ""
    return Counter(re.findall(r"(\w+)\(", path))


class Calls:
    """The method calls that are under way in one run of a forward pass, the innermost last.

    Args:
        collects: whether the pass runs a module's `apply`, which returns its intermediates.
        branches: for the branches in a module, which lie so deep, the places for what the others
            measure, as far as earlier runs of the pass found them; more are added.
    """

    def __init__(self, *, collects: bool, branches: dict[tuple[str, int], Measured]):
        self.collects = collects
        self._level = len(takers.get())
        self._stack = [Call()]
        self._branches = branches
        # Whether this run found measurements that other branches have to make room for.
        self.learned_branches = False
        self._root: Any = None  # the scope of the model that the pass runs
        self._taken: list[Any] = []
        self._traced: Counter[frozenset[str]] = Counter()  # what `nn.jit` has traced, to come
        self._came: set[frozenset[str]] = set()
        self._leaving: str | None = None  # said of an error that a transformation raises over it

    @property
    def innermost(self) -> Call:
        """The innermost call."""
        return self._stack[-1]

    def runs(self, scope: Any) -> None:
        """Take this scope's model for the one that the pass runs, unless that is known."""
        if self._root is None and collects(scope):
            self._root = scope.root

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Begin the forward pass."""
        token = takers.set((*takers.get(), self))
        try:
            yield
        finally:
            takers.reset(token)

    @contextmanager
    def entered(self, module: nn.Module, *, is_call: bool) -> Iterator[Call]:
        """Make a method call the innermost one."""
        call = Call(module, _lifts(module), is_call)
        if module.scope is not None:
            self.runs(module.scope)
        self._stack.append(call)
        self._leaving = None
        try:
            yield call
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._stack.pop()
        self._leaving = None

    def calling(self, module: nn.Module) -> bool:
        """Return whether the module is inside its `__call__`, perhaps as the original of a copy."""
        return any(self._are_itself(module))

    def share_scope(self, module: nn.Module) -> bool:
        """Return whether a module that shares its scope with this one is inside its `__call__`."""
        return not all(self._are_itself(module))

    def _are_itself(self, module: nn.Module) -> Iterator[bool]:
        """Yield, for each that is inside its `__call__` in the module's scope, whether it is this.

        In the lifted transformations that may lie between, scopes and modules are copies.
        """
        for call in self._stack:
            if not call.is_call or call.module is None:
                continue
            scope, own = call.module.scope, module.scope
            if scope is own:
                yield call.module is module
            elif scope and own and scope.path == own.path and call.lifts < _lifts(module):
                yield type(call.module) is type(module)

    def _is_anothers(self, call: Call) -> bool:
        """Return whether a call is one of another model, which is applied inside this one."""
        scope = call.module.scope if call.module is not None else None
        if scope is None or call.lifts:  # lifted scopes have roots of their own
            return False
        # One that is lifted without a name keeps its path.
        return not collects(scope) or (not scope.root.path and scope.root != self._root)

    def carry(self, module: Any, measured: Measured) -> None:
        """Keep what was measured in the innermost call."""
        call = self.innermost
        if not only_measured(measured) and (not call.lifts["jit"] or call.trace != trace()):
            return
        if call.trace != trace():
            raise ValueError(_between_traces(measured, lone=call.module is None))
        call.measured = merge(call.measured, measured)

    def leave(self, run: Pass, call: Call, out: Any) -> Any:
        """Hand what was measured in a call to its caller; return what the call is to return."""
        caller = self.innermost
        measured, sown = only_measured(call.measured), call.measured
        if measured and self.collects and self._is_anothers(call):
            raise ValueError(
                f"{cannot(measured)}: it is another model's, which is applied inside this one. A"
                " rule that maps its path to None exempts it."
            )
        if measured:
            # All since the pass began: a term leaves `nn.vjp` before the `nn.custom_vjp` around it.
            began = self._stack[1] if len(self._stack) > 1 else call
            around = call.lifts - began.lifts
            for lift, mend in _MENDS.items():
                if around[lift]:
                    raise ValueError(f"{cannot(measured)} out of the `nn.{lift}` around it. {mend}")
        if caller.trace == call.trace:
            caller.measured = merge(caller.measured, call.measured)
            return out
        between = call.lifts - caller.lifts
        passes = set(between) <= _PASSING
        # A variable that one branch sows, the others would have to have.
        sows = self.collects and not (caller.branches and passes)
        if between["cond"] or between["switch"]:
            measured = sown = self._with_other_branches(run, call, measured)
        if not measured:
            if sown and sows and between and passes:
                sow(call.module, _stacked(call.lifts), sown)
            return out
        if not between:
            raise ValueError(_between_traces(measured, lone=caller.module is None))
        mend = f"{cannot(measured)} {ADD_AXIS}"
        if sows and sow(call.module, _stacked(call.lifts), sown):
            stacks = any(between[lift] for lift in _STACKING)
            self._leaving = f"{mend} {NOT_ELSEWHERE}" if stacks else None
            return out
        if not passes:
            raise ValueError(mend)
        self._leaving = mend
        if between["jit"]:
            self._traced[frozenset(measured)] += 1
        # Under `jax.disable_jit` a scan is a loop, whose turns may hand over theirs one by one.
        loops = between["scan"] if getattr(jax.config, "jax_disable_jit") else 0
        axes = _stacked(between)
        beside = partial(
            Beside,
            measured=measured,
            level=self._level,
            axes=range(axes - loops, axes + 1),
            cached=between["jit"] > 0,
            jitted=between["jit"] > 0,
        )
        if between["scan"] and isinstance(out, tuple) and len(out) == 2:
            carry, stacked = out
            return carry, with_last_leaf(beside, stacked)
        return with_last_leaf(beside, out)

    def take(self, beside: Beside) -> Any:
        """Take measurements from beside an output, if it has come back to the innermost call."""
        call = self.innermost
        jitted = beside.jitted and not isinstance(beside.probe, jax.core.Tracer)
        if call.trace != trace():
            return dataclasses.replace(beside, jitted=jitted)
        self._leaving = None
        # JAX may put one output together twice.
        if not any(beside.probe is probe for probe in self._taken):
            self._taken.append(beside.probe)
            if jitted:
                # JAX's fast path for such functions must not meet a tree that loses leaves.
                raise ValueError(
                    f"{cannot(beside.measured)} out of an `nn.jit` that no `jax.jit` is around."
                    " Put one around the forward pass, or give it the module's own `apply`."
                )
            if beside.probe.shape[-1] != 0 or beside.probe.ndim - 1 not in beside.axes:
                raise ValueError(f"{cannot(beside.measured)} {ADD_AXIS}")
            if beside.cached:
                self._require_one_module(beside.measured)
            call.measured = merge(call.measured, beside.measured)
        return beside.output

    def _require_one_module(self, measured: Measured) -> None:
        """Raise if a module's trace runs again after it ran, and may be another's of its kind."""
        paths = frozenset(measured)
        if self._traced[paths]:
            self._traced[paths] -= 1
        elif paths in self._came:
            raise ValueError(
                f"{cannot(measured)} out of an `nn.jit`, which ran one trace twice: for one module"
                " or for two of equal fields, as nothing here tells. Give it the module's own"
                " `apply`, or leave `nn.jit` out."
            )
        self._came.add(paths)

    def _explain(self, error: Exception) -> None:
        """Add the mend to an error that a transformation raises over what is leaving."""
        if self._leaving is not None:
            error.add_note(f"Unless the model itself is at fault: {self._leaving}")
            self._leaving = None

    def _with_other_branches(self, run: Pass, call: Call, measured: Measured) -> Measured:
        """Return the measurements, and empty ones in place of those of other branches.

        All branches must return the same tree. What one of them measures is known once it was
        traced, so that the forward pass may have to run again.
        """
        assert call.module is not None
        # Those of a branch within a branch are not those of the outer one.
        known = self._branches.setdefault((join(*call.module.path), call.branches), {})
        filled: Measured = {}
        for path in {**known, **measured}:
            calls, slots = list(measured.get(path, ())), known.get(path, ())
            filled[path] = (*[take(calls, slot) for slot in slots], *calls)
            penalties = run.known.get(path, {}) | run.penalized.get(path, {})
            known[path] = (*slots, *[placeholder(path, penalties, call) for call in calls])
            self.learned_branches = self.learned_branches or bool(calls)
        return filled


def running(model: nn.Module) -> None:
    """Tell the innermost pass which model it runs."""
    takers.get()[-1].runs(model.scope)


def _stacked(lifts: Counter[str]) -> int:
    """Return how many axes these transformations stack outputs on."""
    return sum(lifts[lift] for lift in _STACKING)


def _between_traces(measured: Measured, *, lone: bool) -> str:
    if lone:
        return (
            f'`jaxreg.activity` cannot take the term "{next(iter(measured))}" out of the'
            " transformation around it. Give it the module's own `apply`, or the NNX module, inside"
            " the transformation: `out, terms = jaxreg.activity(rules)(model.apply)(variables, x)`."
        )
    return (
        f"{cannot(measured)} out of the transformation around it. Use Flax's lifted"
        " transformations inside modules (`nn.vmap`, `nn.remat`, `nn.cond`) rather than JAX's own,"
        " and in a lifted function call the submodules of the module that it is given."
    )


_OUTSIDE = (
    "Penalize what it returns, by `jaxreg.sow` outside of it; a rule that maps the path to None"
    " exempts it inside."
)
_MENDS = {
    "custom_vjp": f"Its `backward_fn` would leave the term without a gradient. {_OUTSIDE}",
    "while_loop": f"It cannot stack a term for each turn: use `nn.scan` with `length=`. {_OUTSIDE}",
}
