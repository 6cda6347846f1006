"""Named penalty terms: what each forward pass measured, and their total."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.penalties import Penalty

Reduction = Literal["batch_mean", "sum", "mean", "token_mean"]
AxisName = Hashable | tuple[Hashable, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measurement:
    """One penalty of one array, before it is finished.

    A transformation that runs a site several times (a scan, a vmap) stacks the leaves along leading
    axes; the value is then the sum over them.

    Args:
        penalty: the penalty, without its arrays.
        moments: what `penalty.moments` returned.
        count: what the reduction divides by, a scalar, or None where it does not divide.
        adds_up: whether the moments of parts of a batch add up to those of the whole.
        once: whether it is of a parameter, and so the same for every microbatch.
        axes: how many axes the forward pass has stacked by itself; those of microbatches lie before
            them.
    """

    penalty: Penalty
    moments: Any
    count: ArrayLike | None
    adds_up: bool = dataclasses.field(metadata={"static": True})
    once: bool = dataclasses.field(default=False, metadata={"static": True})
    axes: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def ndim(self) -> int:
        """How many axes it is stacked on."""
        # The strength is a scalar and the first leaf.
        return jnp.ndim(jax.tree.leaves(self.penalty)[0])

    @property
    def value(self) -> jax.Array:
        """The finished penalty, a scalar."""
        finish = _finish
        for _ in range(self.ndim):
            finish = jax.vmap(finish)
        value = finish(self)
        return jnp.sum(value) if value.ndim else value

    def sum(self, path: str) -> "Measurement":
        """Return the measurement of all microbatches together, which the leading axis stacks."""
        self._require_adds_up("combine", path)
        first = jax.tree.map(lambda leaf: leaf[0], self.penalty)
        # Of a parameter each microbatch has the whole. With the mean, each has its share of the
        # gradient, also where the others' are constants.
        add_up = jnp.mean if self.once else jnp.sum
        moments, count = jax.tree.map(lambda leaf: add_up(leaf, axis=0), (self.moments, self.count))
        return dataclasses.replace(self, penalty=first, moments=moments, count=count)

    def psum(self, axis_name: AxisName | None, caller: str, path: str) -> "Measurement":
        """Return the measurement of all shards together; see `combine`. With None, this one."""
        if axis_name is None or self.once:
            return self
        self._require_adds_up(caller, path)
        split = split_axes(self.moments, axis_name)
        if not split:
            return self
        sums = (self.moments, self.count)
        moments, count = jax.lax.psum(sums, split)  # type: ignore[no-untyped-call]
        return dataclasses.replace(self, moments=moments, count=count)

    def _require_adds_up(self, caller: str, path: str) -> None:
        """Raise a ValueError unless the parts of a batch add up to the whole."""
        if not self.adds_up:
            raise ValueError(
                f"`jaxreg.{caller}` cannot add up parts of a batch for"
                f' {type(self.penalty).__name__} of "{path}": its groups, matrices or signals'
                " reach over the leading axis, which was split. Let each lie within one example (by"
                " `axis`, `batch_axes`, `per_group` or the shape of the array), or measure the"
                " whole batch at once."
            )


def varying_axes(*types: Any) -> frozenset[Hashable]:
    """Return the mesh axes along which arrays of these types (`jax.typeof`) may differ.

    As far as `jax.shard_map` keeps track of them.
    """
    return frozenset().union(*(getattr(type_, "manual_axis_type").varying for type_ in types))


def varying_as(tree: Any, like: Any) -> Any:
    """Return arrays that vary over the axes of a `jax.shard_map` that the arrays of `like` do too.

    What does so already stays as it is. Most of JAX's functions do this by themselves; primitives
    and kernels do not.
    """
    wanted = varying_axes(*map(jax.typeof, jax.tree.leaves(like)))

    def mark(array: Any) -> Any:
        missing = tuple(wanted - varying_axes(jax.typeof(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree)


def split_axes(tree: Any, axis_name: AxisName) -> tuple[Hashable, ...]:
    """Return the axes along which arrays may differ: those that JAX does not keep track of, too."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    differ = varying_axes(*map(jax.typeof, jax.tree.leaves(tree)))
    return tuple(axis for axis in axes if axis in differ or not is_tracked(axis))


def is_tracked(axis: Hashable) -> bool:
    """Return whether JAX keeps track of what differs along an axis.

    It does not under `jax.vmap` and `check_vma=False`: not even the index differs there.
    """
    return bool(varying_axes(jax.typeof(jax.lax.axis_index(axis))))


