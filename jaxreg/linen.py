"""Flax Linen layers that carry their penalties."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jaxreg.activity import Parameter, alike, site, sow
from jaxreg.ops._dispatch import Implementation
from jaxreg.ops.dense import Activation, penalized
from jaxreg.penalties import Penalty


class ActivityRegularization(nn.Module):
    """A layer that penalizes what passes through it, as Keras's layer of that name.

    The penalty is collected by a surrounding `jaxreg.activity` (with no rules: `activity({})`),
    under the layer's path and `output`.

    Args:
        penalty: the penalty of the output; with None, only a rule gives it one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import jaxreg as jr
        >>> model = nn.Sequential([nn.relu, jr.linen.ActivityRegularization(jr.L1(0.1))])
        >>> y, terms = jr.activity({})(model.apply)({}, jnp.array([[1.0, -1.0, 2.0]]))
        >>> {path: round(float(value), 4) for path, value in terms.items()}
        {'layers_1/output': 0.3}
    """

    penalty: Penalty | None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`, of any shape."""
        return sow(self, "output", x, self.penalty)


class Dense(nn.Module):
    """A dense layer with its activation and its penalties, by Keras's keywords.

    Its parameters, `kernel` and `bias`, are those of `flax.linen.Dense`, and so are their
    initializers. The penalties are terms of a surrounding `jaxreg.activity` (with no rules:
    `activity({})`), under the layer's path: `output`, which the activity's reduction divides and a
    rule for that path replaces (one for the layer's own path adds to it); and `kernel` and `bias`,
    which neither does, and which count once however often the layer runs. Without a surrounding
    activity nothing is penalized.

    Args:
        features: the size of the output's last axis.
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

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> layer = jr.linen.Dense(4, jax.nn.relu, kernel_regularizer=jr.L2(1e-4),
        ...                        activity_regularizer=jr.L1(1e-3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 5)))
        >>> y, terms = jr.activity({})(layer.apply)(variables, jnp.ones((3, 5)))
        >>> sorted(terms)
        ['kernel', 'output']
    """

    features: int
    activation: Activation | None = None
    use_bias: bool = True
    kernel_regularizer: Penalty | None = None
    bias_regularizer: Penalty | None = None
    activity_regularizer: Penalty | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output (..., features) for an input (..., d)."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        for name in ("kernel", "bias", "activity"):
            penalty = getattr(self, f"{name}_regularizer")
            if penalty is not None and not isinstance(penalty, Penalty):
                raise TypeError(
                    f"`jaxreg.linen.Dense({name}_regularizer=...)` must be a Penalty or None; got"
                    f" {penalty!r}."
                )
        self._report("kernel", self.kernel_regularizer, shape)
        self._report("bias", self.bias_regularizer if self.use_bias else None, shape[1:])
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        operands = (x, kernel, bias)
        return penalized(
            self, operands, self.activation, self.activity_regularizer, self.implementation
        )

    def _report(self, name: str, penalty: Penalty | None, shape: tuple[int, ...]) -> None:
        found = site(self, name)
        if penalty is not None and found is not None:
            run, path = found
            penalty = alike(penalty)
            run.keep(self, path, penalty, Parameter(penalty, shape))


class MLP(nn.Module):
    """Dense layers one after the other, an activation after each but the last.

    Args:
        features: the size of each layer's output.
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

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> model = jr.linen.MLP((8, 2), activity_regularizer=jr.L1(1e-3))
        >>> variables = model.init(jax.random.key(0), jnp.ones((3, 5)))
        >>> y, terms = jr.activity({})(model.apply)(variables, jnp.ones((3, 5)))
        >>> y.shape, list(terms)
        ((3, 2), ['Dense_0/output'])
    """

    features: Sequence[int]
    activation: Activation = nn.relu
    use_bias: bool = True
    kernel_regularizer: Penalty | None = None
    bias_regularizer: Penalty | None = None
    activity_regularizer: Penalty | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the output (..., features[-1]) for an input (..., d)."""
        try:
            sizes = tuple(self.features)
        except TypeError:
            sizes = ()
        if not sizes:
            raise ValueError(
                "`jaxreg.linen.MLP(features)` must have the sizes of at least one layer; got"
                f" {self.features!r}."
            )
        last = len(sizes) - 1
        for i, features in enumerate(sizes):
            x = Dense(
                features,
                activation=self.activation if i < last else None,
                use_bias=self.use_bias,
                kernel_regularizer=self.kernel_regularizer,
                bias_regularizer=self.bias_regularizer,
                activity_regularizer=self.activity_regularizer if i < last else None,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                implementation=self.implementation if i < last else None,
            )(x)
        return x
