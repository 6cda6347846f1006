r"""Penalties of functions: of the derivatives of a model by its input.

Each takes a function of a batch, x of shape (batch, ...) to an array (batch, ...), such as
`lambda x: model.apply(params, x)` or an NNX module, and returns a mean over the examples: a scalar,
added up in float32 or, for float64 input, float64. It is differentiated again by the parameters
that the function closes over, and jitted, like any other function.

An example's output must depend on that example alone. The derivative by x is then that of the sum
over the batch, at the cost of one backward pass. A layer that mixes examples, such as batch
normalization in training, adds derivatives across examples: normalize within an example, or by
fixed statistics. An NNX module must not change its state in the call, as dropout and batch
normalization do in training; Flax raises.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.penalties._arithmetic import of_rank, wide
from jaxreg.penalties._checks import NON_NEGATIVE, require, require_real
from jaxreg.penalties._explicit import on_any_mesh

Function = Callable[[jax.Array], Any]


def gradient_penalty(critic: Function, x: ArrayLike, *, target: ArrayLike = 1.0) -> jax.Array:
    r"""Penalize how far the norms of a critic's gradients are from a target: WGAN-GP.

    $$ \frac1n \sum_{i=1}^n \left(\lVert \nabla_x f(x_i) \rVert_2 - g\right)^2 $$

    Two-sided, as in the paper, whose factor λ (10 there) is left to the caller. For a target of 0,
    that is R1 and R2, use `input_gradient`, which takes no root.

    Args:
        critic: f, a function of a batch to one number for each example, (batch,) or (batch, 1).
        x: (batch, ...): the points to take gradients at, of `interpolate` in the paper.
        target: g, a non-negative scalar.

    Returns:
        A scalar; 0 for an empty batch.

    Gradient:
        By the parameters, that of the formula. At an example whose gradient is zero the norm has
        the subgradient 0.

    Raises:
        TypeError: for an x or an output that is not real floating-point.
        ValueError: for an x without a batch axis, an output of another shape, or a concrete target
            that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import jaxreg as jr
        >>> critic = nn.Dense(1)
        >>> real, fake = jnp.ones((4, 3)), jnp.zeros((4, 3))
        >>> params = critic.init(jax.random.key(0), real)
        >>> def loss(params, key):
        ...     f = lambda x: critic.apply(params, x)
        ...     x = jr.functional.interpolate(key, real, fake)
        ...     distance = jnp.mean(f(fake)) - jnp.mean(f(real))
        ...     return distance + 10.0 * jr.functional.gradient_penalty(f, x)
        >>> gradient = jax.grad(loss)(params, jax.random.key(1))

    References:
        Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, Improved training of Wasserstein GANs,
        NeurIPS, arXiv:1704.00028, 2017.
    """
    require("functional.gradient_penalty(target=...)", target, *NON_NEGATIVE)
    gradients = _input_gradients("gradient_penalty", critic, x)
    norms = optax.safe_norm(gradients, 0.0, axis=1)
    return _mean(jnp.square(norms - jnp.asarray(target, norms.dtype)))


def interpolate(key: jax.Array, real: ArrayLike, fake: ArrayLike) -> jax.Array:
    r"""Return points between real and generated examples, at which WGAN-GP takes gradients.

    $$ \hat x_i = \epsilon_i\, x_i + (1 - \epsilon_i)\, \tilde x_i,
       \qquad \epsilon_i \sim U(0, 1) $$

    Args:
        key: a PRNG key.
        real: x, (batch, ...).
        fake: x̃, of the same shape.

    Returns:
        An array of the shape and dtype of `real`.

    Raises:
        TypeError: for arrays that are not real floating-point.
        ValueError: for arrays of different shapes, or without a batch axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x = jr.functional.interpolate(jax.random.key(0), jnp.ones((4, 2)), jnp.zeros((4, 2)))
        >>> bool(jnp.all(x[:, 0] == x[:, 1])), bool(jnp.all((x >= 0) & (x <= 1)))
        (True, True)

    References:
        Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, Improved training of Wasserstein GANs,
        NeurIPS, arXiv:1704.00028, 2017.
    """
    real, fake = _batch("interpolate", "real", real), _batch("interpolate", "fake", fake)
    if real.shape != fake.shape:
        raise ValueError(
            "`jaxreg.functional.interpolate` takes real and generated examples of the same shape;"
            f" got {real.shape} and {fake.shape}."
        )
    x = wide(real)
    share = jax.random.uniform(key, (x.shape[0], *(1,) * (x.ndim - 1)), x.dtype)
    return (share * x + (1 - share) * fake.astype(x.dtype)).astype(real.dtype)


def input_gradient(f: Function, x: ArrayLike) -> jax.Array:
    r"""Penalize the squared gradients by the input: double backpropagation, and R1 and R2 of GANs.

    $$ \frac1n \sum_{i=1}^n \lVert \nabla_x f(x_i) \rVert_2^2 $$

    With f the loss of each example it is double backpropagation, input gradient regularization.
    With f a discriminator's logit, `gamma / 2 * input_gradient(f, real)` is R1, and R2 on generated
    examples.

    Args:
        f: a function of a batch to one number for each example, (batch,) or (batch, 1): the losses
            of the examples, and not their mean.
        x: (batch, ...).

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: for an x or an output that is not real floating-point.
        ValueError: for an x without a batch axis, or an output of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x, y = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([0.0, 1.0])
        >>> def loss(w):
        ...     losses = lambda x: (x @ w - y) ** 2
        ...     return jnp.mean(losses(x)) + 0.1 * jr.functional.input_gradient(losses, x)
        >>> round(float(loss(jnp.array([1.0, 1.0]))), 6)
        8.1

    References:
        Drucker and LeCun, Improving generalization performance using double backpropagation, IEEE
        Transactions on Neural Networks 3(6), 1992. Ross and Doshi-Velez, Improving the adversarial
        robustness and interpretability of deep neural networks by regularizing their input
        gradients, AAAI, arXiv:1711.09404, 2018. Mescheder, Geiger and Nowozin, Which training
        methods for GANs do actually converge?, ICML, arXiv:1801.04406, 2018.
    """
    gradients = _input_gradients("input_gradient", f, x)
    return _mean(jnp.sum(jnp.square(gradients), axis=1))


def jacobian_norm(
    f: Function, x: ArrayLike, *, key: jax.Array | None = None, samples: int = 1
) -> jax.Array:
    r"""Penalize the squared Frobenius norm of the Jacobian by the input.

    $$ \frac1n \sum_{i=1}^n \left\lVert \frac{\partial f}{\partial x}(x_i) \right\rVert_F^2
       = \frac1n \sum_{i=1}^n C \; \mathbb{E}_{v \sim S^{C-1}}
         \left\lVert \frac{\partial (v \cdot f)}{\partial x}(x_i) \right\rVert_2^2 $$

    C is the number of outputs of an example, and v is uniform on the unit sphere. Without a key it
    is exact, by as many derivatives as an example has inputs or outputs, whichever is less, all at
    once. With a key it is the unbiased estimate by `samples` vectors v for each example. The
    paper's factor λ/2 is left to the caller.

    Args:
        f: a function of a batch to an array (batch, ...).
        x: (batch, ...).
        key: a PRNG key, or None for the exact norm.
        samples: how many v are drawn for each example, one backward pass each. Static.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        TypeError: for an x or an output that is not real floating-point; without a key, where there
            are more outputs than inputs, for a function with a `jax.custom_vjp`, which JAX cannot
            take forward.
        ValueError: for an x or an output without the batch axis, samples below 1, or samples other
            than 1 without a key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x, kernel = jnp.ones((4, 3)), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> f = lambda x: x @ kernel
        >>> float(jr.functional.jacobian_norm(f, x))
        5.0
        >>> estimate = jr.functional.jacobian_norm(f, x, key=jax.random.key(0), samples=2)

    References:
        Hoffman, Roberts and Yaida, Robust learning with Jacobian regularization, arXiv:1908.02729,
        2019.
    """
    x = _batch("jacobian_norm", "x", x)
    samples = operator.index(samples)
    if samples < 1 or (key is None and samples != 1):
        raise ValueError(
            "`jaxreg.functional.jacobian_norm(samples=...)` must be at least 1, and takes a key;"
            f" got samples={samples}, key={key!r}."
        )
    out, pull = _vjp("jacobian_norm", f, x)
    if out.ndim == 0 or out.shape[0] != x.shape[0]:
        raise ValueError(
            "`jaxreg.functional.jacobian_norm` takes a function whose output has the batch axis;"
            f" got an output of shape {out.shape} for x of shape {x.shape}."
        )
    inputs, outputs = math.prod(x.shape[1:]), math.prod(out.shape[1:])
    if key is not None:
        (derivatives,) = jax.vmap(pull)(_unit_vectors(key, samples, out))
        factor = outputs / samples
    elif outputs <= inputs:
        (derivatives,) = jax.vmap(pull)(_basis(out))
        factor = 1.0
    else:
        derivatives = jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(_basis(x))
        factor = 1.0
    squares = jnp.square(wide(derivatives))
    return factor * _mean(jnp.sum(squares, axis=(0, *range(2, squares.ndim))))


def contractive(
    activation: Function, x: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None = None
) -> jax.Array:
    r"""Penalize the Jacobian of one dense layer, in closed form: contractive autoencoders.

    $$ \frac1n \sum_{i=1}^n \sum_j \phi'(z_{ij})^2 \sum_k W_{kj}^2, \qquad z_i = x_i W + b $$

    It is `jacobian_norm` of h = φ(xW + b) by x, at the cost of the layer itself.

    Args:
        activation: φ, an elementwise function, such as `jax.nn.sigmoid`.
        x: (..., in): all axes but the last are examples.
        kernel: W, (in, out).
        bias: b, (out,), or None for 0.

    Returns:
        A scalar; 0 for an empty batch.

    Gradient:
        By x, W and b, through φ″.

    Raises:
        TypeError: for arrays that are not real floating-point.
        ValueError: for shapes that do not go together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x, kernel = jnp.zeros((4, 3)), jnp.ones((3, 2))
        >>> float(jr.functional.contractive(jax.nn.sigmoid, x, kernel))  # 2 · (1/4)² · 3
        0.375

    References:
        Rifai, Vincent, Muller, Glorot and Bengio, Contractive auto-encoders: explicit invariance
        during feature extraction, ICML, 2011.
    """
    x = require_real("functional.contractive", "x", x)
    kernel = require_real("functional.contractive", "kernel", kernel)
    bias = jnp.zeros(kernel.shape[-1:], kernel.dtype) if bias is None else bias
    bias = require_real("functional.contractive", "bias", bias)
    if kernel.ndim != 2 or x.shape[-1:] != kernel.shape[:1] or bias.shape != kernel.shape[1:]:
        raise ValueError(
            "`jaxreg.functional.contractive` takes x (..., in), kernel (in, out) and bias (out,);"
            f" got {x.shape}, {kernel.shape} and {bias.shape}."
        )
    x, kernel, bias = wide(x), wide(kernel), wide(bias)
    z = x @ kernel
    z += of_rank(z.ndim, bias)
    # Backwards, as a `jax.custom_vjp` has no other derivative; the entries are independent.
    a, pull = jax.vjp(activation, z)
    (slopes,) = pull(jnp.ones_like(z, a.dtype))
    weights = of_rank(z.ndim, jnp.sum(jnp.square(kernel), axis=0))
    return _mean(jnp.sum(jnp.square(slopes) * weights, axis=-1))


def lipschitz_bound(kernels: Any) -> jax.Array:
    r"""Return a bound of the Lipschitz constant of a network: the product of its layers' norms.

    $$ \prod_l \lVert W_l \rVert_2 \quad\text{for dense layers}, \qquad
       \prod_l \sqrt{k_l}\, \lVert \mathrm{reshape}(W_l) \rVert_2 \quad\text{for convolutions} $$

    It bounds ‖f(x) − f(y)‖₂ / ‖x − y‖₂ for layers applied one after the other, between which are
    functions of Lipschitz constant at most 1, such as ReLU, tanh and the sigmoid, but not GELU or
    SiLU. For a convolution ‖reshape(W)‖₂, the spectral norm of the kernel as a matrix with a
    column for each output channel, is not a bound by itself: each input entry is in up to k
    windows, k the number of positions in the window, which is where √k comes from. That holds for
    any stride, dilation and number of groups, and padding with zeros or around.

    Args:
        kernels: a pytree of the kernels: (in, out) of a dense layer, (*window, in, out) of a
            convolution, as Flax has them. Pass the layers of a stack one by one, and no kernels of
            attention, which is no such layer.

    Returns:
        A scalar, in at least float32.

    Gradient:
        That of the largest singular value, u vᵀ, shared between equal ones; 0 for a kernel of
        zeros. It takes a singular value decomposition of each kernel. Where singular values are
        equal there is no second derivative.

    Raises:
        TypeError: for a kernel that is not real floating-point.
        ValueError: for a kernel of a rank below 2, or no kernel at all.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernels = [jnp.diag(jnp.array([3.0, 1.0])), jnp.array([[0.5], [0.0]])]
        >>> round(float(jr.functional.lipschitz_bound(kernels)), 5)
        1.5

    References:
        Szegedy et al., Intriguing properties of neural networks, ICLR, arXiv:1312.6199, 2014.
        Tsuzuku, Sato and Sugiyama, Lipschitz-margin training, NeurIPS, arXiv:1802.04034, 2018
        (convolutions).
    """
    norms = [_spectral_norm(kernel) for kernel in jax.tree.leaves(kernels)]
    if not norms:
        raise ValueError("`jaxreg.functional.lipschitz_bound` takes at least one kernel; got none.")
    return functools.reduce(operator.mul, norms)


def _spectral_norm(kernel: ArrayLike) -> jax.Array:
    kernel = require_real("functional.lipschitz_bound", "kernels", kernel)
    if kernel.ndim < 2:
        raise ValueError(
            "`jaxreg.functional.lipschitz_bound` takes kernels (in, out) or (*window, in, out); got"
            f" shape {kernel.shape}."
        )
    *window, inputs, outputs = kernel.shape

    def largest(kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(math.prod(window) * inputs, outputs)
        # The singular vectors of a matrix of zeros are arbitrary, and with them the gradient.
        zero = jnp.all(matrix == 0)
        # LAPACK may loop for ever for an inf.
        matrix = jnp.where(jnp.isinf(matrix), jnp.nan, matrix)
        return jnp.where(zero, 0, jnp.linalg.norm(jnp.where(zero, 1, matrix), ord=2))

    norm: jax.Array = on_any_mesh(largest, wide(kernel))
    return math.sqrt(math.prod(window)) * norm


def _input_gradients(name: str, f: Function, x: ArrayLike) -> jax.Array:
    """Return the gradients of the examples' outputs, [batch, entries]."""
    x = _batch(name, "x", x)
    out, pull = _vjp(name, f, x)
    if out.shape not in ((x.shape[0],), (x.shape[0], 1)):
        raise ValueError(
            f"`jaxreg.functional.{name}` takes a function to one number for each example, (batch,)"
            f" or (batch, 1), not to their mean; got an output of shape {out.shape} for x of shape"
            f" {x.shape}."
        )
    (gradients,) = pull(jnp.ones_like(out))
    return wide(gradients).reshape(x.shape[0], math.prod(x.shape[1:]))


