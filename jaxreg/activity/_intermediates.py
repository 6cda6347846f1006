"""How measurements leave a forward pass of Linen as variables in `intermediates`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxreg.rules import TOP

from ._beside import probe
from ._pass import Measured, Pass, join, merge, only_measured

COLLECTION = "intermediates"
_NAME = "jaxreg_terms_"


def collects(scope: Any) -> bool:
    """Return whether what is sown in a scope comes out of it."""
    mutable: bool = scope.is_mutable_collection(COLLECTION)
    return mutable


def sow(module: Any, axes: int, measured: Measured) -> bool:
    """Put measurements into the intermediates of a bound module, and return whether they leave.

    Args:
        module: the module, whose method is under way.
        axes: how many axes the transformations around it stack outputs on.
        measured: what was measured.
    """
    path = join(*module.scope.path)
    return nn.Module.sow(
        module,
        COLLECTION,
        f"{_NAME}{axes}",
        (measured, probe()),
        reduce_fn=lambda sown, new: (
            {**sown[0], path: merge(sown[0].get(path, {}), new[0])},
            new[1],
        ),
        init_fn=lambda: ({}, None),
    )


def take_sown(run: Pass, tree: Mapping[str, Any], *scope: str) -> tuple[dict[str, Any], Measured]:
    """Split intermediates into what the user's model sowed and what was measured.

    Args:
        run: the pass that measured.
        tree: the intermediates in a scope.
        scope: the names of its path.
    """
    rest: dict[str, Any] = {}
    measured: Measured = {}
    for name, child in tree.items():
        if name.startswith(_NAME):
            sown, probe = child
            for traced, more in sown.items():
                if probe.shape[-1] != 0 or probe.ndim - 1 != int(name.removeprefix(_NAME)):
                    raise ValueError(f"{cannot(more)} {ADD_AXIS} {NOT_ELSEWHERE}")
                measured = merge(measured, _as_of(run, more, traced, join(*scope)))
        elif isinstance(child, Mapping):
            kept, more = take_sown(run, child, *scope, name)
            measured = merge(measured, more)
            if kept or not more:
                rest[name] = kept
        else:
            rest[name] = child
    return rest, measured


def _as_of(run: Pass, measured: Measured, traced: str, path: str) -> Measured:
    """Return what was measured in a module, whose trace may be that of another one.

    `nn.jit` runs one trace for all modules of equal fields, and knows nothing of their paths.

    Args:
        run: the pass.
        measured: the measurements, and the exempt paths without any, as of when it was traced.
        traced: the path of the module that it was traced for.
        path: the path of the module that it ran for.
    """
    moved: Measured = {}
    for old, calls in measured.items():
        new = old
        if traced != path:
            inside = _seen_from(traced, old)
            new = old if inside is None else run.at(path, inside)
            if inside is None or run.rules.find(old) != run.rules.find(new):
                why = (
                    "it measures another module" if inside is None else "the rules for them differ"
                )
                raise ValueError(
                    f'{cannot({new: calls})} out of the `nn.jit` of "{path}": that runs the trace'
                    f' that was made for "{traced}", a module of equal fields, and {why}. Leave'
                    " `nn.jit` out, or give the modules a field that differs."
                )
        run.seen[new] = None
        moved[new] = calls
    return only_measured(moved)


def _seen_from(module: str, path: str) -> str | None:
    """Return a path as it is seen from a module's; None if it does not lie in the module."""
    if path == module:
        return TOP
    start = "" if module == TOP else f"{module}/"
    return path.removeprefix(start) if path.startswith(start) else None


def cannot(measured: Measured) -> str:
    """Return how an error over measurements that cannot leave begins."""
    return f'`jaxreg.activity` cannot carry the term "{next(iter(measured))}"'


ADD_AXIS = (
    'out of the lifted transformation around it. Add "intermediates": 0 to its `variable_axes`, as'
    ' in `nn.scan(..., variable_axes={"params": 0, "intermediates": 0})`; so for `nn.vmap`.'
)
NOT_ELSEWHERE = "There it must be, with that axis: not in `variable_broadcast` or `variable_carry`."
