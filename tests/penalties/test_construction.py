"""Strengths and settings, sums and multiples, and penalties of one's own."""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxreg as jr
from tests.registry import CASES, STRENGTH, derivatives

BAD_STRENGTHS = [
    (-0.5, "-0.5"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    ([1.0, 2.0], "[1.0, 2.0]"),
    (np.ones(1), "array([1.])"),
    ("0.1", "'0.1'"),
    (1j, "1j"),
    (None, "None"),
]
ARGUMENTS = [
    ("L1", "strength", jr.L1),
    ("L2", "strength", jr.L2),
    ("L1L2", "l1", lambda s: jr.L1L2(s, 0.1)),
    ("L1L2", "l2", lambda s: jr.L1L2(0.1, s)),
    ("GroupLasso", "strength", jr.GroupLasso),
    ("KLSparsity", "strength", lambda s: jr.KLSparsity(s, target=0.1)),
]


@pytest.mark.parametrize(("penalty", "argument", "build"), ARGUMENTS, ids=lambda v: str(v)[:10])
@pytest.mark.parametrize(("strength", "shown"), BAD_STRENGTHS, ids=lambda v: str(v))
def test_bad_strength_is_named(penalty, argument, build, strength, shown):
    message = (
        f"`jaxreg.{penalty}({argument}=...)` must be a finite, non-negative scalar; got {shown}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        build(strength)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan"), [0.1]], ids=str)
def test_bad_target_is_named(target):
    message = f"`jaxreg.KLSparsity(target=...)` must be a scalar between 0 and 1; got {target!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.KLSparsity(1.0, target=target)


@pytest.mark.parametrize(
    "strength",
    [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), jnp.float32(1), jnp.bfloat16(1)],
    ids=lambda s: f"{type(s).__name__}",
)
def test_any_concrete_scalar_is_a_strength(strength):
    value = jr.L1(strength)(jnp.ones(3))
    assert value == 3.0
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("one", [1, np.int64(1)])
def test_an_integer_is_the_number_that_it_is(one):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def slopes(penalty):
        return jax.grad(lambda penalty: penalty(jnp.ones(3)))(penalty)

    assert slopes(jr.L2(one)).strength == slopes(jr.L2(0.5)).strength == 3
    assert repr(jr.Huber(one, delta=2)) == "Huber(strength=1.0, delta=2.0)"


def test_a_setting_takes_what_a_variable_holds_and_does_not_follow_it():
    strength: Any = nnx.Param(jnp.float32(2.0))
    reference = nnx.Param(jnp.ones(3))

    @jax.grad
    def slope(strength):
        return jr.L1(strength)(jnp.ones(3))

    assert slope(strength)[...] == 3
    penalty = jr.L2To(strength, reference=reference)
    strength[...], reference[...] = jnp.float32(5.0), jnp.zeros(3)
    assert penalty(jnp.zeros(3)) == 6


def test_a_field_of_ones_own_may_be_set_after_the_others():
    class Doubled(jr.Separable):
        factor: float = dataclasses.field(init=False)

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "factor", 2.0)

        def phi(self, x):
            return self.factor * jnp.abs(x)

    assert Doubled(1.0)(jnp.ones(3)) == 6


def test_traced_strength_is_accepted_whatever_its_value():
    value = jax.jit(lambda s: jr.L1L2(s, s)(jnp.ones(3)))(-1.0)
    assert value == -6.0


def test_traced_strength_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"`jaxreg.L1\(strength=...\)` must be a finite"):
        jax.eval_shape(jr.L1, jnp.ones(3))


