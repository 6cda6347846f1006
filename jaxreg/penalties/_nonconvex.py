"""Penalties that are a sum of one nonconvex function over the entries: sparse, with less bias."""

import math
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import modulus
from ._fields import positive, setting
from ._separable import Separable


class Lp(Separable):
    r"""The p-th power of the absolute values, smoothed at zero; convex from p = 1 on.

    $$ R(x) = s \sum_i (x_i^2 + \epsilon^2)^{p/2} - \epsilon^p $$

    Args:
        strength: s, a non-negative scalar.
        p: the power, in (0, 2]. A leaf, like the strength.
        epsilon: ε > 0, in the units of x: below it the penalty is quadratic. A leaf.

    Gradient:
        s · p · x · (x² + ε²)^(p/2 − 1); smooth, and 0 at 0.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, a
            concrete p outside (0, 2], or a concrete ε that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> round(float(jr.Lp(1.0, p=0.5)(jnp.array([4.0, 0.0]))), 3)
        1.968

    References:
        Chartrand and Yin, Iteratively reweighted algorithms for compressive sensing, ICASSP, 2008.
    """

    _: KW_ONLY
    p: ArrayLike = setting("a scalar in (0, 2]", lambda p: 0 < p <= 2)
    epsilon: ArrayLike = positive(default=1e-3)

    def phi(self, x: jax.Array) -> jax.Array:
        p, epsilon = jnp.asarray(self.p, x.dtype), jnp.asarray(self.epsilon, x.dtype)
        # ε^p ((1 + (x/ε)²)^(p/2) − 1) keeps its digits where x is small, and
        # |x|^p (1 + (ε/x)²)^(p/2) − ε^p does not overflow where it is large.
        is_large = jnp.abs(x) > 1e6 * epsilon
        ratio = jnp.where(is_large, 1, x / epsilon)
        small = epsilon**p * jnp.expm1(p / 2 * jnp.log1p(jnp.square(ratio)))
        size = jnp.where(is_large, jnp.abs(x), 1)
        large = size**p * jnp.exp(p / 2 * jnp.log1p(jnp.square(epsilon / size))) - epsilon**p
        return jnp.where(is_large, large, small)


class LogSum(Separable):
    r"""The sum of logarithms, whose iterative linearization is the reweighted L1.

    $$ R(x) = s \sum_i \log\!\left(1 + \frac{|x_i|}{\epsilon}\right) $$

    Args:
        strength: s, a non-negative scalar.
        epsilon: ε > 0, in the units of x. A leaf, like the strength.

    Gradient:
        s · sign(x) / (ε + |x|), and 0 at 0.

    Prox:
        sign(x) · z, where z is 0 or the larger root ½(|x| − ε + √((|x| + ε)² − 4·t·s)), whichever
        has the smaller objective ½(z − |x|)² + t·s·φ(z).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, or a
            concrete ε that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> round(float(jr.LogSum(1.0, epsilon=1.0)(jnp.array([1.0, 0.0]))), 4)
        0.6931

    References:
        Candès, Wakin and Boyd, Enhancing sparsity by reweighted ℓ1 minimization, Journal of Fourier
        Analysis and Applications 14, 2008. Prater-Bennette, Shen and Tripp, The proximity operator
        of the log-sum penalty, Journal of Scientific Computing 93, 2022.
    """

    _: KW_ONLY
    epsilon: ArrayLike = positive()

    def phi(self, x: jax.Array) -> jax.Array:
        return jnp.log1p(modulus(x) / jnp.asarray(self.epsilon, x.dtype))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale, epsilon = step * self.strength, jnp.asarray(self.epsilon, x.dtype)
        size = jnp.abs(x)
        square = jnp.square(size + epsilon) - 4 * scale
        # Without a root the objective increases from 0 on.
        root = jnp.sqrt(jnp.where(square > 0, square, 1))
        shrunk = size - 2 * scale / (size + epsilon + root)
        # The objective there less that at 0, over |x|: next to that at 0 the difference would have
        # no digits, and far from 1 the squares would overflow or vanish.
        unit = jnp.where(size == 0, 1, size)
        over = shrunk / unit * (shrunk / 2 - size) + scale * self.phi(shrunk) / unit
        kept = jnp.where((square > 0) & (over < 0), shrunk, 0)
        return jnp.where(jnp.isfinite(x), jnp.sign(x) * kept, x)


