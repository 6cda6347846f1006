"""A train step with penalties, against the same without and against what a user would pick instead.

Each workload has an L2 of its kernels, a penalty of activities, and Adam; and everywhere the same
weights and data: jaxreg; Flax by hand, through `capture_intermediates`; Flax without penalties;
Keras on its JAX backend, jitted; PyTorch, eager and by `torch.compile`. Before anything is timed,
the first losses agree to 1e-5, and those after a step to 1e-2 (Adam's first step is as long for a
gradient of rounding errors as for any other).
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr

from ._report import Row
from ._timing import interleaved, ratios, summary
from .workloads import ACTIVITY, AR, TAR, WEIGHTS, WORKLOADS, Workload, error


def penalized(workload: Workload) -> Callable[..., Any]:
    """Return the loss with jaxreg's penalties."""
    kernel = jr.kernel(jr.L2(WEIGHTS))
    activity = jr.activity(dict.fromkeys(workload.penalized, workload.penalty))

    def loss(params: Any, x: Any, y: Any) -> Any:
        outputs, terms = activity(workload.model.apply)({"params": params}, x)
        return error(outputs, y) + kernel(params) + terms.total

    return loss


def by_hand(workload: Workload) -> Callable[..., Any]:
    """Return the same loss with nothing but JAX and Flax."""

    def is_penalized(module: Any, _: str) -> bool:
        return "/".join(module.path) in workload.penalized

    def own(h: Any) -> Any:
        if isinstance(workload.penalty, jr.L1):
            return ACTIVITY * jnp.sum(jnp.abs(h)) / len(h)
        change = h[:, 1:] - h[:, :-1]
        return AR * jnp.mean(jnp.square(h)) + TAR * jnp.mean(jnp.square(change))

    def loss(params: Any, x: Any, y: Any) -> Any:
        outputs, captured = workload.model.apply(
            {"params": params},
            x,
            capture_intermediates=is_penalized,
            mutable=["intermediates"],
        )
        weights = sum(
            jnp.sum(jnp.square(leaf))
            for path, leaf in flax.traverse_util.flatten_dict(params).items()
            if path[-1] in ("kernel", "embedding")
        )
        return error(outputs, y) + WEIGHTS * weights + sum(map(own, jax.tree.leaves(captured)))

    return loss


def without(workload: Workload) -> Callable[..., Any]:
    """Return the loss without penalties."""
    return lambda params, x, y: error(workload.model.apply({"params": params}, x), y)


def step_of(loss: Callable[..., Any], params: Any, batch: Any) -> Callable[[], Any]:
    """Return a function that makes one jitted Adam step at each call and returns the loss."""
    tx = optax.adam(1e-3)

    def update(params: Any, state: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return value, (optax.apply_updates(params, updates), state)

    update = jax.jit(update, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    carried = [(params, tx.init(params))]

    def step() -> Any:
        value, carried[0] = update(*carried[0], *batch)
        return value

    return step


def steps_of(workload: Workload) -> dict[str, Callable[[], Any]]:
    """Return each implementation's step, all from the same weights."""
    params, batch = workload.init(), jax.device_put(workload.batch)
    losses = {
        "jaxreg": penalized(workload),
        "by hand": by_hand(workload),
        "without": without(workload),
    }
    steps = {name: step_of(loss, params, batch) for name, loss in losses.items()}
    if importlib.util.find_spec("keras"):
        from . import _keras

        steps["Keras on JAX"] = _keras.step_of(workload, params)
    if importlib.util.find_spec("torch"):
        from . import _torch

        steps["torch eager"] = _torch.step_of(workload, params, compiled=False)
        steps["torch.compile"] = _torch.step_of(workload, params, compiled=True)
    return steps


TARGETS = {
    "without": "≤ 1.03",
    "by hand": "≤ 1.00",
    "Keras on JAX": "≤ 0.90",
    "torch eager": None,
    "torch.compile": "≤ 1.00",
}


PEERS = ("Keras on JAX", "torch eager", "torch.compile")
"""Beside these, Flax without penalties tells how much of a ratio is the model's."""


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield jaxreg's time over each other's, for each workload."""
    for build in WORKLOADS.values():
        workload = build(smoke)
        steps = steps_of(workload)
        losses = {name: [float(step()) for _ in range(2)] for name, step in steps.items()}
        for name in [name for name in steps if name != "without"]:
            pairs = zip(losses[name], losses["jaxreg"], (1e-5, 1e-2), strict=True)
            for theirs, ours, tolerance in pairs:
                where = f"{workload.name}, {name}"
                np.testing.assert_allclose(theirs, ours, rtol=tolerance, err_msg=where)
        seconds = interleaved(steps, rounds)
        for name, target in TARGETS.items():
            what = f"{workload.name}: jaxreg ÷ {name}"
            if name not in steps:
                yield Row.skipped(what, 'needs the extra "bench"', target)
                continue
            times = {n: summary(seconds[n])["median"] for n in ("jaxreg", name)}
            ratio, note = ratios(seconds, "jaxreg", name), ""
            if name in PEERS:
                alone = ratios(seconds, "without", name)["median"]
                note = f"{alone:.3f} with Flax alone, no penalty"
            yield Row(what, ratio, target, {"seconds": times}, note)