def test_traced_complex_strength_is_an_error():
    with pytest.raises(ValueError, match=r"`jaxreg.L1\(strength=...\)` must be a finite"):
        jax.eval_shape(jr.L1, jnp.complex64(1))


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (0, 0), (0, -2)], ids=str)
@pytest.mark.parametrize("method", ["__call__", "gradient", "prox"])
def test_group_lasso_axis_out_of_range_is_an_error(axis, method):
    penalty = jr.GroupLasso(1.0, axis=axis)
    arguments = (jnp.ones((2, 3)), 0.1)[: 2 if method == "prox" else 1]
    message = "must name an axis of the array, or several different ones; got axis="
    with pytest.raises(ValueError, match=message + re.escape(f'{axis} for "x" of shape (2, 3)')):
        getattr(penalty, method)(*arguments)


def test_group_lasso_axis_of_a_scalar_is_an_error():
    with pytest.raises(ValueError, match=r'must name an axis of the array.*got axis=0 for "x" of'):
        jr.GroupLasso(1.0, axis=0)(jnp.float32(1.0))


@pytest.mark.parametrize(
    "build",
    [
        lambda: jr.GroupLasso(1.0, -1),  # type: ignore[call-arg]
        lambda: jr.KLSparsity(1.0, 0.1),  # type: ignore[call-arg]
    ],
    ids=["GroupLasso", "KLSparsity"],
)
def test_settings_are_keyword_only(build):
    with pytest.raises(TypeError, match="positional argument"):
        build()


def test_strength_is_a_leaf_and_settings_are_not():
    assert jax.tree.leaves(jr.GroupLasso(0.5, axis=1)) == [0.5]
    assert jax.tree.leaves(jr.KLSparsity(0.5, target=0.2)) == [0.5, 0.2]
    structures: list[Any] = [jax.tree.structure(jr.GroupLasso(1.0, axis=a)) for a in (0, 1, 0)]
    assert structures[0] != structures[1]
    assert structures[0] == structures[2]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(jr.L1L2(1.0, 2.0))]
    assert paths == [".l1", ".l2"]


def test_penalties_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field 'strength'"):
        jr.L1(1.0).strength = 2.0  # type: ignore[misc]


MULTIPLES = {
    "2*p": lambda p: 2 * p,
    "p*2": lambda p: p * 2,
    "np.float32(2)*p": lambda p: np.float32(2) * p,
    "p*np.float32(2)": lambda p: p * np.float32(2),
    "np.array(2.)*p": lambda p: np.array(2.0) * p,
    "jnp.float32(2)*p": lambda p: jnp.float32(2) * p,
    "p*jnp.float32(2)": lambda p: p * jnp.float32(2),
}


