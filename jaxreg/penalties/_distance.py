"""Penalties of the distance to a reference."""

from dataclasses import KW_ONLY
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._arithmetic import of_rank, polar, squared_modulus
from ._base import Penalty
from ._checks import check_broadcasts, require_choice
from ._fields import ArrayOrTree, array, positive, static
from ._statistic import Statistic

Direction = Literal["forward", "reverse"]


class L2To(Penalty):
    r"""The weighted squared distance to a reference: L2-SP, elastic weight consolidation.

    $$ R(w) = s \sum_i f_i \, |w_i - r_i|^2 $$

    With f the diagonal of the Fisher information of an earlier task and s = λ/2 it is elastic
    weight consolidation; with f = 1, r the pretrained weights and s = α/2 it is L2-SP.

    Args:
        strength: s, a non-negative scalar.
        reference: r, an array that broadcasts to w. Under `jaxreg.kernel` it may be a tree of the
            parameters' structure, of which each leaf takes the array at its own path. Of an NNX
            state it is what that holds now.
        weight: f ≥ 0, an array that broadcasts to w, or such a tree, or None for 1.

    Gradient:
        2 · s · f · (w − r).

    Prox:
        (w + 2·t·s·f·r) / (1 + 2·t·s·f).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            reference or a weight that does not broadcast to w.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> pretrained = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0])}
        >>> kernel = jr.kernel({"**": jr.L2To(0.5, reference=pretrained)})
        >>> float(kernel({"kernel": jnp.array([1.0, 4.0]), "bias": jnp.array([1.0])}))
        2.5

    References:
        Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 114(13),
        arXiv:1612.00796, 2017. Li, Grandvalet and Davoine, Explicit inductive bias for transfer
        learning with convolutional networks, ICML, arXiv:1802.01483, 2018.
    """

    strength: ArrayLike
    _: KW_ONLY
    reference: ArrayOrTree = array()
    weight: ArrayOrTree = array(default=None)

    takes_complex: ClassVar[bool] = True

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_broadcasts(self, "reference", x, name)
        if self.weight is not None:
            check_broadcasts(self, "weight", x, name)

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        reference = _counted(_of_rank(self.reference, x), where)
        squares = squared_modulus(x - reference)
        return jnp.sum(self._weight(squares) * squares, where=where)

    def step_axes(self, ndim: int) -> tuple[int, ...]:
        return ()

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        # Where it is this large the reference is reached, and more would overflow.
        scale = jnp.minimum(of_rank(x.ndim, step * self.strength), 1e30)
        pull = jnp.minimum(2 * scale * self._weight(jnp.real(x)), 1e30)
        pulled = x - pull / (1 + pull) * (x - _of_rank(self.reference, x))
        return jnp.where(jnp.isinf(x), x, pulled)

    def _weight(self, like: jax.Array) -> jax.Array:
        return _of_rank(1 if self.weight is None else self.weight, like)