def _finish(measurement: Measurement) -> jax.Array:
    return measurement.penalty.finish(measurement.moments, measurement.count)


def measure(
    x: ArrayLike,
    penalty: Penalty,
    reduction: Reduction,
    mask: ArrayLike | None = None,
    name: str = "x",
    moments: Any = None,
) -> Measurement:
    """Take a penalty's moments and count of one array; `name` names it in errors.

    See `jaxreg.penalize` for the reductions and the mask. `moments` are those of the array, where
    they have been taken already.
    """
    check_reduction(reduction)
    x = penalty.prepare(x, name)
    where = None
    tokens: Any = math.prod(x.shape[:-1])
    if mask is not None:
        if jnp.shape(mask) != x.shape[:-1]:
            raise ValueError(
                f"A mask must have the shape of all axes but the last; got {jnp.shape(mask)} for"
                f' "{name}" of shape {x.shape}.'
            )
        if jnp.issubdtype(jnp.result_type(mask), jnp.inexact):
            raise TypeError(
                f"A mask must be booleans, or integers; got dtype {jnp.result_type(mask)} for"
                f' "{name}". Weights of tokens are not taken, nor what is added to logits.'
            )
        where = jnp.asarray(mask, bool)[..., None]
        x = jnp.where(where, x, 0)
        # Counted as integers, exactly; times the features they might overflow.
        tokens = jnp.sum(where).astype(float)
    count = {
        "batch_mean": x.shape[0] if x.ndim else 1,
        "sum": None,
        "mean": tokens * (x.shape[-1] if x.ndim else 1),
        "token_mean": tokens,
    }[reduction]
    return Measurement(
        # What only the moments read stays where they were taken.
        penalty=jax.tree.map(jnp.asarray, penalty.with_arrays(lambda _: None)),
        moments=penalty.moments(x, where) if moments is None else moments,
        # A number stays one, so that nothing of the division by it is traced.
        count=_count(count),
        adds_up=penalty.adds_up(x.ndim),
    )


def measure_parameter(
    x: jax.Array, penalty: Penalty, shape: tuple[int, ...], name: str
) -> Measurement:
    """Measure a parameter that has this shape in its module; leading axes are of stacked layers.

    A penalty whose strengths a scan has stacked, too, has one for each layer; those beyond, of a
    scan that passes one parameter through all its steps, are all the same.
    """
    layers = x.ndim - len(shape)
    if x.shape[layers:] != shape:
        raise ValueError(
            f'`jaxreg.activity` penalizes the parameter "{name}" where layers are stacked on the'
            f" leading axes; got shape {x.shape}, of layers of {shape}. Use `jaxreg.kernel`, whose"
            " penalties take `batch_axes`."
        )

    def take(x: jax.Array, penalty: Penalty) -> Measurement:
        return dataclasses.replace(measure(x, penalty, "sum", name=name), adds_up=True, once=True)

    stacked = max(map(jnp.ndim, jax.tree.leaves(penalty)[:1]), default=0)
    for _ in range(stacked - layers):
        penalty = jax.tree.map(lambda leaf: leaf[0], penalty)
    for _ in range(layers):
        take = jax.vmap(take, in_axes=(0, 0 if stacked else None))
    return take(x, penalty)


def _count(count: Any) -> Any:
    if count is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(float)
    # A number that is known while tracing is divided by in one operation; a size of `jax.export` is
    # none.
    known = isinstance(count, int | np.ndarray)
    return np.asarray(count, dtype) if known else jnp.asarray(count, dtype)


def _total(values: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, values) if values else jnp.zeros((), jnp.float32)


