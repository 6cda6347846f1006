"""Kernel or activity penalty? Three experiments on scikit-learn's handwritten digits.

1. Saturation. Small weights can add up to large outputs. The network below is 4,096 sigmoid
   features, a hidden layer of 64 sigmoids and ten logits. The features lie near one half and are
   all positive, so a change of 0.01 in every weight of a hidden unit changes its output by 20. At
   a learning rate of 0.15 (a smaller one would be another cure) the weights stay below 0.3, and
   most hidden sigmoids saturate. The digits differ in small deviations of the features, which take
   the larger weights. An L2 of the hidden layer's kernel charges all directions of weight space
   alike, an L2 of its output charges a direction by what it does to the output. Both are swept
   over the same strengths.

   That is with momentum SGD. `--adam` trains this network with Adam at a rate of 0.01: outputs of
   a hundred, and it stops learning. There a kernel L2 of 0.01 helps too, though less accurately
   than an activity L2 of 0.0001.

2. Soft limit. An autoencoder with 100 ReLU units in its coding layer, and an L1 of their activity
   strong enough that about ten are active for any one image, against a bottleneck of ten units.
   Which ten may differ from image to image.

3. Exact zeros. The same L1 of the weights, through its subgradient in the loss, and through its
   proximal operator in the optimizer.

A strength is a leaf of a pytree, so each experiment trains all its strengths and seeds in one
vmapped program, and a strength of zero is the network without the penalty.

Run:
    python examples/kernel_vs_activity.py [--quick] [--adam] [--figure kernel_vs_activity.png]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxreg as jr

EXAMPLES, BATCH = 1300, 100
STEPS = EXAMPLES // BATCH  # in an epoch

Row = tuple[str, float]  # which penalty, and how strong
Results = dict[str, np.ndarray]  # each (rows, seeds)


class Digits(NamedTuple):
    """Images of 8 × 8 pixels in [0, 1], flattened, and the digits they show."""

    images: jax.Array
    labels: jax.Array


def load() -> tuple[Digits, Digits]:
    """Return 1,300 images to train on and 497 to test on."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.astype(np.float32) / 16, labels, train_size=EXAMPLES, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def train(
    label: str,
    model: nn.Module,
    loss: Callable[[Any, Digits, Mapping[str, jax.Array]], jax.Array],
    optimizer: Callable[[Mapping[str, jax.Array]], optax.GradientTransformation],
    rows: Sequence[Row],
    digits: Digits,
    epochs: int,
    seeds: int,
) -> Any:
    """Train a network for every row and seed at once; return parameters (rows, seeds, ...).

    `loss` and `optimizer` are given the strengths by name: that of the row, and 0 for the others.
    """

    def start(strengths: Mapping[str, jax.Array], key: jax.Array) -> Any:
        params = model.init(key, digits.images[:1])["params"]
        return params, optimizer(strengths).init(params)

    def epoch(state: Any, strengths: Mapping[str, jax.Array], key: jax.Array) -> Any:
        tx = optimizer(strengths)

        def step(state: Any, batch: Digits) -> tuple[Any, None]:
            params, optimizer_state = state
            gradient = jax.grad(loss)(params, batch, strengths)
            updates, optimizer_state = tx.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), None

        order = jax.random.permutation(key, EXAMPLES).reshape(STEPS, BATCH)
        return jax.lax.scan(step, state, jax.tree.map(lambda array: array[order], digits))[0]

    start = jax.jit(jax.vmap(jax.vmap(start, (None, 0)), (0, None)))
    epoch = jax.jit(jax.vmap(jax.vmap(epoch, (0, None, 0)), (0, 0, None)))

    strengths = {name: jnp.array([s if n == name else 0.0 for n, s in rows]) for name, _ in rows}
    state = start(strengths, jax.random.split(jax.random.key(0), seeds))
    for number in tqdm(range(epochs), desc=label, unit="epoch"):
        keys = jax.random.split(jax.random.key(1 + number), seeds)
        state = jax.block_until_ready(epoch(state, strengths, keys))
    return state[0]


