"""How the cost of a penalty grows with leaves, sites, parameters, devices and strengths.

Each point is a step with a penalty ÷ without. Leaves: SGD of kernels of 64 entries, one operation a
leaf, with an L2 in the loss, also by hand: its run time, and its time to trace and compile. Sites:
the gradient of a stack of narrow dense layers with an L1 of every output. Parameters: AdamW with a
coupled L2, in four leaves. Devices: the MLP's step with its batch over CPU devices, which share the
cores. Strengths: a linear lasso trained by one vmap ÷ trainings one by one. Before they are timed,
all are checked against their formulas, or against the same by hand.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg as jr

from . import optimizer
from ._report import Row
from ._timing import compilations, interleaved, ratios

# Of 10,000 leaves XLA's compiler for the CPU had no program after 17 minutes.
LEAVES = (10, 100, 1000, 3000)
SITES = (1, 4, 16, 64, 256, 512)
PARAMETERS = (10**4, 10**5, 10**6, 10**7, 10**8)
STRENGTHS = (1, 4, 16, 64, 256)


def _row(curve: str, x: int, ratio: dict[str, float]) -> Row:
    return Row(f"{curve}: {x:,}", ratio, details={"curve": curve, "x": x})


def leaves(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yield the run time, and trace and compile time, by the number of leaves."""
    penalties: dict[str, Any] = {
        "with": jr.kernel(jr.L2(1e-4)),
        "by hand": optimizer.leaf_by_leaf,
        "without": None,
    }
    for count in counts:
        params = {f"layer_{i}": {"kernel": jnp.ones((8, 8))} for i in range(count)}
        for name in ("with", "by hand"):
            optimizer.check_l2(penalties[name], params)
        built: dict[str, Callable[[], Any]] = {}

        def build(name: str, params: Any = params, built: Any = built) -> None:
            def step(params: Any, grads: Any) -> Any:
                value: Any = 0.0
                if penalties[name]:
                    value, own = jax.value_and_grad(penalties[name])(params)
                    grads = optax.tree.add(grads, own)
                return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

            program = jax.jit(step).lower(params, params).compile()
            built[name] = functools.partial(program, params, params)

        # Each of the programs with 3,000 takes a minute.
        builds = {name: functools.partial(build, name) for name in penalties}
        compiling = compilations(builds, min(rounds, 3) if count <= 1000 else 1)
        running = interleaved(built, rounds)
        for curve, seconds in (("leaves", running), ("leaves, trace and compile", compiling)):
            yield _row(curve, count, ratios(seconds, "with", "without"))
            yield _row(f"{curve}, by hand", count, ratios(seconds, "by hand", "without"))


class _Stack(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i in range(self.depth):
            x = jnp.tanh(nn.Dense(64, name=f"dense_{i}")(x))
        return x


def stack_gradient(params: Any, x: Any, strength: float) -> Any:
    """Return the gradient of a stack's summed outputs and its L1, by the formula, in NumPy."""
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    y, passed = np.asarray(x, np.float64), []
    for i in range(len(layers)):
        layer = layers[f"dense_{i}"]
        h = y @ layer["kernel"] + layer["bias"]
        passed.append((y, h))
        y = np.tanh(h)
    slope, gradient = np.ones_like(y), {}
    for i, (y, h) in reversed(list(enumerate(passed))):
        slope = slope * (1 - np.tanh(h) ** 2) + strength * np.sign(h) / len(x)
        gradient[f"dense_{i}"] = {"kernel": y.T @ slope, "bias": slope.sum(0)}
        slope = slope @ layers[f"dense_{i}"]["kernel"].T
    return {"params": gradient}


def sites(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yield the run time by the number of modules whose output is penalized."""
    activity = jr.activity({"dense_*": jr.L1(1.0)})
    for depth in counts:
        model, x = _Stack(depth), jnp.ones((128, 64))
        params = jax.jit(model.init)(jax.random.key(0), x)

        def penalized(params: Any, model: Any = model, x: Any = x) -> Any:
            y, terms = activity(model.apply)(params, x)
            return jnp.sum(y) + terms.total

        def without(params: Any, model: Any = model, x: Any = x) -> Any:
            return jnp.sum(model.apply(params, x))

        grads = {"with": jax.jit(jax.grad(penalized)), "without": jax.jit(jax.grad(without))}
        steps = {n: functools.partial(g, params) for n, g in grads.items()}
        for name, strength in (("with", 1.0), ("without", 0.0)):
            exact = jax.tree.leaves(stack_gradient(params, x, strength))
            for slope, expected in zip(jax.tree.leaves(steps[name]()), exact, strict=True):
                off = np.linalg.norm(slope - expected) / np.linalg.norm(expected)
                np.testing.assert_array_less(off, 1e-3, err_msg=f"{depth} sites, {name}")
        yield _row("sites", depth, ratios(interleaved(steps, rounds), "with", "without"))


def parameters(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yield the run time of AdamW with a coupled penalty by the number of parameters."""
    optimizer.check()
    chains = optimizer.chains()
    for count in counts:
        steps = {
            "with": optimizer.stepper(chains["coupled L2"], count),
            "without": optimizer.stepper(chains["AdamW"], count),
        }
        yield _row("parameters", count, ratios(interleaved(steps, rounds), "with", "without"))


def devices(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield the run time by the number of devices."""
    command = [sys.executable, "-m", "benchmarks._devices", "smoke" if smoke else "", str(rounds)]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    for count, ratio in json.loads(printed).items():
        yield _row("devices", int(count), ratio)


def strengths(counts: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Yield the run time of one vmap over as many trainings, by the number of strengths."""
    for count in counts:
        ratio = optimizer.sweep("linear", count, 100, rounds)
        yield _row("strengths", count, ratio)


def rows(smoke: bool, rounds: int) -> Iterator[Row]:
    """Yield every curve's points."""
    if smoke:
        yield from leaves(LEAVES[:1], rounds)
        yield from sites(SITES[:2], rounds)
        yield from parameters(PARAMETERS[:1], rounds)
        yield from devices(smoke, rounds)
        yield from strengths(STRENGTHS[:2], rounds)
        return
    yield from leaves(LEAVES, rounds)
    yield from sites(SITES, rounds)
    yield from parameters(PARAMETERS, rounds)
    yield from devices(smoke, rounds)
    yield from strengths(STRENGTHS, rounds)


def draw(found: list[Row], folder: Path) -> None:
    """Draw the curves into a figure."""
    import matplotlib.pyplot as plt

    panels = ("leaves", "sites", "parameters", "devices", "strengths")
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for curve in dict.fromkeys(row.details["curve"] for row in found):
            if curve.split(",")[0] != panel:
                continue
            points = [row for row in found if row.details["curve"] == curve and row.measured]
            x = [row.details["x"] for row in points]
            low, median, high = (
                [row.measured[q] for row in points] for q in ("low", "median", "high")
            )
            axis.plot(x, median, marker="o", label=curve)
            axis.fill_between(x, low, high, alpha=0.2)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"number of {panel}")
        axis.set_xticks(x, [f"{count:g}" for count in x])
        axis.minorticks_off()
        axis.set_ylim(0)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("with a penalty ÷ without")
    axes[-1].set_ylabel("one vmap ÷ one by one")
    figure.savefig(folder / "scaling.png", dpi=120)
    plt.close(figure)