def _vjp(name: str, f: Function, x: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
    out, pull = jax.vjp(f, x)
    if not isinstance(out, jax.Array):
        raise TypeError(
            f"`jaxreg.functional.{name}` takes a function that returns one array; got"
            f" {type(out).__name__}."
        )
    return require_real(f"functional.{name}", "the function's output", out), pull


def _basis(like: jax.Array) -> jax.Array:
    """Return the unit vectors of an example's entries, each for all examples."""
    size = math.prod(like.shape[1:])
    eye = jnp.eye(size, dtype=like.dtype).reshape(size, 1, *like.shape[1:])
    return eye * jnp.ones_like(like)[None]


def _unit_vectors(key: jax.Array, samples: int, like: jax.Array) -> jax.Array:
    """Return vectors drawn uniformly from the unit sphere of an example's entries."""
    entries = math.prod(like.shape[1:])
    normal = jax.random.normal(key, (samples, like.shape[0], entries), wide(like).dtype)
    unit: jax.Array = normal / jnp.linalg.norm(normal, axis=2, keepdims=True)
    return unit.astype(like.dtype).reshape(samples, *like.shape) * jnp.ones_like(like)[None]


def _mean(values: jax.Array) -> jax.Array:
    return jnp.sum(values) / max(values.size, 1)


def _batch(name: str, argument: str, value: ArrayLike) -> jax.Array:
    array = require_real(f"functional.{name}", argument, value)
    if array.ndim == 0:
        raise ValueError(
            f"`jaxreg.functional.{name}` takes arrays with an axis of examples; got shape () for"
            f' "{argument}".'
        )
    return array
