"""One forward pass under `jaxreg.activity`: which values are penalized, and with what."""

import contextvars
import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jax.typing import ArrayLike

from jaxreg.penalties import Penalty
from jaxreg.penalties._checks import is_floating
from jaxreg.rules import TOP, Rules
from jaxreg.terms import Reduction, measure

Measured = dict[str, tuple[Any, ...]]
"""For each path its measurements, and of parameters the `Parameter`s that are to be measured."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter's own penalty, on its way out of the forward pass.

    Not its measurement: a scan that passes the parameter through all its steps would carry one for
    each step.

    Args:
        penalty: the penalty, its settings `alike`. Only arrays are leaves: a transformation stacks
            those.
        shape: of the parameter in its module.
    """

    penalty: Penalty
    shape: tuple[int, ...]

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """Return the arrays, and all else."""
        settings, structure = jax.tree.flatten(self.penalty)
        numbers = tuple(None if isinstance(s, jax.Array) else s for s in settings)
        arrays = [s for s in settings if isinstance(s, jax.Array)]
        return arrays, (structure, numbers, self.shape)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "Parameter":
        """Return what was flattened."""
        structure, numbers, shape = static
        rest = iter(arrays)
        settings = [next(rest) if number is None else number for number in numbers]
        return cls(jax.tree.unflatten(structure, settings), shape)


def alike(penalty: Penalty) -> Penalty:
    """Return the penalty with all of its settings arrays, if one of them is.

    Transformations stack arrays alone: so either all of them or none.
    """
    settings = jax.tree.leaves(penalty)
    arrays = any(isinstance(setting, jax.Array | np.ndarray) for setting in settings)
    return jax.tree.map(jnp.asarray, penalty) if arrays else penalty


@dataclasses.dataclass
class Pass:
    """What the modules of one forward pass consult while they run.

    No measurement is kept here: `carry` hands each to what takes it out of the transformations of
    the framework (`_lifted.Calls`, `_nnx.Carried`).

    Args:
        key: a hashable that two passes share only if they measure the same values alike.
        rules: the rules over paths.
        reduction: how separable penalties are divided.
        mask: None, or which tokens count.
        carry: called with a module and what was measured in it: nothing, for a path that is exempt.
        seen: the paths of the modules and values met, in order, to which more are added.
        called: the paths of the modules that were called.
        named: the paths of the values that `jaxreg.sow` named.
        initializing: whether a module was met that was being initialized: those collect nothing.
        penalized: the penalties of each path that was measured, by their structure.
        prefix: the path of the module that all paths are below.
    """

    key: Hashable
    rules: Rules
    reduction: Reduction
    mask: ArrayLike | None
    carry: Callable[[Any, Measured], None]
    seen: dict[str, None] = dataclasses.field(default_factory=dict)
    called: set[str] = dataclasses.field(default_factory=set)
    named: set[str] = dataclasses.field(default_factory=set)
    initializing: bool = False
    penalized: dict[str, dict[Any, Penalty]] = dataclasses.field(default_factory=dict)
    prefix: str = TOP

    def penalty(self, path: str, default: Penalty | None = None) -> Penalty | None:
        """Return the penalty of this path: its rule's, or else the default."""
        rule = self.rules.find(path)
        return default if rule is None else self.rules.values[rule]

    def at(self, *names: Any) -> str:
        """Return the path of these names below the pass's module."""
        return join(*(name for name in (self.prefix, *names) if name != TOP))

    def tell_apart(self, path: str, paths: set[str]) -> None:
        """Add a path to those `called` or `named`; raise a ValueError if it is among both."""
        paths.add(path)
        if path in self.called and path in self.named:
            raise ValueError(
                f'`jaxreg.sow` cannot name a value as a module is named: "{path}" is one. A rule'
                " could not tell them apart. Give the value another name."
            )

    def meet(self, module: Any, path: str, default: Penalty | None = None) -> Penalty | None:
        """Note that there is a value at this path, and return its penalty."""
        self.seen[path] = None
        penalty = self.penalty(path, default)
        if penalty is None:
            self.carry(module, {path: ()})
        return penalty

    def record(self, module: Any, path: str, output: Any, default: Penalty | None = None) -> None:
        """Measure each floating-point leaf of an output, if it is penalized, and carry it.

        Raises:
            TypeError: where a penalized output has no such leaf.
        """
        penalty = self.meet(module, path, default)
        if penalty is None:
            return
        leaves = jax.tree.leaves(output)
        floating = [x for x in leaves if is_floating(x)]
        if not floating:
            kinds = sorted({str(getattr(x, "dtype", type(x).__name__)) for x in leaves})
            raise TypeError(
                f'`jaxreg.activity` penalizes floating-point values; got "{path}" of dtype'
                f" {', '.join(kinds) or None}. A rule that maps it to None, put first, exempts it."
            )
        calls = [measure(x, penalty, self.reduction, self.mask, path) for x in floating]
        self.keep(module, path, penalty, *calls)

    def keep(self, module: Any, path: str, penalty: Penalty, *calls: Any) -> None:
        """Carry what was measured by a penalty at a path."""
        self.penalized.setdefault(path, {})[jax.tree.structure(penalty)] = penalty
        # Arrays would live on.
        if not any(isinstance(s, jax.Array | np.ndarray) for s in jax.tree.leaves(penalty)):
            self.known.setdefault(path, {})[jax.tree.structure(penalty)] = penalty
        self.carry(module, {path: calls})

    @functools.cached_property
    def known(self) -> dict[str, dict[Any, Penalty]]:
        """The penalties, if they hold no arrays, of passes of this key, as in `penalized`."""
        return found_before("penalized", self.key)

    def require_wins(self, measured: Measured) -> None:
        """Raise a ValueError if a rule won nothing of what came out of the pass.

        Rules are of activations: none wins a parameter.
        """
        if self.rules.strict and self.rules.patterns and not (self.seen or self.initializing):
            raise ValueError(
                "`jaxreg.activity` met no module in this forward pass. It sees the Linen modules"
                " that run inside it, and an NNX module that it is given itself, or by a bound"
                " method; `jax.jit` and `nnx.jit` go around the whole:"
                " `nnx.jit(lambda model, x: jaxreg.activity(rules)(model)(x))`."
            )
        if self.seen or not self.initializing:
            values = [p for p, calls in measured.items() if not isinstance(calls[0], Parameter)]
            exempt = [path for path in self.seen if self.penalty(path) is None]
            self.rules.require_wins(
                winners={self.rules.find(path) for path in [*values, *exempt]},
                paths=self.seen,
                what="modules and sown values of the forward pass",
                otherwise="which no `__call__` and no `sow` gave a value in this pass",
            )