def evaluate(measures: Callable[[Any], dict[str, jax.Array]], params: Any) -> Results:
    """Return every measure of every network."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(measures)))(params))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of images whose digit has the largest logit."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


class Classifier(nn.Module):
    """Wide sigmoid features, a sigmoid hidden layer, ten logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of images."""
        x = nn.sigmoid(nn.Dense(4096, name="features")(x))
        x = nn.sigmoid(nn.Dense(64, name="hidden")(x))
        return nn.Dense(10, name="logits")(x)


def saturation(
    training: Digits, test: Digits, epochs: int, seeds: int, adam: bool
) -> tuple[list[Row], Results]:
    """Compare an L2 of the hidden layer's kernel with an L2 of its output."""
    model = Classifier()
    sweep = (1e-4, 1e-3, 1e-2, 1e-1)  # 0.1 of the activity L2 diverges at this learning rate
    rows = [("no penalty", 0.0)]
    rows += [(name, s) for name in ("kernel L2", "activity L2") for s in sweep]

    def loss(params: Any, batch: Digits, strengths: Mapping[str, jax.Array]) -> jax.Array:
        kernel = jr.kernel({"hidden/kernel": jr.L2(strengths["kernel L2"])})
        activity = jr.activity({"hidden": jr.L2(strengths["activity L2"])})
        logits, terms = activity(model.apply)({"params": params}, batch.images)
        return cross_entropy(logits, batch.labels) + kernel(params) + terms.total

    def measures(params: Any) -> dict[str, jax.Array]:
        logits, captured = model.apply(
            {"params": params},
            test.images,
            capture_intermediates=lambda module, _: module.name == "hidden",
        )
        (outputs,) = captured["intermediates"]["hidden"]["__call__"]
        slope = nn.sigmoid(outputs) * nn.sigmoid(-outputs)
        return {
            "largest |weight|": jnp.max(jnp.abs(params["hidden"]["kernel"])),
            "median |output|": jnp.median(jnp.abs(outputs)),
            "saturated": jnp.mean(slope < 0.01),
            "accuracy": accuracy(logits, test.labels),
        }

    schedule = optax.cosine_decay_schedule(0.01 if adam else 0.15, epochs * STEPS)
    tx = optax.adam(schedule) if adam else optax.sgd(schedule, momentum=0.9)
    params = train("1. saturation", model, loss, lambda _: tx, rows, training, epochs, seeds)
    return rows, evaluate(measures, params)


def most_accurate(name: str, rows: Sequence[Row], results: Results) -> str:
    """Describe a penalty at the strength that does best on the test images."""
    best = max(
        (i for i, row in enumerate(rows) if row[0] == name),
        key=lambda i: results["accuracy"][i].mean(),
    )
    saturated, accurate = results["saturated"][best].mean(), results["accuracy"][best].mean()
    return f"{rows[best][1]:g}, {saturated:.1%} saturated, {accurate:.1%} accuracy"


class Encoder(nn.Module):
    """A layer of ReLU units, whose output is the code."""

    units: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the code of images."""
        return nn.relu(nn.Dense(self.units)(x))


class Autoencoder(nn.Module):
    """An encoder and a linear decoder."""

    units: int

    def setup(self) -> None:
        """Name the two halves."""
        self.encoder = Encoder(self.units)
        self.decoder = nn.Dense(64)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the reconstruction of images and their code."""
        code = self.encoder(x)
        return self.decoder(code), code


