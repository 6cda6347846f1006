"""Proximal optimizers, against their formulas and against solvers that no one here wrote."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    LogisticRegression,
    MultiTaskLasso,
    Ridge,
)
from sklearn.preprocessing import StandardScaler

import jaxreg as jr

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(6, 4)), RNG.normal(size=6)
W = RNG.normal(size=4)
L1 = jr.kernel({"w": jr.L1(0.3)})
OPTIMIZERS: dict[str, Any] = {
    "proximal_sgd": jr.proximal_sgd,
    "fista": jr.fista,
    "proximal_adam": jr.proximal_adam,
}


def loss(params):
    return jnp.sum((A @ params["w"] - B) ** 2) / 2


def slope(w):
    return A.T @ (A @ w - B)


def soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def train(tx, steps, params, objective=loss):
    """Return the parameters after each step, and the last state."""

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(objective)(params)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    tx = optax.with_extra_args_support(tx)
    (_, state), path = run(params)
    return jax.tree.map(np.asarray, path), state


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_proximal_sgd_is_a_momentum_step_and_then_the_prox(momentum):
    w, m, expected = W, 0.0, []
    for _ in range(5):
        m = (momentum or 0) * m + slope(w)
        w = soft(w - 0.05 * m, 0.05 * 0.3 / (1 - (momentum or 0)))
        expected.append(w)
    with jax.enable_x64():
        path, _ = train(jr.proximal_sgd(0.05, L1, momentum=momentum), 5, {"w": jnp.asarray(W)})
    np.testing.assert_allclose(path["w"], expected, rtol=1e-12)


@pytest.mark.parametrize("rate", [0.02, optax.constant_schedule(0.02)], ids=["rate", "schedule"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_momentum_does_not_change_what_proximal_sgd_minimizes(momentum, rate):
    kernel = jr.kernel({"w": jr.L1(2.0)})
    with jax.enable_x64():
        path, _ = train(jr.proximal_sgd(rate, kernel, momentum=momentum), 3000, {"w": W})
        w = path["w"][-1]
        kkt = w - jr.L1(2.0).prox(w - slope(w), 1.0)
    assert np.abs(kkt).max() < 1e-9
    assert 0 < np.sum(w == 0) < 4


def fista_in_numpy(steps, rate, restart):
    """Beck and Teboulle's (4.1)-(4.3), with the restarts of O'Donoghue and Candès."""
    x = y = W
    theta, last, iterates, restarts = 1.0, np.inf, [], 0
    for _ in range(steps):
        new = soft(y - rate * slope(y), rate * 0.3)
        objective = np.sum((A @ y - B) ** 2) / 2
        again = {
            None: False,
            "gradient": (y - new) @ (new - x) > 0,
            "value": objective > last,
        }[restart]
        restarts += again
        theta = 1.0 if again else theta
        following = (1 + np.sqrt(1 + 4 * theta**2)) / 2
        y = new + (theta - 1) / following * (new - x)
        x, theta, last = new, following, objective
        iterates.append(y)
    return iterates, x, restarts


@pytest.mark.parametrize("restart", [None, "gradient", "value"])
def test_fista_is_that_of_the_paper(restart):
    rate = 1 / np.linalg.eigvalsh(A.T @ A).max()
    expected, iterate, restarts = fista_in_numpy(60, rate, restart)
    assert (restarts > 0) == (restart is not None)
    with jax.enable_x64():
        path, state = train(jr.fista(rate, L1, restart=restart), 60, {"w": jnp.asarray(W)})
        np.testing.assert_allclose(path["w"], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(jr.fista_params(state)["w"], iterate, rtol=1e-9, atol=1e-12)


def test_iterate_of_fista_is_found_in_the_state_of_a_chain_and_has_exact_zeros():
    tx = optax.chain(optax.identity(), jr.fista(0.03, jr.kernel({"w": jr.L1(2.0)})))
    _, state = train(tx, 8, {"w": jnp.asarray(W, jnp.float32)})
    assert 0 < np.sum(jr.fista_params(state)["w"] == 0) < 4
    with pytest.raises(ValueError, match=r"takes the state of an optimizer with `jaxreg.fista` in"):
        jr.fista_params(optax.adam(0.1).init({"w": W}))


def proxgen_in_numpy(steps, rate, strength, b1=0.9, b2=0.99, eps=1e-3, group=False):
    w, m, v = W, 0.0, 0.0
    for t in range(1, steps + 1):
        g = slope(w)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        second = v / (1 - b2**t)
        step = rate / (np.sqrt(np.mean(second) if group else second) + eps)
        moved = w - step * m / (1 - b1**t)
        if group:
            norm = np.sqrt(np.sum(moved**2))
            w = moved * max(1 - step * strength / norm, 0)
        else:
            w = soft(moved, step * strength)
    return w


def test_proximal_adam_has_a_step_for_each_entry():
    tx = jr.proximal_adam(0.05, L1, b1=0.9, b2=0.99, eps=1e-3)
    with jax.enable_x64():
        path, _ = train(tx, 40, {"w": jnp.asarray(W)})
    np.testing.assert_allclose(path["w"][-1], proxgen_in_numpy(40, 0.05, 0.3), rtol=1e-9)


def test_proximal_adam_has_one_step_for_a_group():
    kernel = jr.kernel({"w": jr.GroupLasso(0.3, axis=0, weighted=False)})
    tx = jr.proximal_adam(0.05, kernel, b1=0.9, b2=0.99, eps=1e-3)
    with jax.enable_x64():
        path, _ = train(tx, 40, {"w": jnp.asarray(W)})
    expected = proxgen_in_numpy(40, 0.05, 0.3, group=True)
    np.testing.assert_allclose(path["w"][-1], expected, rtol=1e-9)


def test_proximal_adam_without_a_penalty_is_adam():
    params = {"w": jnp.asarray(W, jnp.float32)}
    for kernel in (jr.kernel({"w": jr.L1(0.0)}), jr.kernel({"w": None})):
        ours, _ = train(jr.proximal_adam(0.05, kernel, b2=0.99, eps=1e-6), 20, params)
        theirs, _ = train(optax.adam(0.05, b2=0.99, eps=1e-6), 20, params)
        np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-4)


def test_proximal_adam_ends_where_the_loss_and_the_penalty_balance():
    """And `apply_prox` after Adam, which shrinks all entries alike, elsewhere."""
    kernel = jr.kernel({"w": jr.L1(2.0)})
    schedule = optax.exponential_decay(0.05, 1000, 0.5)
    with jax.enable_x64():
        params = {"w": jnp.asarray(W)}
        path, _ = train(jr.proximal_adam(schedule, kernel, b2=0.99, eps=1e-3), 20_000, params)
        w = path["w"][-1]
        kkt = np.abs(w - np.asarray(jr.L1(2.0).prox(w - slope(w), 1.0))).max()
        alike = optax.chain(optax.adam(schedule, b2=0.99), jr.apply_prox(kernel, schedule))
        other = train(alike, 20_000, params)[0]["w"][-1]
    assert kkt < 1e-7
    assert 0 < np.sum(w == 0) < 4
    assert np.abs(other - w).max() > 0.05


def test_training_by_proximal_adam_has_a_derivative_where_a_gradient_is_zero():
    """A ReLU that is never active gives its bias a gradient, and a mean square, of exactly 0."""

    def trained(strength):
        def objective(params):
            return jnp.sum(params["w"] ** 2 + jax.nn.relu(params["w"] * params["bias"] - 1))

        tx = jr.proximal_adam(0.1, jr.kernel({"w": jr.L1(strength)}))
        params = {"w": jnp.ones(1), "bias": jnp.zeros(1)}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(objective)(params), state, params)
            params = optax.apply_updates(params, updates)
        return objective(params)

    with jax.enable_x64():
        derivative = jax.jit(jax.grad(trained))(0.1)
        ahead, behind = float(trained(0.1 + 1e-6)), float(trained(0.1 - 1e-6))
    np.testing.assert_allclose(derivative, (ahead - behind) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_proximal_adam_in_half_precision_keeps_the_squares_of_small_gradients(dtype):
    gradients = np.array([5e-3, 1e-2, 1e-4, 1e-1], np.float32)
    tx = jr.proximal_adam(1e-3, jr.kernel({"w": jr.L1(1e-4)}))
    out = {}
    for precision in (dtype, jnp.float32):
        params = {"w": jnp.full(4, 0.5, precision)}
        grads = {"w": jnp.asarray(gradients, precision)}
        updates, _ = tx.update(grads, tx.init(params), params)
        out[precision] = np.asarray(optax.apply_updates(params, updates)["w"], np.float32)
    np.testing.assert_allclose(out[dtype], out[jnp.float32], rtol=float(jnp.finfo(dtype).eps))


def test_proximal_adam_of_bfloat16_goes_on_to_average():
    params = {"w": jnp.ones(64, jnp.bfloat16)}
    tx = jr.proximal_adam(0.0, jr.kernel({"w": jr.L1(0.0)}))

    def step(state, key):
        grads = {"w": jax.random.normal(key, (64,), jnp.bfloat16)}
        return tx.update(grads, state, params)[1], None

    state, _ = jax.lax.scan(step, tx.init(params), jax.random.split(jax.random.key(0), 4000))
    assert state.nu["w"].dtype == jnp.float32
    np.testing.assert_allclose(np.mean(state.nu["w"]), 1 - 0.999**4000, rtol=0.02)


class WholeArray(jr.Penalty):
    strength: Any

    def moments(self, x, where=None):
        return jnp.sqrt(jnp.sum(x**2))

    def _prox(self, x, step):
        return x


def test_proximal_adam_names_apply_prox_where_a_penalty_needs_one_step():
    tx = jr.proximal_adam(0.1, jr.kernel({"w": jr.L2(1.0) + WholeArray(1.0)}))
    params = {"w": jnp.ones(3)}
    message = "takes penalties of single entries or of groups; got L2.*WholeArray.*`jaxreg.apply_p"
    with pytest.raises(NotImplementedError, match=message):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_penalty_without_a_prox_is_an_error(name):
    params = {"w": jnp.full((3, 2), 0.5)}
    for penalty in (jr.LogCosh(1.0), jr.L1(1.0) + jr.Huber(1.0)):
        tx = OPTIMIZERS[name](0.1, jr.kernel({"w": penalty}))
        with pytest.raises(NotImplementedError, match="closed-form proximal operator"):
            tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_kernel_is_an_error(name):
    with pytest.raises(TypeError, match=rf"`jaxreg.{name}` takes a `jaxreg.kernel\(...\)`; got"):
        OPTIMIZERS[name](0.1, jr.L1(1.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_missing_parameters_are_an_error(name):
    tx = OPTIMIZERS[name](0.1, L1)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"needs the parameters"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), True], ids=repr)
def test_a_decay_that_is_none_is_an_error(decay):
    makers: dict[str, Any] = {
        "proximal_sgd(momentum": lambda: jr.proximal_sgd(0.1, L1, momentum=decay),
        "proximal_adam(b1": lambda: jr.proximal_adam(0.1, L1, b1=decay),
        "proximal_adam(b2": lambda: jr.proximal_adam(0.1, L1, b2=decay),
    }
    for argument, make in makers.items():
        message = f"`jaxreg.{argument}=...)` must be a scalar from 0 on, below 1; got"
        with pytest.raises(ValueError, match=re.escape(message)):
            make()
    with pytest.raises(ValueError, match=re.escape("`jaxreg.proximal_adam(eps=...)` must be a f")):
        jr.proximal_adam(0.1, L1, eps=-1e-8)


def test_settings_of_fista_are_checked():
    with pytest.raises(ValueError, match="must be one of 'gradient', 'value', None; got 1"):
        jr.fista(0.1, L1, restart=1)  # type: ignore[arg-type]
    tx = jr.fista(0.1, L1, restart="value")
    with pytest.raises(ValueError, match=r"needs the objective: call.*value=loss \+ penalty"):
        tx.update({"w": W}, tx.init({"w": W}), {"w": W})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exempt_leaves_follow_the_optimizer_alone(name):
    params = {"w": jnp.asarray(W, jnp.float32), "bias": jnp.asarray(W, jnp.float32)}

    def both(params):
        return loss({"w": params["w"] + params["bias"]})

    free, _ = train(OPTIMIZERS[name](0.01, jr.kernel({"w": jr.L1(0.0)})), 3, params, both)
    held, _ = train(OPTIMIZERS[name](0.01, jr.kernel({"w": jr.L1(1e6)})), 3, params, both)
    assert (held["w"] == 0).all()
    np.testing.assert_allclose(free["bias"], free["w"], rtol=1e-5)
    assert (held["bias"] != params["bias"]).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision_parameters_keep_their_dtype_and_zeros(name):
    params = {"w": jnp.asarray(W, jnp.bfloat16)}
    kernel = jr.kernel({"w": jr.L1(1e3)})
    path, _ = train(OPTIMIZERS[name](0.01, kernel), 3, params)
    assert path["w"].dtype == jnp.bfloat16
    assert (path["w"] == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complex_parameters_shrink_by_their_modulus(name):
    """A real problem turned by a phase for each entry has its solution turned by the same."""
    phase = np.exp(1j * np.arange(4)).astype(np.complex64)

    def turned(params):
        return loss({"w": jnp.real(params["w"] / phase)}) + jnp.sum(
            jnp.imag(params["w"] / phase) ** 2
        )

    tx = OPTIMIZERS[name](0.02, jr.kernel({"w": jr.L1(2.0)}))
    conjugate = optax.stateless(lambda updates, _: jax.tree.map(jnp.conj, updates))
    real, _ = train(tx, 30, {"w": jnp.asarray(W, jnp.float32)})
    path, _ = train(optax.chain(conjugate, tx), 30, {"w": jnp.asarray(W * phase)}, turned)
    assert path["w"].dtype == np.complex64
    assert (real["w"][-1] == 0).any()
    np.testing.assert_allclose(path["w"], real["w"] * phase, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_follows_a_schedule(name):
    params = {"w": jnp.asarray(W, jnp.float32)}
    schedule = optax.piecewise_constant_schedule(0.05, {2: 0.0})
    path, _ = train(OPTIMIZERS[name](schedule, L1), 4, params)
    constant, _ = train(OPTIMIZERS[name](0.05, L1), 2, params)
    np.testing.assert_allclose(path["w"][:2], constant["w"], rtol=1e-5)
    if name != "fista":  # which goes on by its inertia
        np.testing.assert_array_equal(path["w"][3], path["w"][1])


DIABETES, TARGET = load_diabetes(return_X_y=True)
TARGET = (TARGET - TARGET.mean()) / TARGET.std()
TARGETS = np.stack([TARGET, TARGET**2, np.sin(TARGET)], axis=1)
CANCER, MALIGNANT = load_breast_cancer(return_X_y=True)
CANCER, SIGN = StandardScaler().fit_transform(CANCER)[:, 10:25], 2 * MALIGNANT - 1
DIGITS, DIGIT = (array[:150] for array in load_digits(return_X_y=True))
DIGITS = DIGITS / 16


def squares(target, w):
    return jnp.sum((DIABETES @ w - target) ** 2) / (2 * len(target))


def logistic(w):
    return jnp.sum(jax.nn.softplus(-SIGN * (CANCER @ w)))


def multinomial(w):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(DIGITS @ w, DIGIT))


def curvature(data, most):
    """Return a bound of the Hessian of a sum over examples with second derivatives up to `most`."""
    return most * np.linalg.eigvalsh(data.T @ data).max()


EXACT: Any = {"fit_intercept": False, "tol": 1e-13, "max_iter": 100_000}
MEAN = curvature(DIABETES, 1 / len(TARGET))
C = 0.1
# Each: loss, its Lipschitz constant, penalty, scikit-learn's estimator and its target.
PROBLEMS: dict[str, Any] = {
    "Lasso": (functools.partial(squares, TARGET), MEAN, jr.L1(0.01), Lasso(0.01, **EXACT)),
    "ElasticNet": (
        functools.partial(squares, TARGET),
        MEAN,
        jr.L1L2(0.01 * 0.7, 0.01 * 0.3 / 2),
        ElasticNet(0.01, l1_ratio=0.7, **EXACT),
    ),
    "Ridge": (
        functools.partial(squares, TARGET),
        MEAN,
        jr.L2(4.0 / (2 * len(TARGET))),
        Ridge(4.0, **EXACT),
    ),
    "MultiTaskLasso": (
        functools.partial(squares, TARGETS),
        MEAN,
        jr.GroupLasso(0.01, axis=-1, weighted=False),
        MultiTaskLasso(0.01, **EXACT),
    ),
    "L1-logistic": (
        logistic,
        curvature(CANCER, 1 / 4),
        jr.L1(1 / C),
        LogisticRegression(C=C, l1_ratio=1, solver="saga", **EXACT),
    ),
    "L2-logistic": (
        logistic,
        curvature(CANCER, 1 / 4),
        jr.L2(1 / (2 * C)),
        LogisticRegression(C=C, solver="newton-cg", **EXACT),
    ),
    "L1-multinomial": (
        multinomial,
        curvature(DIGITS, 1 / 2),
        jr.L1(1 / C),
        LogisticRegression(C=C, l1_ratio=1, solver="saga", **EXACT),
    ),
    "L2-multinomial": (
        multinomial,
        curvature(DIGITS, 1 / 2),
        jr.L2(1 / (2 * C)),
        LogisticRegression(C=C, solver="newton-cg", **EXACT),
    ),
}
DATA: dict[str, Any] = {
    "MultiTaskLasso": (DIABETES, TARGETS),
    "L1-logistic": (CANCER, MALIGNANT),
    "L2-logistic": (CANCER, MALIGNANT),
    "L1-multinomial": (DIGITS, DIGIT),
    "L2-multinomial": (DIGITS, DIGIT),
}


def solve(objective, lipschitz, penalty, shape, steps=4000):
    """Return what `fista` ends at, and how far that is from a fixed point of the prox, scaled."""
    tx = jr.fista(1 / lipschitz, jr.kernel({"w": penalty}))

    def step(_, carry):
        w, state = carry
        updates, state = tx.update({"w": jax.grad(objective)(w)}, state, {"w": w})
        return w + updates["w"], state

    @jax.jit
    def run(w):
        state = jax.lax.fori_loop(0, steps, step, (w, tx.init({"w": w})))[1]
        w = jr.fista_params(state)["w"]
        back = penalty.prox(w - jax.grad(objective)(w) / lipschitz, 1 / lipschitz)
        return w, jnp.max(jnp.abs(w - back)) * lipschitz

    return jax.tree.map(np.asarray, run(jnp.zeros(shape)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_solution_is_that_of_scikit_learn(name):
    objective, lipschitz, penalty, estimator = PROBLEMS[name]
    theirs = estimator.fit(*DATA.get(name, (DIABETES, TARGET))).coef_.T.squeeze()
    with jax.enable_x64():
        ours, residual = solve(objective, lipschitz, penalty, theirs.shape)
        reached, best = (float(objective(w) + penalty(w)) for w in (ours, theirs))
        assert residual < 1e-7
    assert abs(reached - best) <= 1e-8 * best
    np.testing.assert_array_equal(ours == 0, theirs == 0)


def test_projected_solution_is_that_of_non_negative_least_squares():
    theirs, _ = scipy.optimize.nnls(DIABETES, TARGET)
    with jax.enable_x64():
        objective = functools.partial(squares, TARGET)
        ours, residual = solve(objective, MEAN, jr.NonNegative(), theirs.shape)
        reached, best = float(objective(ours)), float(objective(theirs))
    assert residual < 1e-7
    assert abs(reached - best) <= 1e-8 * best
    assert 0 < np.sum(theirs == 0) < theirs.size
    np.testing.assert_array_equal(ours == 0, theirs == 0)


def test_weighted_group_lasso_satisfies_its_optimality_conditions():
    """Of Yuan and Lin: the slope of a zero group is within its threshold, else it balances."""
    strength, groups = 0.004, [slice(0, 4), slice(4, 6), slice(6, 10)]

    kernel = jr.kernel({"*": jr.GroupLasso(strength, axis=0)})
    tx = jr.fista(1 / MEAN, kernel)

    def objective(params):
        return squares(TARGET, jnp.concatenate([params[str(i)] for i in range(3)]))

    with jax.enable_x64():
        params = {str(i): jnp.zeros(g.stop - g.start) for i, g in enumerate(groups)}
        _, state = train(tx, 3000, params, objective)
        solution = jr.fista_params(state)
        slopes = jax.grad(objective)(solution)
    zeros = 0
    for i, group in enumerate(groups):
        w, g = np.asarray(solution[str(i)]), np.asarray(slopes[str(i)])
        threshold = strength * np.sqrt(group.stop - group.start)
        if (w == 0).all():
            zeros += 1
            assert np.linalg.norm(g) <= threshold
        else:
            np.testing.assert_allclose(g, -threshold * w / np.linalg.norm(w), atol=1e-9)
    assert 0 < zeros < 3


@pytest.mark.parametrize(
    "constraint", [jr.NonNegative(), jr.Box(-0.1, 0.1), jr.LinfBall(0.1), jr.MaxNorm(0.1)], ids=str
)
def test_proximal_adam_keeps_constraints_of_entries_and_of_vectors(constraint):
    tx = jr.proximal_adam(0.05, jr.kernel({"w": constraint}))
    path, _ = train(tx, 20, {"w": jnp.asarray(W, jnp.float32)})
    w = path["w"][-1]
    np.testing.assert_allclose(constraint.project(w), w, atol=1e-6)
    free, _ = train(jr.proximal_adam(0.05, jr.kernel({"w": None})), 20, {"w": jnp.float32(W)})
    assert np.abs(free["w"][-1] - w).max() > 1e-2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_may_be_python_numbers(name):
    tx = OPTIMIZERS[name](0.1, jr.kernel({"w": jr.L1(0.5)}))
    params = {"w": 1.0, "b": 2.0}
    updates, _ = tx.update({"w": 1.0, "b": 1.0}, tx.init(params), params)
    arrays = jax.tree.map(jnp.asarray, params)
    expected, _ = tx.update(jax.tree.map(jnp.ones_like, arrays), tx.init(arrays), arrays)
    np.testing.assert_allclose(updates["w"], expected["w"])
    np.testing.assert_allclose(updates["b"], expected["b"])


@pytest.mark.parametrize("step", [-0.1, float("nan"), jnp.ones(2), "0.1"])
def test_a_step_that_cannot_be_taken_is_an_error(step):
    reg = jr.kernel(jr.L1(1.0))
    makers: dict[str, Any] = {
        "apply_prox(step_size": lambda: jr.apply_prox(reg, step),
        "proximal_sgd(learning_rate": lambda: jr.proximal_sgd(step, reg),
        "proximal_adam(learning_rate": lambda: jr.proximal_adam(step, reg),
        "fista(learning_rate": lambda: jr.fista(step, reg),
    }
    for argument, make in makers.items():
        with pytest.raises(ValueError, match=re.escape(f"`jaxreg.{argument}=...)` must be a")):
            make()


def test_fista_follows_a_schedule():
    tx = jr.fista(
        lambda count: jnp.where(count < 2, 0.1, 0.02), jr.kernel({"w": jr.L1(0.0)}), restart=None
    )
    params = {"w": jnp.array([1.0])}
    state, moves = tx.init(params), []
    for _ in range(4):
        # Of a slope of 1 a step from y is as long as the learning rate.
        before = params["w"]
        updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        moves.append(float((before - jr.fista_params(state)["w"])[0]))
    np.testing.assert_allclose(moves, [0.1, 0.1, 0.02, 0.02], rtol=1e-4)
    assert state.count == 4


def test_value_of_half_precision_keeps_the_state_of_fista_as_it_is():
    tx = jr.fista(0.1, jr.kernel({"w": jr.L1(1.0)}), restart="value")
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    _, after = tx.update(params, state, params, value=jnp.bfloat16(1.0))
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


class _Other(NamedTuple):
    iterate: Any


def test_the_iterate_of_another_transformation_is_not_that_of_fista():
    other = optax.GradientTransformation(lambda p: _Other(0 * p), lambda u, s, p=None: (u, s))
    state = optax.chain(other, jr.fista(0.1, jr.kernel({".": jr.L1(1.0)}))).init(jnp.ones(2))
    np.testing.assert_array_equal(jr.fista_params(state), [1, 1])


def test_complex_fista_restarts_where_the_real_one_does():
    kernel = jr.kernel({".": jr.L1(0.0)})
    curvature = jnp.array([1.0, 0.01])
    phase = jnp.exp(1j * jnp.array([0.0, jnp.pi / 2])).astype(jnp.complex64)

    def path(start, steps=60):
        tx = jr.fista(1.0, kernel)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(curvature * w, state, w)
            return (optax.apply_updates(w, updates), state), state.inertia

        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]

    inertia = path(jnp.ones(2))
    assert (jnp.diff(inertia) < 0).any()
    np.testing.assert_allclose(path(phase * jnp.ones(2)), inertia, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        (lambda: jr.MaxNorm(0.9), (0,)),
        (lambda: jr.MinMaxNorm(0.5, 0.9, batch_axes=0), (1,)),
        (lambda: jr.UnitNorm(axis=1), (1,)),
        (lambda: jr.L2To(0.3, reference=0.5), ()),
        (lambda: jr.Box(-0.5, 0.9), ()),
        (lambda: jr.SparseGroupLasso(0.3, alpha=0.5), (0,)),
    ],
    ids=["MaxNorm", "MinMaxNorm", "UnitNorm", "L2To", "Box", "SparseGroupLasso"],
)
def test_proximal_adam_has_a_step_for_each_group_of_a_matrix(build, groups):
    penalty = build()
    rng = np.random.default_rng(0)
    shape = (2, 3, 4)[-3 if getattr(penalty, "batch_axes", ()) == 0 else -2 :]
    w, g = rng.normal(size=shape), rng.normal(size=shape) * rng.uniform(0.1, 9, shape)
    tx = jr.proximal_adam(0.1, jr.kernel({".": penalty}), eps=1e-3)
    with jax.enable_x64():
        found = w + tx.update(jnp.asarray(g), tx.init(jnp.asarray(w)), jnp.asarray(w))[0]
        # After one update the corrected moments are the gradient and its square.
        step = 0.1 / (np.sqrt(np.mean(g**2, axis=groups, keepdims=True)) + 1e-3)
        np.testing.assert_allclose(found, penalty.prox(w - step * g, step), rtol=1e-6)


TWICE = 2.1935  # θ of Beck and Teboulle after two updates


def test_fista_does_not_restart_where_it_stands_still():
    params = {"kernel": jnp.zeros(2)}
    tx = jr.fista(0.1, jr.kernel(jr.L1(1.0)))
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(state.inertia, TWICE, rtol=1e-4)


def test_fista_does_not_restart_at_an_equal_value():
    params = {"kernel": jnp.zeros(2)}
    tx = jr.fista(0.1, jr.kernel(jr.L1(1.0)), restart="value")
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params, value=1.0)
    np.testing.assert_allclose(state.inertia, TWICE, rtol=1e-4)


def test_the_state_of_fista_has_the_value_it_was_given():
    params = {"kernel": jnp.zeros(2)}
    tx = jr.fista(0.1, jr.kernel(jr.L1(1.0)))
    _, state = tx.update(params, tx.init(params), params, value=3.0)
    assert state.value == 3
    _, state = tx.update(params, state, params)
    assert state.value == 3


def last_weights(tx, start, target):
    """Return the weight in the last 15,000 of 20,000 updates on ½(w − target)²."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(w - target, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    w = jnp.float32(start)
    return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=20_000)[1][-15_000:])()


