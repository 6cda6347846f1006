"""One forward pass under `jaxreg.activity`: which values are penalized, and with what."""

import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties import Penalty
from jaxreg.rules import TOP, Rules
from jaxreg.terms import Measurement, Reduction, measure

Measured = dict[str, tuple[Measurement, ...]]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What the modules of one forward pass consult while they run.

    Nothing traced is kept here: `carry` hands each measurement to the framework's own variables,
    which the framework's transformations carry out.

    Args:
        rules: the rules over paths.
        reduction: how separable penalties are divided.
        mask: None, or which tokens count.
        carry: called with a module and what was measured in it.
    """

    rules: Rules
    reduction: Reduction
    mask: ArrayLike | None
    carry: Callable[[Any, Measured], None]
    seen: dict[str, None] = dataclasses.field(default_factory=dict)
    """The paths of all modules and values met, in order."""
    carried: dict[str, None] = dataclasses.field(default_factory=dict)
    """Those of them that `carry` was given."""
    initialized: dict[str, None] = dataclasses.field(default_factory=dict)
    """The paths of modules met while they were being initialized: they collect nothing."""

    def penalty(self, path: str, default: Penalty | None = None) -> Penalty | None:
        """Return the penalty of this path: its rule's, or else the default."""
        rule = self.rules.find(path)
        return default if rule is None else self.rules.values[rule]

    def record(self, module: Any, path: str, output: Any, default: Penalty | None = None) -> None:
        """Measure each floating-point leaf of an output, if it is penalized, and carry it.

        Raises:
            TypeError: where a penalized output has no such leaf.
        """
        self.seen[path] = None
        penalty = self.penalty(path, default)
        if penalty is None:
            return
        leaves = jax.tree.leaves(output)
        floating = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
        if leaves and not floating:
            raise TypeError(
                f'`jaxreg.activity` penalizes floating-point values; got "{path}" of dtype'
                f" {jnp.result_type(leaves[0])}."
            )
        calls = [
            measure(jnp.asarray(x), penalty, self.reduction, self.mask, path) for x in floating
        ]
        self.carried[path] = None
        self.carry(module, {path: tuple(calls)})

    def finish(self, measured: Measured) -> Measured:
        """Return what came out of the pass, having made sure that nothing was lost in it.

        Raises:
            ValueError: for a term that was dropped on the way, or a rule that won nothing.
        """
        for path in self.carried:
            if path not in measured:
                raise ValueError(
                    f'`jaxreg.activity` lost the term "{path}" in a transformation around it. Use'
                    " `nnx.scan` or `nnx.vmap` rather than JAX's own, and give the term an axis:"
                    " `nnx.StateAxes({jaxreg.nnx.PenaltyTerm: 0, ...})`."
                )
        if not self.initialized:
            exempt = [path for path in self.seen if self.penalty(path) is None]
            self.rules.require_wins(
                winners={self.rules.find(path) for path in [*measured, *exempt]},
                paths=self.seen,
                what="modules and sown values of the forward pass",
                otherwise="which no `__call__` and no `sow` gave a value in this pass",
            )
        return measured


def merge(measured: Measured, more: Measured) -> Measured:
    """Return both; where they share a path, its calls in order."""
    return {path: measured.get(path, ()) + more.get(path, ()) for path in {**measured, **more}}


def join(*names: Any) -> str:
    """Return the path of these names; the top module's for none."""
    return "/".join(map(str, names)) or TOP


def current() -> Pass | None:
    """Return the innermost pass under way, if any."""
    return _current.get()


@contextmanager
def under_way(run: Pass) -> Iterator[None]:
    """Make this the innermost pass."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


_current: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("jaxreg", default=None)
