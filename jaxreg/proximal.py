"""Proximal optimizers: gradient steps whose penalty gives exact zeros."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.kernel import Kernel
from jaxreg.penalties import Penalty
from jaxreg.penalties._arithmetic import root, wide
from jaxreg.penalties._checks import NON_NEGATIVE, require, require_choice
from jaxreg.transforms import (
    apply_prox,
    require_kernel,
    require_params,
    require_step,
    value_of,
)


def proximal_sgd(
    learning_rate: ArrayLike | optax.Schedule, reg: Kernel, *, momentum: float | None = None
) -> optax.GradientTransformation:
    r"""Descend along the gradient, then apply the proximal operator with the same step.

    $$ m \leftarrow \mu m + g, \qquad
       w \leftarrow \mathrm{prox}_{\frac{\eta}{1 - \mu} R}(w - \eta m) $$

    The fixed points are those of loss + R: for a gradient that stays, m is g / (1 − μ), as in
    `optax.sgd`, and so is the step of the proximal operator. (It is ProxGen with a rate of
    η / (1 − μ) and the mean (1 − μ)·m.)

    With momentum the updates settle there for a convex R, at rates up to 1 / L for gradients that
    are L-Lipschitz. The proximal operator acts at once, the gradient over 1 / (1 − μ) updates:
    where R curves downwards by c (s/κ for `MCP`), they cycle unless η < (1 − μ)² / c, and so they
    may for other nonconvex penalties and sets. Take no momentum for those, or `fista`.

    Args:
        learning_rate: η, a scalar or a schedule from the number of updates made so far to one.
        reg: a `jaxreg.kernel` whose penalties have a closed-form proximal operator.
        momentum: μ, 0 ≤ μ < 1, or None for 0, which is proximal gradient descent (ISTA).

    Returns:
        An `optax.GradientTransformation`, whose `update` needs `params`.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: for a concrete η that is negative, NaN, infinite or no scalar, or a concrete μ
            that is not in [0, 1).
        NotImplementedError: from `update`, for a penalty without a closed-form operator.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0, 0.05])}
        >>> tx = jr.proximal_sgd(0.1, jr.kernel(jr.L1(1.0)))
        >>> updates, _ = tx.update({"kernel": jnp.zeros(2)}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [1.899999976158142, 0.0]

    References:
        Combettes and Wajs, Signal recovery by proximal forward-backward splitting, Multiscale
        Modeling & Simulation 4(4), 2005. Yun, Lozano and Yang, A general family of stochastic
        proximal gradient methods for deep learning (ProxGen), arXiv:2007.07484, 2020.
    """
    require_kernel("proximal_sgd", reg)
    require_step("proximal_sgd(learning_rate=...)", learning_rate)
    steps = 1.0
    if momentum is not None:
        require("proximal_sgd(momentum=...)", momentum, *_DECAY)
        steps = 1 / (1 - momentum)
    return optax.chain(
        optax.sgd(learning_rate, momentum=momentum),  # type: ignore[arg-type,unused-ignore]
        apply_prox(reg, _times(steps, learning_rate)),
    )


_DECAY = "a scalar from 0 on, below 1", lambda value: 0 <= value < 1


def _times(factor: float, rate: ArrayLike | optax.Schedule) -> Any:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


class FistaState(NamedTuple):
    """State of `fista`.

    Args:
        count: number of updates made, an int32 scalar.
        iterate: x, a tree like the parameters: where the zeros are exact.
        inertia: θ, a scalar from 1 on.
        value: the objective at the last parameters, a scalar; inf before the first update.
    """

    count: jax.Array  # type: ignore[assignment]
    iterate: Any
    inertia: jax.Array
    value: jax.Array


def fista(
    learning_rate: ArrayLike | optax.Schedule,
    reg: Kernel,
    *,
    restart: Literal["gradient", "value"] | None = "gradient",
) -> optax.GradientTransformationExtraArgs:
    r"""Accelerate proximal gradient descent, for a convex loss and full-batch gradients.

    $$ x_{k+1} = \mathrm{prox}_{\eta R}(y_k - \eta \nabla f(y_k)), \qquad
       \theta_{k+1} = \tfrac12\Big(1 + \sqrt{1 + 4\theta_k^2}\Big), \qquad
       y_{k+1} = x_{k+1} + \frac{\theta_k - 1}{\theta_{k+1}} (x_{k+1} - x_k) $$

    The parameters that `optax.apply_updates` gives are the extrapolated points y, at which the
    gradient is taken. The solution, with its exact zeros, is x: `fista_params(state)`.

    Args:
        learning_rate: η, at most 1 / L for an L-Lipschitz gradient; a scalar or a schedule from the
            number of updates made so far to one.
        reg: a `jaxreg.kernel` whose penalties have a closed-form proximal operator.
        restart: when θ is put back to 1. "gradient": where the last step went against the one
            before it, ⟨y_k − x_{k+1}, x_{k+1} − x_k⟩ > 0. "value": where the objective went up;
            `update` then needs `value=`, the loss and the penalty at its `params`. None: never.

    Returns:
        An `optax.GradientTransformationExtraArgs`, whose `update` needs `params`.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: for another `restart`, or a concrete η that is negative, NaN, infinite or no
            scalar; from `update`, without the `value` that it needs.
        NotImplementedError: from `update`, for a penalty without a closed-form operator.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> loss = lambda w: 0.5 * jnp.sum((w["kernel"] - jnp.array([2.0, 0.5])) ** 2)
        >>> params = {"kernel": jnp.zeros(2)}
        >>> tx = jr.fista(0.5, jr.kernel(jr.L1(1.0)))
        >>> state = tx.init(params)
        >>> for _ in range(40):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> [round(float(w), 6) for w in jr.fista_params(state)["kernel"]]
        [1.0, 0.0]

    References:
        Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
        problems, SIAM Journal on Imaging Sciences 2(1), 2009. O'Donoghue and Candès, Adaptive
        restart for accelerated gradient schemes, Foundations of Computational Mathematics 15,
        arXiv:1204.3982, 2015.
    """
    require_kernel("fista", reg)
    require_step("fista(learning_rate=...)", learning_rate)
    require_choice("fista(restart=...)", restart, ("gradient", "value", None))

    def init(params: Any) -> FistaState:
        return FistaState(
            count=jnp.zeros([], jnp.int32),
            # Copies, so that both the parameters and the state can be donated.
            iterate=jax.tree.map(lambda x: jnp.array(x, copy=True), params),
            inertia=jnp.ones([]),
            value=jnp.full([], jnp.inf),
        )

    def update(
        updates: Any, state: FistaState, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, FistaState]:
        del extra
        require_params("fista", params)
        if restart == "value" and value is None:
            raise ValueError(
                '`jaxreg.fista(restart="value")` needs the objective: call'
                " `tx.update(updates, state, params, value=loss + penalty)`."
            )
        params = jax.tree.map(jnp.asarray, params)
        step = value_of(learning_rate, state)
        moved = jax.tree.map(lambda y, g: (y - step * g).astype(y.dtype), params, updates)
        iterate = reg.prox(moved, step)
        direction = optax.tree.sub(iterate, state.iterate)
        again = {
            "gradient": _inner(optax.tree.sub(params, iterate), direction) > 0,
            "value": value is not None and value > state.value,
            None: False,
        }[restart]
        inertia = jnp.where(again, 1, state.inertia)
        following = (1 + jnp.sqrt(1 + 4 * inertia**2)) / 2
        ahead = jax.tree.map(
            lambda x, d, y: (x + (inertia - 1) / following * d - y).astype(y.dtype),
            iterate,
            direction,
            params,
        )
        return ahead, FistaState(
            count=optax.safe_increment(state.count),
            iterate=iterate,
            inertia=following,
            value=state.value if value is None else jnp.asarray(value, state.value.dtype),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _inner(a: Any, b: Any) -> jax.Array:
    # `optax.tree.vdot` flattens, which a sharded array may not allow.
    products = jax.tree.map(lambda x, y: jnp.sum(jnp.real(jnp.conj(x) * y)), a, b)
    total: jax.Array = sum(jax.tree.leaves(products), start=jnp.float32(0))
    return total


def fista_params(state: Any) -> Any:
    """Return the iterate of `fista`, whose zeros are exact, from an optimizer state that holds it.

    Raises:
        ValueError: if the state holds no `FistaState`.
        KeyError: if it holds several.
    """
    iterate = optax.tree.get(state, "iterate", filtering=_is_of_fista)
    if iterate is None:
        raise ValueError(
            f"`jaxreg.fista_params` takes the state of an optimizer with `jaxreg.fista` in it; got"
            f" {jax.tree.structure(state)}."
        )
    return iterate


def _is_of_fista(path: Any, value: Any) -> bool:
    del value
    return getattr(path[-1], "tuple_name", None) == FistaState.__name__


class ProximalAdamState(NamedTuple):
    """State of `proximal_adam`.

    Args:
        count: number of updates made, an int32 scalar.
        mu: the mean of the gradients, a tree like the parameters.
        nu: the mean of their squares, a tree like the parameters, in float32 for half precision:
            with b2 = 0.999 a mean in bfloat16 stops moving, and a square in float16 underflows.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def proximal_adam(
    learning_rate: ArrayLike | optax.Schedule,
    reg: Kernel,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    r"""Adam whose proximal operator has Adam's own step for each entry.

    $$ \eta_i = \frac{\eta}{\sqrt{\hat v_i} + \epsilon}, \qquad
       w \leftarrow \arg\min_z R(z) + \sum_i \frac{(z_i - (w_i - \eta_i \hat m_i))^2}{2\eta_i} $$

    For a convex R the fixed points are those of loss + R, with exact zeros; `apply_prox` after
    `optax.adam` has others, since it shrinks all entries alike. A penalty of groups needs one step
    for each group: there v̂ is the mean over the group, for the direction as well. An entry that has
    never had a gradient has the step η / ε, which a penalty sets to zero at once.

    Where R is flat far from 0 (`L0`, `MCP`, `SCAD`, `CappedL1`), a gradient without noise vanishes
    at the solution, v̂ after it, and the step grows to η / ε, for which the operator moves every
    entry. There give an ε for which `penalty.prox(w, η / ε)` leaves the weights w that are to be
    kept as they are, or use `apply_prox`.

    Args:
        learning_rate: η, a scalar or a schedule from the number of updates made so far to one.
        reg: a `jaxreg.kernel` of penalties of single entries or of groups.
        b1: the decay of m̂, the mean of the gradients.
        b2: the decay of v̂, the mean of their squares.
        eps: ε, in the units of the gradient.

    Returns:
        An `optax.GradientTransformation`, whose `update` needs `params`. Leaves that the rules
        exempt follow Adam.

    Raises:
        TypeError: if `reg` is not a `jaxreg.kernel`.
        ValueError: for a concrete η or ε that is negative, NaN, infinite or no scalar, or a decay
            that is not in [0, 1).
        NotImplementedError: from `update`, for a penalty of a whole array, or one without a
            closed-form operator.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxreg as jr
        >>> params = {"kernel": jnp.array([2.0, 0.05])}
        >>> tx = jr.proximal_adam(0.1, jr.kernel(jr.L1(1.0)))
        >>> updates, _ = tx.update({"kernel": jnp.ones(2)}, tx.init(params), params)
        >>> [round(float(w), 3) for w in optax.apply_updates(params, updates)["kernel"]]
        [1.8, 0.0]

    References:
        Yun, Lozano and Yang, A general family of stochastic proximal gradient methods for deep
        learning (ProxGen), arXiv:2007.07484, 2020.
    """
    require_kernel("proximal_adam", reg)
    require_step("proximal_adam(learning_rate=...)", learning_rate)
    require("proximal_adam(b1=...)", b1, *_DECAY)
    require("proximal_adam(b2=...)", b2, *_DECAY)
    require("proximal_adam(eps=...)", eps, *NON_NEGATIVE)

    def init(params: Any) -> ProximalAdamState:
        return ProximalAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=jax.tree.map(lambda x: jnp.zeros_like(wide(jnp.real(x))), params),
        )

    def update(
        updates: Any, state: ProximalAdamState, params: Any = None
    ) -> tuple[Any, ProximalAdamState]:
        require_params("proximal_adam", params)
        params = jax.tree.map(jnp.asarray, params)
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        gradients = jax.tree.map(lambda g: wide(jnp.asarray(g)), updates)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        mean = optax.tree.bias_correction(mu, b1, count)
        square = optax.tree.bias_correction(nu, b2, count)
        rate: Any = value_of(learning_rate, state)

        def steps(v: jax.Array) -> jax.Array:
            return jnp.asarray(rate / (root(v) + eps))

        def penalized(penalty: Penalty, leaf: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            axes = penalty.step_axes(leaf.ndim)
            if axes is None:
                raise NotImplementedError(
                    f"`jaxreg.proximal_adam` takes penalties of single entries or of groups; got"
                    f" {penalty!r}. Use `jaxreg.apply_prox` after `optax.adam`."
                )
            step = steps(jnp.mean(v, axes, keepdims=True))
            return (penalty.prox(leaf - step * m, step) - leaf).astype(leaf.dtype)

        plain = jax.tree.map(lambda m, v: (-steps(v) * m).astype(m.dtype), mean, square)
        moved = reg.map(penalized, params, mean, square, exempt=plain)
        return moved, ProximalAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