@pytest.mark.parametrize(
    ("momentum", "rate", "settles"), [(None, 0.5, True), (0.9, 0.035, True), (0.9, 0.045, False)]
)
def test_momentum_settles_with_a_concave_penalty_only_at_small_rates(momentum, rate, settles):
    """(1 − μ)²·κ/s is 0.04."""
    reg = jr.kernel({"**": jr.MCP(0.5, knot=2.0)})
    weights = last_weights(jr.proximal_sgd(rate, reg, momentum=momentum), 0.7, 1.0)
    assert bool(jnp.all(jnp.abs(weights - 2 / 3) < 1e-4)) == settles


@pytest.mark.parametrize(("eps", "stays"), [(1e-8, False), (1e-2, True)])
@pytest.mark.parametrize(
    "penalty", [jr.L0(0.1), jr.MCP(0.5, knot=1.5), jr.CappedL1(0.5, cap=0.8)], ids=str
)
def test_proximal_adam_keeps_a_weight_without_gradient_only_for_a_large_epsilon(
    penalty, eps, stays
):
    weights = last_weights(jr.proximal_adam(0.01, jr.kernel({"**": penalty}), eps=eps), 3.1, 3.0)
    assert bool(jnp.all(jnp.abs(weights - 3) < 1e-3)) == stays
    assert bool(jnp.abs(penalty.prox(jnp.float32(3), 0.01 / eps) - 3) < 1e-3) == stays
