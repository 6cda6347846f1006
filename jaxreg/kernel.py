"""Kernel penalties: rules over the leaves of a parameter tree."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from jaxreg.penalties import Constraint, Penalty
from jaxreg.penalties._checks import is_floating
from jaxreg.rules import TOP, Rules, names
from jaxreg.terms import AxisName, is_tracked, split_axes


def kernel(
    rules: Penalty | Mapping[Any, Penalty | None],
    *,
    strict: bool = True,
) -> "Kernel":
    """Return a penalty of a parameter tree: a pure function of parameters to a scalar.

    Args:
        rules: an ordered mapping from a pattern over the leaves' paths to a penalty, or to None,
            which exempts; the first rule that matches a leaf wins, and a leaf that no rule matches
            is exempt. Paths are as `jax.tree_util.keystr(path, simple=True, separator="/")` gives
            them. A pattern is a glob (`*` within a segment, `**` any number of segments), a
            compiled regular expression, or a predicate of the path. A bare penalty means every
            leaf named `kernel` or `embedding`: no biases, no norm scales.
        strict: whether it is an error when a rule wins no leaf, or spells out one that is masked.

    Returns:
        A `Kernel`, which is itself a pytree whose leaves are the strengths.

    Raises:
        TypeError: for a value that is neither a penalty nor None, and for another pattern: a class,
            for one.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> params = {"dense": {"kernel": jnp.array([[1.0, -3.0]]), "bias": jnp.array([9.0])}}
        >>> kernel = jr.kernel({"**/kernel": jr.L2(0.5) + jr.L1(1.0)})
        >>> float(kernel(params))
        9.0
        >>> print(kernel.describe(params))
        leaf          shape   rule         penalty                              value
        dense/bias    (1,)    -            exempt                               -
        dense/kernel  (1, 2)  "**/kernel"  L2(strength=0.5) + L1(strength=1.0)  9
        total                                                                   9
    """
    mapping: Any = {kernel_or_embedding: rules} if isinstance(rules, Penalty) else rules
    return Kernel(Rules.of(mapping, Penalty, strict=strict, owner="jaxreg.kernel"))


def kernel_or_embedding(path: str) -> bool:
    """Return whether a leaf is one that a bare penalty means."""
    return path.split("/")[-1] in ("kernel", "embedding")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A penalty of a parameter tree; made by `jaxreg.kernel`.

    The tree is any pytree of arrays: a Linen dict or FrozenDict, an `nnx.State`, or another
    library's module. Integer and bool leaves, PRNG keys, None and `optax.MaskedNode` are never
    penalized.

    Args:
        rules: the rules, whose values are penalties or None.
    """

    rules: Rules

    def __call__(self, params: Any, *, axis_name: AxisName | None = None) -> jax.Array:
        """Return the sum of the penalties of all leaves.

        Args:
            params: a pytree of arrays.
            axis_name: the axis or axes of a surrounding `jax.shard_map` that split some of the
                leaves, each along any of its axes. The value is then that of the whole leaves, the
                same on every shard, and its gradient each shard's part. Leaves that JAX knows to be
                the same on every shard count once.

        Returns:
            A scalar in float32, or in float64 where a penalized leaf is float64. 0 for an empty
            tree.

        Raises:
            ValueError: for a rule that wins nothing (unless `strict=False`), or a leaf whose rank
                or axes its penalty cannot take; with `axis_name`, for a leaf that is split whose
                penalty is not a sum over single entries, and where JAX does not know which leaves
                are split (`check_vma=False`).
            TypeError: for a rule that spells out a leaf that cannot be penalized, or a complex
                leaf whose penalty has no modulus; for the count of a schedule in place of a tree.
        """
        scalar = isinstance(params, jax.Array) and params.shape == ()
        if scalar and jnp.issubdtype(params.dtype, jnp.integer):
            raise TypeError(
                f"`jaxreg.kernel` takes a tree of parameters; got {params!r}. If that is the count"
                ' of a schedule: `optax.inject_hyperparams(..., static_args="reg")`.'
            )
        total: jax.Array = jnp.float32(0)
        alike: dict[Any, list[jax.Array]] = {}
        for leaf in self._match(params).leaves:
            if not leaf.penalty:
                continue
            x = leaf.penalty.prepare(leaf.value, leaf.path)
            split = () if axis_name is None else _split(leaf.penalty, x, axis_name, leaf.path)
            if leaf.penalty.entrywise and _has_numbers(leaf.penalty) and _is_small(x):
                alike.setdefault((leaf.penalty, split, jax.typeof(x)), []).append(x)
            else:
                total += _finish(leaf.penalty, leaf.penalty.moments(x), split)
        for (penalty, split, _), leaves in alike.items():
            total += _finish(penalty, _moments_of_all(penalty, leaves), split)
        return total

    def values(self, params: Any) -> dict[str, jax.Array]:
        """Return each penalized leaf's penalty, a scalar, by its path.

        Leaves of one path, such as those of a Variable that holds a tree, are added up.

        Raises:
            ValueError: as the call does.
            TypeError: as the call does.
        """
        values: dict[str, jax.Array] = {}
        for leaf in self._match(params).leaves:
            if leaf.penalty:
                value = leaf.penalty(leaf.value)
                values[leaf.path] = values[leaf.path] + value if leaf.path in values else value
        return values

    def gradient(self, params: Any) -> Any:
        """Return d(penalty)/d(params), zero on exempt leaves, in the tree and dtypes of `params`.

        Under `jit` the value is not computed.
        """
        zeros = jax.tree.map(_zero, params)
        return self.map(lambda penalty, leaf: penalty.gradient(leaf), params, exempt=zeros)

    def prox(self, params: Any, step: ArrayLike) -> Any:
        """Return each leaf's proximal operator with this step; exempt leaves as they are.

        Raises:
            NotImplementedError: where a penalty has no closed-form proximal operator.
        """
        return self.map(lambda penalty, leaf: penalty.prox(leaf, step), params, exempt=params)

    def map(self, function: Callable[..., Any], params: Any, *others: Any, exempt: Any) -> Any:
        """Map over the penalized leaves.

        Args:
            function: called as `function(penalty, leaf, *other_leaves)`.
            params: the tree that the rules are matched against.
            others: trees of the structure of `params`.
            exempt: a tree of the structure of `params`, from which all other leaves come.

        Returns:
            A tree of the structure of `params`.
        """
        match = self._match(params)
        columns = (match.treedef.flatten_up_to(tree) for tree in (exempt, *others))
        return match.treedef.unflatten(
            function(leaf.penalty, leaf.value, *rest) if leaf.penalty else default
            for leaf, default, *rest in zip(match.leaves, *columns, strict=True)
        )

    def describe(self, params: Any) -> str:
        """Return a table, to be printed: each leaf's path, shape, rule, penalty and value.

        Of shapes alone, as `jax.eval_shape` gives them, there is no value.
        """
        rows = [("leaf", "shape", "rule", "penalty", "value")]
        total: float | None = 0.0
        for leaf in self._match(params).leaves:
            rule = "-" if leaf.rule is None else self.rules.name(leaf.rule)
            penalty, shown = "exempt", "-"
            if leaf.penalty:
                penalty = repr(leaf.penalty.with_arrays(_shown))
            if leaf.penalty and not isinstance(leaf.penalty, Constraint):
                if isinstance(leaf.value, jax.ShapeDtypeStruct):
                    total = None
                else:
                    value = float(leaf.penalty(leaf.value))
                    shown = f"{value:.6g}"
                    total = None if total is None else total + value
            shape = str(leaf.value.shape) if hasattr(leaf.value, "shape") else "-"
            rows.append((leaf.path, shape, rule, penalty, shown))
        rows.append(("total", "", "", "", "-" if total is None else f"{total:.6g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _match(self, params: Any) -> "_Match":
        values, treedef = jax.tree.flatten(params, is_leaf=_is_absent)
        paths = _paths(params)
        settings = _Settings()
        leaves = [
            self._leaf(place, value, self.rules.find(place.path), settings)
            for place, value in zip(_places(paths), values, strict=True)
        ]
        if leaves:
            won = {
                leaf.rule
                for leaf in leaves
                if leaf.rule is not None and (leaf.penalty or self.rules.values[leaf.rule] is None)
            }
            self.rules.require_wins(
                won,
                paths,
                what="leaves of the parameter tree",
                otherwise="which is not a floating-point array, or is masked",
            )
        return _Match(leaves, treedef)

    def _leaf(
        self, place: "_Place", value: Any, rule: int | None, settings: "_Settings"
    ) -> "_Leaf":
        path = place.path
        penalty = None if rule is None else self.rules.values[rule]
        if penalty is None or rule is None:
            return _Leaf(path, value, rule, None)
        if not is_floating(value):
            # A leaf that is masked out is often another part's, to which the same rules belong.
            elsewhere = isinstance(value, optax.MaskedNode) and not self.rules.strict
            if names(self.rules.patterns[rule], path) and not elsewhere:
                raise TypeError(
                    f'`jaxreg.kernel` cannot penalize "{path}": it takes floating-point arrays,'
                    f" and this leaf is {_kind(value)}. Drop the rule {self.rules.name(rule)}."
                )
            return _Leaf(path, value, rule, None)
        penalty = penalty.with_arrays(lambda setting: settings.at(place, setting))
        penalty.check(value if hasattr(value, "dtype") else jnp.asarray(value), path)
        return _Leaf(path, value, rule, penalty)


# Compiled for a GPU, leaves up to this size with rows at least this long each take a kernel less
# where their sums by row are added up first. An AdamW step then moves 0.1 % more bytes for rows of
# 256, 2 % for rows of 16, and 4 % for rows of 8.
_MOST_ENTRIES = 2**20
_SHORTEST_ROW = 8


def _has_numbers(penalty: Penalty) -> bool:
    """Return whether all settings are scalars, and so the same for every row of a leaf."""
    return not any(map(jnp.ndim, jax.tree.leaves(penalty)))


def _is_small(x: jax.Array) -> bool:
    return x.size <= _MOST_ENTRIES and max(x.shape[-1:], default=0) >= _SHORTEST_ROW


def _moments_of_all(penalty: Penalty, leaves: list[jax.Array]) -> Any:
    """Return the moments of leaves of one type: by row, added up over the leaves, then summed."""
    moments = penalty.moments
    for _ in leaves[0].shape[:-1]:
        moments = jax.vmap(moments)
    by_row = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), map(moments, leaves))
    return jax.tree.map(jnp.sum, by_row)


