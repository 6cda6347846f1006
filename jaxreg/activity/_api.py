"""The public functions of activity penalties."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxreg.penalties import Penalty
from jaxreg.rules import Rules
from jaxreg.terms import AxisName, Reduction, Terms, check_reduction, measure

from . import _linen, _nnx
from ._pass import Pass, current

Value = TypeVar("Value")


def activity(
    rules: Mapping[Any, Penalty | None],
    *,
    reduction: Reduction = "batch_mean",
    mask: ArrayLike | None = None,
    strict: bool = True,
) -> "Activity":
    r"""Return a transformation that penalizes what modules put out.

    `activity(rules)(model.apply)(variables, x)` in Linen, and `activity(rules)(model)(x)` in NNX,
    return `(out, terms)`: what the model returned, and a `Terms` of the penalties of its modules'
    outputs. A penalty is computed at the module's output, and only its moments are carried out,
    through the transformations around it: no activation is stored.

    A module's output is what its `__call__` returns; of several outputs, each floating-point array
    counts. A module that is called twice counts twice, a shared module under its first path. A path
    also names a value that the module sows (`encoder/code`). Inside of two activities, the inner
    one takes what NNX modules and `jaxreg.sow` put out, the outer one the penalties that layers
    carry of their own parameters.

    An activity is cheap to build, inside a training step too. Outside of `jit`, build one whose
    strengths are arrays once, and not at each step: each new one retraces jitted functions that run
    inside it.

    For an output of shape (B, ..., D), Σ running over all its entries, a separable penalty gives

    $$ \frac{s}{N} \sum_i \varphi(x_i), \qquad
       N = B,\quad 1,\quad B \cdots D,\quad \text{or}\quad B \cdots $$

    for the reductions `"batch_mean"` (Keras from 3.14 on; 1 at rank 0), `"sum"` (Keras up to 3.13),
    `"mean"` and `"token_mean"` (all axes but the last). A `Statistic` penalty averages over
    examples itself and is not divided again.

    Args:
        rules: an ordered mapping from a pattern over module paths to a penalty, or to None, which
            exempts; the first rule that matches wins. Paths are names joined by "/", and "." is the
            top module. A pattern is as in `jaxreg.kernel`.
        reduction: what a separable penalty is divided by.
        mask: booleans of the shape of all axes but the last of every penalized output: the tokens
            that count. `"mean"` and `"token_mean"` divide by how many do.
        strict: whether a rule that wins nothing in a forward pass is an error.

    Returns:
        An `Activity`: call it with a bound Linen `apply`, an NNX module, a bound method of one, or
        any function that calls Linen modules; or a `functools.partial` of these.

    Raises:
        TypeError: for a rule's value that is neither a penalty nor None, and for another pattern: a
            class, for one.
        ValueError: for an unknown reduction.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import jaxreg as jr
        >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((3, 5)))
        >>> forward = jr.activity({"layers_0": jr.L1(1e-3)})(model.apply)
        >>> y, terms = forward(variables, jnp.ones((3, 5)))
        >>> y.shape, list(terms)
        ((3, 2), ['layers_0'])
    """
    if isinstance(rules, Penalty):
        raise TypeError(
            "`jaxreg.activity` takes rules from module paths to penalties; got a bare penalty."
            f' To penalize the top module\'s own output, pass {{".": {rules!r}}}.'
        )
    check_reduction(reduction)
    return Activity(
        Rules.of(rules, Penalty, strict=strict, owner="jaxreg.activity"), reduction, mask
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """A transformation of a forward pass; made by `jaxreg.activity`. A pytree.

    Args:
        rules: the rules, whose values are penalties or None.
        reduction: what a separable penalty is divided by.
        mask: None, or the tokens that count.
    """

    rules: Rules
    reduction: Reduction = dataclasses.field(metadata={"static": True})
    mask: ArrayLike | None

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., tuple[Any, Terms]]:
        """Return the forward pass that returns `(out, terms)`.

        Its errors name the mend: a ValueError for a rule that wins nothing and for a term that a
        transformation inside the model would drop; a TypeError for a Linen module in place of its
        `apply`.
        """
        if isinstance(forward, functools.partial):
            return functools.partial(self(forward.func), *forward.args, **forward.keywords)
        run: Callable[..., tuple[Any, Any]]
        if _nnx.module_of(forward) is not None:
            run = _nnx.run_module
        elif _linen.is_apply(forward):
            run = _linen.run_apply
        elif _linen.is_unbound(forward):
            raise TypeError(
                "`jaxreg.activity(rules)` takes a forward pass, which of a Linen module is its"
                f" `apply`; got a {type(forward).__name__} itself."
            )
        else:
            run = _linen.run_function

        @functools.wraps(forward, assigned=("__name__", "__qualname__", "__doc__"), updated=())
        def penalized(*args: Any, **kwargs: Any) -> tuple[Any, Terms]:
            new_pass = functools.partial(Pass, self._key, self.rules, self.reduction, self.mask)
            out, measured = run(forward, new_pass, args, kwargs)
            return out, Terms.of(measured)

        return penalized

    @functools.cached_property
    def _key(self) -> Hashable:
        """Equal for two activities only if they measure alike: by value where that can be told."""
        if self.mask is None:
            with contextlib.suppress(TypeError):  # an array or a tracer has no hash
                key = (jax.tree.structure(self.rules), *jax.tree.leaves(self.rules), self.reduction)
                hash(key)
                return key
        return object()


def penalize(
    x: ArrayLike,
    penalty: Penalty,
    *,
    reduction: Reduction = "batch_mean",
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Return the penalty of one activation: the arithmetic of `jaxreg.activity` for one array.

    For code whose modules are neither Linen's nor NNX's.

    Args:
        x: the activation, (batch, ..., features).
        penalty: the penalty.
        reduction: what a separable penalty is divided by; see `jaxreg.activity`.
        mask: booleans of the shape of all axes of `x` but the last: the tokens that count.
        axis_name: the axis or axes of a surrounding `jax.shard_map` that split the batch: the
            penalty is that of the whole one, on every shard. See `jaxreg.combine`.

    Returns:
        A scalar, in float32 or, for float64 input, float64. 0 for an empty batch.

    Raises:
        TypeError: for integer input, or a mask of floating-point numbers.
        ValueError: for an unknown reduction, or a mask of another shape; with `axis_name`, for a
            penalty that does not add up over the leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> x = jnp.ones((4, 10))
        >>> [float(jr.penalize(x, jr.L1(1.0), reduction=r)) for r in ("batch_mean", "sum", "mean")]
        [10.0, 40.0, 1.0]
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"`jaxreg.penalize` takes a Penalty; got {penalty!r}.")
    return measure(x, penalty, reduction, mask).psum(axis_name, "penalize", "x").value


def sow(module: nn.Module | nnx.Module, name: str, value: Value, penalty: Penalty | None) -> Value:
    """Penalize a value inside a module, and return it.

    For a value that is no module's output. Its path is the module's and the name
    (`encoder/code`); a rule of the surrounding `jaxreg.activity` that matches the path replaces
    the penalty. Without a surrounding `jaxreg.activity`, and in `init`, it does nothing.

    Args:
        module: the module that is running: `self`.
        name: a name for the value, which no submodule that is called has.
        value: an array, or a pytree of which each floating-point leaf counts.
        penalty: the penalty, or None where a rule alone may give one.

    Returns:
        `value`.

    Raises:
        TypeError: for a penalty that is neither, and a penalized value without a floating-point
            leaf.
        ValueError: for the name of a submodule, and where a transformation around the module would
            drop the term.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import jaxreg as jr
        >>> class Encoder(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return jr.sow(self, "code", nn.relu(nn.Dense(4)(x)), jr.L1(1e-3))
        >>> variables = Encoder().init(jax.random.key(0), jnp.ones((3, 5)))
        >>> code, terms = jr.activity({})(Encoder().apply)(variables, jnp.ones((3, 5)))
        >>> list(terms)
        ['code']
    """
    if not isinstance(penalty, Penalty | None):
        raise TypeError(f"`jaxreg.sow` takes a Penalty or None; got {penalty!r} for {name!r}.")
    found = site(module, name)
    if found is not None:
        run, path = found
        run.tell_apart(path, run.named)
        run.record(module, path, value, penalty)
    return value


def site(module: nn.Module | nnx.Module, name: str) -> tuple[Pass, str] | None:
    """Return the pass under way and the path in it of a module's value; None if there is no pass.

    Nor is there one for a module that is being initialized.
    """
    run = current()
    if run is None or (isinstance(module, nn.Module) and module.is_initializing()):
        return None
    path = module.path if isinstance(module, nn.Module) else _nnx.path_of(module)
    return run, run.at(*path, name)
