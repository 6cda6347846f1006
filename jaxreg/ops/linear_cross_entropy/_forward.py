"""The sums over tokens: on one device, or on each of those that a mesh splits the arrays over."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg.terms import AxisName

from . import _check, _reference
from ._chunked import Settings, counted
from ._sharding import Explicit, PartitionSpec, psum


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns.

    Attributes:
        total: loss + z_loss; differentiate this one.
        loss: the cross-entropy in nats, reduced.
        z_loss: the z-loss, its strength included, reduced.
        lse: the log-normalizer of each token, of the shape of the labels, also where ignored.
        correct: whether the label's logit, before the soft cap, is each token's largest, the first
            of equal ones; False where ignored.
        accuracy: the weighted mean of `correct`.
        weight: the sum of the tokens' weights: what a mean divides by. With `reduction="sum"`,
            the totals of microbatches add up to one that is divided by their sum.
    """

    total: jax.Array
    loss: jax.Array
    z_loss: jax.Array
    lse: jax.Array
    correct: jax.Array
    accuracy: jax.Array
    weight: jax.Array


class Problem(NamedTuple):
    hidden: jax.Array
    weight: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    weights: jax.Array
    z_loss: jax.Array


@dataclasses.dataclass(frozen=True)
class Forward:
    """The function of a `Problem`, on one device or on each of a mesh; its fields are static."""

    settings: Settings
    reduction: str
    has_z_loss: bool
    batch_axis_name: AxisName | None
    compute: Any  # the module that computes it

    def __call__(self, problem: Problem) -> LinearCrossEntropy:
        hidden, weight, bias, labels, w, strength = problem
        share = self._share(w)
        a = w.reshape(-1) * (share if self.reduction == "mean" else 1)
        total, (losses, squares), (lse, correct) = self.compute.of_logits(
            self.settings,
            hidden.reshape(labels.size, hidden.shape[-1]),
            weight,
            bias,
            labels.reshape(-1),
            None if self.reduction == "none" else (a, a * strength),
        )
        loss = a * counted(a, losses)
        penalty = strength * a * counted(a, squares)
        if self.reduction == "none":
            loss, penalty = loss.reshape(labels.shape), penalty.reshape(labels.shape)
            total = loss + penalty
        else:
            total, penalty = self._over_batch(total), self._over_batch(penalty)
            # Without z-loss the two are one, and so is what is differentiated.
            loss = self._over_batch(loss) if self.has_z_loss else total
        hits = (correct.reshape(labels.shape) > 0) & (w != 0)
        return LinearCrossEntropy(
            total=total,
            loss=loss,
            z_loss=penalty,
            lse=lse.reshape(labels.shape),
            correct=hits,
            accuracy=share * self._over_batch(jnp.where(hits, w, 0)),
            weight=self._over_batch(w),
        )

    def _share(self, w: jax.Array) -> jax.Array:
        """Return 1 / Σ w, and 0 where there is none: 1 / 0 would have NaN for its derivative."""
        weight = self._over_batch(w)
        return jnp.where(weight == 0, 0, 1 / jnp.where(weight == 0, 1, weight))

    def _over_batch(self, x: jax.Array) -> jax.Array:
        return psum(jnp.sum(x), self.batch_axis_name)  # type: ignore[no-any-return]


def on_mesh(forward: Forward, problem: Problem, on: Explicit) -> LinearCrossEntropy:
    """Run each device's part on it, where the types of the arrays say what its part is."""
    reduced = on.tokens if forward.reduction == "none" else PartitionSpec()
    out: Any = LinearCrossEntropy(
        reduced, reduced, reduced, on.tokens, on.tokens, PartitionSpec(), PartitionSpec()
    )
    if on.mesh.manual_axes:
        if on.words and on.token_axes:
            raise NotImplementedError(_check.NAMED)
        # Inside of a `jax.shard_map` over other axes, which keep their names. Another one inside of
        # that has no gradient that compiles.
        out = jax.tree.map(on.sharding, out)
        anywhere = jax.sharding.auto_axes(forward, axes=on.mesh.explicit_axes, out_sharding=out)
        return anywhere(problem)  # type: ignore[no-any-return]
    if on.words and forward.compute is _reference:
        raise NotImplementedError(_check.WHOLE)
    specs: Any = Problem(
        hidden=PartitionSpec(*on.tokens, None),
        weight=on.weight(forward.settings.words),
        bias=PartitionSpec(on.words or None) if problem.bias is not None else None,
        labels=on.tokens,
        weights=on.tokens,
        z_loss=PartitionSpec(),
    )
    function = dataclasses.replace(forward.settings.function, vocab_axis_name=on.words or None)
    settings = dataclasses.replace(forward.settings, function=function)
    forward = dataclasses.replace(forward, settings=settings, batch_axis_name=on.token_axes or None)
    run = jax.shard_map(forward, mesh=on.mesh, in_specs=(specs,), out_specs=out)
    result: LinearCrossEntropy = run(jax.tree.map(on.put, problem, specs))
    return result
