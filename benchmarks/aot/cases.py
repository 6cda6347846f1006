"""What is compiled: models with a penalty and without, and optimizer chains."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxreg as jr

BF16: Any = jnp.bfloat16
ARRAY: Any = jax.ShapeDtypeStruct
L1, L2, KL, GROUP = (
    jr.L1(1e-3),
    jr.L2(1e-4),
    jr.KLSparsity(1e-2, target=0.05),
    jr.GroupLasso(1e-3, axis=-1),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step's loss and gradient, whose penalty can be left out.

    Args:
        model: a module with a value named "code".
        penalty: the penalty of that value.
        input: the shape of the input.
        code: the shape of the value.
        gradient: whether the step takes the gradient; else it is the forward pass alone.
    """

    model: nn.Module
    penalty: jr.Penalty
    input: tuple[int, ...]
    code: tuple[int, ...]
    gradient: bool = True

    def step(self, penalized: bool) -> tuple[Callable[..., Any], tuple[Any, Any]]:
        """Return the function and the shapes of its arguments, with the penalty or without."""
        activity = jr.activity({"**/code": self.penalty if penalized else None})
        x = ARRAY(self.input, BF16)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), x)

        def forward(variables: Any, x: Any) -> Any:
            y, terms = activity(self.model.apply)(variables, x)
            return (y, terms.total)

        def loss(variables: Any, x: Any) -> Any:
            y, total = forward(variables, x)
            # Of the input's shape where it is an autoencoder's output.
            error = y - x if y.shape == x.shape else y
            return jnp.mean(jnp.square(error.astype(jnp.float32))) + total

        return jax.value_and_grad(loss) if self.gradient else forward, (variables, x)


class Layer(nn.Module):
    """A dense layer whose output is the value."""

    width: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for an input (..., features)."""
        h = self.activation(nn.Dense(self.width, dtype=BF16, param_dtype=BF16)(x))
        return jr.sow(self, "code", h, L1)


class TwoLayers(nn.Module):
    """An MLP or an autoencoder."""

    width: int
    out: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for an input (..., features)."""
        h = Layer(self.width, self.activation)(x)
        return nn.Dense(self.out, dtype=BF16, param_dtype=BF16)(h)


class Convolution(nn.Module):
    """A convolution whose rectified output is the value, and its mean over the image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for an input (..., features)."""
        h = nn.relu(nn.Conv(128, (3, 3), dtype=BF16, param_dtype=BF16)(x))
        return jnp.mean(jr.sow(self, "code", h, L1), axis=(1, 2))


class Attention(nn.Module):
    """A pre-norm attention block, whose heads' output is the value."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for an input (..., features)."""
        h = nn.LayerNorm(dtype=BF16, param_dtype=BF16)(x)
        h = nn.MultiHeadDotProductAttention(8, dtype=BF16, param_dtype=BF16)(h)
        y: jax.Array = x + jr.sow(self, "code", h, L2)
        return y


class FeedForward(nn.Module):
    """A pre-norm feed-forward block, whose hidden activation is the value."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output for an input (..., features)."""
        h = nn.LayerNorm(dtype=BF16, param_dtype=BF16)(x)
        h = Layer(4 * x.shape[-1], nn.gelu)(h)
        return x + nn.Dense(x.shape[-1], dtype=BF16, param_dtype=BF16)(h)


def _dense(penalty: jr.Penalty, activation: Any = nn.relu) -> Case:
    return Case(Layer(16384, activation), penalty, (8192, 512), (8192, 16384), gradient=False)


CASES: dict[str, Case] = {
    "dense, L1": _dense(L1),
    "dense, L2": _dense(L2),
    "dense, KL": _dense(KL, nn.sigmoid),
    "dense, group": _dense(GROUP),
    "MLP, L1": Case(TwoLayers(4096, 256), L1, (8192, 512), (8192, 4096)),
    "SAE, L1": Case(TwoLayers(16384, 1024), L1, (8192, 1024), (8192, 16384)),
    "convolution, L1": Case(Convolution(), L1, (64, 56, 56, 64), (64, 56, 56, 128)),
    "attention, L2": Case(Attention(), L2, (8, 1024, 512), (8, 1024, 512)),
    "LayerNorm block, L1": Case(FeedForward(), L1, (8, 1024, 512), (8, 1024, 2048)),
}


