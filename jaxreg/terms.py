"""Named penalty terms: what each forward pass measured, and their total."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties import Penalty

Reduction = Literal["batch_mean", "sum", "mean", "token_mean"]


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
        once: whether it is of a parameter, and so the same for every microbatch.
    """

    penalty: Penalty
    moments: Any
    count: jax.Array | None
    once: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def value(self) -> jax.Array:
        """The finished penalty, a scalar."""
        finish = _finish
        # The strength is a scalar and the first leaf, so its axes are those of stacking.
        for _ in range(jnp.ndim(jax.tree.leaves(self.penalty)[0])):
            finish = jax.vmap(finish)
        return jnp.sum(finish(self))


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
        where = jnp.asarray(mask, bool)[..., None]
        x = jnp.where(where, x, 0)
        tokens = jnp.sum(where)
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
        count=None if count is None else jnp.asarray(count, float),
    )


def measure_parameter(x: jax.Array, penalty: Penalty, ndim: int, name: str) -> Measurement:
    """Measure a parameter of so many axes; leading ones beyond them are of stacked layers.

    A penalty whose strengths a scan has stacked, too, has one for each layer; those beyond, of a
    scan that passes one parameter through all its steps, are all the same.
    """

    def take(x: jax.Array, penalty: Penalty) -> Measurement:
        return dataclasses.replace(measure(x, penalty, "sum", name=name), once=True)

    layers, stacked = x.ndim - ndim, jnp.ndim(jax.tree.leaves(penalty)[0])
    for _ in range(stacked - layers):
        penalty = jax.tree.map(lambda leaf: leaf[0], penalty)
    for _ in range(layers):
        take = jax.vmap(take, in_axes=(0, 0 if stacked else None))
    return take(x, penalty)


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

    @property
    def total(self) -> jax.Array:
        """The sum of all terms, a scalar; 0 where there are none."""
        return sum(self.values(), start=jnp.float32(0))

    def as_dict(self) -> dict[str, jax.Array]:
        """Return a plain dict from path to scalar, for any logger."""
        return dict(self)

    def _penalty_names(self) -> dict[str, list[str]]:
        return {
            path: [type(call.penalty).__name__ for call in calls]
            for path, calls in self.measurements.items()
        }

    def __getitem__(self, path: str) -> jax.Array:
        return sum((m.value for m in self.measurements[path]), start=jnp.float32(0))

    def __iter__(self) -> Iterator[str]:
        return iter(self.measurements)

    def __len__(self) -> int:
        return len(self.measurements)


def combine(terms: Iterable[Terms] | Terms) -> Terms:
    """Return the terms of one large batch from those of its microbatches, exactly.

    Sums and counts are added up and each penalty is finished once, so that microbatches of unequal
    size count by their size. The strengths are those of the first microbatch. Exact are
    all penalties whose moments add up over the leading axis: not `L1Inf` of groups that reach over
    it, whose maxima do not, nor penalties of matrices and of neighbours that do.

    Args:
        terms: the microbatches' terms, all of the same sites; or one `Terms` with a leading axis of
            microbatches, as `jax.lax.scan` stacks them.

    Returns:
        The combined terms.

    Raises:
        ValueError: for an empty sequence, or terms of different sites.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> forward = jr.activity({})(jr.nnx.ActivityRegularization(jr.L1(1.0)))
        >>> terms = [forward(jnp.ones((n, 2)))[1] for n in (1, 3)]
        >>> float(jr.combine(terms).total)
        2.0
    """
    if not isinstance(terms, Terms):
        terms = list(terms)
        if not terms:
            raise ValueError("`jaxreg.combine` takes at least one `Terms`; got none.")
        structures = {jax.tree.structure(t) for t in terms}
        if len(structures) > 1:
            raise ValueError(
                "`jaxreg.combine` takes terms of the same sites and penalties; got"
                f" {[t._penalty_names() for t in terms]}."
            )
        stacked: Terms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *terms)
    else:
        stacked = terms
        if any(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(stacked)):
            raise ValueError(
                "`jaxreg.combine` takes a sequence of `Terms`, or one with a leading axis of"
                " microbatches; got one of a single batch."
            )

    def combined(m: Measurement) -> Measurement:
        if m.once:
            one: Measurement = jax.tree.map(lambda leaf: leaf[0], m)
            return one
        first = jax.tree.map(lambda leaf: leaf[0], m.penalty)
        moments, count = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), (m.moments, m.count))
        return Measurement(first, moments, count)

    return Terms({k: tuple(map(combined, ms)) for k, ms in stacked.measurements.items()})