class MCP(Separable):
    r"""The minimax concave penalty: L1 near zero, constant away from it.

    $$ R(x) = s \sum_i \begin{cases} |x_i| - \dfrac{x_i^2}{2\kappa} & |x_i| \le \kappa \\
                                     \dfrac{\kappa}{2} & \text{otherwise} \end{cases} $$

    The paper's MCP with λ and γ is `MCP(λ, knot=γ * λ)`.

    Args:
        strength: s, a non-negative scalar.
        knot: κ > 0, in the units of x: from here on entries are not shrunk. A leaf, like the
            strength.

    Gradient:
        s · sign(x) · max(1 − |x| / κ, 0), and 0 at 0.

    Prox:
        With w = t·s. For w < κ firm thresholding: 0 up to w, sign(x) · (|x| − w) / (1 − w/κ) up to
        κ, x beyond. For w ≥ κ hard thresholding: 0 up to √(w·κ), x beyond.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, or a
            concrete knot that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.MCP(1.0, knot=2.0).prox(jnp.array([0.5, 1.5, 5.0]), step=1.0).tolist()
        [0.0, 1.0, 5.0]

    References:
        Zhang, Nearly unbiased variable selection under minimax concave penalty, Annals of
        Statistics 38(2), arXiv:1002.4734, 2010.
    """

    _: KW_ONLY
    knot: ArrayLike = positive()

    def phi(self, x: jax.Array) -> jax.Array:
        knot = jnp.asarray(self.knot, x.dtype)
        near = jnp.clip(x, -knot, knot)
        return modulus(near) - jnp.square(near) / (2 * knot)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale, knot = step * self.strength, jnp.asarray(self.knot, x.dtype)
        size = jnp.abs(x)
        inner = jnp.clip(_ratio(size - scale, 1 - scale / knot), 0, knot)
        edge = jnp.where(scale < knot, knot, _jump(scale, knot / 2))
        return _kept_from(edge, x, inner)


