"""A sparse autoencoder in Flax NNX: a soft limit on the active units of a wide coding layer.

An L1 of the coding layer's activity lets about ten of its 100 units be active for any one image of
scikit-learn's handwritten digits. Which ten may differ from image to image, so it reconstructs
better than a bottleneck of ten units, which must use the same ten for every image.
`kernel_vs_activity.py` tells the same story in Linen.

Run:
    python examples/sparse_autoencoder_nnx.py [--quick]
"""

import argparse
from collections import defaultdict
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxreg as jr

PIXELS, BATCH = 64, 100


class Encoder(nnx.Module):
    """A layer of ReLU units, whose output is the code."""

    def __init__(self, units: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(PIXELS, units, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the code of images."""
        return nnx.relu(self.linear(x))


class Autoencoder(nnx.Module):
    """An encoder and a linear decoder."""

    def __init__(self, units: int, *, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(units, rngs=rngs)
        self.decoder = nnx.Linear(units, PIXELS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the reconstruction of images."""
        return self.decoder(self.encoder(x))


@nnx.jit
def train_epoch(
    model: Autoencoder, optimizer: nnx.Optimizer, batches: jax.Array, strength: float
) -> None:
    """Take one step for each batch.

    The strength is an argument like any other: another value does not recompile.
    """
    activity = jr.activity({"encoder": jr.L1(strength)})

    def loss(model: Autoencoder, batch: jax.Array) -> jax.Array:
        output, terms = activity(model)(batch)
        return jnp.mean((output - batch) ** 2) + terms.total

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def step(state: tuple[Autoencoder, nnx.Optimizer], batch: jax.Array) -> Any:
        model, optimizer = state
        optimizer.update(model, nnx.grad(loss)(model, batch))
        return model, optimizer

    step((model, optimizer), batches)


@nnx.jit
def measure(model: Autoencoder, training: jax.Array, test: jax.Array) -> list[jax.Array]:
    """Return the active units per test image, the test error, and the units that never fire."""
    active = jnp.mean(jnp.sum(model.encoder(test) > 0, axis=-1))
    error = jnp.mean((model(test) - test) ** 2)
    dead = jnp.sum(~jnp.any(model.encoder(training) > 0, axis=0))
    return [active, error, dead]


def load() -> tuple[jax.Array, jax.Array]:
    """Return 1,300 images to train on and 497 to test on, in [0, 1] and then centred."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    training, test = train_test_split(images, train_size=1300, stratify=labels, random_state=0)
    mean = training.mean(axis=0)
    return jnp.asarray(training - mean), jnp.asarray(test - mean)


def main() -> None:
    """Train a bottleneck and wide layers with stronger and stronger penalties; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs")
    seeds, epochs = (1, 40) if parser.parse_args().quick else (3, 150)

    training, test = load()
    steps = len(training) // BATCH
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, epochs * steps))
    rows = [(10, 0.0), (100, 0.0), (100, 0.003), (100, 0.01), (100, 0.02)]

    results = defaultdict(list)
    for row, seed in tqdm(list(product(rows, range(seeds))), unit="network"):
        units, strength = row
        model = Autoencoder(units, rngs=nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
        shuffle = np.random.default_rng(seed).permutation
        for _ in range(epochs):
            batches = shuffle(training).reshape(steps, BATCH, PIXELS)
            train_epoch(model, optimizer, batches, strength)
        results[row].append(measure(model, training, test))

    print("Soft limit: 100 units of which few are active, or a bottleneck of 10")
    line = "{:<9}  {:<8}  {:<12}  {:<17}  {}"
    print(line.format("network", "strength", "active units", "test error (MSE)", "dead units"))
    for (units, strength), measured in results.items():
        cells = (
            f"{mean:{spec}} ± {spread:{spec}}"
            for mean, spread, spec in zip(
                np.mean(measured, axis=0),
                np.std(measured, axis=0),
                (".1f", ".5f", ".1f"),
                strict=True,
            )
        )
        print(line.format(f"{units} units", f"{strength:g}", *cells).rstrip())


if __name__ == "__main__":
    main()