def chains() -> dict[str, tuple[Any, Any]]:
    """Return optimizers by name, each with the penalty in the loss, or None."""
    l2, l1 = jr.kernel(jr.L2(1e-4)), jr.kernel(jr.L1(1e-4))
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    return {
        "AdamW": (adamw, None),
        "AdamW + coupled L2, add_penalty_gradient": (
            optax.chain(jr.add_penalty_gradient(l2), adamw),
            None,
        ),
        "AdamW + L1, apply_prox": (optax.chain(adamw, jr.apply_prox(l1, 1e-3)), None),
        "proximal_adam, L1": (jr.proximal_adam(1e-3, l1), None),
        "AdamW + L2 in the loss": (adamw, l2),
        "AdamW + L2 in the loss, leaf by leaf": (adamw, leaf_by_leaf),
    }


LARGE = {"layers": [{"kernel": ARRAY((4096, 6144), jnp.float32)}] * 4}
SMALL = [{"kernel": ARRAY((256, 256), jnp.float32)}] * 200


def leaf_by_leaf(params: Any) -> Any:
    """Return what people write by hand."""
    return 1e-4 * sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def update(chain: tuple[Any, Any], params: Any) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
    """Return an update step of given gradients of the loss, and the shapes of its arguments."""
    tx, penalty = chain

    def step(params: Any, state: Any, gradients: Any) -> Any:
        value: Any = 0.0
        if penalty is not None:
            value, own = jax.value_and_grad(penalty)(params)
            gradients = optax.tree.add(gradients, own)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (params, jax.eval_shape(tx.init, params), params)


FUSED: dict[str, tuple[Callable[[jax.Array], jax.Array], jr.Penalty]] = {
    "relu, L1": (jax.nn.relu, L1),
    "sigmoid, KL": (jax.nn.sigmoid, KL),
    "tanh, L1L2 + KL": (jnp.tanh, jr.L1L2(1e-3, 1e-4) + KL),
    "gelu, L1": (jax.nn.gelu, L1),
    "silu, Huber": (jax.nn.silu, jr.Huber(1e-3, delta=0.5)),
}
"""Activations and penalties that `jaxreg.ops.dense` and `mlp` have kernels for."""


def fused(
    name: str, implementation: str = "mosaic_gpu", gradient: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a dense layer with its penalty, or its gradient, and the shapes of its arguments."""
    activation, penalty = FUSED[name]

    def forward(x: Any, w: Any, b: Any) -> Any:
        return jr.ops.dense(
            x, w, b, activation=activation, penalty=penalty, implementation=implementation
        )

    def loss(w: Any, x: Any, b: Any) -> Any:
        a, value = forward(x, w, b)
        return jnp.mean(jnp.square(a.astype(jnp.float32))) + value

    x, w, b = (ARRAY(s, BF16) for s in ((8192, 512), (512, 16384), (16384,)))
    return (jax.value_and_grad(loss), (w, x, b)) if gradient else (forward, (x, w, b))


def fused_loss(
    name: str, implementation: str | None = "mosaic_gpu", width: int = 512
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return an autoencoder's loss with its penalty, and the shapes of its arguments.

    Args:
        name: a key of `FUSED`.
        implementation: of `jaxreg.ops.mlp`; None leaves out the penalty.
        width: of the input.
    """
    activation, penalty = FUSED[name]

    def loss(params: Any, x: Any) -> Any:
        w1, b1, w2, b2 = params
        if implementation is None:
            y, value = activation(x @ w1 + b1) @ w2 + b2, 0.0
        else:
            y, _, value = jr.ops.mlp(
                *(x, w1, b1, w2, b2),
                activation=activation,
                penalty=penalty,
                implementation=implementation,
            )
        return jnp.mean(jnp.square((y - x).astype(jnp.float32))) + value

    params = tuple(ARRAY(s, BF16) for s in ((width, 16384), (16384,), (16384, width), (width,)))
    return loss, (params, ARRAY((8192, width), BF16))


def fused_step(*settings: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the gradient of `fused_loss`, and the shapes of its arguments."""
    loss, arguments = fused_loss(*settings)
    return jax.value_and_grad(loss), arguments
