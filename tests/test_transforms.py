"""optax transformations that regularize."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import sklearn.datasets
import sklearn.linear_model
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxreg as jr

RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {
        "kernel": RNG.normal(size=(3, 2)).astype(np.float32),
        "bias": RNG.normal(size=2).astype(np.float32),
    }
}
X = RNG.normal(size=(5, 3)).astype(np.float32)
Y = RNG.normal(size=(5, 2)).astype(np.float32)
KERNEL = jr.kernel({"**/kernel": jr.L2(0.05) + jr.L1(0.03), "**/bias": None})
TRANSFORMS = {
    "add_penalty_gradient": jr.add_penalty_gradient,
    "apply_prox": lambda reg: jr.apply_prox(reg, 0.1),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def loss(params):
    return jnp.mean((X @ params["dense"]["kernel"] + params["dense"]["bias"] - Y) ** 2)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def train(tx, steps, objective=loss, params=PARAMS):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def one_update(tx, params, updates=None):
    updates, _ = tx.update(zeros(params) if updates is None else updates, tx.init(params), params)
    return updates


def assert_close(tree, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), tree, expected
    )


def test_gradient_before_sgd_is_the_penalty_in_the_loss():
    in_loss = train(optax.sgd(0.1), 20, lambda p: loss(p) + KERNEL(p))
    in_chain = train(optax.chain(jr.add_penalty_gradient(KERNEL), optax.sgd(0.1)), 20)
    assert_close(in_chain, in_loss)
    plain = train(optax.sgd(0.1), 20)
    assert np.abs(plain["dense"]["kernel"] - in_chain["dense"]["kernel"]).max() > 1e-2


def test_gradient_after_adam_is_the_decay_of_adamw():
    decay, rate = 0.3, 0.05
    tx = optax.chain(
        optax.scale_by_adam(),
        jr.add_penalty_gradient(jr.kernel({"**": jr.L2(decay / 2)})),
        optax.scale_by_learning_rate(rate),
    )
    assert_close(train(tx, 10), train(optax.adamw(rate, weight_decay=decay), 10))


def test_gradient_leaves_exempt_updates_alone():
    updates = jax.tree.map(lambda p: p / 3, PARAMS)
    out = one_update(jr.add_penalty_gradient(KERNEL), PARAMS, updates)
    assert out["dense"]["bias"] is updates["dense"]["bias"]
    expected = PARAMS["dense"]["kernel"] / 3 + KERNEL.gradient(PARAMS)["dense"]["kernel"]
    np.testing.assert_allclose(out["dense"]["kernel"], expected, rtol=1e-6)


def test_update_never_computes_the_value():
    tx = jr.add_penalty_gradient(KERNEL)
    update = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).compile()
    assert " reduce(" not in str(update.as_text())
    assert " reduce(" in str(jax.jit(KERNEL).lower(PARAMS).compile().as_text())


def test_prox_after_sgd_is_ista():
    strength, rate = 0.2, 0.1
    tx = optax.chain(
        optax.sgd(rate), jr.apply_prox(jr.kernel({"**/kernel": jr.L1(strength)}), rate)
    )
    trained = train(tx, 15)

    weights = PARAMS["dense"]["kernel"].astype(np.float64)
    bias = PARAMS["dense"]["bias"].astype(np.float64)
    for _ in range(15):
        residual = 2 * (X @ weights + bias - Y) / Y.size
        weights, bias = weights - rate * X.T @ residual, bias - rate * residual.sum(0)
        weights = np.sign(weights) * np.maximum(np.abs(weights) - rate * strength, 0)
    assert 0 < np.sum(weights == 0) < weights.size
    np.testing.assert_allclose(trained["dense"]["kernel"], weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(trained["dense"]["kernel"] == 0, weights == 0)
    np.testing.assert_allclose(trained["dense"]["bias"], bias, rtol=1e-4)


@pytest.mark.parametrize(
    ("params_dtype", "updates_dtype"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
    ids=lambda dtype: dtype.__name__,
)
@pytest.mark.parametrize(
    "penalty", [jr.L1(0.5), jr.GroupLasso(0.5), jr.L1L2(0.5, 0.1)], ids=lambda p: type(p).__name__
)
def test_prox_gives_exact_zeros(penalty, params_dtype, updates_dtype):
    values = np.array([[0.3, 5.1], [-0.1, 0.7], [0.2, 0.3]])
    params = {"kernel": jnp.asarray(values, params_dtype)}
    updates = {"kernel": jnp.full((3, 2), 0.013, updates_dtype)}
    tx = jr.apply_prox(jr.kernel(penalty), 1.0)
    updated = optax.apply_updates(params, one_update(tx, params, updates))["kernel"]
    np.testing.assert_array_equal(updated[:, 0], 0.0)
    assert updated[0, 1] != 0


def test_prox_leaves_exempt_leaves_bit_identical():
    rules = jr.kernel({"**/kernel": jr.L1(0.2)})
    rate = 0.1
    updates = jax.tree.map(lambda g: -rate * g, jax.grad(loss)(PARAMS))
    out = one_update(jr.apply_prox(rules, rate), PARAMS, updates)
    assert out["dense"]["bias"] is updates["dense"]["bias"]
    with_prox, without = (optax.apply_updates(PARAMS, u) for u in (out, updates))
    np.testing.assert_array_equal(with_prox["dense"]["bias"], without["dense"]["bias"])
    assert not np.array_equal(with_prox["dense"]["kernel"], without["dense"]["kernel"])


def test_prox_without_a_closed_form_is_an_error():
    reg = jr.kernel({"**/kernel": jr.KLSparsity(1.0, target=0.1)})
    with pytest.raises(NotImplementedError, match=r"`jaxreg\.KLSparsity` has no closed-form"):
        one_update(jr.apply_prox(reg, 0.1), PARAMS)


@every_transform
def test_nan_parameters_stay_nan(name):
    params = {"kernel": jnp.array([jnp.nan, 0.01])}
    tx = TRANSFORMS[name](jr.kernel(jr.L1(1.0)))
    updated = optax.apply_updates(params, one_update(tx, params))["kernel"]
    np.testing.assert_array_equal(jnp.isnan(updated), [True, False])


@every_transform
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_kept(name, dtype):
    params = {"kernel": jnp.ones(2, dtype), "bias": jnp.ones(2, dtype)}
    updates = one_update(TRANSFORMS[name](jr.kernel(jr.L1(np.float32(1.0)))), params)
    assert {key: u.dtype for key, u in updates.items()} == {"kernel": dtype, "bias": dtype}


def test_gradient_keeps_the_dtype_of_the_updates():
    params, updates = {"kernel": jnp.ones(2)}, {"kernel": jnp.ones(2, jnp.bfloat16)}
    out = one_update(jr.add_penalty_gradient(jr.kernel(jr.L1(1.0))), params, updates)
    assert out["kernel"].dtype == jnp.bfloat16


@every_transform
def test_missing_parameters_are_an_error(name):
    tx = TRANSFORMS[name](KERNEL)
    message = f"`jaxreg.{name}` needs the parameters: call `tx.update(updates, state, params)`"
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(PARAMS, tx.init(PARAMS))


@every_transform
@pytest.mark.parametrize(
    "reg", [jr.L1(1.0), {"**": jr.L1(1.0)}, 1e-4], ids=lambda r: type(r).__name__
)
def test_what_is_no_kernel_is_an_error(name, reg):
    message = f"`jaxreg.{name}` takes a `jaxreg.kernel(...)`; got {reg!r}. For a bare penalty:"
    with pytest.raises(TypeError, match=re.escape(message)):
        TRANSFORMS[name](reg)


@every_transform
def test_misspelt_rule_is_an_error_in_update(name):
    tx = TRANSFORMS[name](jr.kernel({"dense/kernl": jr.L1(1.0)}))
    with pytest.raises(ValueError, match=r'"dense/kernl" wins none.*Nearest: "dense/kernel"'):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_scale_and_step_size_follow_a_schedule():
    params = {"kernel": jnp.ones(1)}
    schedule = lambda count: 0.1 * (count + 1)  # noqa: E731
    for tx, sign in [
        (jr.add_penalty_gradient(jr.kernel(jr.L1(1.0)), schedule), 1),
        (jr.apply_prox(jr.kernel(jr.L1(1.0)), schedule), -1),
    ]:
        update, state, seen = jax.jit(tx.update), tx.init(params), []
        for _ in range(3):
            updates, state = update(zeros(params), state, params)
            seen.append(float(updates["kernel"][0]))
        np.testing.assert_allclose(seen, sign * np.array([0.1, 0.2, 0.3]), rtol=1e-6)
        assert state.count == 3
        assert state.count.dtype == jnp.int32


def test_constant_scale():
    tx = jr.add_penalty_gradient(jr.kernel(jr.L2(0.5)), 3.0)
    np.testing.assert_allclose(one_update(tx, {"kernel": jnp.ones(1)})["kernel"], [3.0])


@every_transform
def test_only_a_schedule_needs_a_count(name):
    assert jax.tree.leaves(TRANSFORMS[name](KERNEL).init(PARAMS)) == []


@every_transform
def test_donated_buffers(name):
    tx = optax.chain(optax.scale_by_adam(), TRANSFORMS[name](KERNEL))
    params = jax.tree.map(jnp.array, PARAMS)
    updates, state = jax.tree.map(jnp.ones_like, params), tx.init(params)

    def step(updates, state, params):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = jax.jit(step)(updates, state, params)
    donated, _ = jax.jit(step, donate_argnums=(1, 2))(updates, state, params)
    assert params["dense"]["kernel"].is_deleted()
    assert_close(donated, expected, rtol=1e-6)


@every_transform
def test_masked(name):
    mask = {"dense": {"kernel": True, "bias": False}}
    tx = optax.masked(TRANSFORMS[name](jr.kernel({"**": jr.L1(0.5)})), mask)
    updates = one_update(tx, PARAMS)
    unmasked = one_update(TRANSFORMS[name](jr.kernel({"**": jr.L1(0.5)})), PARAMS)
    np.testing.assert_array_equal(updates["dense"]["bias"], [0.0, 0.0])
    np.testing.assert_array_equal(updates["dense"]["kernel"], unmasked["dense"]["kernel"])
    assert np.all(np.asarray(unmasked["dense"]["bias"]) != 0)


def test_multi_steps_adds_the_penalty_once_to_the_mean():
    inner = optax.chain(jr.add_penalty_gradient(jr.kernel(jr.L2(0.5))), optax.sgd(1.0))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params = {"kernel": jnp.array([4.0])}
    state = tx.init(params)
    first, state = tx.update({"kernel": jnp.array([1.0])}, state, params)
    second, state = tx.update({"kernel": jnp.array([3.0])}, state, params)
    np.testing.assert_array_equal(first["kernel"], [0.0])
    np.testing.assert_allclose(second["kernel"], [-(2.0 + 4.0)])


def test_multi_steps_applies_the_prox_when_it_steps():
    inner = optax.chain(optax.sgd(1.0), jr.apply_prox(jr.kernel(jr.L1(1.0)), 1.0))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params = {"kernel": jnp.array([2.5, 5.0])}
    state = tx.init(params)
    for gradient in ([1.0, 1.0], [3.0, 3.0]):
        updates, state = tx.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [0.0, 2.0])


def test_injected_strength():
    @optax.inject_hyperparams
    def regularize(strength):
        return jr.add_penalty_gradient(jr.kernel(jr.L1(strength)))

    params = {"kernel": jnp.ones(1)}
    tx = regularize(strength=0.1)
    update, state = jax.jit(tx.update), tx.init(params)
    updates, state = update(zeros(params), state, params)
    np.testing.assert_allclose(updates["kernel"], [0.1], rtol=1e-6)
    state.hyperparams["strength"] = jnp.float32(0.7)
    updates, _ = update(zeros(params), state, params)
    np.testing.assert_allclose(updates["kernel"], [0.7], rtol=1e-6)


@pytest.mark.parametrize(
    ("transform", "argument", "sign"),
    [(jr.add_penalty_gradient, "scale", 1), (jr.apply_prox, "step_size", -1)],
    ids=["add_penalty_gradient", "apply_prox"],
)
def test_injected_scalar(transform, argument, sign):
    inject = optax.inject_hyperparams(transform, static_args="reg")
    tx = inject(jr.kernel(jr.L1(1.0)), **{argument: lambda count: 0.1 * (count + 1)})
    params = {"kernel": jnp.ones(1)}
    update, state, seen = jax.jit(tx.update), tx.init(params), []
    for _ in range(2):
        updates, state = update(zeros(params), state, params)
        seen.append(float(updates["kernel"][0]))
    np.testing.assert_allclose(seen, sign * np.array([0.1, 0.2]), rtol=1e-6)


def test_a_kernel_that_is_injected_as_a_schedule_says_what_to_write():
    tx = optax.inject_hyperparams(jr.apply_prox)(reg=jr.kernel(jr.L1(1.0)), step_size=0.1)
    with pytest.raises(TypeError, match=r"got .*0.*inject_hyperparams\(..., static_args=\"reg\"\)"):
        tx.init({"kernel": jnp.ones(1)})


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), 1j, True, None, np.ones(2)], ids=lambda s: repr(s)
)
def test_a_scale_that_is_no_finite_scalar_is_an_error(scale):
    message = r"`jaxreg\.add_penalty_gradient\(scale=\.\.\.\)` must be a finite scalar, or a sche"
    with pytest.raises(ValueError, match=message):
        jr.add_penalty_gradient(KERNEL, scale)


def test_map_params_of_optax_goes_past_the_record():
    tx = optax.chain(jr.record_penalty(KERNEL), optax.trace(0.9))
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda m: m + 2, state)
    assert doubled[0].total == state[0].total
    np.testing.assert_array_equal(doubled[1].trace["dense"]["kernel"], 2)
    record = jr.record_penalty(jr.kernel({"none": jr.L2(1.0)}, strict=False))
    _, state = record.update(PARAMS, record.init(PARAMS), PARAMS)
    assert state.values == 0


@every_transform
def test_eight_devices(name):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    weights = RNG.normal(size=(8, 4)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tx = TRANSFORMS[name](jr.kernel(jr.GroupLasso(0.3)))
    params = {"kernel": jax.device_put(weights, sharding)}
    update = jax.jit(tx.update)
    sharded, _ = update(zeros(params), tx.init(params), params)
    assert sharded["kernel"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(
        sharded["kernel"], one_update(tx, {"kernel": weights})["kernel"], rtol=1e-5, atol=1e-7
    )


def test_train_state():
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = optax.chain(optax.sgd(0.1), jr.apply_prox(jr.kernel(jr.L1(100.0)), 0.1))
    state = TrainState.create(apply_fn=nn.Dense(2).apply, params=params, tx=tx)
    state = state.apply_gradients(grads=zeros(params))
    np.testing.assert_array_equal(state.params["dense"]["kernel"], 0.0)
    np.testing.assert_array_equal(state.params["dense"]["bias"], PARAMS["dense"]["bias"])


def test_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), bias_init=nnx.initializers.ones)
    before = np.asarray(model.kernel[...])
    tx = optax.chain(
        jr.add_penalty_gradient(jr.kernel({"kernel": jr.L2(0.5), "bias": None})), optax.sgd(0.1)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, zeros(nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(model.kernel[...], 0.9 * before, rtol=1e-6)
    np.testing.assert_array_equal(nnx.state(model)["bias"][...], [1.0, 1.0])


CONSTRAINTS = jr.kernel({"**/kernel": jr.MaxNorm(0.5), "**/bias": None})


def column_norms(params):
    return np.linalg.norm(params["dense"]["kernel"], axis=0)


def test_project_after_sgd_is_projected_gradient():
    rate, limit = 0.1, 0.5
    trained = train(optax.chain(optax.sgd(rate), jr.project(CONSTRAINTS)), 15)

    weights = PARAMS["dense"]["kernel"].astype(np.float64)
    bias = PARAMS["dense"]["bias"].astype(np.float64)
    for _ in range(15):
        residual = 2 * (X @ weights + bias - Y) / Y.size
        weights, bias = weights - rate * X.T @ residual, bias - rate * residual.sum(0)
        weights *= np.minimum(1, limit / np.linalg.norm(weights, axis=0))
    np.testing.assert_allclose(trained["dense"]["kernel"], weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trained["dense"]["bias"], bias, rtol=1e-4)
    assert column_norms(trained).max() <= limit * (1 + 1e-6)
    assert column_norms(train(optax.sgd(rate), 15)).max() > limit * 1.1


def test_project_after_adam_stays_in_the_set():
    tx = optax.chain(optax.adam(0.5), jr.project(CONSTRAINTS))
    for steps in (1, 3):
        assert column_norms(train(tx, steps)).max() <= 0.5 * (1 + 1e-6)
    assert column_norms(train(optax.adam(0.5), 1)).max() > 0.6


def test_project_leaves_exempt_updates_alone():
    updates = jax.tree.map(lambda p: p / 3, PARAMS)
    out = one_update(jr.project(CONSTRAINTS), PARAMS, updates)
    assert out["dense"]["bias"] is updates["dense"]["bias"]
    assert np.abs(out["dense"]["kernel"] - updates["dense"]["kernel"]).max() > 0.1


@pytest.mark.parametrize(
    ("params_dtype", "updates_dtype"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
    ids=lambda dtype: dtype.__name__,
)
def test_project_keeps_the_dtype_of_the_parameters_and_gives_exact_zeros(
    params_dtype, updates_dtype
):
    params = {"kernel": jnp.asarray([0.3, -5.1, 0.7, 1e-3], params_dtype)}
    updates = {"kernel": jnp.full(4, -0.4, updates_dtype)}
    out = one_update(jr.project(jr.kernel(jr.NonNegative())), params, updates)
    updated = optax.apply_updates(params, out)["kernel"]
    assert updated.dtype == params_dtype
    np.testing.assert_array_equal(updated > 0, [False, False, True, False])
    np.testing.assert_array_equal(updated[jnp.array([0, 1, 3])], 0.0)


def test_project_keeps_nan_parameters_nan():
    params = {"kernel": jnp.array([jnp.nan, -1.0])}
    for constraint in (jr.NonNegative(), jr.MaxNorm(0.5), jr.Box(0.0, 1.0)):
        out = one_update(jr.project(jr.kernel(constraint)), params)
        updated = optax.apply_updates(params, out)["kernel"]
        np.testing.assert_array_equal(jnp.isnan(updated), [True, False])


def test_project_needs_parameters():
    tx = jr.project(CONSTRAINTS)
    message = "`jaxreg.project` needs the parameters: call `tx.update(updates, state, params)`"
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(PARAMS, tx.init(PARAMS))


def test_project_takes_only_a_kernel_of_constraints():
    message = "`jaxreg.project` takes a `jaxreg.kernel(...)`; got MaxNorm("
    with pytest.raises(TypeError, match=re.escape(message)):
        jr.project(jr.MaxNorm(1.0))  # type: ignore[arg-type]
    message = "`jaxreg.project` takes a kernel of constraints; got L1(strength=1.0). For penalties"
    for rules in ({"**": jr.L1(1.0)}, {"a": jr.NonNegative(), "b": None, "c": jr.L1(1.0)}):
        with pytest.raises(TypeError, match=re.escape(message)):
            jr.project(jr.kernel(rules))


def test_misspelt_rule_of_project_is_an_error_in_update():
    tx = jr.project(jr.kernel({"dense/kernl": jr.NonNegative()}))
    with pytest.raises(ValueError, match=r'"dense/kernl" wins none.*Nearest: "dense/kernel"'):
        one_update(tx, PARAMS)


def test_constraint_has_no_gradient_to_add():
    tx = jr.add_penalty_gradient(CONSTRAINTS)
    with pytest.raises(TypeError, match=r"`jaxreg\.MaxNorm` is a constraint.*jaxreg\.project\("):
        one_update(tx, PARAMS)


def test_apply_prox_projects_whatever_the_step():
    expected = one_update(jr.project(CONSTRAINTS), PARAMS)
    for step_size in (0.0, 0.1, 100.0):
        chex.assert_trees_all_equal(
            one_update(jr.apply_prox(CONSTRAINTS, step_size), PARAMS), expected
        )


def test_project_with_donated_buffers():
    tx = optax.chain(optax.scale_by_adam(), jr.project(CONSTRAINTS))
    params = jax.tree.map(jnp.array, PARAMS)
    updates, state = jax.tree.map(jnp.ones_like, params), tx.init(params)

    def step(updates, state, params):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = jax.jit(step)(updates, state, params)
    donated, _ = jax.jit(step, donate_argnums=(1, 2))(updates, state, params)
    assert params["dense"]["kernel"].is_deleted()
    assert_close(donated, expected, rtol=1e-6)


def test_masked_project():
    mask = {"dense": {"kernel": True, "bias": False}}
    tx = optax.masked(jr.project(jr.kernel({"**": jr.LinfBall(0.01)})), mask)
    updated = optax.apply_updates(PARAMS, one_update(tx, PARAMS))
    np.testing.assert_array_equal(updated["dense"]["bias"], PARAMS["dense"]["bias"])
    np.testing.assert_allclose(np.abs(updated["dense"]["kernel"]), 0.01, rtol=1e-4)


def test_multi_steps_projects_when_it_steps():
    inner = optax.chain(optax.sgd(1.0), jr.project(jr.kernel(jr.NonNegative())))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    params = {"kernel": jnp.array([1.5, 5.0])}
    state = tx.init(params)
    for gradient in ([4.0, 1.0], [0.0, 3.0]):
        updates, state = tx.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [0.0, 3.0])


def test_scheduled_constraint_is_rebuilt_in_a_step_without_a_retrace():
    chex.clear_trace_counter()
    schedule = optax.linear_schedule(1.0, 0.25, 3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, count):
        tx = jr.project(jr.kernel({"**/kernel": jr.MaxNorm(schedule(count))}))
        return optax.apply_updates(params, one_update(tx, params))

    params = jax.tree.map(lambda p: 10 * jnp.asarray(p), PARAMS)
    for count, limit in enumerate((1.0, 0.75, 0.5, 0.25)):
        params = step(params, count)
        np.testing.assert_allclose(column_norms(params), limit, rtol=1e-5)


def test_injected_constraint():
    @optax.inject_hyperparams
    def constrain(radius):
        return jr.project(jr.kernel(jr.LinfBall(radius)))

    params = {"kernel": jnp.array([3.0])}
    tx = constrain(radius=optax.linear_schedule(2.0, 1.0, 1))
    update, state, seen = jax.jit(tx.update), tx.init(params), []
    for _ in range(2):
        updates, state = update(zeros(params), state, params)
        seen.append(float(updates["kernel"][0]))
    assert seen == [-1.0, -2.0]


def test_project_on_eight_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    weights = RNG.normal(size=(8, 4)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    tx = jr.project(jr.kernel(jr.MaxNorm(0.5)))
    params = {"kernel": jax.device_put(weights, sharding)}
    sharded, _ = jax.jit(tx.update)(zeros(params), tx.init(params), params)
    assert sharded["kernel"].sharding.is_equivalent_to(sharding, 2)
    expected = one_update(tx, {"kernel": weights})["kernel"]
    np.testing.assert_allclose(sharded["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_project_in_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), bias_init=nnx.initializers.ones)
    before = np.asarray(model.kernel[...])
    tx = optax.chain(optax.sgd(0.1), jr.project(jr.kernel(jr.UnitNorm())))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, zeros(nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(
        model.kernel[...], before / np.linalg.norm(before, axis=0), rtol=1e-5
    )
    np.testing.assert_array_equal(nnx.state(model)["bias"][...], [1.0, 1.0])


def descend_on_diabetes(steps, transforms, rate):
    """Return the coefficients that gradient descent on ½ mean squared error ends at, in float64."""
    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    y = y - y.mean()
    rate = rate * len(y) / np.linalg.norm(x, 2) ** 2

    @jax.jit
    def descend(params):
        tx = optax.chain(optax.sgd(rate), *transforms(rate))

        def step(carry, _):
            params, state = carry
            objective = lambda p: jnp.mean((x @ p["kernel"] - y) ** 2) / 2  # noqa: E731
            updates, state = tx.update(jax.grad(objective)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return params["kernel"]

    with jax.enable_x64():
        return x, y, np.asarray(descend({"kernel": jnp.zeros(x.shape[1])}))


def test_projected_gradient_solves_non_negative_least_squares():
    x, y, weights = descend_on_diabetes(
        5000, lambda rate: [jr.project(jr.kernel(jr.NonNegative()))], rate=1.0
    )
    expected, distance = scipy.optimize.nnls(x, y)
    assert weights.min() == 0.0
    np.testing.assert_allclose(np.linalg.norm(x @ weights - y) ** 2, distance**2, rtol=1e-8)
    np.testing.assert_array_equal(weights == 0, expected == 0)


def test_prox_and_projection_solve_the_non_negative_lasso():
    alpha = 0.3
    l1, non_negative = jr.kernel(jr.L1(alpha)), jr.kernel(jr.NonNegative())
    x, y, weights = descend_on_diabetes(
        5000, lambda rate: [jr.apply_prox(l1, rate), jr.project(non_negative)], rate=1.0
    )
    lasso = sklearn.linear_model.Lasso(
        alpha=alpha, positive=True, fit_intercept=False, tol=1e-14, max_iter=1_000_000
    ).fit(x, y)
    np.testing.assert_allclose(weights, lasso.coef_, rtol=1e-6, atol=1e-8)
    assert 0 < np.sum(weights == 0) < weights.size
    np.testing.assert_array_equal(weights == 0, lasso.coef_ == 0)


def test_a_count_does_not_wrap_around():
    tx = jr.add_penalty_gradient(jr.kernel({".": jr.L1(1.0)}), lambda count: 1.0 * (count >= 0))
    last = tx.init(jnp.ones(1))._replace(count=jnp.int32(2**31 - 1))
    _, state = tx.update(jnp.zeros(1), last, jnp.ones(1))
    assert state.count == 2**31 - 1


def test_the_record_of_float32_leaves_is_float32_in_x64():
    with jax.enable_x64():
        params = {"kernel": jnp.ones(3, jnp.float32)}
        tx = jr.record_penalty(jr.kernel(jr.L2(1.0)))
        _, state = tx.update(params, tx.init(params), params)
        assert state.total.dtype == jr.kernel(jr.L2(1.0))(params).dtype == jnp.float32


def test_record_penalty_takes_no_bare_penalty():
    with pytest.raises(TypeError, match=r"`jaxreg\.record_penalty` takes a `jaxreg\.kernel"):
        jr.record_penalty(jr.L1(1.0))  # type: ignore[arg-type]


def test_the_count_of_a_record_does_not_wrap_around():
    params, last = {"kernel": jnp.ones(2)}, jnp.int32(2**31 - 1)
    tx = jr.record_penalty(jr.kernel(jr.L2(1.0)))
    _, state = tx.update(params, tx.init(params)._replace(count=last), params)
    assert state.count == last