class SCAD(Separable):
    r"""Smoothly clipped absolute deviation: L1 near zero, then quadratic, then constant.

    $$ R(x) = s \sum_i \begin{cases} |x_i| & |x_i| \le \theta \\
         \dfrac{2 a \theta |x_i| - x_i^2 - \theta^2}{2 (a - 1) \theta}
             & \theta < |x_i| \le a\theta \\
         \dfrac{(a + 1)\,\theta}{2} & \text{otherwise} \end{cases} $$

    The paper's SCAD with λ is `SCAD(λ, threshold=λ)`.

    Args:
        strength: s, a non-negative scalar.
        threshold: θ > 0, in the units of x: where L1 ends. A leaf, like the strength.
        a: a > 1; from aθ on entries are not shrunk. A leaf. The default is the paper's.

    Gradient:
        s · sign(x) · clip((aθ − |x|) / ((a − 1)θ), 0, 1), and 0 at 0.

    Prox:
        With w = t·s. For w < (a − 1)θ: sign(x) · max(|x| − w, 0) up to θ + w,
        sign(x) · ((a − 1)θ·|x| − aθ·w) / ((a − 1)θ − w) up to aθ, x beyond. For w ≥ (a − 1)θ:
        that of `CappedL1` with the cap (a + 1)θ/2.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, a
            concrete threshold that is not positive, or a concrete a that is not above 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.SCAD(1.0, threshold=1.0).prox(jnp.array([0.5, 1.5, 5.0]), step=1.0).tolist()
        [0.0, 0.5, 5.0]

    References:
        Fan and Li, Variable selection via nonconcave penalized likelihood and its oracle
        properties, Journal of the American Statistical Association 96(456), 2001.
    """

    _: KW_ONLY
    threshold: ArrayLike = positive()
    a: ArrayLike = setting("a finite scalar above 1", lambda a: 1 < a < math.inf, default=3.7)

    def phi(self, x: jax.Array) -> jax.Array:
        threshold, end = self._knots(x)
        size = modulus(jnp.clip(x, -end, end))
        over = jax.nn.relu(size - threshold)
        return size - jnp.square(over) / (2 * (end - threshold))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale, (threshold, end) = step * self.strength, self._knots(x)
        size, width = jnp.abs(x), end - threshold
        middle = jnp.clip(_ratio(size - scale * (end / width), 1 - scale / width), threshold, end)
        is_middle = (scale < width) & (size > threshold + scale)
        inner = jnp.where(is_middle, middle, jax.nn.relu(size - scale))
        edge = jnp.where(scale < width, end, _jump(scale, (threshold + end) / 2))
        return _kept_from(edge, x, inner)

    def _knots(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        threshold = jnp.asarray(self.threshold, x.dtype)
        return threshold, jnp.asarray(self.a, x.dtype) * threshold


class CappedL1(Separable):
    r"""Absolute values up to a cap.

    $$ R(x) = s \sum_i \min(|x_i|, \theta) $$

    Args:
        strength: s, a non-negative scalar.
        cap: θ > 0, in the units of x: from here on entries are not shrunk. A leaf, like the
            strength.

    Gradient:
        s · sign(x) below the cap, 0 at 0, at the cap and beyond it.

    Prox:
        With w = t·s. For w ≤ 2θ: sign(x) · max(|x| − w, 0) up to θ + w/2, x beyond. For w > 2θ:
        0 up to √(2·w·θ), x beyond.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, or a
            concrete cap that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.CappedL1(1.0, cap=2.0)(jnp.array([1.0, -5.0])))
        3.0

    References:
        Zhang, Analysis of multi-stage convex relaxation for sparse regularization, Journal of
        Machine Learning Research 11, 2010.
    """

    _: KW_ONLY
    cap: ArrayLike = positive()

    def phi(self, x: jax.Array) -> jax.Array:
        size, cap = modulus(x), jnp.asarray(self.cap, x.dtype)
        # Compared this way round, so that a NaN is not beyond the cap and stays a NaN.
        return jnp.where(size >= cap, cap, size)

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        scale, cap = step * self.strength, jnp.asarray(self.cap, x.dtype)
        return _kept_from(_jump(scale, cap), x, jax.nn.relu(jnp.abs(x) - scale))


class L0(Separable):
    r"""The number of entries that are not zero.

    $$ R(x) = s \cdot \#\{i : x_i \ne 0\} $$

    Its gradient is 0: use it through its proximal operator.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        0 everywhere.

    Prox:
        Hard thresholding: 0 where |x| ≤ √(2·t·s), x beyond.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.L0(1.0)(jnp.array([0.1, 0.0, -5.0])))
        2.0
        >>> jr.L0(1.0).prox(jnp.array([1.0, 3.0]), step=2.0).tolist()
        [0.0, 3.0]

    References:
        Blumensath and Davies, Iterative thresholding for sparse approximations, Journal of Fourier
        Analysis and Applications 14, 2008.
    """

    def phi(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(x), x, (x != 0).astype(x.dtype))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        twice = 2 * step * self.strength
        return jnp.where((jnp.square(x) <= twice) & (twice > 0), 0, x)


def _jump(scale: jax.Array, cap: jax.Array) -> jax.Array:
    """Return the |x| from which on it is better kept than soft-thresholded by the scale.

    For scale · min(|z|, cap). To compare objectives would not tell |x| from what lies next to it.
    """
    soft = cap + scale / 2
    return jnp.where(scale <= 2 * cap, soft, jnp.sqrt(scale) * jnp.sqrt(2 * cap))


def _kept_from(edge: jax.Array, x: jax.Array, inner: jax.Array) -> jax.Array:
    """Return x where |x| is beyond the edge, or infinite; up to it sign(x) · inner."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.where((size > edge) | jnp.isinf(x), size, inner)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divide where the denominator is positive; elsewhere the piece is concave, and no minimum."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1), 0)
