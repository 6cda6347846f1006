"""optax gradient transformations that regularize."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.kernel import Kernel
from jaxreg.penalties import Constraint, Penalty
from jaxreg.penalties._checks import NON_NEGATIVE, require, require_integer


class CountState(NamedTuple):
    """State of a transformation whose scalar follows a schedule.

    Args:
        count: number of updates made, an int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]


_State: TypeAlias = CountState | optax.EmptyState


def add_penalty_gradient(
    reg: Kernel, scale: ArrayLike | optax.Schedule = 1.0
) -> optax.GradientTransformation:
    r"""Add the gradient of a penalty of the parameters to the updates.

    $$ u \leftarrow u + c \,\nabla R(w) $$

    Before the preconditioner (`scale_by_adam`) this is coupled regularization: the same as R in the
    loss. After it, and before the scaling by the learning rate, it is decoupled, as weight decay in
    AdamW is: `L2(λ / 2)` there is optax's `add_decayed_weights(λ)`, for real parameters (the
    gradient of complex ones is conjugate, as `jax.grad` has it). The value of the penalty is never
    computed, so that XLA folds the gradient into the update.

    Args:
        reg: a `jaxreg.kernel`. `optax.inject_hyperparams` needs `static_args="reg"`.
        scale: c, a scalar or a schedule from the number of updates made so far to a scalar.

    Returns:
        An `optax.GradientTransformation`, whose `update` needs `params`. Leaves that the rules
        exempt keep their updates.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: for a concrete c that is not finite or no real scalar; from `update`, if it is
            not given `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
        >>> tx = optax.chain(jr.add_penalty_gradient(jr.kernel(jr.L2(0.5))), optax.sgd(0.1))
        >>> zero = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}
        >>> updates, _ = tx.update(zero, tx.init(params), params)
        >>> round(float(updates["kernel"][0]), 3), bool(updates["bias"][0] == 0)
        (-0.2, True)

    References:
        Loshchilov and Hutter, Decoupled weight decay regularization, arXiv:1711.05101, 2019.
    """
    require_kernel("add_penalty_gradient", reg)
    if not callable(scale):
        what = "a finite scalar, or a schedule"
        require("add_penalty_gradient(scale=...)", scale, what, math.isfinite)

    def add(factor: ArrayLike, penalty: Penalty, leaf: jax.Array, u: jax.Array) -> jax.Array:
        return (u + factor * penalty.gradient(leaf)).astype(u.dtype)

    return _mapping("add_penalty_gradient", reg, scale, add)


def apply_prox(reg: Kernel, step_size: ArrayLike | optax.Schedule) -> optax.GradientTransformation:
    r"""Apply the proximal operator of a penalty to the updated parameters.

    $$ u \leftarrow \mathrm{prox}_{t R}(w + u) - w $$

    Put it last in the chain. With `optax.sgd(lr)` before it and t = lr it is proximal gradient
    descent on loss + R (ISTA); with `optax.sgd(lr, momentum=μ)`, t = lr / (1 − μ), as the steps add
    up to that (`jaxreg.proximal_sgd`). Where the proximal operator gives a zero,
    `optax.apply_updates` gives an exact zero. Inside `jax.shard_map` it sees each shard's part:
    right for penalties of single entries.

    Args:
        reg: a `jaxreg.kernel` whose penalties have a closed-form proximal operator.
            `optax.inject_hyperparams` needs `static_args="reg"`.
        step_size: t, a scalar or a schedule from the number of updates made so far to a scalar.

    Returns:
        An `optax.GradientTransformation`, whose `update` needs `params`. Leaves that the rules
        exempt keep their updates.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: for a concrete t that is negative, NaN, infinite or no scalar; from `update`, if
            it is not given `params`.
        NotImplementedError: from `update`, for a penalty without a closed-form operator.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0, 0.05])}
        >>> tx = optax.chain(optax.sgd(0.1), jr.apply_prox(jr.kernel(jr.L1(1.0)), 0.1))
        >>> updates, _ = tx.update({"kernel": jnp.zeros(2)}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [1.899999976158142, 0.0]

    References:
        Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization 1(3), 2014.
    """
    require_kernel("apply_prox", reg)
    require_step("apply_prox(step_size=...)", step_size)
    return _mapping("apply_prox", reg, step_size, _move)


def project(reg: Kernel) -> optax.GradientTransformation:
    r"""Project the updated parameters onto constraints.

    $$ u \leftarrow P_C(w + u) - w $$

    Put it last in the chain: what comes after it may leave the set again. `optax.apply_updates`
    adds the difference to w, and so meets the set up to a rounding error of w; zeros are exact.
    Inside `jax.shard_map` it sees each shard's part: right for bounds of single entries.

    Args:
        reg: a `jaxreg.kernel` of constraints (`MaxNorm`, `NonNegative`, `Simplex`, …).

    Returns:
        An `optax.GradientTransformation`, whose `update` needs `params`. Leaves that the rules
        exempt keep their updates.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`, or if one of its penalties is no constraint.
        ValueError: from `update`, if it is not given `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0, 0.05])}
        >>> tx = optax.chain(optax.sgd(0.1), jr.project(jr.kernel(jr.NonNegative())))
        >>> updates, _ = tx.update({"kernel": jnp.ones(2)}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [1.899999976158142, 0.0]

    References:
        Goldstein, Convex programming in Hilbert space, Bulletin of the AMS 70(5), 1964.
    """
    require_kernel("project", reg)
    for penalty in reg.rules.values:
        if penalty is not None and not isinstance(penalty, Constraint):
            raise TypeError(
                f"`jaxreg.project` takes a kernel of constraints; got {penalty!r}. For penalties"
                " use `jaxreg.apply_prox` or `jaxreg.add_penalty_gradient`."
            )
    return _mapping("project", reg, 1.0, _move)