def _split(penalty: Penalty, x: jax.Array, axis_name: AxisName, path: str) -> tuple[Hashable, ...]:
    """Return those of a `shard_map`'s axes that split a leaf, or raise if parts do not add up."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(map(is_tracked, axes)):
        raise ValueError(
            f"A `jaxreg.kernel` with axis_name={axis_name!r} must know which leaves are split:"
            " use it inside a `jax.shard_map` with `check_vma=True`, or on whole arrays beside it."
        )
    split = split_axes(x, axes)
    if split and not penalty.entrywise:
        raise ValueError(
            f'`jaxreg.kernel` cannot add up parts of "{path}", which differs along the mesh axes'
            f" {split}: {type(penalty).__name__} is no sum of one function of entries. Call the"
            " kernel on whole arrays, beside the `jax.shard_map` in the same `jit`; along a leading"
            ' axis `jaxreg.penalize(..., reduction="sum", axis_name=...)` adds up groups.'
        )
    return split


def _finish(penalty: Penalty, moments: Any, split: tuple[Hashable, ...]) -> jax.Array:
    if split:
        moments = jax.lax.psum(moments, split)  # type: ignore[no-untyped-call]
    return penalty.finish(moments, None)


class _Shape:
    """What `describe` shows of an array."""

    def __init__(self, array: Any) -> None:
        self._shape = jnp.shape(array)

    def __repr__(self) -> str:
        return f"array{self._shape}"


def _shown(array: Any) -> Any:
    return _Shape(array) if jnp.ndim(array) else array


class _Leaf(NamedTuple):
    path: str
    value: Any
    rule: int | None
    penalty: Penalty | None


class _Settings:
    """The array settings of penalties, where each leaf has its own from a tree like the params."""

    def __init__(self) -> None:
        self._trees: dict[int, dict[_Place, Any]] = {}

    def at(self, place: "_Place", setting: Any) -> Any:
        """Return the setting's array for the leaf at this place."""
        if jax.tree_util.all_leaves([setting]):
            return setting
        if id(setting) not in self._trees:
            leaves = jax.tree.leaves(setting, is_leaf=_is_absent)
            self._trees[id(setting)] = dict(zip(_places(_paths(setting)), leaves, strict=True))
        tree = self._trees[id(setting)]
        if place not in tree or _is_absent(tree[place]):
            raise ValueError(
                f'A penalty of the leaf "{place.path}" needs an array there in the tree it was'
                f" given; got one with {', '.join(repr(p.path) for p in tree) or 'no leaves'}."
            )
        return tree[place]


