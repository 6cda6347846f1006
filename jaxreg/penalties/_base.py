"""What a penalty is, what a constraint is, and the sum of several penalties."""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._arithmetic import divide, real_dtype, shrunk, wide
from ._checks import NON_NEGATIVE, check_step, require
from ._explicit import on_any_mesh
from ._fields import array, held, positive, register, setting, static


@dataclass_transform(
    frozen_default=True, field_specifiers=(dataclasses.field, static, setting, positive, array)
)
class Penalty(abc.ABC):
    r"""A non-negative strength times a real function of one array.

    A subclass becomes a frozen dataclass and a pytree by being defined. Its fields are leaves,
    except those declared by `jaxreg.penalties.static`; `setting` and `positive`, beside it, declare
    further scalars, `array` arrays. The strength is a leaf and the first field, so that it can be
    traced, scheduled, vmapped over and differentiated, and changing it never recompiles. The other
    fields follow a `dataclasses.KW_ONLY`.

    A penalty is defined by its `moments`, sums over the array that add up across microbatches and
    devices, and by `finish`, which turns them into the value:

    $$ R(x) = \mathrm{finish}(\mathrm{moments}(x)) $$

    Implement `Separable` or `Statistic` where the penalty has that shape. Any other penalty
    subclasses `Penalty` and implements `moments` as its value for a strength of one, and `adds_up`
    where those of the parts of a batch do not add up to it.
    """

    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    """The fields that the value is linear in."""

    takes_complex: ClassVar[bool] = False
    """Whether the formula is defined on the modulus of complex entries."""

    quadratic: ClassVar[bool] = False
    r"""Whether the value is exactly strength · ‖x‖²."""

    absolute: ClassVar[bool] = False
    r"""Whether the value is exactly strength · ‖x‖₁."""

    fuses: ClassVar[bool] = False
    """Whether the proximal operator of its sum with an L1 is L1's after its own."""

    entrywise: ClassVar[bool] = False
    """Whether the moments are sums of functions of single entries."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        register(cls)

    def __post_init__(self) -> None:
        required = dict.fromkeys(self.strengths, NON_NEGATIVE)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.init and not field.metadata.get("static"):
                object.__setattr__(self, field.name, held(getattr(self, field.name)))
            if "requires" in field.metadata:
                required[field.name] = field.metadata["requires"]
        for name, (what, holds) in required.items():
            value = getattr(self, name)
            require(f"{type(self).__name__}({name}=...)", value, what, holds)
            # JAX would not take the derivative by an integer.
            if isinstance(value, int | np.integer):
                object.__setattr__(self, name, float(value))

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Return the value at `x`.

        Args:
            x: a floating-point array of any shape the penalty takes.

        Returns:
            A scalar, added up in float32, or in float64 for float64 input. 0 for an array of size
            0. An inf or NaN in `x` propagates.

        Raises:
            TypeError: for integer input, complex input where the formula has no modulus, or an axis
                that is neither an integer nor a tuple of such.
            ValueError: for a rank or an axis that the penalty cannot take.
        """
        return self.finish(self.moments(self.prepare(x)), None)

    def gradient(self, x: ArrayLike) -> jax.Array:
        """Return dR/dx, of the shape and dtype of `x`, in the convention of `jax.grad`.

        At kinks and at zero it is the subgradient 0. Under `jit` the value is not computed.
        """
        x = jnp.asarray(x)
        self.check(x)
        gradient: jax.Array = jax.grad(self.__call__)(x)
        return gradient

    def prox(self, x: ArrayLike, step: ArrayLike) -> jax.Array:
        r"""Return the proximal operator, of the shape and dtype of `x`.

        $$ \mathrm{prox}(x, t) = \arg\min_z \tfrac12 \lVert z - x\rVert^2 + t\,R(z) $$

        Args:
            x: the point.
            step: t ≥ 0, a scalar; or an array that broadcasts to `x` and is constant along the
                `step_axes`.

        Raises:
            NotImplementedError: where no closed form is known.
            ValueError: for a step of another shape, or a number that is negative or NaN.
        """
        x = jnp.asarray(x)
        point = self.prepare(x)
        check_step(self, step, point)
        step = jnp.asarray(step, real_dtype(point))
        moved: jax.Array = on_any_mesh(lambda x, p, t: p._prox(x, t), point, self, step, split=True)
        return moved.astype(x.dtype)

    @abc.abstractmethod
    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        """Return a pytree of arrays that add up across microbatches and devices.

        Args:
            x: the array, in its accumulation dtype; entries that `where` leaves out are 0.
            where: None, or booleans that broadcast to `x`: the entries that count.
        """

    def finish(self, moments: Any, count: ArrayLike | None) -> jax.Array:
        """Return the value from the moments.

        Args:
            moments: what `moments` returned, or a sum of such.
            count: what the value is divided by, or None. A count of 0 (an empty batch) gives 0.
        """
        return divide(jnp.asarray(getattr(self, "strength"), moments.dtype) * moments, count)

    def adds_up(self, ndim: int) -> bool:
        """Return whether the moments of parts of an array's leading axis are those of the whole."""
        return True

    def step_axes(self, ndim: int) -> tuple[int, ...] | None:
        """Return the axes along which all entries must have one step in `prox`.

        () where every entry may have its own; None where the whole array must share one.
        """
        return () if self.entrywise else None

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        known = sorted(c.__name__ for c in _concrete(Penalty) if c._prox is not Penalty._prox)
        raise NotImplementedError(
            f"`jaxreg.{type(self).__name__}` has no closed-form proximal operator. Those that have"
            f" one: {', '.join(known)}. Use its gradient instead (`jaxreg.add_penalty_gradient`)."
        )

    def prepare(self, x: ArrayLike, name: str = "x") -> jax.Array:
        """Return the array in its accumulation dtype, at least single precision, having checked it.

        Raises as `check` does.
        """
        array = jnp.asarray(x)
        self.check(array, name)
        return wide(array)

    def check(self, x: jax.Array, name: str = "x") -> None:
        """Raise if the penalty cannot take an array of this dtype and shape; `name` names it."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            needs = "a floating-point array"
        elif jnp.issubdtype(x.dtype, jnp.complexfloating) and not self.takes_complex:
            needs = "a real array"
        else:
            return
        raise TypeError(
            f"`jaxreg.{type(self).__name__}` takes {needs}; got dtype {x.dtype} for"
            f' "{name}" of shape {x.shape}.'
        )

    def with_arrays(self, function: Callable[[Any], Any]) -> "Penalty":
        """Return this penalty with `function` applied to each field declared by `array`."""
        names = [f.name for f in dataclasses.fields(self) if "array" in f.metadata]  # type: ignore[arg-type]
        present = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        if not present:
            return self
        return dataclasses.replace(self, **{n: function(v) for n, v in present.items()})  # type: ignore[type-var]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(a, b) for a, b in zip(_fields(self), _fields(other), strict=True))

    def __hash__(self) -> int:
        return hash((type(self), *(v if _has_hash(v) else id(v) for v in _fields(self))))

    def __add__(self, other: "Penalty") -> "Sum":
        if not isinstance(other, Penalty):
            return NotImplemented
        return Sum(_terms(self) + _terms(other))

    def __radd__(self, other: object) -> "Penalty":
        # What `sum` starts from.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: ArrayLike) -> Self:
        if isinstance(factor, Penalty):
            return NotImplemented
        scaled = {name: factor * getattr(self, name) for name in self.strengths}
        return dataclasses.replace(self, **scaled)  # type: ignore[type-var]

    __rmul__ = __mul__
    # NumPy scalars and arrays must leave `factor * penalty` to this class.
    __array_ufunc__: ClassVar[None] = None


class Constraint(Penalty):
    r"""A set that an array must lie in; its proximal operator is the projection onto it.

    $$ R(x) = \begin{cases} 0 & x \in C \\ \infty & \text{otherwise} \end{cases},
       \qquad \mathrm{prox}(x, t) = P_C(x) = \arg\min_{z \in C} \lVert z - x\rVert $$

    Such a value has no gradient that leads anywhere: a constraint in a loss is an error. Put it
    last in an optax chain, by `jaxreg.project`.
    """

    strengths: ClassVar[tuple[str, ...]] = ()

    def project(self, x: ArrayLike) -> jax.Array:
        """Return the projection of `x`, of its shape and dtype.

        Raises:
            TypeError: for integer input, or complex input where the set has no modulus.
            ValueError: for a rank or an axis that the constraint cannot take.
        """
        return self.prox(x, 1.0)

    @abc.abstractmethod
    def _project(self, x: jax.Array) -> jax.Array:
        """Return the projection of an array in its accumulation dtype."""

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        return self._project(x)

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> Any:
        name = type(self).__name__
        raise TypeError(
            f"`jaxreg.{name}` is a constraint: it has no value and no gradient to train with. Put"
            f" `jaxreg.project(jaxreg.kernel(...))` last in the optax chain, or call its `project`."
        )


class Sum(Penalty):
    """Several penalties of the same array, added up; what `p + q` returns.

    Its prox is known where all but one of the terms are multiples of ‖x‖²:
    prox of f + c‖·‖² with step t is prox of f at x / (1 + 2ct) with step t / (1 + 2ct)
    (Parikh and Boyd, Proximal Algorithms, section 2.2, 2014). Several `jaxreg.L1` are one; next to
    a `jaxreg.TotalVariation` (the fused lasso) their prox is taken of what its prox returns
    (Friedman, Hastie, Höfling and Tibshirani, Pathwise coordinate optimization, Annals of Applied
    Statistics 1(2), 2007).

    Args:
        terms: the penalties.
    """

    terms: tuple[Penalty, ...]

    strengths: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if any(isinstance(term, Constraint) for term in self.terms):
            raise TypeError(
                f"A constraint adds up with nothing; got {self!r}. Put `jaxreg.project` after"
                " `jaxreg.apply_prox` or `jaxreg.add_penalty_gradient` in the optax chain."
            )

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))

    def check(self, x: jax.Array, name: str = "x") -> None:
        for term in self.terms:
            term.check(x, name)

    def with_arrays(self, function: Callable[[Any], Any]) -> "Sum":
        return Sum(tuple(term.with_arrays(function) for term in self.terms))

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> tuple[Any, ...]:
        return tuple(term.moments(x, where) for term in self.terms)

    def finish(self, moments: tuple[Any, ...], count: ArrayLike | None) -> jax.Array:
        values = (term.finish(m, count) for term, m in zip(self.terms, moments, strict=True))
        return sum(values, start=jnp.float32(0))

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return all(term.entrywise for term in self.terms)

    def adds_up(self, ndim: int) -> bool:
        return all(term.adds_up(ndim) for term in self.terms)

    def step_axes(self, ndim: int) -> tuple[int, ...] | None:
        axes: set[int] = set()
        for term in self.terms:
            own = term.step_axes(ndim)
            if own is None:
                return None
            axes.update(own)
        return tuple(sorted(axes))

    def _prox(self, x: jax.Array, step: jax.Array) -> jax.Array:
        squares = [term for term in self.terms if term.quadratic]
        lasso = [term for term in self.terms if term.absolute]
        others = [term for term in self.terms if not term.quadratic and not term.absolute]
        if len(others) > 1 or (others and lasso and not others[0].fuses):
            raise NotImplementedError(
                f"`jaxreg.Sum` has a closed-form proximal operator only where at most one term is"
                f" not an L2, or all others are L1 and one TotalVariation; got {self!r}. An L1 and"
                " a GroupLasso together are a `jaxreg.SparseGroupLasso`."
            )
        curvature = sum(2 * step * getattr(term, "strength") for term in squares)
        z = shrunk(x, curvature)
        step = step / (1 + curvature)
        for term in [*others, *lasso]:
            z = term._prox(z, step)
        return z

    def __mul__(self, factor: ArrayLike) -> "Sum":
        return Sum(tuple(term * factor for term in self.terms))

    __rmul__ = __mul__


def _fields(penalty: Any) -> tuple[Any, ...]:
    return tuple(getattr(penalty, field.name) for field in dataclasses.fields(penalty))


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _same(a: Any, b: Any) -> bool:
    # Arrays have no hash, and are the same only as objects.
    return a is b or bool(_has_hash(a) and _has_hash(b) and a == b)


def _terms(penalty: Penalty) -> tuple[Penalty, ...]:
    return penalty.terms if isinstance(penalty, Sum) else (penalty,)


def _concrete(cls: Any) -> Iterator[type[Penalty]]:
    for subclass in cls.__subclasses__():
        if not subclass.__abstractmethods__:
            yield subclass
        yield from _concrete(subclass)
