"""Gates that keep the largest entries, of an example or of a batch."""

import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.penalties._arithmetic import among_largest
from jaxreg.penalties._checks import require_real
from jaxreg.penalties._explicit import on_any_mesh


def top_k(x: ArrayLike, k: int, *, axis: int = -1) -> jax.Array:
    r"""Keep the k largest entries along an axis, and set the others to 0.

    $$ z_i = \begin{cases} x_i & x_i \text{ is among the } k \text{ largest} \\
                           0 & \text{otherwise} \end{cases} $$

    The largest, not the largest in modulus: negative entries are kept where there are not k others.
    The paper's implementation applies ReLU as well: `jax.nn.relu(top_k(x, k))`.

    Args:
        x: pre-activations.
        k: how many entries are kept, from 1 to the size of the axis. Static.
        axis: the axis that the k are taken along.

    Returns:
        An array of the shape and dtype of `x`. Of equal entries the first are kept, so that no more
        than k are. A NaN is kept as well.

    Gradient:
        1 for entries that are kept, and 0 for the others.

    Raises:
        TypeError: for an x that is not real floating-point, or a k or an axis that is no integer.
        ValueError: for a k out of its range, or an axis that x does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.gates.top_k(jnp.array([3.0, 1.0, 2.0, 2.0]), 2).tolist()
        [3.0, 0.0, 2.0, 0.0]

    References:
        Makhzani and Frey, k-Sparse autoencoders, ICLR, arXiv:1312.5663, 2014. Gao et al., Scaling
        and evaluating sparse autoencoders, arXiv:2406.04093, 2024.
    """
    x = require_real("gates.top_k", "x", x)
    if not -x.ndim <= operator.index(axis) < x.ndim:
        raise ValueError(
            f"`jaxreg.gates.top_k(axis=...)` must name an axis of x; got axis={axis} for x of shape"
            f" {x.shape}."
        )
    k = _check_k("top_k", k, x, x.shape[axis])
    kept: jax.Array = on_any_mesh(
        lambda x: jnp.moveaxis(_keep_largest(jnp.moveaxis(x, axis, -1), k), -1, axis),
        x,
        split=True,
    )
    return kept


def batch_top_k(x: ArrayLike, k: int) -> jax.Array:
    r"""Keep the k·n largest entries of n examples, and set the others to 0.

    Each example keeps k on average, and as many as it needs. The last axis holds features, all
    others together are the n examples: under `vmap` over examples it would be `top_k`. The paper's
    implementation applies ReLU first: `batch_top_k(jax.nn.relu(x), k)`.

    At test time an example must not depend on the others: keep the mean of `batch_top_k_threshold`
    over training batches, and use `jnp.where(x > threshold, x, 0)` instead.

    Args:
        x: pre-activations, (batch, ..., features).
        k: how many entries of an example are kept on average, from 1 to the number of features.
            Static.

    Returns:
        An array of the shape and dtype of `x`. Of equal entries the first are kept, so that no more
        than k·n are. A NaN is kept as well.

    Gradient:
        1 for entries that are kept, and 0 for the others.

    Raises:
        TypeError: for an x that is not real floating-point, or a k that is no integer.
        ValueError: for a k out of its range, or an x without axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.gates.batch_top_k(jnp.array([[5.0, 4.0, 3.0], [1.0, 2.0, 0.5]]), 1).tolist()
        [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]

    References:
        Bussmann, Leask and Nanda, BatchTopK sparse autoencoders, arXiv:2412.06410, 2024.
    """
    x = require_real("gates.batch_top_k", "x", x)
    if x.ndim == 0:
        raise ValueError("`jaxreg.gates.batch_top_k` takes an x with an axis of features; got ().")
    total = _check_k("batch_top_k", k, x, x.shape[-1]) * math.prod(x.shape[:-1])
    kept: jax.Array = on_any_mesh(
        lambda x: _keep_largest(x.reshape(x.size), total).reshape(x.shape), x, split=True
    )
    return kept


def batch_top_k_threshold(z: ArrayLike) -> jax.Array:
    r"""Return the smallest positive entry of what `batch_top_k` kept, a scalar; 0 if there is none.

    $$ \theta = \mathbb{E}_Z \left[ \min \{ z_{ij} : z_{ij} > 0 \} \right] $$

    is the test-time threshold: the mean of what this function returns for batches Z.

    Args:
        z: the output of `batch_top_k`.

    Returns:
        A scalar of the dtype of `z`.

    Gradient:
        0: the threshold is measured, and not trained.

    Raises:
        TypeError: for a z that is not real floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> threshold = jr.gates.batch_top_k_threshold(jnp.array([[5.0, 4.0], [0.0, 0.0]]))
        >>> x = jnp.array([4.5, 3.9])
        >>> jnp.where(x > threshold, x, 0).tolist()
        [4.5, 0.0]

    References:
        Bussmann, Leask and Nanda, BatchTopK sparse autoencoders, arXiv:2412.06410, 2024.
    """
    z = jax.lax.stop_gradient(require_real("gates.batch_top_k_threshold", "z", z))
    kept = ~(z <= 0)
    return jnp.where(jnp.any(kept), jnp.min(z, where=kept, initial=jnp.inf), 0)


def _keep_largest(x: jax.Array, k: int) -> jax.Array:
    """Keep the k largest entries along the last axis."""
    # A NaN with its sign bit set sorts below all numbers.
    return jnp.where(among_largest(x, k) | jnp.isnan(x), x, 0)


def _check_k(name: str, k: int, x: jax.Array, size: int) -> int:
    k = operator.index(k)
    if not 1 <= k <= size:
        raise ValueError(
            f"`jaxreg.gates.{name}(k=...)` must be from 1 to the {size} entries there are; got"
            f" k={k} for x of shape {x.shape}."
        )
    return k
