"""What a penalty adds to an optimizer's step, to its compilation, and to a sweep of strengths.

Before they are timed, the coupled L2 is checked against the same by hand, and one strength of the
vmapped sweep against its own training:

- AdamW with a coupled L2 by `add_penalty_gradient`, and with `apply_prox`, over AdamW alone, for
  parameters in a few large leaves;
- trace and compile time of the step with a penalty in the loss over that without, for 10 to 1,000
  leaves;
- 64 strengths trained by one vmap over 64 trainings one after another, of a linear model and of a
  network with a hidden layer.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios

LEAVES = 4


def large_leaves(parameters: int) -> dict[str, Any]:
    """Return parameters in a few kernels with 1,000 columns."""
    rows = parameters // LEAVES // 1000
    keys = jax.random.split(jax.random.key(0), LEAVES)
    return {str(i): {"kernel": jax.random.normal(key, (rows, 1000))} for i, key in enumerate(keys)}


def stepper(tx: Any, parameters: int) -> Callable[[], Any]:
    """Return a function that makes one donated update at each call, with constant gradients."""
    params, gradients = large_leaves(parameters), large_leaves(parameters)

    @jax.jit
    def start(params: Any) -> Any:
        return tx.init(params)

    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, donate_argnums=(0, 1))
    carried = [params, start(params)]

    def step() -> Any:
        carried[:] = update(*carried, gradients)
        return carried

    return step


def step_cost(parameters: int, rounds: int) -> Iterator[Row]:
    """Time AdamW with and without penalties."""
    l2, l1 = jr.kernel(jr.L2(1e-4)), jr.kernel(jr.L1(1e-4))

    def by_hand() -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda u, w: u + 2e-4 * w, updates, params), state

        return optax.GradientTransformation(optax.init_empty_state, update)

    chains = {
        "AdamW": optax.adamw(1e-3),
        "coupled L2": optax.chain(jr.add_penalty_gradient(l2), optax.adamw(1e-3)),
        "coupled L2 by hand": optax.chain(by_hand(), optax.adamw(1e-3)),
        "apply_prox L1": optax.chain(optax.adamw(1e-3), jr.apply_prox(l1, 1e-3)),
        "proximal_adam L1": jr.proximal_adam(1e-3, l1),
    }
    one, other = (
        jax.tree.leaves(stepper(chains[name], 40_000)()[0])
        for name in ("coupled L2", "coupled L2 by hand")
    )
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    targets = {"coupled L2": "≤ 1.05"}
    notes = {"coupled L2": "12 passes over the parameters ÷ 10: see docs/design.md"}
    for name in list(chains)[1:]:
        # Two at a time, so that the parameters of all do not fill the memory.
        seconds = interleaved({n: stepper(chains[n], parameters) for n in ("AdamW", name)}, rounds)
        what = f"AdamW of {parameters:,} parameters: {name} ÷ AdamW"
        ratio = ratios(seconds, name, "AdamW")
        yield Row(what, ratio, targets.get(name), note=notes.get(name, ""))


def compile_cost(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Time tracing and compiling of a step, with and without a penalty in the loss."""
    l2 = jr.kernel(jr.L2(1e-4))

    def leaf_by_leaf(params: Any) -> Any:
        return 1e-4 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def seconds(penalty: Any, params: Any) -> float:
        tx = optax.adamw(1e-3)

        def loss(params: Any) -> Any:
            x = jnp.ones((2, 8))
            for leaf in jax.tree.leaves(params):
                x = jnp.tanh(x @ leaf)
            return jnp.sum(x) + (0.0 if penalty is None else penalty(params))

        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(step).lower(params, jax.eval_shape(tx.init, params)).compile()
        return time.perf_counter() - start

    for count in counts:
        leaf = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
        params = {f"layer_{i}": leaf for i in range(count)}
        times: dict[str, list[float]] = {"without": [], "kernel": [], "leaf by leaf": []}
        # A thousand leaves take half a minute.
        for _ in range(rounds if count < 1000 else 1):
            for name, penalty in zip(times, (None, l2, leaf_by_leaf), strict=True):
                times[name].append(seconds(penalty, params))
        what = f"trace and compile, {count:,} leaves"
        yield Row(f"{what}: kernel ÷ without", ratios(times, "kernel", "without"), "≤ 1.05")
        yield Row(f"{what}: leaf by leaf ÷ without", ratios(times, "leaf by leaf", "without"))


def linear(params: Any, x: Any) -> Any:
    """Return a linear model's outputs."""
    return x @ params["kernel"]


def hidden(params: Any, x: Any) -> Any:
    """Return a small network's outputs."""
    return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["out"]["kernel"]


KEYS = jax.random.split(jax.random.key(1))
MODELS = {
    "linear": (linear, {"kernel": jnp.zeros((16, 1))}),
    "hidden layer": (
        hidden,
        {
            "hidden": {"kernel": 0.3 * jax.random.normal(KEYS[0], (16, 16))},
            "out": {"kernel": 0.3 * jax.random.normal(KEYS[1], (16, 1))},
        },
    ),
}


def sweep(model: str, count: int, steps: int, rounds: int) -> dict[str, float]:
    """Return the time of strengths trained in one vmap over that of one after another."""
    strengths = jnp.logspace(-4, 0, count)
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.sin(x @ jnp.linspace(-1, 1, 16))[:, None]
    outputs, params = MODELS[model]

    def train(strength: Any) -> Any:
        tx = jr.proximal_sgd(1e-2, jr.kernel(jr.L1(strength)))

        def loss(params: Any) -> Any:
            return jnp.mean((outputs(params, x) - y) ** 2)

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return jax.flatten_util.ravel_pytree(trained)[0]

    one, together = jax.jit(train), jax.jit(jax.vmap(train))
    np.testing.assert_allclose(together(strengths)[-1], one(strengths[-1]), atol=1e-4)
    seconds = interleaved(
        {
            "one vmap": lambda: together(strengths),
            "one by one": lambda: [one(strength) for strength in strengths],
        },
        rounds,
    )
    return ratios(seconds, "one vmap", "one by one")


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the ratios."""
    yield from step_cost(40_000 if smoke else 10**8, rounds)
    yield from compile_cost((10,) if smoke else (10, 100, 1000), min(rounds, 3))
    for model in MODELS:
        ratio = sweep(model, 64, 5 if smoke else 300, rounds)
        yield Row(f"64 strengths, {model}: one vmap ÷ one by one", ratio, "≤ 0.25")
