"""Penalties of the singular values of a matrix."""

import abc
import functools
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._arithmetic import matmul, of_rank, root, scaled_to_one
from ._axes import as_matrices, vector_axes
from ._checks import check_broadcasts, require_choice
from ._explicit import on_any_mesh
from ._fields import ArrayOrTree, array, static
from ._matrix import Matrix, gram
from ._singular_values import map_singular_values, svd

Method = Literal["svd", "polar"]


class _Spectral(Matrix):
    """A penalty of singular values, with a proximal operator that moves only them."""

    @abc.abstractmethod
    def shrink(self, w: jax.Array, threshold: jax.Array) -> jax.Array:
        """Return the proximal operator of each matrix, for strength · step = threshold."""

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        if x.size == 0:
            return x
        threshold = step * jnp.asarray(self.strength, step.dtype)
        w, back = as_matrices(self, x)
        moved = back(self.shrink(w, threshold))
        return jnp.where((threshold == 0) | jnp.isinf(x), x, moved)


class SpectralNorm(_Spectral):
    r"""The largest singular value of a kernel: how much it can stretch a vector.

    $$ R(W) = s \, \sigma_1(W) = s \max_{\lVert v\rVert = 1} \lVert W v \rVert_2, \qquad
       R_v(W) = s \, \frac{\lVert W v\rVert_2}{\lVert v\rVert_2} = s \, u^\top W v $$

    Without `vector` it is exact, by an eigendecomposition of the smaller Gram matrix. With one it
    is R_v, a product with a vector: at most σ_1, and equal to it for the leading right singular
    vector. `leading_vector` gives that vector, and from then on follows it by one step of power
    iteration after each update, which shares its product W v with the value:

        def regularizer(vectors=None):
            return jr.kernel({"**/kernel": jr.SpectralNorm(1e-2, vector=vectors)})

        def follow(regularizer, params):
            return regularizer.map(lambda p, w: p.leading_vector(w), params, exempt=params)

        vectors = follow(regularizer(), params)  # exact

        def train_step(params, vectors, batch):
            reg = regularizer(vectors)
            grads = jax.grad(lambda p: loss(p, batch) + reg(p))(params)
            return sgd(params, grads), follow(reg, params)  # one step

    Args:
        strength: s, a non-negative scalar.
        vector: v, an array that broadcasts to the shape of the kernel with 1 along `axis`, such as
            (out,) for a kernel (in, out); or None. It need not be a unit vector. Under
            `jaxreg.kernel` it may be a tree of the parameters' structure, of which each leaf takes
            the array at its own path. It is held constant.
        axis: which entries make up a column of W; see `Orthogonal`.
        batch_axes: axes that hold separate matrices; see `Orthogonal`.

    Gradient:
        s · u vᵀ, with u = W v / ‖W v‖; 0 where W v = 0. Where σ_1 is that of several singular
        vectors, v is one of them.

    Prox:
        That of R, also with a vector: the singular values are cut off at a level such that they
        lose t·s in all, and are all 0 where their sum is at most t·s.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have; for an array that is no matrix, such as a bias; for a
            vector of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> float(jr.SpectralNorm(1.0)(kernel))
        4.0
        >>> follow = jr.SpectralNorm(1.0, vector=jnp.array([3.0, 4.0]))
        >>> vector = follow.leading_vector(kernel)
        >>> round(float(jr.SpectralNorm(1.0, vector=vector)(kernel)), 3)
        3.866

    References:
        Yoshida and Miyato, Spectral norm regularization for improving the generalizability of deep
        learning, arXiv:1705.10941, 2017; they penalize the square, (λ/2)·Σ σ₁(W)², and follow the
        vector from step to step as here.
    """

    _: KW_ONLY
    vector: ArrayOrTree = array(default=None)

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        if self.vector is None:
            return
        check_broadcasts(self, "vector", x, name)
        shape = self._vector_shape(x)
        if np.broadcast_shapes(jnp.shape(self.vector), shape) != shape:
            raise ValueError(
                f"`jaxreg.SpectralNorm(vector=...)` must broadcast to shape {shape}; got shape"
                f' {jnp.shape(self.vector)} for "{name}" of shape {x.shape}.'
            )

    def of_matrices(self, w: jax.Array) -> jax.Array:
        return jnp.sum(_spectral_norm(w))

    def of_array(self, x: jax.Array) -> jax.Array:
        if self.vector is None:
            return super().of_array(x)
        w, _ = as_matrices(self, x)
        v, _ = self._vectors(x)
        return jnp.sum(_stretch(w, v))

    def leading_vector(self, x: ArrayLike) -> jax.Array:
        """Return the leading right singular vector, a unit vector.

        Args:
            x: the kernel.

        Returns:
            An array of the shape of `x` with 1 along `axis`, in the accumulation dtype. Without
            `vector` it is exact; else it is that after one step of power iteration from `vector`,
            which stays as it is where the kernel takes it to 0. No gradient flows through it.

        Raises:
            TypeError: for integer or complex input.
            ValueError: for an array that is no matrix; for a vector of another shape.
        """
        kernel = jax.lax.stop_gradient(self.prepare(x))
        vector: jax.Array = on_any_mesh(lambda x, p: p._leading_vector(x), kernel, self)
        return vector

    def _leading_vector(self, x: jax.Array) -> jax.Array:
        w, _ = as_matrices(self, x)
        v, back = self._vectors(x)
        if w.size == 0:
            return back(v)
        if self.vector is None:
            return back(_leading(w))
        u = _unit(matmul(w, v), 0)
        return back(_unit(matmul(w.mT, u), v))

    def shrink(self, w: jax.Array, threshold: jax.Array) -> jax.Array:
        return map_singular_values(_capped, w, threshold)

    def _vector_shape(self, x: jax.Array) -> tuple[int, ...]:
        axes = vector_axes(self, x.ndim)
        return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))

    def _vectors(self, x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """Return v as unit vectors [batch, vectors, 1], and the way back to its shape."""
        given = jnp.asarray(1 if self.vector is None else self.vector, x.dtype)
        rows, back = as_matrices(self, jnp.broadcast_to(given, self._vector_shape(x)))
        return _unit(jax.lax.stop_gradient(rows.mT), 0), lambda v: back(v.mT)


class Nuclear(_Spectral):
    r"""The sum of the singular values of a kernel, which lowers its rank.

    $$ R(W) = s \sum_i \sigma_i(W) $$

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up a column of W; see `Orthogonal`.
        batch_axes: axes that hold separate matrices; see `Orthogonal`.
        method: how the proximal operator is computed. "svd" is exact. "polar" takes only products
            of matrices, some sixty of them, for devices on which a decomposition costs more than
            that (a CPU is none): two polar decompositions by Newton–Schulz iteration, of W and of
            a matrix with the singular values less t·s. Its singular values are those of "svd" to
            within 10⁻³·t·s and the rounding of the products (about 10⁻⁶·σ_1 in float32). Those that
            should be 0 are that small, but not exactly 0.

    Gradient:
        s · U Vᵀ over the singular vectors whose singular value is not 0, which means above
        σ_1 · max(m, n) · ε as in `numpy.linalg.matrix_rank`; 0 for an array of zeros.

    Prox:
        Singular value thresholding, U max(Σ − t·s, 0) Vᵀ. Its derivative is by singular value
        decomposition, whatever the method.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have; for an array that is no matrix, such as a bias; for
            another method.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 0.0], [0.0, 0.5]])
        >>> float(jr.Nuclear(2.0)(kernel))
        7.0
        >>> jr.Nuclear(1.0).prox(kernel, step=1.0).tolist()
        [[2.0, 0.0], [0.0, 0.0]]

    References:
        Fazel, Hindi and Boyd, A rank minimization heuristic with application to minimum order
        system approximation, ACC, 2001. Cai, Candès and Shen, A singular value thresholding
        algorithm for matrix completion, SIAM Journal on Optimization 20(4), 2010. Cai and Osher,
        Fast singular value thresholding without singular value decomposition, Methods and
        Applications of Analysis 20(4), 2013. Chen and Chow, A stable scaling of Newton–Schulz for
        improving the sign function computation of a Hermitian matrix, ANL/MCS-P5059-0114, 2014.
    """

    _: KW_ONLY
    method: Method = static(default="svd")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("Nuclear(method=...)", self.method, get_args(Method))

    def of_matrices(self, w: jax.Array) -> jax.Array:
        return _nuclear_norm(w)

    def shrink(self, w: jax.Array, threshold: jax.Array) -> jax.Array:
        return _soft_thresholded(self.method, w, threshold)


def _stretch(w: jax.Array, v: jax.Array) -> jax.Array:
    """Return ‖W v‖ of each matrix."""
    return root(jnp.sum(jnp.square(matmul(w, v)), axis=(-2, -1)))


def _unit(v: jax.Array, otherwise: ArrayLike) -> jax.Array:
    """Return vectors [batch, entries, 1] divided by their norms; `otherwise` where that is 0."""
    norm = root(jnp.sum(jnp.square(v), axis=-2, keepdims=True))
    return jnp.where(norm == 0, otherwise, v / jnp.where(norm == 0, 1, norm))


@jax.custom_jvp
def _spectral_norm(w: jax.Array) -> jax.Array:
    return _stretch(w, _leading(w))


@_spectral_norm.defjvp
def _spectral_norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The norm is stationary in v: only the second derivative is that of v, too.
    v = _leading(*primals)
    result: tuple[jax.Array, jax.Array] = jax.jvp(lambda w: _stretch(w, v), primals, tangents)
    return result


def _leading(w: jax.Array) -> jax.Array:
    """Return each matrix's leading right singular vector, [batch, n, 1]."""
    if w.shape[-2] >= w.shape[-1]:
        return _top(gram(w))
    n = w.shape[-1]
    return _unit(matmul(w.mT, _top(gram(w.mT))), n**-0.5)


@jax.custom_jvp
def _top(g: jax.Array) -> jax.Array:
    """Return an eigenvector of the largest eigenvalue of symmetric matrices, [batch, n, 1]."""
    vectors: jax.Array = jnp.linalg.eigh(g).eigenvectors
    return vectors[..., -1:]


@_top.defjvp
def _top_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # As for `eigh`, but finite where eigenvalues repeat.
    (g,), (dg,) = primals, tangents
    values, vectors = jnp.linalg.eigh(g)
    v, gap = vectors[..., -1:], (values[..., -1:] - values)[..., None]
    turned = matmul(vectors.mT, matmul(dg, v))
    turned = jnp.where(gap > 0, turned / jnp.where(gap > 0, gap, 1), 0)
    return v, matmul(vectors, turned)


@jax.custom_jvp
def _nuclear_norm(w: jax.Array) -> jax.Array:
    return jnp.sum(svd(w)[1])


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (w,), (dw,) = primals, tangents
    tolerance = jnp.asarray(max(w.shape[-2:]) * _epsilon(w), w.dtype)
    directions = map_singular_values(_nonzero, w, tolerance)
    return jnp.sum(directions * w), jnp.sum(directions * dw)


def _nonzero(s: jax.Array, tolerance: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A NaN is not zero, and stays a NaN.
    kept = jnp.where(s <= tolerance * s[..., :1], 0, s)
    return jnp.where(kept == 0, 0, kept / jnp.where(kept == 0, 1, kept)), jnp.zeros_like(s)


def _soft(s: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(s - threshold, 0), (s > threshold).astype(s.dtype)


def _capped(s: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    counts = jnp.arange(1, s.shape[-1] + 1, dtype=s.dtype)
    # As in the projection on an L1 ball, the largest candidate is the level.
    levels = (jnp.cumsum(s, axis=-1) - threshold) / of_rank(s.ndim, counts)
    level = jnp.max(levels, axis=-1, keepdims=True, initial=0)
    return jnp.minimum(s, level), (s < level).astype(s.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _soft_thresholded(method: Method, w: jax.Array, threshold: jax.Array) -> jax.Array:
    if method == "svd":
        return map_singular_values(_soft, w, threshold)
    if w.shape[-2] < w.shape[-1]:
        return _soft_thresholded(method, w.mT, threshold).mT
    # Fourth powers must not overflow. No entry is then above 4, and no σ_1 above 4 m n.
    scale, w = scaled_to_one(w, (1, 2))
    threshold = jnp.minimum(threshold / scale, 4 * w.shape[-2] * w.shape[-1])
    # With W = QH, H positive semidefinite: U (Σ − τ)₊ Vᵀ = ½ Q (H − τ) (1 + sign(H − τ)). Where a
    # singular value is below τ, Q need not be accurate: that is where the last factor is 0.
    q = _polar(w, threshold)
    h = matmul(q.mT, w)
    identity = jnp.eye(w.shape[-1], dtype=w.dtype)[None]
    sign = _polar((h + h.mT) / 2 - threshold * identity, 1e-3 * threshold)
    return scale * matmul(w - threshold * q, (identity + sign) / 2)


@_soft_thresholded.defjvp
def _soft_thresholded_jvp(
    method: Method, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    _, tangent = jax.jvp(functools.partial(map_singular_values, _soft), primals, tangents)
    return _soft_thresholded(method, *primals), tangent


def _polar(w: jax.Array, resolved: jax.Array) -> jax.Array:
    """Return U Vᵀ of each matrix, of which no side is longer than the first.

    Singular values below `resolved` become such in [0, 1], not 1.
    """
    # Σσ⁴ bounds the largest σ⁴.
    bound = jnp.sqrt(root(jnp.sum(jnp.square(gram(w)), axis=(-2, -1), keepdims=True)))
    bound = jnp.where(bound == 0, 1, bound)
    epsilon = _epsilon(w)

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(state[1] < 1 - 8 * epsilon)

    def iterate(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The cubic that takes [least, 1] to the narrowest interval below 1 (Chen and Chow). One
        # for a smaller least than 0.1 would take 1 to nearly 0, where it is lost in rounding.
        x, least = state
        center = jnp.maximum(least, 0.1)
        scale = jnp.sqrt(3 / (1 + center + center * center))
        x, least = scale * x, scale * least
        return 1.5 * x - 0.5 * matmul(x, gram(x)), least * (1.5 - 0.5 * least * least)

    least = jnp.clip(resolved / bound, epsilon, 1)
    return jax.lax.while_loop(unfinished, iterate, (w / bound, least))[0]


def _epsilon(w: jax.Array) -> float:
    return float(jnp.finfo(w.dtype).eps)  # type: ignore[no-untyped-call]
