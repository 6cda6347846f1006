"""Constraints on entries and on whole arrays: sets that parameters are projected onto."""

import math
from dataclasses import KW_ONLY
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax.projections
from jax.typing import ArrayLike

from ._arithmetic import among_largest, of_rank, polar
from ._axes import check_axes, vector_axes
from ._base import Constraint
from ._checks import check_broadcasts, require_integer, require_order
from ._fields import ArrayOrTree, array, positive, static
from ._norm_constraints import onto_ball
from ._threshold import over_threshold


class NonNegative(Constraint):
    r"""Entries that are not negative.

    $$ C = \{x : x_i \ge 0\}, \qquad P(x) = \max(x, 0) $$

    Gradient:
        That of the projection is 1 for a positive entry, and 0 for another, 0 included.

    Raises:
        TypeError: from `project`, for integer or complex input.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.NonNegative().project(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]

    References:
        Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization 1(3), 2014.
    """

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def _project(self, x: jax.Array) -> jax.Array:
        projected: jax.Array = optax.projections.projection_non_negative(x)
        return projected


class Box(Constraint):
    r"""Entries that lie between bounds.

    $$ C = \{x : l_i \le x_i \le u_i\}, \qquad P(x)_i = \min(\max(x_i, l_i), u_i) $$

    Args:
        lower: l, a scalar or an array that broadcasts to x. Under `jaxreg.kernel` it may be a tree
            of the parameters' structure, of which each leaf takes the array at its own path.
        upper: u ≥ l, as `lower`.

    Gradient:
        That of the projection is 1 between the bounds, 0 outside, and 1/2 at a bound.

    Raises:
        TypeError: from `project`, for integer or complex input.
        ValueError: for concrete bounds that are NaN or out of order; for bounds that do not
            broadcast to x.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.Box(-1.0, 2.0).project(jnp.array([-3.0, 0.5, 3.0])).tolist()
        [-1.0, 0.5, 2.0]
        >>> jr.Box(upper=jnp.array([0.0, 1.0, 5.0])).project(jnp.array([-3.0, 3.0, 3.0])).tolist()
        [-3.0, 1.0, 3.0]

    References:
        Bertsekas, On the Goldstein-Levitin-Polyak gradient projection method, IEEE Transactions on
        Automatic Control 21(2), 1976.
    """

    lower: ArrayOrTree = array(default=-math.inf)
    upper: ArrayOrTree = array(default=math.inf)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "lower", "upper")

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_broadcasts(self, "lower", x, name)
        check_broadcasts(self, "upper", x, name)

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def _project(self, x: jax.Array) -> jax.Array:
        lower, upper = (
            of_rank(x.ndim, jnp.asarray(bound, x.dtype)) for bound in (self.lower, self.upper)
        )
        projected: jax.Array = optax.projections.projection_box(x, lower, upper)
        return projected