def soft_limit(
    training: Digits, test: Digits, epochs: int, seeds: int
) -> tuple[list[Row], Results]:
    """Compare 100 units that an L1 of their activity keeps quiet with a bottleneck of 10 units."""
    # Centred: with non-negative inputs units of the bottleneck die, and the comparison is unfair.
    mean = training.images.mean(axis=0)
    training, test = (d._replace(images=d.images - mean) for d in (training, test))

    def run(label: str, units: int, rows: list[Row]) -> Results:
        model = Autoencoder(units)

        def loss(params: Any, batch: Digits, strengths: Mapping[str, jax.Array]) -> jax.Array:
            activity = jr.activity({"encoder": jr.L1(strengths[f"{units} units"])})
            (output, _), terms = activity(model.apply)({"params": params}, batch.images)
            return jnp.mean((output - batch.images) ** 2) + terms.total

        def measures(params: Any) -> dict[str, jax.Array]:
            output, code = model.apply({"params": params}, test.images)
            _, training_code = model.apply({"params": params}, training.images)
            return {
                "active units": jnp.mean(jnp.sum(code > 0, axis=-1)),
                "test error (MSE)": jnp.mean((output - test.images) ** 2),
                "dead units": jnp.sum(~jnp.any(training_code > 0, axis=0)),
            }

        schedule = optax.cosine_decay_schedule(5e-3, epochs * STEPS)
        adam = optax.adam(schedule)
        params = train(label, model, loss, lambda _: adam, rows, training, epochs, seeds)
        return evaluate(measures, params)

    hard = [("10 units", 0.0)]
    # 0.02 was found by looking: it leaves about ten units active. The others show the trade-off.
    soft = [("100 units", s) for s in (0.0, 0.001, 0.003, 0.01, 0.02, 0.03)]
    results = run("2. hard limit", 10, hard), run("2. soft limit", 100, soft)
    return hard + soft, jax.tree.map(lambda *parts: np.concatenate(parts), *results)


class SmallClassifier(nn.Module):
    """One hidden layer of ReLU units."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of images."""
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


def exact_zeros(
    training: Digits, test: Digits, epochs: int, seeds: int
) -> tuple[list[Row], Results]:
    """Compare an L1 of the weights in the loss with the same L1 in the optimizer."""
    model = SmallClassifier()
    rows = [("no penalty", 0.0), ("subgradient", 1e-3), ("prox", 1e-3)]
    rate = 0.5

    def loss(params: Any, batch: Digits, strengths: Mapping[str, jax.Array]) -> jax.Array:
        kernel = jr.kernel(jr.L1(strengths["subgradient"]))
        logits = model.apply({"params": params}, batch.images)
        return cross_entropy(logits, batch.labels) + kernel(params)

    def optimizer(strengths: Mapping[str, jax.Array]) -> optax.GradientTransformation:
        kernel = jr.kernel(jr.L1(strengths["prox"]))
        return optax.chain(optax.sgd(rate), jr.apply_prox(kernel, rate))

    def measures(params: Any) -> dict[str, jax.Array]:
        kernels = [jnp.ravel(layer["kernel"]) for layer in params.values()]
        weights = jnp.abs(jnp.concatenate(kernels))
        return {
            "weights": weights,
            "exactly zero": jnp.mean(weights == 0),
            "below 0.001": jnp.mean(weights < 1e-3),
            "accuracy": accuracy(model.apply({"params": params}, test.images), test.labels),
        }

    params = train("3. exact zeros", model, loss, optimizer, rows, training, epochs, seeds)
    return rows, evaluate(measures, params)


