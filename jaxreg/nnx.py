"""Flax NNX layers that carry their penalties."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jaxreg.activity import alike, sow
from jaxreg.activity._nnx import PenaltyTerm as PenaltyTerm
from jaxreg.activity._nnx import is_foreign
from jaxreg.ops._dispatch import Implementation
from jaxreg.ops.dense import Activation, penalized
from jaxreg.penalties import Penalty


class ActivityRegularization(nnx.Module):
    """A layer that penalizes what passes through it, as Keras's layer of that name.

    The penalty is collected by a surrounding `jaxreg.activity` (with no rules: `activity({})`),
    under the layer's path and `output`.

    Args:
        penalty: the penalty of the output; with None, only a rule gives it one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxreg as jr
        >>> model = nnx.Sequential(jax.nn.relu, jr.nnx.ActivityRegularization(jr.L1(0.1)))
        >>> y, terms = jr.activity({})(model)(jnp.array([[1.0, -1.0, 2.0]]))
        >>> {path: round(float(value), 4) for path, value in terms.items()}
        {'layers/1/output': 0.3}
    """

    def __init__(self, penalty: Penalty | None):
        self.penalty = _held(penalty, "ActivityRegularization(penalty=...)")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`, of any shape."""
        return sow(self, "output", x, self.penalty)

    def _jaxreg_output_penalty(self) -> Penalty | None:
        return self.penalty  # type: ignore[no-any-return]


class Dense(nnx.Module):
    """A dense layer with its activation and its penalties, by Keras's keywords.

    Its parameters, `kernel` and `bias`, are those of `flax.nnx.Linear`, and so are their
    initializers. The penalties are terms of a surrounding `jaxreg.activity` (with no rules:
    `activity({})`), under the layer's path: `output`, which the activity's reduction divides and a
    rule for that path replaces (one for the layer's own path adds to it); and `kernel` and `bias`,
    which neither does, and which count once, whether the layer runs often or not at all. Layers
    that share a parameter must give it one penalty: two are an error. Without a surrounding
    activity nothing is penalized.

    Args:
        in_features: the size of the input's last axis.
        out_features: the size of the output's.
        activation: a function of an array; None is the identity.
        use_bias: whether there is a bias.
        kernel_regularizer: the penalty of the kernel.
        bias_regularizer: the penalty of the bias.
        activity_regularizer: the penalty of the output, after the activation.
        dtype: of the computation; None is that of the input and the parameters together.
        param_dtype: of the parameters.
        kernel_init: the kernel's initializer.
        bias_init: the bias's initializer.
        implementation: of the layer with its activity penalty; see `jaxreg.ops.dense`.
        rngs: the random number generators.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxreg as jr
        >>> layer = jr.nnx.Dense(5, 4, jax.nn.relu, kernel_regularizer=jr.L2(1e-4),
        ...                      activity_regularizer=jr.L1(1e-3), rngs=nnx.Rngs(0))
        >>> y, terms = jr.activity({})(layer)(jnp.ones((3, 5)))
        >>> sorted(terms)
        ['kernel', 'output']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation | None = None,
        *,
        use_bias: bool = True,
        kernel_regularizer: Penalty | None = None,
        bias_regularizer: Penalty | None = None,
        activity_regularizer: Penalty | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = nnx.nn.linear.default_kernel_init,
        bias_init: Any = jax.nn.initializers.zeros,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape[1:], param_dtype))
            if use_bias
            else nnx.data(None)
        )
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype
        self.activation = activation
        self.kernel_regularizer = _held(kernel_regularizer, "Dense(kernel_regularizer=...)")
        self.bias_regularizer = _held(bias_regularizer, "Dense(bias_regularizer=...)")
        self.activity_regularizer = _held(activity_regularizer, "Dense(activity_regularizer=...)")
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output (..., out_features) for an input (..., in_features)."""
        if self._jaxreg_penalties() and is_foreign(self):
            raise ValueError(
                "`jaxreg.activity` cannot measure the parameters of a `jaxreg.nnx.Dense` that is"
                " not part of the NNX module it was given. Penalize them by `jaxreg.kernel`."
            )
        bias = None if self.bias is None else self.bias[...]
        operands = promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        return penalized(
            self, operands, self.activation, self.activity_regularizer, self.implementation
        )

    def _jaxreg_output_penalty(self) -> Penalty | None:
        return self.activity_regularizer  # type: ignore[no-any-return]

    def _jaxreg_penalties(self) -> dict[str, tuple[Penalty, tuple[int, ...]]]:
        """Return the penalties of the parameters, each with the parameter's shape in the layer."""
        shape = (self.in_features, self.out_features)
        own: dict[str, tuple[Any, tuple[int, ...]]] = {"kernel": (self.kernel_regularizer, shape)}
        if self.bias is not None:
            own["bias"] = (self.bias_regularizer, shape[1:])
        return {name: (p, shape) for name, (p, shape) in own.items() if p is not None}


class MLP(nnx.Module):
    """Dense layers one after the other, an activation after each but the last.

    Args:
        features: the size of the input and of each layer's output.
        activation: a function of an array.
        use_bias: whether there are biases.
        kernel_regularizer: the penalty of each kernel.
        bias_regularizer: the penalty of each bias.
        activity_regularizer: the penalty of each hidden layer's output, after the activation.
        dtype: of the computation; see `Dense`.
        param_dtype: of the parameters.
        kernel_init: each kernel's initializer.
        bias_init: each bias's initializer.
        implementation: of the hidden layers; see `jaxreg.ops.dense`.
        rngs: the random number generators.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxreg as jr
        >>> model = jr.nnx.MLP((5, 8, 2), activity_regularizer=jr.L1(1e-3), rngs=nnx.Rngs(0))
        >>> y, terms = jr.activity({})(model)(jnp.ones((3, 5)))
        >>> y.shape, list(terms)
        ((3, 2), ['layers/0/output'])
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        activation: Activation = jax.nn.relu,
        use_bias: bool = True,
        kernel_regularizer: Penalty | None = None,
        bias_regularizer: Penalty | None = None,
        activity_regularizer: Penalty | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = nnx.nn.linear.default_kernel_init,
        bias_init: Any = jax.nn.initializers.zeros,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        try:
            sizes = list(itertools.pairwise(features))
        except TypeError:
            sizes = []
        if not sizes:
            raise ValueError(
                "`jaxreg.nnx.MLP(features)` must have the sizes of the input and of at least one"
                f" layer; got {features!r}."
            )
        last = len(sizes) - 1
        self.layers = nnx.List(
            [
                Dense(
                    size,
                    out,
                    activation=activation if i < last else None,
                    use_bias=use_bias,
                    kernel_regularizer=kernel_regularizer,
                    bias_regularizer=bias_regularizer,
                    activity_regularizer=activity_regularizer if i < last else None,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    kernel_init=kernel_init,
                    bias_init=bias_init,
                    implementation=implementation if i < last else None,
                    rngs=rngs,
                )
                for i, (size, out) in enumerate(sizes)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output (..., features[-1]) for an input (..., features[0])."""
        for layer in self.layers:
            x = layer(x)
        return x


def _held(penalty: Penalty | None, argument: str) -> Any:
    """Return what a module can hold of a penalty."""
    if penalty is not None and not isinstance(penalty, Penalty):
        raise TypeError(f"`jaxreg.nnx.{argument}` must be a Penalty or None; got {penalty!r}.")
    if penalty is None:
        return None
    penalty = alike(penalty)
    # An array must be data to NNX; numbers stay out of the module's state.
    arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(penalty))
    return nnx.data(penalty) if arrays else penalty
