"""Penalties of matrices: how far their columns are from orthogonal."""

import abc
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import matmul, modulus, polar
from ._axes import as_matrices, batch_axes, check_matrices
from ._base import Penalty
from ._explicit import partitioned
from ._fields import static


class Matrix(Penalty):
    """A penalty of a kernel seen as a matrix whose columns are its vectors.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which the entries make up one vector, as in NumPy. None is
            every axis but the last.
        batch_axes: axes that hold separate matrices, whose values add up.
    """

    strength: ArrayLike
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)
    batch_axes: int | tuple[int, ...] = static(default=())

    @abc.abstractmethod
    def of_matrices(self, w: jax.Array) -> jax.Array:
        """Return the sum of the values of matrices [batch, entries, vectors] for a strength of one.

        None of the axes is empty.
        """

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_matrices(self, x, name)

    def adds_up(self, ndim: int) -> bool:
        return 0 in batch_axes(self, ndim)

    @partitioned
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        if where is not None:
            raise ValueError(
                f"`jaxreg.{type(self).__name__}` takes no mask: which entries of a matrix would"
                " count is not defined. Select the examples before."
            )
        return self.of_array(x) if x.size else jnp.zeros((), x.dtype)

    def of_array(self, x: jax.Array) -> jax.Array:
        """Return the value of an array that is not empty, for a strength of one."""
        w, _ = as_matrices(self, x)
        return self.of_matrices(w)


class Orthogonal(Matrix):
    r"""The mean modulus of the cosine between two vectors of a kernel.

    $$ R(W) = \frac{2 s}{n (n - 1)} \sum_{i<j}
              \frac{|w_i^\top w_j|}{\lVert w_i\rVert \lVert w_j\rVert} $$

    The n vectors w_j are the columns of W, the kernel reshaped to (entries of a vector, vectors).
    It says nothing of their norms. All n² products are formed.

    Args:
        strength: s, a non-negative scalar.
        axis: the axis or axes along which the entries make up one vector, as in NumPy. None is
            every axis but the last, so that each output unit has one vector. On a kernel (in, out),
            None is Keras's `mode="columns"` and -1 is its `mode="rows"`; a query kernel (in, heads,
            dim) has one vector for each output with `axis=0`.
        batch_axes: the axis or axes that hold separate matrices, such as 0 for the kernels
            (layers, in, out) of a scan over layers. Their values add up.

    Gradient:
        That of the formula; a pair of orthogonal vectors adds 0, and so does a vector of zeros. One
        vector has the value 0, where Keras gives NaN.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have; for an array that is no matrix, such as a bias.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> kernel = jnp.array([[3.0, 2.0], [4.0, 0.0]])
        >>> round(float(jr.Orthogonal(1.0)(kernel)), 6)
        0.6

    References:
        Chollet et al., Keras, `keras.regularizers.OrthogonalRegularizer`, 2015. Rodríguez,
        Gonzàlez, Cucurull, Gonfaus and Roca, Regularizing CNNs with locally constrained
        decorrelations, ICLR, arXiv:1611.01967, 2017.
    """

    def of_matrices(self, w: jax.Array) -> jax.Array:
        n = w.shape[-1]
        _, directions = polar(w, (-2,))
        cosines = gram(directions)
        return jnp.sum(modulus(_off_diagonal(cosines))) / max(n * (n - 1), 1)


class SoftOrthogonal(Matrix):
    r"""The squared distance of the Gram matrix of a kernel's vectors from the identity.

    $$ R(W) = s \, \lVert W^\top W - I_n \rVert_F^2 $$

    W is the kernel reshaped to (m entries of a vector, n vectors). For m < n its columns cannot be
    orthonormal; the least value, s(n − m), is that of orthonormal rows. The same value is computed
    there from the smaller matrix: ‖WWᵀ − I_m‖²_F + n − m.

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up a vector; see `Orthogonal`.
        batch_axes: axes that hold separate matrices; see `Orthogonal`.

    Gradient:
        4 · s · W(WᵀW − I), from the smaller Gram matrix as well.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have; for an array that is no matrix, such as a bias.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.SoftOrthogonal(1.0)(jnp.array([[1.0, 1.0], [0.0, 0.0]])))
        2.0

    References:
        Bansal, Chen and Wang, Can we gain more from orthogonality regularizations in training deep
        CNNs?, NeurIPS, arXiv:1810.09102, 2018.
    """

    def of_matrices(self, w: jax.Array) -> jax.Array:
        batch, m, n = w.shape
        g = gram(w if n <= m else w.mT)
        squares = jnp.sum(jnp.square(g - jnp.eye(min(m, n), dtype=g.dtype)[None]))
        return squares + batch * max(n - m, 0)


class OffDiagonalOrthogonal(Matrix):
    r"""The squared products of each two vectors of a kernel, whatever their norms.

    $$ R(W) = s \sum_{i \ne j} (w_i^\top w_j)^2 $$

    The n vectors w_j, of m entries each, are the columns of W. Where n ≥ 2m the same value is
    computed as ‖WWᵀ‖²_F − Σ_j ‖w_j‖⁴ from the m × m Gram matrix. The rounding is then that of
    ‖WWᵀ‖²_F: of vectors of one norm it is at most twice R, by Welch's bound; of vectors of which
    few dominate, it can exceed R by far.

    Args:
        strength: s, a non-negative scalar.
        axis: which entries make up a vector; see `Orthogonal`.
        batch_axes: axes that hold separate matrices; see `Orthogonal`.

    Gradient:
        4 · s · (W WᵀW − W diag(‖w_j‖²)).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for an
            axis that the array does not have; for an array that is no matrix, such as a bias.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.OffDiagonalOrthogonal(0.5)(jnp.array([[3.0, 1.0], [4.0, 0.0]])))
        9.0

    References:
        Brock, Donahue and Simonyan, Large scale GAN training for high fidelity natural image
        synthesis, ICLR, arXiv:1809.11096, 2019. DeepMind, Sonnet,
        `snt.regularizers.OffDiagonalOrthogonal`, 2019. Welch, Lower bounds on the maximum cross
        correlation of signals, IEEE Transactions on Information Theory 20(3), 1974.
    """

    def of_matrices(self, w: jax.Array) -> jax.Array:
        _, m, n = w.shape
        if n < 2 * m:
            return jnp.sum(jnp.square(_off_diagonal(gram(w))))
        norms = jnp.sum(jnp.square(w), axis=-2)
        return jnp.sum(jnp.square(gram(w.mT))) - jnp.sum(jnp.square(norms))


@jax.custom_jvp
def gram(w: jax.Array) -> jax.Array:
    """Return WᵀW. Its derivative takes one product of matrices, not two, since it is symmetric."""
    return matmul(w.mT, w)


@gram.defjvp
def _gram_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (w,), (dw,) = primals, tangents
    half = matmul(w.mT, dw)
    return gram(w), half + half.mT


def _off_diagonal(g: jax.Array) -> jax.Array:
    return jnp.where(jnp.eye(g.shape[-1], dtype=bool), 0, g)
