"""Penalties that are a sum of one function over the entries."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import divide, modulus, shrunk, squared_modulus
from ._base import Penalty


class Separable(Penalty):
    r"""A penalty that is a sum of one function over the entries.

    $$ R(x) = s \sum_i \varphi(x_i) $$

    Since φ is elementwise, it and its derivative fuse into whatever produces or updates `x`.

    Args:
        strength: s.

    Example:
        >>> import dataclasses
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> class PseudoHuber(jr.penalties.Separable):
        ...     _: dataclasses.KW_ONLY
        ...     delta: float = jr.penalties.positive(default=1.0)
        ...
        ...     def phi(self, x):
        ...         return self.delta**2 * (jnp.sqrt(1 + (x / self.delta) ** 2) - 1)
        >>> round(float(PseudoHuber(0.5, delta=2.0)(jnp.array([2 * 3**0.5, 0.0]))), 4)
        2.0
        >>> PseudoHuber(0.5, delta=-1.0)
        Traceback (most recent call last):
        ValueError: `jaxreg.PseudoHuber(delta=...)` must be a positive, finite scalar; got -1.0.
    """

    strength: ArrayLike

    entrywise: ClassVar[bool] = True

    @abc.abstractmethod
    def phi(self, x: jax.Array) -> jax.Array:
        """Return φ of each entry, a real array of the shape of `x`, without the strength."""

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        return jnp.sum(self.phi(x), where=where)


class L1(Separable):
    r"""The sum of absolute values (lasso).

    $$ R(x) = s \sum_i |x_i| $$

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        s · sign(x), and 0 at 0. Complex entries count by their modulus.

    Prox:
        Soft thresholding, sign(x) · max(|x| − t·s, 0): exact zeros.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.L1(0.5)(jnp.array([1.0, -3.0])))
        2.0
        >>> jr.L1(0.5).prox(jnp.array([1.0, -0.25]), step=1.0).tolist()
        [0.5, 0.0]

    References:
        Tibshirani, Regression shrinkage and selection via the lasso, JRSS B 58(1), 1996.
    """

    takes_complex: ClassVar[bool] = True
    absolute: ClassVar[bool] = True

    def phi(self, x: jax.Array) -> jax.Array:
        return modulus(x)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return soft_threshold(x, step * self.strength)


class L2(Separable):
    r"""The sum of squares (ridge), as in Keras: no factor ½.

    $$ R(x) = s \sum_i |x_i|^2 $$

    PyTorch's `weight_decay=λ` adds λ·x to the gradient, which is that of `L2(λ / 2)`.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        2·s·x. Complex entries count by their modulus; the gradient is then 2·s·conj(x), as
        `jax.grad` has it.

    Prox:
        x / (1 + 2·t·s).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.L2(0.5)(jnp.array([1.0, -3.0])))
        5.0
        >>> jr.L2(0.5).gradient(jnp.array([1.0, -3.0])).tolist()
        [1.0, -3.0]

    References:
        Hoerl and Kennard, Ridge regression, Technometrics 12(1), 1970.
    """

    takes_complex: ClassVar[bool] = True
    quadratic: ClassVar[bool] = True

    def phi(self, x: jax.Array) -> jax.Array:
        return squared_modulus(x)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return shrunk(x, 2 * step * self.strength)


class L1L2(Penalty):
    r"""Absolute values and squares, each with its own strength (elastic net), as in Keras.

    $$ R(x) = l_1 \sum_i |x_i| + l_2 \sum_i |x_i|^2 $$

    Args:
        l1: the strength of the absolute values, a non-negative scalar.
        l2: the strength of the squares, a non-negative scalar.

    Gradient:
        l1 · sign(x) + 2·l2·x, and 0 at 0. Complex entries count by their modulus.

    Prox:
        Soft thresholding by t·l1, divided by 1 + 2·t·l2.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.L1L2(l1=1.0, l2=0.5)(jnp.array([1.0, -3.0])))
        9.0

    References:
        Zou and Hastie, Regularization and variable selection via the elastic net, JRSS B 67(2),
        2005.
    """

    l1: ArrayLike
    l2: ArrayLike

    strengths: ClassVar[tuple[str, ...]] = ("l1", "l2")
    takes_complex: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return L1(1).moments(x, where), L2(1).moments(x, where)

    def finish(self, moments: tuple[jax.Array, jax.Array], count: ArrayLike | None) -> jax.Array:
        absolute, square = moments
        l1, l2 = jnp.asarray(self.l1, square.dtype), jnp.asarray(self.l2, square.dtype)
        return divide(l1 * absolute + l2 * square, count)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return shrunk(soft_threshold(x, step * self.l1), 2 * step * self.l2)


def soft_threshold(x: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Move each entry towards 0 by the threshold, and not beyond it."""
    size = jnp.abs(x)
    # Compared this way round, so that a NaN is not below the threshold and stays a NaN.
    zero = size <= threshold
    # The derivative of a complex `jnp.sign` is wrong in JAX 0.10.
    direction = x / jnp.where(zero, 1, size) if jnp.iscomplexobj(x) else jnp.sign(x)
    return jnp.where(zero, 0, x - threshold * direction)
