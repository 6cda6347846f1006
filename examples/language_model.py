"""A byte-level language model, and what holds its logits in place.

Cross-entropy does not change if all logits of a token are shifted by one number, so nothing in it
holds their level: the log-normalizer, lse = log Σ exp(logits), is free to drift, and in half
precision large logits lose the digits that tell them apart. The z-loss, s·lse², is what language
models are trained with to stop that; a penalty of the logits' squares is another way, which also
makes the predictions less confident.

A small causal transformer reads the reference manual that ships with Python. The head goes
through `jaxreg.ops.linear_cross_entropy`, which never holds the logits of all tokens: with 256
bytes for words it need not, but the code is that of a large vocabulary.

Each way trains from the same start on the same batches, over a few seeds; the tables show the mean
± standard deviation over them, of text that the model has not seen.

Run:
    python examples/language_model.py [--quick]
"""

import argparse
import functools
from pydoc_data.topics import topics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from tqdm import tqdm

import jaxreg as jr

WORDS, FEATURES, LENGTH, BATCH = 256, 48, 32, 16


class Transformer(nn.Module):
    """Causal self-attention; gives the hidden states, and leaves the head to the loss."""

    layers: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return hidden states (batch, length, features) of bytes (batch, length)."""
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, FEATURES))
        x = nn.Embed(WORDS, FEATURES)(tokens) + positions
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=causal)
            x += nn.Dense(FEATURES)(nn.gelu(nn.Dense(4 * FEATURES)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


def manual() -> np.ndarray:
    """Return the language reference that Python carries for its `help`, as bytes."""
    return np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)


# The strengths of the z-loss and of the penalty of the logits' squares.
LOSSES = {
    "cross-entropy": (0.0, 0.0),
    "z-loss, 0.0001": (1e-4, 0.0),
    "z-loss, 0.01": (1e-2, 0.0),
    "L2 of the logits, 0.0001": (0.0, 1e-4),
}


def loss_of(
    params: Any, text: jax.Array, z_loss: ArrayLike, penalty: ArrayLike
) -> tuple[jax.Array, jr.ops.LinearCrossEntropy]:
    """Return what is minimized, and what the head gives, for (batch, length + 1) bytes."""
    hidden = Transformer().apply(params["body"], text[:, :-1])
    assert isinstance(hidden, jax.Array)
    result = jr.ops.linear_cross_entropy(hidden, params["head"], text[:, 1:], z_loss=z_loss)
    # A penalty of the logits themselves holds them.
    squares = jr.penalize(hidden @ params["head"], jr.L2(penalty), reduction="token_mean")
    return result.total + squares, result


@functools.partial(jax.jit, static_argnames="updates")
def train(
    key: jax.Array, text: jax.Array, unseen: jax.Array, strengths: Any, updates: int
) -> dict[str, jax.Array]:
    """Return the course of a training: at a quarter of the updates, at a half, and so on."""
    tx = optax.adam(3e-3)
    start, batches = jax.random.split(key)
    body = Transformer().init(start, jnp.zeros((1, LENGTH), int))
    head = jax.random.normal(start, (FEATURES, WORDS)) / FEATURES**0.5
    params = {"body": body, "head": head}

    def update(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        first = jax.random.randint(key, (BATCH, 1), 0, len(text) - LENGTH)
        batch = text[first + jnp.arange(LENGTH + 1)]
        gradient = jax.grad(lambda p: loss_of(p, batch, *strengths)[0])(params)
        changes, state = tx.update(gradient, state)
        return (optax.apply_updates(params, changes), state), None

    def quarter(carry: Any, keys: jax.Array) -> Any:
        carry, _ = jax.lax.scan(update, carry, keys)
        _, result = loss_of(carry[0], unseen, *strengths)
        return carry, {
            "lse": jnp.mean(result.lse),
            "spread": jnp.std(result.lse),
            "loss": jnp.mean(result.loss),
            "accuracy": result.accuracy,
        }

    keys = jax.random.split(batches, (4, updates // 4))
    return jax.lax.scan(quarter, (params, tx.init(params)), keys)[1]


def main() -> None:
    """Train every way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer updates and one seed")
    arguments = parser.parse_args()
    updates, seeds = (120, 1) if arguments.quick else (2000, 3)
    everything = manual()
    text, unseen = np.split(everything, [len(everything) * 9 // 10])
    unseen = unseen[: 16 * (LENGTH + 1)].reshape(16, LENGTH + 1)
    print(f"{len(everything):,} bytes of the manual; {updates} updates, {seeds} seeds")

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LOSSES}
    for seed, name in tqdm([(s, n) for s in range(seeds) for n in LOSSES], unit="run"):
        course = train(jax.random.key(seed), text, unseen, LOSSES[name], updates)
        runs[name].append(jax.device_get(course))
    show(f"Mean lse of unseen text; of equal logits it is log {WORDS} = {np.log(WORDS):.2f}", runs)


def show(title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print how lse goes, and where the model ends."""
    header = ("", "lse at 25%", "50%", "75%", "100%", "spread of lse", "loss (nats)", "accuracy")
    rows = [header]
    for name, results in runs.items():
        course = [cell([r["lse"][i] for r in results]) for i in range(4)]
        ends = [cell([r[key][-1] for r in results]) for key in ("spread", "loss", "accuracy")]
        rows.append((name, *course, *ends))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    print(f"\n{title}")
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def cell(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


if __name__ == "__main__":
    main()
