"""What a penalty adds to an optimizer's step, to its compilation, and to a sweep of strengths.

Before they are timed, the steps and the penalties are checked against their formulas, and the
vmapped sweep against the trainings of its own strengths:

- AdamW with a coupled L2 by `add_penalty_gradient`, and with `apply_prox`, over AdamW alone, and
  the first over the same by hand, for parameters in a few large leaves;
- trace and compile time of the step with a penalty in the loss over that without, for 10 to 1,000
  leaves;
- 64 strengths trained by one vmap over 64 trainings one after another, of a linear model and of a
  network with a hidden layer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr

from ._report import Row
from ._timing import compilations, interleaved, ratios

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


def chains() -> dict[str, optax.GradientTransformation]:
    """Return AdamW, first without a penalty, then with one in each way."""
    # L1 is so strong that a first step shows it.
    l2, l1 = jr.kernel(jr.L2(1e-4)), jr.kernel(jr.L1(1.0))

    def by_hand() -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return jax.tree.map(lambda u, w: u + 2e-4 * w, updates, params), state

        return optax.GradientTransformation(optax.init_empty_state, update)

    return {
        "AdamW": optax.adamw(1e-3),
        "coupled L2": optax.chain(jr.add_penalty_gradient(l2), optax.adamw(1e-3)),
        "coupled L2 by hand": optax.chain(by_hand(), optax.adamw(1e-3)),
        "apply_prox L1": optax.chain(optax.adamw(1e-3), jr.apply_prox(l1, 1e-3)),
        "proximal_adam L1": jr.proximal_adam(1e-3, l1),
    }


def check() -> None:
    """Raise if a first step is off, of its formula's or of the same by hand."""

    def shrunk(w: Any, threshold: Any) -> Any:
        return np.sign(w) * np.maximum(np.abs(w) - threshold, 0)

    def exact(leaf: jax.Array) -> dict[str, Any]:
        w = np.asarray(leaf, np.float64)  # the gradient is the same
        adam = w - 1e-3 * np.sign(w)
        adamw = adam - 1e-3 * 1e-4 * w
        return {
            "AdamW": adamw,
            "apply_prox L1": shrunk(adamw, 1e-3),
            "proximal_adam L1": shrunk(adam, 1e-3 / np.abs(w)),
        }

    found = {name: stepper(tx, 40_000)() for name, tx in chains().items()}
    for key, leaf in large_leaves(40_000).items():
        for name, expected in exact(leaf["kernel"]).items():
            np.testing.assert_allclose(found[name][0][key]["kernel"], expected, atol=1e-6)
    # With their states: Adam's first step is as long for any gradient, but its mean is not.
    ours, theirs = (jax.tree.leaves(found[name]) for name in ("coupled L2", "coupled L2 by hand"))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def step_cost(parameters: int, rounds: int) -> Iterator[Row]:
    """Time AdamW with and without penalties."""
    check()
    made = chains()
    pairs = [(name, "AdamW") for name in list(made)[1:]]
    targets = {pairs[0]: "≤ 1.05"}
    notes = {pairs[0]: "12 passes over the parameters ÷ 10: see docs/design.md"}
    # Two at a time, so that the parameters of all do not fill the memory.
    for pair in [*pairs, ("coupled L2", "coupled L2 by hand")]:
        seconds = interleaved({name: stepper(made[name], parameters) for name in pair}, rounds)
        what = f"AdamW of {parameters:,} parameters: {' ÷ '.join(pair)}"
        yield Row(what, ratios(seconds, *pair), targets.get(pair), note=notes.get(pair, ""))


def leaf_by_leaf(params: Any) -> Any:
    """Return an L2 of strength 1e-4, as one writes it."""
    return 1e-4 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def check_l2(penalty: Callable[[Any], Any], params: Any) -> None:
    """Raise if a penalty of parameters of such shapes is no L2 of strength 1e-4."""
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    value, gradient = jax.value_and_grad(penalty)(ones)
    leaves = jax.tree.leaves(gradient)
    np.testing.assert_allclose(value, 1e-4 * sum(leaf.size for leaf in leaves), rtol=1e-5)
    for leaf in leaves:
        np.testing.assert_allclose(leaf, 2e-4, rtol=1e-6)


def compile_cost(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Time tracing and compiling of a step, with and without a penalty in the loss."""
    penalties = {"without": None, "kernel": jr.kernel(jr.L2(1e-4)), "leaf by leaf": leaf_by_leaf}

    def compiled(penalty: Any, params: Any) -> Any:
        tx = optax.adamw(1e-3)

        def loss(params: Any) -> Any:
            x = jnp.ones((2, 8))
            for leaf in jax.tree.leaves(params):
                x = jnp.tanh(x @ leaf)
            return jnp.sum(x) + (0.0 if penalty is None else penalty(params))

        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step).lower(params, jax.eval_shape(tx.init, params)).compile()

    for count in counts:
        leaf = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
        params = {f"layer_{i}": leaf for i in range(count)}
        for name in ("kernel", "leaf by leaf"):
            check_l2(penalties[name], params)
        programs = {n: functools.partial(compiled, p, params) for n, p in penalties.items()}
        times = compilations(programs, rounds)
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
    apart = list(strengths)
    np.testing.assert_allclose(together(strengths), [one(s) for s in apart], atol=1e-4)
    seconds = interleaved(
        {
            "one vmap": lambda: together(strengths),
            "one by one": lambda: [one(strength) for strength in apart],
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