class LinfBall(Constraint):
    r"""Arrays no entry of which has a modulus above a radius.

    $$ C = \{x : \max_i |x_i| \le r\}, \qquad P(x)_i = x_i \min\!\left(1, \frac{r}{|x_i|}\right) $$

    Args:
        radius: r > 0. A leaf.

    Gradient:
        That of the projection at real entries is 1 within, 0 outside, and 1/2 at ±r.

    Raises:
        ValueError: for a concrete radius that is not a positive, finite scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.LinfBall(1.0).project(jnp.array([-3.0, 0.5])).tolist()
        [-1.0, 0.5]

    References:
        Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization 1(3), 2014.
    """

    radius: ArrayLike = positive()

    takes_complex: ClassVar[bool] = True

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def _project(self, x: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            return onto_ball(x, (), self.radius)
        radius = jnp.asarray(self.radius, x.dtype)
        projected: jax.Array = optax.projections.projection_linf_ball(x, radius)
        return projected


class L2Ball(Constraint):
    r"""Arrays whose Euclidean norm, that of all entries, is at most a radius.

    $$ C = \{x : \lVert x \rVert_2 \le r\}, \qquad
       P(x) = x \min\!\left(1, \frac{r}{\lVert x \rVert_2}\right) $$

    For the norm of each output unit's vector there is `MaxNorm`.

    Args:
        radius: r > 0. A leaf.

    Gradient:
        That of the projection is the identity within the ball, its edge included.

    Raises:
        ValueError: for a concrete radius that is not a positive, finite scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.L2Ball(2.5).project(jnp.array([[3.0], [4.0]])).tolist()
        [[1.5], [2.0]]

    References:
        Parikh and Boyd, Proximal algorithms, Foundations and Trends in Optimization 1(3), 2014.
    """

    radius: ArrayLike = positive()

    takes_complex: ClassVar[bool] = True

    def _project(self, x: jax.Array) -> jax.Array:
        # `optax.projections.projection_l2_ball` squares the entries: those of 1e30 all become 0.
        return onto_ball(x, tuple(range(x.ndim)), self.radius)


class VectorConstraint(Constraint):
    """A constraint on the vectors along `axis`, which a subclass declares; None is all axes."""

    batch_axes: ClassVar[tuple[int, ...]] = ()

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_axes(self, x, name)

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes along which the entries make up one vector."""
        whole = getattr(self, "axis") is None
        return tuple(range(ndim)) if whole else vector_axes(self, ndim)


class L1Ball(VectorConstraint):
    r"""Arrays, or vectors, the moduli of whose entries add up to at most a radius.

    $$ C = \Big\{x : \sum_i |x_i| \le r\Big\}, \qquad
       P(x)_i = \mathrm{sign}(x_i)\,\max(|x_i| - \tau, 0) $$

    τ is 0 within the ball; outside it is such that the moduli add up to r.

    Args:
        radius: r > 0. A leaf.
        axis: the axis or axes along which the entries make up one vector, as in NumPy. None is all
            axes: the whole array is one vector. (Not each output unit's vector, as in `MaxNorm`.)

    Gradient:
        That of the projection is the identity within the ball, its edge included.

    Raises:
        ValueError: for a concrete radius that is not a positive, finite scalar; for an axis that
            the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.L1Ball(2.0).project(jnp.array([3.0, -2.0, 0.5])).tolist()
        [1.5, -0.5, 0.0]

    References:
        Duchi, Shalev-Shwartz, Singer and Chandra, Efficient projections onto the ℓ1-ball for
        learning in high dimensions, ICML, 2008.
    """

    radius: ArrayLike = positive()
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)

    takes_complex: ClassVar[bool] = True

    def _project(self, x: jax.Array) -> jax.Array:
        axes = self.axes(x.ndim)
        sizes, directions = polar(x, ())
        radius = jnp.asarray(self.radius, sizes.dtype)
        within = jnp.sum(sizes, axis=axes, keepdims=True) <= radius
        return jnp.where(within, x, directions * over_threshold(sizes, axes, radius))


class Simplex(VectorConstraint):
    r"""Arrays, or vectors, of entries that are not negative and add up to a scale.

    $$ C = \Big\{x : x_i \ge 0, \sum_i x_i = s\Big\}, \qquad P(x)_i = \max(x_i - \tau, 0) $$

    τ is such that the entries add up to s.

    Args:
        scale: s > 0; 1 for probabilities. A leaf.
        axis: the axis or axes along which the entries make up one vector; see `L1Ball`. None is the
            whole array.

    Gradient:
        That of the projection takes their mean off the entries that stay positive, and is 0 for the
        others.

    Raises:
        TypeError: from `project`, for integer or complex input.
        ValueError: for a concrete scale that is not a positive, finite scalar; for an axis that the
            array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.Simplex(axis=-1).project(jnp.array([[0.5, 1.0, -1.0], [9.0, 0.0, 0.0]])).tolist()
        [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]

    References:
        Michelot, A finite algorithm for finding the projection of a point onto the canonical
        simplex of Rⁿ, Journal of Optimization Theory and Applications 50(1), 1986. Condat, Fast
        projection onto the simplex and the ℓ1 ball, Mathematical Programming 158, 2016.
    """

    scale: ArrayLike = positive(default=1.0)
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)

    def _project(self, x: jax.Array) -> jax.Array:
        return over_threshold(x, self.axes(x.ndim), jnp.asarray(self.scale, x.dtype))


class SparseTopK(VectorConstraint):
    r"""Arrays, or vectors, with at most k entries that are not zero.

    $$ C = \{x : \lVert x \rVert_0 \le k\}, \qquad
       P(x)_i = \begin{cases} x_i & i \text{ is among the } k \text{ largest } |x_i| \\
                              0 & \text{otherwise} \end{cases} $$

    Exactly k entries are kept, also among equal moduli, of which those of the lowest index are; in
    an array of several axes, in C order. The set is not convex. In a chain this is iterative hard
    thresholding.

    Args:
        k: how many entries are kept, a positive int. Static.
        axis: the axis or axes along which the entries make up one vector; see `L1Ball`. None is the
            whole array.

    Gradient:
        That of the projection is 1 for an entry that is kept, and 0 for another.

    Raises:
        ValueError: for a k that is not a positive int, or is above the number of entries; for an
            axis that the array does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> jr.SparseTopK(2).project(jnp.array([1.0, -2.0, 2.0, 2.0])).tolist()
        [0.0, -2.0, 2.0, 0.0]

    References:
        Blumensath and Davies, Iterative hard thresholding for compressed sensing, Applied and
        Computational Harmonic Analysis 27(3), arXiv:0805.0510, 2009.
    """

    k: int = static()
    _: KW_ONLY
    axis: int | tuple[int, ...] | None = static(default=None)

    takes_complex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("SparseTopK(k=...)", self.k, least=1)

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        length = math.prod(x.shape[axis] for axis in self.axes(x.ndim))
        if x.size and self.k > length:
            raise ValueError(
                f"`jaxreg.SparseTopK(k=...)` must be at most {length}, the number of entries of a"
                f' vector with axis={self.axis}; got k={self.k} for "{name}" of shape {x.shape}.'
            )

    def _project(self, x: jax.Array) -> jax.Array:
        if x.size == 0:
            return x
        axes = self.axes(x.ndim)
        last = tuple(range(x.ndim - len(axes), x.ndim))
        moved = jnp.moveaxis(x, axes, last)
        vectors = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
        # A NaN counts as larger than all else.
        kept = among_largest(jnp.abs(vectors), self.k)
        return jnp.where(jnp.moveaxis(kept.reshape(moved.shape), last, axes), x, 0)