class KLTo(Statistic):
    r"""The divergence from reference logits: knowledge distillation, KL-regularized policies.

    $$ R(x) = s\,T^2 \cdot \tfrac1n \sum_{i=1}^n
          \begin{cases} \mathrm{KL}(p_i \,\Vert\, q_i) & \text{forward} \\
                        \mathrm{KL}(q_i \,\Vert\, p_i) & \text{reverse} \end{cases}
       \qquad p_i = \mathrm{softmax}(r_i / T), \quad q_i = \mathrm{softmax}(x_i / T) $$

    The last axis of x holds the logits of one distribution, all others together are the n examples
    (tokens). The forward divergence is that of distillation, the reverse one that of a policy from
    its reference model. T² is Hinton's factor, which keeps the size of the gradient as T changes.

    Args:
        strength: s, a non-negative scalar.
        reference: r, logits that broadcast to x. It is differentiated like any other leaf: pass
            `jax.lax.stop_gradient(r)` where it depends on the parameters and must not follow x.
        temperature: T > 0, of both distributions. A leaf, like the strength.
        direction: `"forward"` or `"reverse"`. Static.

    Gradient:
        Forward, (s·T/n) · (q − p); reverse, (s·T/n) · q · (log(q/p) − KL(q ‖ p)). A class to which
        the reference gives probability 0 (a logit of −inf) costs nothing in the forward direction,
        nor in the reverse one if x excludes it too; if x does not, the reverse divergence is inf.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar, a
            concrete temperature that is not positive, another direction, or a reference that does
            not broadcast to x.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[4.0, 0.0]])
        >>> round(float(jr.KLTo(0.5, reference=teacher, temperature=2.0)(student)), 4)
        0.6556
        >>> policy_penalty = jr.KLTo(0.1, reference=teacher, direction="reverse")

    References:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, arXiv:1503.02531,
        2015. Stiennon et al., Learning to summarize from human feedback, NeurIPS,
        arXiv:2009.01325, 2020 (reverse).
    """

    _: KW_ONLY
    reference: ArrayOrTree = array()
    temperature: ArrayLike = positive(default=1.0)
    direction: Direction = static(default="forward")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("KLTo(direction=...)", self.direction, get_args(Direction))

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_broadcasts(self, "reference", x, name)

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        temperature = jnp.asarray(self.temperature, x.dtype)
        log_q = jax.nn.log_softmax(x / temperature)
        log_p = jax.nn.log_softmax(_last_axis_as(x, self.reference, where) / temperature)
        of, to = (log_p, log_q) if self.direction == "forward" else (log_q, log_p)
        # 0 · log 0 is 0, and its derivative must not be NaN.
        possible = of != -jnp.inf
        log_ratio = jnp.where(possible, of, 0) - jnp.where(possible, to, 0)
        return temperature**2 * jnp.sum(jnp.exp(of) * log_ratio, where=where)


class Cosine(Statistic):
    r"""The mean cosine distance to reference vectors.

    $$ R(x) = s \cdot \tfrac1n \sum_{i=1}^n 1 - \cos(x_i, r_i), \qquad
       \cos(x, r) = \frac{\langle x, r\rangle}{\lVert x\rVert\,\lVert r\rVert} $$

    The last axis holds the entries of one vector, all others together are the n examples. The
    cosine with a vector of zeros is 0.

    Args:
        strength: s, a non-negative scalar.
        reference: r, an array that broadcasts to x. It is differentiated like any other leaf: pass
            `jax.lax.stop_gradient(r)` where it depends on the parameters and must not follow x.

    Gradient:
        −(s/n) · (r/‖r‖ − cos(x, r) · x/‖x‖) / ‖x‖, and 0 where x or r is all zeros.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a
            reference that does not broadcast to x.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> teacher = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> float(jr.Cosine(1.0, reference=teacher)(jnp.array([[3.0, 0.0], [1.0, 0.0]])))
        0.5

    References:
        Sanh, Debut, Chaumond and Wolf, DistilBERT, arXiv:1910.01108, 2019 (between hidden states).
    """

    _: KW_ONLY
    reference: ArrayOrTree = array()

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        check_broadcasts(self, "reference", x, name)

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        if x.size == 0:
            return jnp.zeros((), x.dtype)
        reference = _last_axis_as(x, self.reference, where)
        (_, direction), (_, other) = polar(x, (-1,)), polar(reference, (-1,))
        cosines = jnp.sum(direction * other, axis=-1, keepdims=True)
        return jnp.sum(1 - cosines, where=where)


def _counted(array: jax.Array, where: jax.Array | None) -> jax.Array:
    """Return the array with 0 where it does not count: a NaN there must not reach a derivative."""
    return array if where is None else jnp.where(where, array, 0)


def _of_rank(array: ArrayLike, like: jax.Array) -> jax.Array:
    """Return an array that broadcasts to another, in its dtype and rank."""
    return of_rank(like.ndim, jnp.asarray(array, like.dtype))


def _last_axis_as(x: jax.Array, reference: ArrayLike, where: jax.Array | None) -> jax.Array:
    """Return the reference in the dtype of `x`, with a last axis of the same size."""
    reference = _counted(_of_rank(reference, x), where)
    return jnp.broadcast_to(reference, (*reference.shape[:-1], x.shape[-1]))
