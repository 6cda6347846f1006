"""The workloads as Keras's users write them, on its JAX backend."""

import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from keras import layers, regularizers

from . import workloads as w


def step_of(workload: w.Workload, params: Any) -> Callable[[], Any]:
    """Return a function that makes one jitted Adam step at each call and returns the loss."""
    model = MODELS[type(workload.model)](workload, params)
    optimizer = keras.optimizers.Adam(1e-3, epsilon=1e-8)
    optimizer.build(model.trainable_variables)

    def loss(trained: Any, rest: Any, x: Any, y: Any) -> Any:
        outputs, rest, penalties = model.stateless_call(
            trained, rest, x, training=True, return_losses=True
        )
        return w.error(outputs, y) + sum(penalties), rest

    def update(trained: Any, rest: Any, state: Any, x: Any, y: Any) -> Any:
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(trained, rest, x, y)
        trained, state = optimizer.stateless_apply(state, grads, trained)
        return value, (trained, rest, state)

    update = jax.jit(update, donate_argnums=(0, 1, 2))
    batch = jax.device_put(workload.batch)
    variables = model.trainable_variables, model.non_trainable_variables, optimizer.variables
    carried = [[[np.array(v.value) for v in part] for part in variables]]

    def step() -> Any:
        value, carried[0] = update(*carried[0], *batch)
        return value

    return step


def _l2() -> Any:
    return regularizers.L2(w.WEIGHTS)


def _place(layer: Any, weights: Any, *inputs: Any, **options: Any) -> Any:
    """Call a layer, which builds it, and give it Flax's weights, in Keras's order."""
    outputs = layer(*inputs, **options)
    layer.set_weights([np.asarray(array) for array in weights])
    return outputs


def _dense(params: Any, x: Any, *, relu: bool = False) -> Any:
    options: Any = {"activity_regularizer": regularizers.L1(w.ACTIVITY)} if relu else {}
    layer = layers.Dense(
        params["kernel"].shape[1],
        activation="relu" if relu else None,
        kernel_regularizer=_l2(),
        **options,
    )
    return _place(layer, [params["kernel"], params["bias"]], x)


def _mlp(workload: w.Workload, params: Any) -> Any:
    x = inputs = keras.Input(workload.batch[0].shape[1:])
    for name in workload.penalized:
        x = _dense(params[name]["dense"], x, relu=True)
    return keras.Model(inputs, _dense(params["out"], x))


def _cnn(workload: w.Workload, params: Any) -> Any:
    x = inputs = keras.Input(workload.batch[0].shape[1:])
    for name in workload.penalized:
        conv = params[name]["conv"]
        layer = layers.Conv2D(
            conv["kernel"].shape[-1],
            3,
            padding="same",
            activation="relu",
            kernel_regularizer=_l2(),
            activity_regularizer=regularizers.L1(w.ACTIVITY),
        )
        x = _place(layer, [conv["kernel"], conv["bias"]], x)
    return keras.Model(inputs, _dense(params["out"], layers.Flatten()(x)))


class _Position(layers.Layer):
    def build(self, shape: Any) -> None:
        self.position = self.add_weight(shape=shape[1:], name="position")

    def call(self, x: Any) -> Any:
        return x + self.position


def _embed(params: Any, tokens: Any) -> Any:
    embedding = params["embed"]["embedding"]
    layer = layers.Embedding(*embedding.shape, embeddings_regularizer=_l2())
    return _place(layer, [embedding], tokens)


def _norm(params: Any, x: Any) -> Any:
    return _place(layers.LayerNormalization(epsilon=1e-6), [params["scale"], params["bias"]], x)


def _transformer(workload: w.Workload, params: Any) -> Any:
    model: Any = workload.model
    inputs = keras.Input(workload.batch[0].shape[1:], dtype="int32")
    x = _place(_Position(), [params["position"]], _embed(params, inputs))
    for i in range(model.layers):
        block = params[f"block_{i}"]
        normal = _norm(block["norm_1"], x)
        attention = layers.MultiHeadAttention(
            model.heads, model.width // model.heads, kernel_regularizer=_l2()
        )
        weights = [
            block["attention"][name][leaf]
            for name in ("query", "key", "value", "out")
            for leaf in ("kernel", "bias")
        ]
        x = x + _place(attention, weights, normal, normal, use_causal_mask=True)
        hidden = _dense(block["hidden"]["dense"], _norm(block["norm_2"], x), relu=True)
        x = x + _dense(block["out"], hidden)
    return keras.Model(inputs, _dense(params["head"], _norm(params["norm"], x)))


class _Temporal(layers.Layer):
    def call(self, h: Any) -> Any:
        ops = keras.ops
        self.add_loss(w.AR * ops.mean(ops.square(h)))
        self.add_loss(w.TAR * ops.mean(ops.square(h[:, 1:] - h[:, :-1])))
        return h


def _lstm(workload: w.Workload, params: Any) -> Any:
    model: Any = workload.model
    inputs = keras.Input(workload.batch[0].shape[1:], dtype="int32")
    cell = params["cell"]
    layer = layers.LSTM(
        model.width, return_sequences=True, kernel_regularizer=_l2(), recurrent_regularizer=_l2()
    )
    weights = [
        np.concatenate([cell[part + gate][leaf] for gate in "ifgo"], -1)
        for part, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
    ]
    h = _Temporal()(_place(layer, weights, _embed(params, inputs)))
    return keras.Model(inputs, _dense(params["head"], h))


MODELS: dict[Any, Callable[[w.Workload, Any], Any]] = {
    w.MLP: _mlp,
    w.CNN: _cnn,
    w.Transformer: _transformer,
    w.LSTM: _lstm,
}