@pytest.mark.parametrize("multiply", MULTIPLES.values(), ids=MULTIPLES)
def test_multiple_from_either_side(multiply):
    for penalty in (jr.L1L2(1.0, 0.5), jr.L1(1.0) + jr.L2(0.5)):
        doubled = multiply(penalty)
        assert type(doubled) is type(penalty)
        assert jax.tree.leaves(doubled) == [2.0, 1.0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_multiple_of_every_penalty_keeps_its_settings(case):
    doubled = 2 * case.penalty
    x = jnp.asarray(case.sample, jnp.float32)
    value, _, _ = derivatives(doubled, x, x)
    np.testing.assert_allclose(value, case.formula(case.sample, 2 * STRENGTH), rtol=1e-5)


def test_traced_multiple():
    value = jax.jit(lambda c: (c * (jr.L1(1.0) + jr.L2(0.5)))(jnp.ones(2)))(3.0)
    assert value == 9.0


@pytest.mark.parametrize("factor", [-1.0, float("nan")], ids=str)
def test_multiple_keeps_the_strength_valid(factor):
    with pytest.raises(ValueError, match=r"`jaxreg.L1\(strength=...\)` must be a finite, non-neg"):
        factor * jr.L1(1.0)


def test_array_times_penalty_is_an_error_and_not_an_object_array():
    with pytest.raises(ValueError, match="must be a finite, non-negative scalar"):
        np.ones(3) * jr.L1(1.0)


@pytest.mark.parametrize("other", [1, 1.0, np.ones(2), None], ids=str)
def test_adding_what_is_no_penalty_is_an_error(other):
    with pytest.raises(TypeError, match=r"unsupported operand|does not support ufuncs"):
        jr.L1(1.0) + other


def test_product_of_penalties_is_an_error():
    with pytest.raises(TypeError, match="unsupported operand"):
        jr.L1(1.0) * jr.L1(1.0)  # type: ignore[operator]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum_adds_values_and_gradients(case):
    first = jr.L1(0.7)
    x = jnp.asarray(case.sample, jnp.float32)
    both = first + case.penalty
    assert isinstance(both, jr.Sum)
    value, gradient, _ = derivatives(both, x, x)
    values, gradients, _ = zip(*(derivatives(p, x, x) for p in both.terms), strict=True)
    np.testing.assert_allclose(value, np.sum(values), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.sum(gradients, axis=0), rtol=1e-5, atol=1e-6)


def test_sums_are_flat_and_read_as_sums():
    nested = (jr.L1(1.0) + jr.L2(2.0)) + (jr.L1(3.0) + jr.L2(4.0))
    assert [type(term) for term in nested.terms] == [jr.L1, jr.L2, jr.L1, jr.L2]
    assert repr(jr.L1(1.0) + jr.L2(2.0)) == "L1(strength=1.0) + L2(strength=2.0)"


def test_sum_checks_every_term():
    with pytest.raises(TypeError, match=r"`jaxreg\.KLSparsity` takes a real array"):
        (jr.L1(1.0) + jr.KLSparsity(1.0, target=0.1))(jnp.ones((2, 2), jnp.complex64))


class Quartic(jr.Separable):
    def phi(self, x):
        return x**4


class Spread(jr.Statistic):
    def sums(self, x, where):
        return {"x": jnp.sum(x, 0, where=where), "x2": jnp.sum(x**2, 0, where=where)}

    def of_means(self, means):
        return jnp.sum(means["x2"] - means["x"] ** 2)


def test_own_separable_penalty_needs_only_phi():
    penalty = Quartic(0.5)
    assert penalty(jnp.array([1.0, 2.0])) == 8.5
    np.testing.assert_array_equal(penalty.gradient(jnp.array([1.0, 2.0])), [2.0, 16.0])
    assert jax.tree.leaves(penalty) == [0.5]
    with pytest.raises(ValueError, match=re.escape("`jaxreg.Quartic(strength=...)` must be a fin")):
        Quartic(-1.0)
    with pytest.raises(NotImplementedError, match=r"`jaxreg\.Quartic` has no closed-form"):
        penalty.prox(jnp.ones(2), 0.1)


def test_own_statistic_penalty_needs_sums_and_a_function_of_means():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(Spread(2.0)(x), 2 * np.var(x, axis=0).sum(), rtol=1e-5)
    mask = np.array([True, False, True, True, False])
    masked = jr.penalize(x, Spread(2.0), mask=mask)
    np.testing.assert_allclose(masked, 2 * np.var(x[mask], axis=0).sum(), rtol=1e-5)


def test_penalties_add_up_by_sum():
    x = jnp.array([1.0, -2.0])
    both: Any = sum([jr.L1(1.0), jr.L2(1.0)])
    assert both(x) == 8.0
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + jr.L1(1.0)


def test_float8_is_added_up_in_float32():
    value = jr.L1(1.0)(jnp.ones(1000, jnp.float8_e4m3fn))
    assert value == 1000.0
    assert value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: jr.Huber(1.0, delta=0.0), "`jaxreg.Huber(delta=...)` must be a positive, finite"),
        (lambda: jr.Lp(1.0, p=2.5), "`jaxreg.Lp(p=...)` must be a scalar in (0, 2]; got 2.5"),
        (lambda: jr.Lp(1.0, p=1, epsilon=0), "`jaxreg.Lp(epsilon=...)` must be a positive, fin"),
        (lambda: jr.LogSum(1.0, epsilon=-1.0), "`jaxreg.LogSum(epsilon=...)` must be a positive"),
        (lambda: jr.MCP(1.0, knot=0.0), "`jaxreg.MCP(knot=...)` must be a positive, finite"),
        (lambda: jr.SCAD(1.0, threshold=1.0, a=1.0), "`jaxreg.SCAD(a=...)` must be a finite sc"),
        (lambda: jr.SCAD(1.0, threshold=0.0), "`jaxreg.SCAD(threshold=...)` must be a positive"),
        (lambda: jr.CappedL1(1.0, cap=0.0), "`jaxreg.CappedL1(cap=...)` must be a positive"),
        (lambda: jr.RangeHinge(1.0, lower=2.0, upper=1.0), "must be in this order; got lower=2.0"),
        (lambda: jr.RangeHinge(1.0, upper=float("nan")), "`jaxreg.RangeHinge(upper=...)` must be"),
        (lambda: jr.RangeHinge(1.0, power=3), "`jaxreg.RangeHinge(power=...)` must be one of 1, 2"),
    ],
)
def test_settings_out_of_range_are_an_error(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_range_hinge_is_built_inside_jit_from_concrete_arrays():
    bounds = jnp.float32(-1.0), jnp.float32(1.0)
    built = jax.jit(lambda x: jr.RangeHinge(1.0, lower=bounds[0], upper=bounds[1])(x))
    assert built(jnp.array([3.0])) == 2.0


def test_range_hinge_bounds_one_side():
    x = jnp.array([-3.0, 0.0, 5.0])
    assert jr.RangeHinge(1.0, upper=1.0)(x) == 4.0
    assert jr.RangeHinge(1.0, lower=-1.0, power=2)(x) == 4.0
    np.testing.assert_array_equal(jr.RangeHinge(1.0, upper=1.0).gradient(x), [0.0, 0.0, 1.0])
    np.testing.assert_array_equal(jr.RangeHinge(1.0, upper=1.0).prox(x, 1.5), [-3.0, 0.0, 3.5])
    at_bounds = jr.RangeHinge(1.0, lower=-3.0, upper=5.0).gradient(x)
    np.testing.assert_array_equal(at_bounds, [0.0, 0.0, 0.0])


def test_log_cosh_keeps_its_digits_near_zero_and_does_not_overflow():
    x = jnp.array([1e-3, 1e4])
    np.testing.assert_allclose(jr.LogCosh(1.0).phi(x), [5e-7, 1e4 - np.log(2)], rtol=1e-6)


def test_gradients_at_the_knots_are_as_documented():
    x = jnp.array([1.0, -1.0])
    np.testing.assert_array_equal(jr.CappedL1(1.0, cap=1.0).gradient(x), [0.0, 0.0])
    np.testing.assert_array_equal(jr.MCP(1.0, knot=1.0).gradient(x), [0.0, 0.0])
    np.testing.assert_array_equal(jr.SCAD(1.0, threshold=1.0).gradient(x), [1.0, -1.0])
    np.testing.assert_array_equal(jr.Huber(2.0, delta=1.0).gradient(x), [2.0, -2.0])


def test_sparse_group_lasso_is_the_sum_of_its_terms():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    penalty = jr.SparseGroupLasso(2.0, alpha=0.25, axis=1, weighted=False)
    both = jr.L1(0.5) + jr.GroupLasso(1.5, axis=1, weighted=False)
    np.testing.assert_allclose(penalty(x), both(x), rtol=1e-6)
    with pytest.raises(ValueError, match=r"SparseGroupLasso\(alpha=...\)` must be a scalar in \[0"):
        jr.SparseGroupLasso(1.0, alpha=1.5)
    with pytest.raises(ValueError, match=r"SparseGroupLasso\(axis=...\)` must name .* axis=2 for"):
        jr.SparseGroupLasso(1.0, alpha=0.5, axis=2)(x)


def test_l1_inf_divides_its_gradient_among_equal_entries():
    gradient = jr.L1Inf(1.0).gradient(jnp.array([[2.0], [-2.0], [1.0]]))
    np.testing.assert_array_equal(gradient, [[0.5], [-0.5], [0.0]])


def test_penalties_of_equal_numbers_are_equal_and_arrays_only_themselves():
    array = jnp.ones(2)
    assert jr.L1(1.0) + jr.L2(2.0) == jr.L1(1) + jr.L2(2)
    assert jr.L1(1.0) != jr.L1(2.0)
    assert jr.L1(1.0) != jr.L2(1.0)
    assert jr.L2To(1.0, reference=array) == jr.L2To(1.0, reference=array)
    assert jr.L2To(1.0, reference=array) != jr.L2To(1.0, reference=jnp.ones(2))
    assert hash(jr.L2To(1.0, reference=array)) == hash(jr.L2To(1.0, reference=array))


@pytest.mark.parametrize(
    "penalty", [jr.L1(jnp.float32(2.0)), jr.L2To(2.0, reference=np.zeros(3))], ids=["L1", "L2To"]
)
def test_penalty_that_holds_an_array_can_be_jitted_itself(penalty):
    assert jax.jit(penalty)(jnp.ones(3)) == 6
    kernel = jr.kernel({"**": penalty})
    assert jax.jit(kernel)({"w": jnp.ones(3)}) == 6


@pytest.mark.parametrize("epsilon", [1e-3, 1e-12, 1e-20])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_lp_does_not_overflow_far_from_a_small_epsilon(p, epsilon):
    x = np.array([0.0, 1e-4, 0.1, -1.0, 30.0, 2e16], np.float32)
    wide = np.asarray(x, np.float64)
    penalty = jr.Lp(1.0, p=p, epsilon=epsilon)
    value = (wide**2 + epsilon**2) ** (p / 2) - epsilon**p
    gradient = p * wide * (wide**2 + epsilon**2) ** (p / 2 - 1)
    for i in range(len(x)):
        np.testing.assert_allclose(penalty(x[i]), value[i], rtol=2e-5)
        np.testing.assert_allclose(penalty.gradient(x[i]), gradient[i], rtol=2e-5)


def test_the_gradient_of_log_cosh_does_not_overflow():
    gradient = jr.LogCosh(1.0).gradient(jnp.array([1e3, -1e30, 0.0]))
    np.testing.assert_array_equal(gradient, [1, -1, 0])


@pytest.mark.parametrize(
    "build",
    [
        lambda: jr.Box(1.0, 1.0),
        lambda: jr.MinMaxNorm(1.0, 1.0),
        lambda: jr.MinMaxNorm(0.0, 1.0, rate=0.0),
        lambda: jr.RangeHinge(1.0, lower=1.0, upper=1.0),
        lambda: jr.SparseGroupLasso(1.0, alpha=0.0),
        lambda: jr.SparseGroupLasso(1.0, alpha=1.0),
        lambda: jr.Lp(1.0, p=2.0),
    ],
)
def test_settings_at_the_ends_of_their_ranges_are_taken(build):
    build()


@pytest.mark.parametrize(
    "penalty",
    [
        jr.SparseGroupLasso(1.0, alpha=np.float64(0.5)),
        jr.KLTo(1.0, reference=np.ones((3, 2)), temperature=np.float64(2)),
        jr.VarianceHinge(1.0, target=np.float64(1), epsilon=np.float64(1e-4)),
    ],
    ids=lambda penalty: type(penalty).__name__,
)
def test_settings_of_float64_do_not_widen_a_value(penalty):
    with jax.enable_x64():
        wide = jax.tree.map(lambda setting: jnp.asarray(setting, jnp.float64), penalty)
        for settings in (penalty, wide):
            assert settings(jnp.ones((3, 2), jnp.float32)).dtype == jnp.float32


def test_scad_takes_no_infinite_a():
    with pytest.raises(ValueError, match=r"SCAD\(a=\.\.\.\)` must be a finite scalar above 1"):
        jr.SCAD(1.0, threshold=1.0, a=np.inf)