def check_reduction(reduction: str) -> None:
    """Raise unless this is the name of a reduction."""
    if reduction not in get_args(Reduction):
        known = ", ".join(map(repr, get_args(Reduction)))
        raise ValueError(f"A reduction must be one of {known}; got {reduction!r}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Terms(Mapping[str, jax.Array]):
    """The penalties of one forward pass, by the path of what they penalize; a pytree.

    As a mapping it gives each path's value, a scalar. A path that was penalized several times in
    the pass (a module called twice, a scanned layer) has the sum.

    The terms of microbatches, or of the shards under `shard_map`, come together by `combine`:
    adding up their leaves would add up their strengths too.

    Args:
        measurements: for each path what was measured there, in the order of the calls.
    """

    measurements: dict[str, tuple[Measurement, ...]]

    @classmethod
    def of(cls, measured: Mapping[str, tuple[Measurement, ...]]) -> "Terms":
        """Return the terms of one forward pass, which is over."""
        return cls(
            {
                path: tuple(dataclasses.replace(call, axes=call.ndim) for call in calls)
                for path, calls in measured.items()
            }
        )

    @property
    def total(self) -> jax.Array:
        """The sum of all terms, a scalar; 0 where there are none."""
        return _total(list(self.values()))

    def as_dict(self) -> dict[str, jax.Array]:
        """Return a plain dict from path to scalar, for any logger."""
        return dict(self)

    def _penalty_names(self) -> dict[str, list[str]]:
        return {
            path: [type(call.penalty).__name__ for call in calls]
            for path, calls in self.measurements.items()
        }

    def _map(self, function: Callable[[Measurement, str], Measurement]) -> "Terms":
        measurements = {
            path: tuple(function(call, path) for call in calls)
            for path, calls in self.measurements.items()
        }
        return Terms(measurements)

    def __getitem__(self, path: str) -> jax.Array:
        return _total([m.value for m in self.measurements[path]])

    def __iter__(self) -> Iterator[str]:
        return iter(self.measurements)

    def __len__(self) -> int:
        return len(self.measurements)


def combine(terms: Iterable[Terms] | Terms, *, axis_name: AxisName | None = None) -> Terms:
    """Return the terms of one large batch from those of its parts, exactly.

    The parts are microbatches, or shards under `jax.shard_map`. Sums and counts are added up and
    each penalty is finished once, so that parts of unequal size count by their size. The strengths
    are those of the first microbatch, or each shard's own.

    Within `jax.shard_map` the result is the same on every shard, and so is its gradient by
    parameters that are: with `check_vma=True`, JAX's default, add the total to the mean over the
    shards of the loss, and nothing is left to be averaged. What JAX knows to be the same on every
    shard is not added up.

    Args:
        terms: the microbatches' terms, all of the same sites; or one `Terms` with a leading axis of
            microbatches, as `jax.lax.scan` stacks them. With `axis_name`, one `Terms` is that of
            this shard, without such an axis.
        axis_name: the axis or axes of a surrounding `jax.shard_map` (or `jax.vmap`) that split the
            leading axis of what is penalized: the batch, not the features.

    Returns:
        The combined terms.

    Raises:
        TypeError: for parts that are no `Terms`.
        ValueError: for an empty sequence, one `Terms` of a single batch, or terms of different
            sites; for a penalty that does not add up over the leading axis: `L1Inf` of groups,
            matrices, neighbours or groups of tokens that reach over it.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> forward = jr.activity({})(jr.nnx.ActivityRegularization(jr.L1(1.0)))
        >>> terms = [forward(jnp.ones((n, 2)))[1] for n in (1, 3)]
        >>> float(jr.combine(terms).total)
        2.0
    """
    if not isinstance(terms, Terms):
        terms = _of_microbatches(_stack(list(terms)))
    elif axis_name is None:
        terms = _of_microbatches(terms)
    return terms._map(lambda call, path: call.psum(axis_name, "combine", path))


def _of_microbatches(stacked: Terms) -> Terms:
    """Return the terms of all microbatches together, which a leading axis stacks."""
    if any(call.ndim <= call.axes for calls in stacked.measurements.values() for call in calls):
        raise ValueError(
            "`jaxreg.combine` takes a sequence of `Terms`, or one with a leading axis of"
            " microbatches; got one of a single batch."
        )
    return stacked._map(Measurement.sum)


def _stack(microbatches: list[Terms]) -> Terms:
    """Return one `Terms` with a leading axis of microbatches."""
    for part in microbatches:
        if not isinstance(part, Terms):
            raise TypeError(
                "`jaxreg.combine` takes `Terms`, the second of what"
                f" `jaxreg.activity(...)(apply)` returns; got a {type(part).__name__}."
            )
    if not microbatches:
        raise ValueError("`jaxreg.combine` takes at least one `Terms`; got none.")
    if len(set(map(jax.tree.structure, microbatches))) > 1:
        raise ValueError(
            "`jaxreg.combine` takes terms of the same sites and penalties; got"
            f" {[part._penalty_names() for part in microbatches]}."
        )
    stacked: Terms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *microbatches)
    return stacked
