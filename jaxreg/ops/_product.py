"""A matrix product with an epilogue of one's own: by a kernel where it is asked for, or wins."""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxreg.terms import varying_as

from . import _dispatch, _mosaic_gpu, _tiles, _tuning
from ._kernel import Finish, Results
from ._tiles import Config, Problem

Outcome = tuple[list[jax.Array], list[jax.Array]]
Plain = Callable[..., Outcome]


def product(
    x: jax.Array,
    w: jax.Array,
    *,
    loaded: Sequence[jax.Array] = (),
    columns: Sequence[jax.Array] = (),
    scalars: Sequence[jax.Array] = (),
    epilogue: Finish,
    results: Results,
    plain: Plain,
    transposed: bool = False,
    name: str,
    asked_by: str | None,
) -> Outcome:
    """Return the arrays (m, n) that the epilogue stores, and the sums of what it sums.

    Args:
        x: (m, k).
        w: (k, n), or transposed (n, k).
        loaded: arrays (m, n) of x's dtype that the epilogue reads.
        columns: arrays (n,) that it reads.
        scalars: those that it reads.
        epilogue: given parts of the product, of what is loaded and of the columns, all of one shape
            and in float32 (what is loaded, in its own dtype), and the scalars, returns parts of
            what is stored and of what is summed.
        results: how much it returns.
        plain: the op as it is without a kernel, of x, w, loaded, columns and scalars: what runs
            elsewhere, and what the kernel must beat. It need not round as the epilogue does, whose
            product in float32 costs XLA more bytes than that in x's dtype.
        transposed: whether it is w's transpose that x is multiplied by.
        name: the kernel's.
        asked_by: the op that asks for the kernel. None leaves the product to XLA, but on devices
            where the kernel is recorded to be faster.

    Returns:
        What is stored, in x's dtype; and the sums in float32, each a scalar or (n,).

    Raises:
        NotImplementedError: if there are no tiles for the kernel that is asked for.
    """
    operands = (x, w, list(loaded), list(columns), list(scalars))
    settings: dict[str, Any] = {
        "epilogue": epilogue,
        "results": results,
        "transposed": transposed,
    }
    m, n, k = sizes(x, w, transposed)
    problem = _mosaic_gpu.problem(m, n, k, len(loaded), len(columns), results)

    def run(tiles: Config | None) -> Any:
        if tiles is None:
            return plain
        kernel = functools.partial(_mosaic_gpu.product, tiles=tiles, name=name, **settings)
        if asked_by is None:
            return kernel
        return _dispatch.only_on(_mosaic_gpu.PLATFORMS, asked_by, "mosaic_gpu", kernel)

    def marked(run: Any) -> Any:
        return lambda *given: varying_as(run(*given), given)

    key = _tuning.shape_class(name, m, n, k, x.dtype)
    heuristic = None
    if asked_by is not None:
        heuristic = _tiles.config(problem, bool(loaded))
        room = f"its epilogue reads {len(columns)} vectors, for which a block's memory has no room"
        _dispatch.require(asked_by, "mosaic_gpu", None if heuristic else room)
        array: Any = jax.ShapeDtypeStruct
        shapes = jax.tree.map(lambda a: array(a.shape, a.dtype), operands)
        _tuning.measure(key, functools.partial(_calls, run, shapes, problem))
    tuned = {
        kind: marked(run(record.config))
        for kind, record in _tuning.known(key).items()
        if record.config.fits(problem) and (asked_by is not None or record.seconds < record.xla)
    }
    chosen: Callable[..., Outcome] = _dispatch.by_device(tuned, marked(run(heuristic)))
    return chosen(*operands)


def sizes(x: jax.Array, w: jax.Array, transposed: bool = False) -> tuple[int, int, int]:
    """Return m, n and k of the product of x (..., k) and w."""
    return x.size // max(x.shape[-1], 1), w.shape[0 if transposed else 1], x.shape[-1]


def wins(name: str, x: jax.Array, w: jax.Array, transposed: bool = False) -> bool:
    """Return whether the kernel is recorded to be faster than XLA on any device."""
    product = sizes(x, w, transposed)
    if not all(isinstance(size, int) for size in product):
        return False  # exported before they are known
    key = _tuning.shape_class(name, *product, x.dtype)
    return any(record.seconds < record.xla for record in _tuning.known(key).values())


def _calls(run: Any, shapes: Any, problem: Problem) -> _tuning.Calls:
    """Return compiled calls on arrays of these shapes."""
    # A GPU multiplies equal numbers faster than others.
    draw = functools.partial(jax.random.normal, jax.random.key(0))
    arrays = jax.tree.map(lambda a: draw(a.shape).astype(a.dtype), shapes)
    programs: dict[Config | None, concurrent.futures.Future[Any]] = {}
    calls: dict[Config | None, Callable[[], Any]] = {}
    errors: dict[Config, Exception] = {}
    tried = _tuning.candidates(problem)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs[None] = pool.submit(jax.jit(run(None)).lower(*arrays).compile)
        for tiles in tried:
            try:
                programs[tiles] = pool.submit(jax.jit(run(tiles)).lower(*arrays).compile)
            except Exception as error:
                errors[tiles] = error
        for which, program in programs.items():
            try:
                calls[which] = functools.partial(program.result(), *arrays)
            except Exception as error:
                if which is None:
                    raise
                errors[which] = error
    if errors and len(errors) == len(tried):  # on another platform, for one
        raise next(iter(errors.values()))
    for tiles, why in errors.items():
        _tuning.leave_out(tiles, why)
    return calls