def merge(measured: Measured, more: Measured) -> Measured:
    """Return both; where they share a path, its calls in order."""
    return {path: measured.get(path, ()) + more.get(path, ()) for path in {**measured, **more}}


def only_measured(measured: Measured) -> Measured:
    """Return these without the paths that are exempt."""
    return {path: calls for path, calls in measured.items() if calls}


def join(*names: Any) -> str:
    """Return the path of these names; the top module's for none."""
    return "/".join(map(str, names)) or TOP


def current() -> Pass | None:
    """Return the innermost pass under way, if any."""
    return _current.get()


@contextmanager
def under_way(run: Pass) -> Iterator[None]:
    """Make this the innermost pass.

    JAX's, Linen's and NNX's jit know nothing of what watches a module: they would replay a forward
    pass that was traced under another activity, or under none. The user context is part of their
    cache keys.
    """
    token = _current.set(run)
    try:
        with _user_context((_user_context.value, run.key, _failures.seen)):
            yield
    finally:
        _current.reset(token)


def failed() -> None:
    """Let no later pass replay what was traced in one that failed: it would not fail again."""
    _failures.seen += 1


@functools.lru_cache(maxsize=4096)
def found_before(*key: Hashable) -> dict[str, Any]:
    """Return what passes of this key found, by path, in jitted functions when those were traced.

    To be added to: a pass in which JAX runs such a trace again does not find it.
    """
    del key
    return {}


def trace() -> Any:
    """Return what identifies the JAX trace under way."""
    return get_opaque_trace_state(convention="flax")  # type: ignore[no-untyped-call]


_failures = types.SimpleNamespace(seen=0)
_user_context = jax.make_user_context(None)  # type: ignore[no-untyped-call]
_current: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("jaxreg", default=None)
