"""Models with penalties, as jaxreg's users write them; the peers' start from the same weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import jaxreg as jr

WEIGHTS = 1e-4
"""The strength of the L2 of every kernel and embedding."""
ACTIVITY = 1e-5
"""The strength of the L1 of activities, added up and divided by the batch size."""
AR, TAR = 0.1, 0.05
"""The strengths of activation regularization and its temporal kin, for the LSTM."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its data and its penalties.

    Args:
        name: as in the table.
        model: maps a batch to outputs.
        batch: inputs, and targets: classes where they are integers, else values.
        penalized: the names of the modules whose outputs are penalized.
        penalty: of those outputs.
    """

    name: str
    model: nn.Module
    batch: tuple[Any, Any]
    penalized: tuple[str, ...]
    penalty: jr.Penalty = dataclasses.field(default_factory=lambda: jr.L1(ACTIVITY))

    def init(self) -> Any:
        """Return parameters."""
        return jax.jit(self.model.init)(jax.random.key(0), self.batch[0])["params"]


def error(outputs: Any, targets: Any) -> jax.Array:
    """Return the mean cross-entropy of classes, or the mean squared error of values."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)
        return -jnp.mean(chosen)
    return jnp.mean(jnp.square(outputs - targets))


class Relu(nn.Module):
    """A dense layer and its ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.relu(nn.Dense(self.features, name="dense")(x))


class MLP(nn.Module):
    """Hidden layers of ReLUs and a linear one."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i, features in enumerate(self.hidden):
            x = Relu(features, name=f"hidden_{i}")(x)
        return nn.Dense(self.outputs, name="out")(x)


class ConvRelu(nn.Module):
    """A 3 × 3 convolution and its ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.relu(nn.Conv(self.features, (3, 3), name="conv")(x))


class CNN(nn.Module):
    """Convolutions and a linear layer."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i, features in enumerate(self.features):
            x = ConvRelu(features, name=f"conv_{i}")(x)
        return nn.Dense(10, name="out")(x.reshape(len(x), -1))


class Block(nn.Module):
    """A transformer's block, normalized before each of its two halves."""

    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        width = x.shape[-1]
        normal = nn.LayerNorm(name="norm_1")(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(normal, mask=mask)
        hidden = Relu(4 * width, name="hidden")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(width, name="out")(hidden)


class Transformer(nn.Module):
    """A causal language model."""

    vocabulary: int
    width: int
    layers: int
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        shape = (tokens.shape[1], self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


class LSTM(nn.Module):
    """A language model of one recurrent layer."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width, name="cell"), name="lstm")(x)
        return nn.Dense(self.vocabulary, name="head")(x)


def _digits(count: int) -> tuple[Any, Any]:
    x, y = load_digits(return_X_y=True)
    return np.float32(x[:count] / 16), np.int32(y[:count])


def _tokens(batch: int, length: int, vocabulary: int) -> tuple[Any, Any]:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def _mlp(smoke: bool) -> Workload:
    hidden = (16, 16) if smoke else (512, 512)
    batch = _digits(16 if smoke else 512)
    return Workload("MLP on digits", MLP(hidden, 10), batch, ("hidden_0", "hidden_1"))


def _autoencoder(smoke: bool) -> Workload:
    x, _ = _digits(16 if smoke else 512)
    return Workload("autoencoder of 100 units", MLP((100,), 64), (x, x), ("hidden_0",))


def _sparse_autoencoder(smoke: bool) -> Workload:
    width, units, count = (16, 64, 16) if smoke else (512, 8192, 256)
    x = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    name = f"sparse autoencoder, {width} × {units}"
    return Workload(name, MLP((units,), width), (x, x), ("hidden_0",))


def _cnn(smoke: bool) -> Workload:
    x, y = _digits(16 if smoke else 256)
    features = (4, 4) if smoke else (32, 64)
    batch = x.reshape(-1, 8, 8, 1), y
    return Workload("CNN on digits", CNN(features), batch, ("conv_0", "conv_1"))


def _transformer(smoke: bool) -> Workload:
    vocabulary, width, layers, shape = (32, 16, 2, (2, 8)) if smoke else (256, 128, 6, (8, 64))
    return Workload(
        f"transformer of {layers} layers",
        Transformer(vocabulary, width, layers),
        _tokens(*shape, vocabulary),
        tuple(f"block_{i}/hidden" for i in range(layers)),
    )


def _lstm(smoke: bool) -> Workload:
    vocabulary, width, shape = (32, 16, (2, 8)) if smoke else (256, 256, (32, 64))
    penalty = jr.ActivationNorm(AR) + jr.TemporalDifference(TAR)
    batch = _tokens(*shape, vocabulary)
    return Workload("LSTM with AR and TAR", LSTM(vocabulary, width), batch, ("lstm",), penalty)


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "mlp": _mlp,
    "autoencoder": _autoencoder,
    "sae": _sparse_autoencoder,
    "cnn": _cnn,
    "transformer": _transformer,
    "lstm": _lstm,
}
"""Each is called with whether its shapes should be tiny."""