def _move(step: ArrayLike, penalty: Penalty, leaf: jax.Array, u: jax.Array) -> jax.Array:
    # Not rounded to the dtype of u: that could leave more than zero where prox gives zero.
    return penalty.prox(leaf + u, step) - leaf


def _mapping(
    transform: str,
    reg: Kernel,
    scalar: ArrayLike | optax.Schedule,
    function: Callable[..., jax.Array],
) -> optax.GradientTransformation:
    """Return the transformation that maps `function(scalar, penalty, leaf, update)`.

    It counts its updates only for a schedule.
    """

    def init(params: Any) -> _State:
        del params
        return CountState(jnp.zeros([], jnp.int32)) if callable(scalar) else optax.EmptyState()

    def update(updates: Any, state: _State, params: Any = None) -> tuple[Any, _State]:
        require_params(transform, params)
        mapped = functools.partial(function, value_of(scalar, state))
        updates = reg.map(mapped, params, updates, exempt=updates)
        if isinstance(state, CountState):
            state = CountState(optax.safe_increment(state.count))
        return updates, state

    return optax.GradientTransformation(init, update)


class PenaltyRecord(NamedTuple):
    """State of `record_penalty`.

    Args:
        count: number of updates made, an int32 scalar.
        total: the penalty when it was last recorded, a scalar.
        values: its share of each penalized leaf, by path; 0 where no leaf is.
    """

    count: jax.Array  # type: ignore[assignment]
    total: jax.Array
    values: dict[str, jax.Array] | jax.Array


def record_penalty(reg: Kernel, every: int = 1) -> optax.GradientTransformation:
    """Record the penalty of the parameters in the optimizer's state; change no update.

    `optax.tree.get(state, "values")` reads the record out of a chain's state.

    Args:
        reg: a `jaxreg.kernel`.
        every: how many updates lie between records; the first update makes one. The others
            evaluate nothing.

    Returns:
        An `optax.GradientTransformation` whose state is a `PenaltyRecord` of the parameters that
        `update` was given.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: if `every` is not a positive integer; from `update`, if it is not given
            `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0, 1.0])}
        >>> tx = optax.chain(jr.record_penalty(jr.kernel(jr.L2(1.0)), every=100), optax.sgd(0.1))
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> float(optax.tree.get(state, "total"))
        5.0
    """
    require_kernel("record_penalty", reg)
    require_integer("record_penalty(every=...)", every, least=1)

    def evaluate(params: Any) -> tuple[jax.Array, dict[str, jax.Array] | jax.Array]:
        values = reg.values(params)
        total = sum(values.values(), start=jnp.float32(0))
        # `optax.tree.map_params` makes the state of no parameters, and needs a leaf for each field.
        return total, values or total

    def init(params: Any) -> PenaltyRecord:
        zeros = optax.tree.zeros_like(jax.eval_shape(evaluate, params))
        return PenaltyRecord(jnp.zeros([], jnp.int32), *zeros)

    def update(updates: Any, state: PenaltyRecord, params: Any = None) -> tuple[Any, PenaltyRecord]:
        require_params("record_penalty", params)
        record = jax.lax.cond(
            state.count % every == 0, evaluate, lambda _: (state.total, state.values), params
        )
        return updates, PenaltyRecord(optax.safe_increment(state.count), *record)

    return optax.GradientTransformation(init, update)


def value_of(scalar: ArrayLike | optax.Schedule, state: Any) -> ArrayLike:
    """Return a scalar, or what a schedule gives after the updates that the state has counted."""
    return scalar(state.count) if callable(scalar) else scalar


def require_kernel(transform: str, reg: Any) -> None:
    """Raise unless `reg` is a `jaxreg.kernel`; `transform` is who takes it."""
    if not isinstance(reg, Kernel):
        raise TypeError(
            f"`jaxreg.{transform}` takes a `jaxreg.kernel(...)`; got {reg!r}. For a bare penalty:"
            f" `jaxreg.{transform}(jaxreg.kernel(penalty))`."
        )


def require_step(argument: str, step: ArrayLike | optax.Schedule) -> None:
    """Raise unless this is a schedule, or traced, or a step that can be taken."""
    if not callable(step):
        what, holds = NON_NEGATIVE
        require(argument, step, f"{what}, or a schedule", holds)


def require_params(transform: str, params: Any) -> None:
    """Raise unless the parameters were given; `transform` is who needs them."""
    if params is None:
        raise ValueError(
            f"`jaxreg.{transform}` needs the parameters: call `tx.update(updates, state, params)`."
        )