class _Place(NamedTuple):
    path: str
    earlier: int


def _places(paths: list[str]) -> list[_Place]:
    """Tell leaves of one path apart, such as those of a Variable that holds a tree."""
    seen: collections.Counter[str] = collections.Counter()
    places = []
    for path in paths:
        places.append(_Place(path, seen[path]))
        seen[path] += 1
    return places


class _Match(NamedTuple):
    leaves: list[_Leaf]
    treedef: Any


def _paths(params: Any) -> list[str]:
    """Return each leaf's path; a box around an array (a Variable, sharding metadata) adds none."""
    boxed, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: _is_absent(node) or _is_box(node)
    )
    if any(isinstance(node, nnx.Module) for _, node in boxed):
        raise TypeError(
            "`jaxreg.kernel` takes parameters, and an NNX module holds a shared one several times,"
            " and more than parameters. Pass `nnx.state(model, nnx.Param)`."
        )
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") or TOP
        for path, node in boxed
        for _ in jax.tree.leaves(node, is_leaf=_is_absent)
    ]


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable | nnx.Module | flax.core.meta.AxisMetadata)


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _zero(value: Any) -> Any:
    number = isinstance(value, int | float | complex)
    return jnp.zeros_like(value) if number or hasattr(value, "dtype") else value


def _kind(value: Any) -> str:
    return f"of dtype {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