def show(title: str, rows: Sequence[Row], results: Results, formats: Mapping[str, str]) -> None:
    """Print a table of means and standard deviations over the seeds."""
    lines = [("network", "strength", *formats)]
    for i, (name, strength) in enumerate(rows):
        cells = (
            f"{results[key][i].mean():{spec}} ± {results[key][i].std():{spec}}"
            for key, spec in formats.items()
        )
        lines.append((name, f"{strength:g}", *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


KERNEL, ACTIVITY, NEUTRAL = "tab:orange", "tab:blue", "0.4"


def draw(path: Path, saturated: Any, limited: Any, sparse: Any) -> None:
    """Write the figure: one panel for each experiment."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(16.5, 5.2), layout="constrained")
    draw_saturation(panels[0], *saturated)
    draw_soft_limit(panels[1], *limited)
    draw_exact_zeros(panels[2], *sparse)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_saturation(axes: plt.Axes, rows: Sequence[Row], results: Results) -> None:
    """Draw a bar for the saturated share of each network, and a dot for its accuracy."""
    saturated, accuracies = (100 * results[key].mean(axis=1) for key in ("saturated", "accuracy"))
    colors = [{"kernel L2": KERNEL, "activity L2": ACTIVITY}.get(name, NEUTRAL) for name, _ in rows]
    names = [f"{name} {strength:g}" if strength else name for name, strength in rows]
    bars = axes.barh(names, saturated, color=colors, label="saturated hidden sigmoids")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.plot(accuracies, names, "ko", markersize=9, label="test accuracy")
    axes.invert_yaxis()
    axes.set(
        title="Small weights, saturated sigmoids:\npenalize the output, not the weights",
        xlabel="share (%)",
        xlim=(0, 105),
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.55, 0.1))


def draw_soft_limit(axes: plt.Axes, rows: Sequence[Row], results: Results) -> None:
    """Draw the reconstruction error against the number of active units."""
    active, error = (results[key].mean(axis=1) for key in ("active units", "test error (MSE)"))
    axes.plot(active[2:], error[2:], "o-", color=ACTIVITY, label="100 units, L1 of their activity")
    for (_, strength), *point in zip(rows[2:], active[2:], error[2:], strict=True):
        axes.annotate(f"{strength:g}", point, (7, 5), textcoords="offset points", color=ACTIVITY)
    axes.plot(active[0], error[0], "*", color=KERNEL, markersize=16, label="bottleneck of 10 units")
    axes.plot(active[1], error[1], "*", color=NEUTRAL, markersize=16, label="100 units, no penalty")
    axes.axvline(10, color=NEUTRAL, linestyle=":", zorder=0)
    axes.set(
        title="Ten active units of a hundred\nreconstruct better than a bottleneck of ten",
        xlabel="active units per image",
        ylabel="test reconstruction error (MSE)",
        xscale="log",
        xticks=(3, 10, 30, 100),
        xticklabels=("3", "10", "30", "100"),
    )
    axes.legend(loc="upper right")


def draw_exact_zeros(axes: plt.Axes, rows: Sequence[Row], results: Results) -> None:
    """Draw how large the weights are; a logarithmic axis has no zero, so it gets a bar."""
    for i, label, color in ((1, "subgradient in the loss", KERNEL), (2, "apply_prox", ACTIVITY)):
        weights = results["weights"][i].ravel()
        exponents = np.log10(np.where(weights == 0, 1e-6, np.maximum(weights, 1e-5)))
        share = np.full(weights.size, 100 / weights.size)
        bins = np.arange(-6.1, 0.2, 0.2)
        axes.hist(exponents, bins, weights=share, color=color, alpha=0.65, label=label)
    axes.set(
        title="The same L1 of the weights:\nsmall numbers, or exact zeros",
        xlabel="|weight|",
        ylabel="share of the weights (%)",
        xticks=(-6, -4, -3, -2, -1, 0),
        xticklabels=("exactly 0", "0.0001", "0.001", "0.01", "0.1", "1"),
    )
    axes.legend(loc="upper right")


def main() -> None:
    """Run the three experiments, print their tables, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs")
    parser.add_argument("--adam", action="store_true", help="experiment 1 with Adam")
    parser.add_argument("--figure", type=Path, default=Path("kernel_vs_activity.png"))
    arguments = parser.parse_args()
    seeds, epochs = (1, (6, 40, 15)) if arguments.quick else (3, (15, 150, 50))
    training, test = load()

    saturated = saturation(training, test, epochs[0], seeds, arguments.adam)
    show(
        "1. Saturation: a penalty of the hidden layer's weights, or of its output",
        *saturated,
        {
            "largest |weight|": ".3f",
            "median |output|": ".2f",
            "saturated": ".1%",
            "accuracy": ".1%",
        },
    )
    for name in ("kernel L2", "activity L2"):
        print(f"the most accurate {name}: {most_accurate(name, *saturated)}")

    limited = soft_limit(training, test, epochs[1], seeds)
    show(
        "2. Soft limit: 100 units of which few are active, or a bottleneck of 10",
        *limited,
        {"active units": ".1f", "test error (MSE)": ".5f", "dead units": ".1f"},
    )
    components = PCA(10).fit(training.images)
    projected = components.inverse_transform(components.transform(test.images))
    error = np.mean((projected - test.images) ** 2)
    print(f"ten principal components, the best linear bottleneck: {error:.5f}")

    sparse = exact_zeros(training, test, epochs[2], seeds)
    show(
        "3. Exact zeros: the same L1 in the loss, or in the optimizer",
        *sparse,
        {"exactly zero": ".1%", "below 0.001": ".1%", "accuracy": ".1%"},
    )

    draw(arguments.figure, saturated, limited, sparse)


if __name__ == "__main__":
    main()
