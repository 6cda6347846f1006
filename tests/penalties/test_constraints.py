"""Projections, against what defines them."""

import itertools
import math
import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import jaxreg as jr
from tests.registry.constraints import CASES, ConstraintCase


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


every_constraint = each(CASES)
every_convex_constraint = each([case for case in CASES if case.convex])
every_nonconvex_constraint = each([case for case in CASES if not case.convex and case.projects])
every_constraint_with_a_setting = each([case for case in CASES if case.setting is not None])


MATRIX = np.random.default_rng(5).normal(size=(4, 3))


@jax.jit
def project(constraint: jr.Constraint, x):
    return constraint.project(x)


def points(case: ConstraintCase, dtype=np.float64, seed=0):
    """Return the sample and random points, of which the small ones may be in the set."""
    rng = np.random.default_rng(seed)
    out = [case.sample]
    out += [scale * rng.normal(size=case.sample.shape) for scale in (0.1, 1.0, 10.0)]
    phases = np.exp(1j * rng.uniform(0, 2 * np.pi, case.sample.shape))
    return [x * phases if dtype == np.complex128 else x for x in out]


def members(case: ConstraintCase, number: int):
    rng = np.random.default_rng(1)
    return [case.member(rng, case.sample.shape, case.setting) for _ in range(number)]


def inner(a, b) -> float:
    return float(np.real(np.sum(a * np.conj(b))))


@every_constraint
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=["real", "complex"])
def test_projection_is_the_formula(case, dtype):
    if dtype == np.complex128 and not case.takes_complex:
        with pytest.raises(TypeError, match="takes a real array; got dtype complex64"):
            case.constraint.project(jnp.asarray(case.sample, jnp.complex64))
        return
    with jax.enable_x64():
        for x in points(case, dtype):
            z = project(case.constraint, jnp.asarray(x))
            assert z.dtype == dtype
            np.testing.assert_allclose(z, case.projection(x), rtol=1e-11, atol=1e-12)


@every_constraint
def test_projection_ends_in_the_set_and_stays_there(case):
    moved = 0
    for x in points(case):
        z = project(case.constraint, x.astype(np.float32))
        again = project(case.constraint, z)
        if case.projects:
            assert case.contains(np.asarray(z, np.float64), case.setting, 2e-6)
            np.testing.assert_allclose(again, z, rtol=1e-6, atol=1e-6)
        moved += not case.contains(x, case.setting, 2e-6)
    assert moved > 0


@every_constraint
def test_members_are_fixed_points(case):
    for x in members(case, 5):
        assert case.contains(x, case.setting, 1e-12)
        x = x.astype(np.float32)
        z = project(case.constraint, x)
        if case.interior:
            np.testing.assert_array_equal(z, x)
        else:
            np.testing.assert_allclose(z, x, rtol=1e-6, atol=1e-6)


@every_convex_constraint
def test_no_member_lies_ahead_of_the_projection(case):
    """P(x) is the nearest point of a convex set: <x - P(x), y - P(x)> <= 0 for every member y."""
    others = members(case, 2000)
    with jax.enable_x64():
        for x in points(case)[:3]:
            z = np.asarray(project(case.constraint, x))
            assert max(inner(x - z, y - z) for y in others) <= 1e-10


@each([case for case in CASES if case.convex and case.takes_complex])
def test_no_complex_member_lies_ahead_of_the_projection(case):
    rng = np.random.default_rng(2)
    with jax.enable_x64():
        for x in points(case, np.complex128)[:3]:
            z = np.asarray(project(case.constraint, x))
            turned = (
                y * np.exp(2j * np.pi * rng.uniform(size=y.shape)) for y in members(case, 500)
            )
            assert max(inner(x - z, y - z) for y in turned) <= 1e-10


@every_nonconvex_constraint
def test_no_member_is_nearer(case):
    others = members(case, 1000)
    with jax.enable_x64():
        for x in points(case)[:3]:
            z = np.asarray(project(case.constraint, x))
            # Members about x itself are near it: the projections of what lies about it.
            rng = np.random.default_rng(3)
            about = [case.projection(x + 0.1 * rng.normal(size=x.shape)) for _ in range(100)]
            nearest = min(np.linalg.norm(x - y) for y in others + about)
            assert np.linalg.norm(x - z) <= nearest + 1e-12


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_is_the_nearest_of_all_supports(k):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(size=6).astype(np.float32)
        distances = [
            np.sum(np.delete(x, support) ** 2) for support in itertools.combinations(range(6), k)
        ]
        z = project(jr.SparseTopK(k), x)
        assert np.count_nonzero(z) == k
        np.testing.assert_allclose(np.sum((x - z) ** 2), min(distances), rtol=1e-6)


def test_norm_constraints_are_nearest_on_a_grid_of_the_plane():
    angles = np.linspace(0, 2 * np.pi, 2001)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    annulus = np.concatenate([r * circle for r in np.linspace(0.5, 1.5, 101)])
    for x in np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32):
        for constraint, grid in [
            (jr.UnitNorm(axis=0), circle),
            (jr.MinMaxNorm(0.5, 1.5, axis=0), annulus),
        ]:
            z = project(constraint, x)
            nearest = np.min(np.linalg.norm(x - grid, axis=-1))
            assert np.linalg.norm(x - z) <= nearest + 1e-6


def test_orthonormal_is_nearest_of_all_rotations_and_reflections():
    angles = np.linspace(0, 2 * np.pi, 4001)
    c, s = np.cos(angles), np.sin(angles)
    grid = np.concatenate([np.array([[c, -s], [s, c]]), np.array([[c, s], [s, -c]])], axis=-1)
    for x in np.random.default_rng(0).normal(size=(10, 2, 2)).astype(np.float32):
        z = project(jr.Orthonormal(), x)
        nearest = np.min(np.sum((x[..., None] - grid) ** 2, axis=(0, 1)))
        assert np.sum((x - z) ** 2) <= nearest + 1e-5


@every_convex_constraint
def test_projection_is_firmly_nonexpansive(case):
    for a, b in itertools.combinations(points(case), 2):
        a, b = a.astype(np.float32), b.astype(np.float32)
        moved = np.asarray(project(case.constraint, a) - project(case.constraint, b), np.float64)
        assert inner(moved, moved) <= inner(moved, a - b) * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("constraint", [jr.MaxNorm(1.0), jr.Simplex()], ids=str)
def test_prox_is_the_projection_whatever_the_step(constraint):
    expected = project(constraint, MATRIX)
    prox = jax.jit(constraint.prox)
    for step in (0.0, 1e-3, 50.0):
        np.testing.assert_array_equal(prox(MATRIX, step), expected)


@every_constraint
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_kept_and_rounded_once(case, dtype):
    x = jnp.asarray(case.sample, dtype)
    z = project(case.constraint, x)
    assert z.dtype == dtype
    np.testing.assert_array_equal(z, project(case.constraint, x.astype(jnp.float32)).astype(dtype))


@every_constraint
def test_dtype_is_kept_under_x64_and_strict_promotion(case):
    with jax.enable_x64():
        x = jax.ShapeDtypeStruct(case.sample.shape, jnp.float32)
        assert jax.eval_shape(case.constraint.project, x) == x
        setting = None if case.setting is None else np.float64(case.setting)
        assert jax.eval_shape(case.build(setting).project, x) == x
    for dtype in ("bfloat16", "float8_e4m3fn"):
        x = jax.ShapeDtypeStruct(case.sample.shape, dtype)
        with jax.numpy_dtype_promotion("strict"):
            assert jax.eval_shape(case.constraint.project, x) == x
            derivative = jax.eval_shape(lambda x: jax.jvp(case.constraint.project, (x,), (x,)), x)
            assert derivative == (x, x)


@every_constraint
def test_float16_does_not_overflow(case):
    x = jnp.asarray(1e4 * case.sample, jnp.float16)
    z = project(case.constraint, x)
    np.testing.assert_allclose(z, case.projection(x), rtol=1e-3, atol=1e-3)


@every_constraint
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_magnitude_overflows_or_vanishes(case, factor):
    x = case.sample.astype(np.float32)
    setting = None if case.setting is None else case.setting * factor
    z = project(case.build(setting), factor * x)
    expected = case.projection(x) * factor**case.degree
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-6 * factor**case.degree)


@every_constraint
def test_entries_far_outside_are_projected_exactly(case):
    x = (1e30 * case.sample).astype(np.float32)
    z = project(case.constraint, x)
    np.testing.assert_allclose(z, case.projection(x), rtol=1e-5, atol=1e-6)


def test_the_largest_entries_of_all_are_projected():
    x = np.array([3e38, -3e38, 0.0], np.float32)
    for constraint in (jr.MaxNorm(1.0, axis=0), jr.UnitNorm(axis=0), jr.MinMaxNorm(0.5, 1, axis=0)):
        np.testing.assert_allclose(
            project(constraint, x), np.sqrt([0.5, 0.5, 0]) * np.sign(x), rtol=1e-6
        )
    np.testing.assert_array_equal(project(jr.L1Ball(1.0), x), [0.5, -0.5, 0.0])
    # Divided by these entries, such a radius vanishes.
    z = project(jr.SpectralBall(0.1), x[:2] * np.array([[1, 1], [0, 1]], np.float32))
    expected = project(jr.SpectralBall(0.1), np.array([[3.0, -3.0], [0.0, -3.0]]))
    np.testing.assert_allclose(z, expected, rtol=1e-5)


@every_constraint
def test_nan_propagates(case):
    first = (0,) * case.sample.ndim
    x = jnp.asarray(case.sample, jnp.float32)
    assert jnp.isnan(project(case.constraint, x.at[first].set(jnp.nan))[first])
    assert jnp.isnan(project(case.constraint, x.at[first].set(jnp.nan)).sum())


def test_infinite_entries_go_to_a_bound_or_become_nan():
    x = np.array([-1.0, np.inf], np.float32)
    np.testing.assert_array_equal(project(jr.NonNegative(), x), [0.0, np.inf])
    np.testing.assert_array_equal(project(jr.Box(0.0, 5.0), x), [0.0, 5.0])
    np.testing.assert_array_equal(project(jr.LinfBall(2.0), x), [-1.0, 2.0])
    np.testing.assert_array_equal(project(jr.SparseTopK(1), x), [0.0, np.inf])
    for constraint in (
        jr.L1Ball(1.0),
        jr.L2Ball(1.0),
        jr.Simplex(),
        jr.MaxNorm(1.0, axis=0),
        jr.UnitNorm(axis=0),
        jr.MinMaxNorm(0.5, 1.0, axis=0),
    ):
        assert np.isnan(project(constraint, x)).any(), constraint
    # LAPACK's SVD of this is finite.
    for of_matrix in (jr.Orthonormal(), jr.SpectralBall(5.0)):
        assert np.isnan(project(of_matrix, np.array([[np.inf, 1.0], [2.0, 3.0]]))).all()
    layers = np.stack([np.ones((2, 2)), np.full((2, 2), np.inf)])
    z = project(jr.SpectralBall(5.0, batch_axes=0), layers)
    np.testing.assert_array_equal(z, [np.ones((2, 2)), np.full((2, 2), np.nan)])


@every_constraint
def test_empty_arrays_stay_empty(case):
    shape = case.sample.shape
    empty = [(0, *shape[1:]), (*shape[:-1], 0)] if case.name != "Box-arrays" else [(0, *shape[1:])]
    projected = jax.jit(lambda xs: [case.constraint.project(x) for x in xs])
    assert [z.shape for z in projected([*map(jnp.zeros, empty)])] == empty


@each([case for case in CASES if case.any_shape and "axis" not in repr(case.constraint)])
def test_scalar_arrays(case):
    x = jnp.float32(case.sample.flat[0])
    assert project(case.constraint, x).shape == ()


@every_constraint
def test_vmap_over_data(case):
    batch = np.stack(points(case)).astype(np.float32)
    batched = jax.jit(jax.vmap(case.constraint.project))(batch)
    expected = [case.projection(x) for x in batch]
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=2e-6)


@every_constraint_with_a_setting
def test_vmap_over_settings(case):
    x = case.sample.astype(np.float32)
    settings = np.array([0.5, 1.0, 2.0], np.float32) * np.float32(case.setting)
    batched = jax.jit(jax.vmap(lambda s: case.build(s).project(x)))(settings)
    expected = [case.formula(x.astype(np.float64), float(s)) for s in settings]
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-6)


def test_one_trace_serves_every_setting():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def given(constraints, x):
        return [constraint.project(x) for constraint in constraints]

    cases = [case for case in CASES if case.setting is not None and case.sample.shape == (8, 3)]
    x = cases[0].sample
    for factor in (1.0, 1.5):
        projected = given([case.build(factor * case.setting) for case in cases], x)
        expected = [case.formula(x, factor * case.setting) for case in cases]
        chex.assert_trees_all_close(projected, expected, rtol=1e-5, atol=1e-6)


@every_constraint
def test_jacobian_is_that_of_the_formula_and_finite_at_zero(case):
    with jax.enable_x64():
        jacobian = jax.jit(jax.jacrev(case.constraint.project))
        for x in (case.sample, members(case, 1)[0]):
            expected = central_differences(case, x)
            if case.name.startswith("SparseTopK") and x is not case.sample:
                # Of a member that is sparse: the entries that are 0 may as well be kept.
                kept = (x != 0)[(..., *[None] * x.ndim)]
                expected, actual = expected * kept, jacobian(x) * kept
            else:
                actual = jacobian(x)
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
        assert np.isfinite(jacobian(np.zeros(case.sample.shape))).all()


def central_differences(case: ConstraintCase, x, h: float = 1e-6):
    out = np.empty(x.shape * 2)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        out[(..., *index)] = (case.projection(x + step) - case.projection(x - step)) / (2 * h)
    return out


@jax.jit
def derivative(constraint, x):
    return jax.jacobian(constraint.project)(x)


@pytest.mark.parametrize(
    ("constraint", "x", "slopes"),
    [
        (jr.NonNegative(), [-1.0, 0.0, 1.0], [0, 0, 1]),
        (jr.Box(-1.0, 2.0), [-2.0, -1.0, 0.0, 2.0, 3.0], [0, 0.5, 1, 0.5, 0]),
        (jr.LinfBall(2.0), [-3.0, -2.0, 0.0, 2.0, 3.0], [0, 0.5, 1, 0.5, 0]),
        (jr.L1Ball(7.0), [3.0, -4.0], [1, 1]),
        (jr.L2Ball(5.0), [3.0, -4.0], [1, 1]),
        (jr.MaxNorm(5.0, axis=0), [3.0, -4.0], [1, 1]),
        (jr.MinMaxNorm(5.0, 6.0, axis=0), [3.0, -4.0], [1, 1]),
        (jr.MinMaxNorm(4.0, 5.0, axis=0), [3.0, -4.0], [1, 1]),
    ],
    ids=str,
)
def test_derivative_at_the_edge_is_the_documented_one(constraint, x, slopes):
    np.testing.assert_array_equal(derivative(constraint, jnp.array(x)), np.diag(slopes))


@each(
    [
        c
        for c in CASES
        if c.name in ("LinfBall", "L1Ball", "MinMaxNorm", "Orthonormal", "SpectralBall")
    ]
)
def test_complex_derivatives(case):
    with jax.enable_x64():
        x = jnp.asarray(points(case, np.complex128)[0])
        check_grads(jax.jit(case.constraint.project), (x,), 1, modes=["rev"], rtol=1e-6)
        _, tangent = jax.jit(lambda x: jax.jvp(case.constraint.project, (x,), (x + 1j,)))(0 * x)
        assert np.isfinite(tangent).all()


@every_constraint
def test_eight_devices_give_what_one_gives(case):
    axis = case.sample.shape.index(8)
    mesh = Mesh(np.array(jax.devices()), ("shards",))
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "shards"))
    x = jax.device_put(case.sample.astype(np.float32), sharding)
    assert len(x.sharding.device_set) == 8
    expected = case.projection(case.sample)
    np.testing.assert_allclose(project(case.constraint, x), expected, rtol=1e-5, atol=1e-6)


@every_constraint
def test_integers_are_an_error(case):
    with pytest.raises(TypeError, match="takes a floating-point array; got dtype int32"):
        case.constraint.project(jnp.ones(case.sample.shape, jnp.int32))


@every_constraint
def test_constraint_is_a_pytree_of_its_settings(case):
    leaves, treedef = jax.tree.flatten(case.constraint)
    placeholders = [object() for _ in leaves]
    assert jax.tree.leaves(jax.tree.unflatten(treedef, placeholders)) == placeholders
    assert (len(leaves) > 0) == (case.setting is not None)


@pytest.mark.parametrize(
    ("constraint", "penalty"),
    [
        (jr.L1Ball(1.3), jr.L1Inf(1.0, axis=(0, 1))),
        (jr.L1Ball(1.3, axis=0), jr.L1Inf(1.0)),
        (jr.LinfBall(1.3), jr.L1(1.0)),
        (jr.L2Ball(1.3), jr.GroupLasso(1.0, axis=(0, 1), weighted=False)),
        (jr.MaxNorm(1.3), jr.GroupLasso(1.0, weighted=False)),
        (jr.SpectralBall(1.3), jr.Nuclear(1.0)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_projection_is_what_the_prox_of_the_dual_norm_leaves(constraint, penalty):
    """Moreau: x = P_B(x) + prox_R(x), for R the largest <x, y> over the members y of B."""
    with jax.enable_x64():
        left = jax.jit(lambda x: x - penalty.prox(x, step=1.3))(MATRIX)
        np.testing.assert_allclose(project(constraint, MATRIX), left, rtol=1e-12, atol=1e-14)


def test_top_k_keeps_the_first_of_equal_moduli():
    x = jnp.array([[1.0, -2.0], [2.0, 2.0]])
    np.testing.assert_array_equal(jr.SparseTopK(2).project(x), [[0.0, -2.0], [2.0, 0.0]])
    np.testing.assert_array_equal(
        jr.SparseTopK(3).project(jnp.zeros(5).at[4].set(1.0)), [0.0, 0.0, 0.0, 0.0, 1.0]
    )
    jacobian = jax.jit(jax.jacobian(jr.SparseTopK(1).project))(jnp.zeros(2))
    np.testing.assert_array_equal(jacobian, [[1.0, 0.0], [0.0, 0.0]])


def test_simplex_of_many_entries_of_all_sizes_adds_up_to_its_scale():
    case = next(case for case in CASES if case.name == "Simplex")
    entries = np.arange(1, 2001)
    for x, scale in [
        # In float32 the running sums of these have no digit left for a scale of 7.
        (1e7 + entries % 9, 7.0),
        (-1.0 / entries, 1.0),
        (-(0.9**entries), 3.0),
        (0.0 * entries, 1.0),
        (np.linspace(-1e-3, 5e-3, 2000), 1e-3),
        (np.random.default_rng(0).pareto(0.3, 2000), 1e4),
    ]:
        x = x.astype(np.float32)
        z = np.asarray(project(jr.Simplex(scale), x), np.float64)
        np.testing.assert_allclose(z.sum(), scale, rtol=2e-5)
        np.testing.assert_allclose(z, case.formula(x.astype(np.float64), scale), atol=1e-6 * scale)


@pytest.mark.parametrize("constraint", [jr.UnitNorm(), jr.MinMaxNorm(0.5, 1.0)], ids=str)
def test_vector_of_zeros_stays_zero_beside_another(constraint):
    x = jnp.array([[0.0, 3.0], [0.0, 4.0]])
    np.testing.assert_allclose(constraint.project(x), [[0.0, 0.6], [0.0, 0.8]], rtol=1e-6)
    jacobian = jax.jit(jax.jacobian(constraint.project))(x)
    np.testing.assert_array_equal(jacobian[:, 0], 0.0)
    assert np.abs(jacobian[:, 1]).max() > 0.1
    assert np.isfinite(jacobian).all()


orthonormal_jacobian = jax.jit(jax.jacobian(jr.Orthonormal().project))


def test_orthonormal_is_differentiable_at_equal_singular_values():
    with jax.enable_x64():
        for x in (np.eye(3), 2 * np.eye(4)[:, :2], np.eye(2, 4)):
            jacobian = orthonormal_jacobian(x)
            case = next(case for case in CASES if case.name == "Orthonormal")
            np.testing.assert_allclose(jacobian, central_differences(case, x), atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)], ids=str)
def test_orthonormal_of_a_matrix_without_full_rank(shape):
    case = next(case for case in CASES if case.name == "Orthonormal")
    for x in (jnp.zeros(shape), jnp.ones(shape), jnp.zeros(shape).at[0, 0].set(-2.0)):
        assert case.contains(np.asarray(project(jr.Orthonormal(), x)), None, 1e-5)
        assert np.isfinite(orthonormal_jacobian(x)).all()


def test_orthonormal_takes_axes():
    x = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    expected = project(jr.Orthonormal(), x.reshape(6, 2)).reshape(x.shape)
    np.testing.assert_allclose(jr.Orthonormal().project(x), expected, rtol=1e-6, atol=1e-7)
    moved = jr.Orthonormal(axis=(1, 2)).project(np.moveaxis(x, -1, 0))
    np.testing.assert_allclose(jnp.moveaxis(moved, 0, -1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 0.3, 1.0, 1e30])
def test_spectral_ball_leaves_a_matrix_within_as_it_is_its_edge_included(scale):
    scale = np.float32(scale)
    edge = np.array([[0.0, -5.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    for matrix, radius in [(edge, 5), (MATRIX, 9)]:
        x = matrix.astype(np.float32) * scale
        np.testing.assert_array_equal(project(jr.SpectralBall(radius * scale), x), x)
        identity = np.eye(x.size).reshape(x.shape * 2)
        np.testing.assert_array_equal(derivative(jr.SpectralBall(radius * scale), x), identity)


def test_spectral_ball_is_differentiable_at_equal_and_zero_singular_values():
    case = next(case for case in CASES if case.name == "SpectralBall")
    with jax.enable_x64():
        for x in (
            3 * np.eye(3),
            4 * np.eye(4)[:, :2],
            np.diag([3.0, 3.0, 1.0, 1.0]),
            np.diag([3.0, 0.0, 0.0])[:, :2],
            np.diag([3.0, 1.0, 0.0, 0.0])[:3],
        ):
            expected = central_differences(case, x)
            jacobian = derivative(jr.SpectralBall(case.setting), x)
            np.testing.assert_allclose(jacobian, expected, atol=1e-8)


TURNED: dict[str, Any] = {
    "SpectralBall": jr.SpectralBall(2.0).project,
    "Nuclear": lambda x: jr.Nuclear(1.0).prox(x, 0.7),
}


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("singular", [(3.0, 1.0, 1.0), (3.0, 3.0, 1.2)], ids=str)
def test_derivatives_at_singular_values_that_are_equal_but_for_rounding(name, singular):
    moved = jax.jit(TURNED[name])
    tangent = jax.jit(lambda x, dx: jax.jvp(TURNED[name], (x,), (dx,))[1])
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        for _ in range(20):
            u, _, vt = np.linalg.svd(rng.normal(size=(5, 3)), full_matrices=False)
            x, dx = u * np.array(singular) @ vt, rng.normal(size=(5, 3))
            expected = (moved(x + 1e-6 * dx) - moved(x - 1e-6 * dx)) / 2e-6
            for dtype, tolerance in ((np.float64, 1e-6), (np.float32, 1e-4)):
                found = tangent(x.astype(dtype), dx.astype(dtype))
                np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_derivatives_of_spectral_ball_do_not_overflow_or_vanish(scale):
    jacobians = jax.jit(jax.jacobian(lambda x, r: jr.SpectralBall(r).project(x), argnums=(0, 1)))
    x = np.array([[0.0, 3.0, 0.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    case = next(case for case in CASES if case.name == "SpectralBall")
    by_entries, by_radius = jacobians(x * np.float32(scale), case.setting * scale)
    by_differences = central_differences(case, x.astype(np.float64))
    np.testing.assert_allclose(by_entries, by_differences, atol=1e-6)
    expected = [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(by_radius, expected, atol=1e-6)
    _, by_radius = jacobians(x * np.float32(scale), 5.0 * scale)
    np.testing.assert_array_equal(by_radius, 0.0)


def test_spectral_ball_of_layers_projects_only_those_outside():
    layers = np.stack([MATRIX, 10 * MATRIX]).astype(np.float32)
    z = project(jr.SpectralBall(9.0, batch_axes=0), layers)
    np.testing.assert_array_equal(z[0], layers[0])
    np.testing.assert_allclose(z[1], project(jr.SpectralBall(9.0), layers[1]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(z[1], 2), 9.0, rtol=1e-6)


def test_spectral_ball_bounds_how_much_a_network_stretches():
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(3, 2, 5, 4))]
    projected = [project(jr.SpectralBall(0.5), kernel) for kernel in kernels]
    bound = jr.functional.lipschitz_bound(projected)
    np.testing.assert_allclose(bound, 0.5 * 0.5 * math.sqrt(3 * 2), rtol=1e-6)


def test_box_takes_bounds_from_a_tree():
    params = {"a": {"kernel": jnp.array([1.0, -4.0])}, "b": {"kernel": jnp.array([2.0])}}
    lower: Any = {"a": {"kernel": jnp.array([0.0, -1.0])}, "b": {"kernel": jnp.array([3.0])}}
    kernel = jr.kernel(jr.Box(lower, 5.0))
    chex.assert_trees_all_equal(
        kernel.prox(params, 1.0),
        {"a": {"kernel": jnp.array([1.0, -1.0])}, "b": {"kernel": jnp.array([3.0])}},
    )
    above: Any = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.array([6.0])}}
    with pytest.raises(ValueError, match=re.escape("must be in this order; got lower=Array([6.")):
        jr.kernel(jr.Box(above, 5.0)).prox(params, 1.0)
    with pytest.raises(TypeError, match=r"`jaxreg\.Box\(lower=\.\.\.\)` is a tree: only"):
        jr.Box(lower).project(jnp.ones(2))


def test_box_takes_bounds_that_another_jit_made():
    lower, upper = jnp.zeros(2), jnp.ones(2)
    z = jax.jit(lambda x: jr.Box(lower, upper).project(x))(jnp.array([-1.0, 3.0]))
    np.testing.assert_array_equal(z, [0.0, 1.0])
    traced = jax.jit(lambda lower, upper: jr.Box(lower, upper).project(jnp.array([-1.0, 3.0])))
    np.testing.assert_array_equal(traced(lower, upper), [0.0, 1.0])


def test_describe_shows_the_bounds_of_a_box():
    table = jr.kernel(jr.Box(-1.0, jnp.ones(2))).describe({"kernel": jnp.ones(2)})
    assert "Box(lower=-1.0, upper=array(2,))" in table


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: jr.Box(1.0, 0.5), "`jaxreg.Box(lower=..., upper=...)` must be in this order; got"),
        (lambda: jr.Box(float("nan")), "must be in this order; got lower=nan, upper=inf"),
        (lambda: jr.Box(np.ones(2), np.array([1, 0])), "`jaxreg.Box(lower=..., upper=...)` must"),
        (lambda: jr.Box(jnp.float32(2), 1.0), "`jaxreg.Box(lower=..., upper=...)` must be in"),
        (lambda: jr.LinfBall(0.0), "`jaxreg.LinfBall(radius=...)` must be a positive, finite"),
        (lambda: jr.L2Ball(math.inf), "`jaxreg.L2Ball(radius=...)` must be a positive, finite"),
        (lambda: jr.L1Ball(-1.0), "`jaxreg.L1Ball(radius=...)` must be a positive, finite"),
        (lambda: jr.Simplex(0), "`jaxreg.Simplex(scale=...)` must be a positive, finite scalar"),
        (lambda: jr.Simplex(np.ones(2)), "`jaxreg.Simplex(scale=...)` must be a positive, finite"),
        (lambda: jr.SparseTopK(0), "`jaxreg.SparseTopK(k=...)` must be a positive integer; got 0"),
        (lambda: jr.SparseTopK(2.0), "(k=...)` must be a positive integer; got 2.0"),  # type: ignore[arg-type]
        (lambda: jr.SparseTopK(True), "`jaxreg.SparseTopK(k=...)` must be a positive integer; g"),
        (lambda: jr.MaxNorm(float("nan")), "`jaxreg.MaxNorm(max_norm=...)` must be a positive"),
        (lambda: jr.SpectralBall(0.0), "`jaxreg.SpectralBall(radius=...)` must be a positive, fin"),
        (lambda: jr.MinMaxNorm(-0.1, 1.0), "`jaxreg.MinMaxNorm(min_norm=...)` must be a finite, n"),
        (lambda: jr.MinMaxNorm(0.0, 0.0), "`jaxreg.MinMaxNorm(max_norm=...)` must be a positive"),
        (lambda: jr.MinMaxNorm(2.0, 1.0), "must be in this order; got min_norm=2.0, max_norm=1.0"),
        (lambda: jr.MinMaxNorm(0.0, 1.0, rate=1.1), "`jaxreg.MinMaxNorm(rate=...)` must be a sca"),
    ],
)
def test_bad_settings_are_an_error(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_settings_that_are_traced_are_accepted_whatever_their_values():
    z = jax.jit(lambda low, high: jr.MinMaxNorm(low, high, axis=0).project(jnp.ones(4)))(5.0, 1.0)
    np.testing.assert_array_equal(z, 0.5)


def test_k_above_the_number_of_entries_is_an_error():
    message = (
        "`jaxreg.SparseTopK(k=...)` must be at most 4, the number of entries of a vector with"
        ' axis=0; got k=5 for "x" of shape (4, 3).'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jr.SparseTopK(5, axis=0).project(jnp.ones((4, 3)))
    assert jr.SparseTopK(5).project(jnp.ones((4, 3))).sum() == 5


@pytest.mark.parametrize(
    "build",
    [
        lambda axis: jr.L1Ball(1.0, axis=axis),
        lambda axis: jr.Simplex(axis=axis),
        lambda axis: jr.SparseTopK(1, axis=axis),
        lambda axis: jr.MaxNorm(1.0, axis=axis),
        lambda axis: jr.UnitNorm(axis=axis),
        lambda axis: jr.MinMaxNorm(0.5, 1.0, axis=axis),
        lambda axis: jr.Orthonormal(axis=axis),
        lambda axis: jr.SpectralBall(1.0, axis=axis),
    ],
)
@pytest.mark.parametrize("axis", [2, (0, -2)], ids=str)
def test_axis_out_of_range_is_an_error(build, axis):
    message = f'several different ones; got axis={axis} for "x" of shape (2, 3).'
    with pytest.raises(ValueError, match=re.escape(message)):
        build(axis).project(jnp.ones((2, 3)))


@pytest.mark.parametrize("build", [jr.Orthonormal, partial(jr.SpectralBall, 1.0)])
def test_constraint_on_matrices_of_a_bias_is_an_error(build):
    message = r"` takes a matrix, an array with two axes or more; got .a/kernel"
    with pytest.raises(ValueError, match=type(build()).__name__ + message):
        jr.kernel(build()).prox({"a": {"kernel": jnp.ones(3)}}, 1.0)
    with pytest.raises(ValueError, match=r"or more, beside batch_axes=0; got .*\(2, 3\)"):
        build(batch_axes=0).project(jnp.ones((2, 3)))


def test_constraint_has_no_value_and_no_gradient():
    params = {"kernel": jnp.ones((2, 2))}
    kernel = jr.kernel(jr.MaxNorm(1.0))
    message = (
        r"`jaxreg\.MaxNorm` is a constraint: it has no value and no gradient to train with\. Put"
        r" `jaxreg\.project\(jaxreg\.kernel\(\.\.\.\)\)` last in the optax chain"
    )
    for use in (
        lambda: kernel(params),
        lambda: jax.grad(kernel)(params),
        lambda: kernel.gradient(params),
        lambda: jr.MaxNorm(1.0).gradient(params["kernel"]),
        lambda: jr.penalize(params["kernel"], jr.MaxNorm(1.0)),
    ):
        with pytest.raises(TypeError, match=message):
            use()


def test_constraint_adds_up_with_nothing():
    message = "A constraint adds up with nothing; got .*Put `jaxreg.project` after"
    with pytest.raises(TypeError, match=message):
        jr.L1(1.0) + jr.NonNegative()
    with pytest.raises(TypeError, match=message):
        jr.NonNegative() + jr.MaxNorm(1.0)


def test_scalars_of_numpy_are_checked_too():
    with pytest.raises(ValueError, match="must be in this order; got lower="):
        jr.Box(np.float32(2), 1.0)


@pytest.mark.parametrize("name", ["lower", "upper"])
@pytest.mark.parametrize("shape", [(2,), (1, 1, 3)], ids=str)
def test_bounds_that_do_not_broadcast_are_an_error(name, shape):
    message = (
        rf'Box\({name}=...\)` must broadcast to the array; got shape .* for "x" of shape \(2, 3\)'
    )
    with pytest.raises(ValueError, match=message):
        jr.Box(**{name: np.zeros(shape)}).project(jnp.ones((2, 3)))


def test_a_singular_value_of_the_radius_counts_as_one_within():
    jacobian = jax.jacobian(jr.SpectralBall(2.0).project)(jnp.diag(jnp.array([4.0, 2.0])))
    np.testing.assert_allclose(jacobian[1, 1, 1, 1], 1, rtol=1e-6)


def test_an_array_is_no_number_of_entries():
    with pytest.raises(ValueError, match=r"SparseTopK\(k=...\)` must be a positive integer"):
        jr.SparseTopK(jnp.int32(2))


def test_spectral_ball_is_the_identity_where_several_singular_values_are_zero():
    jacobian = jax.jacobian(jr.SpectralBall(2.0).project)(jnp.diag(jnp.array([3.0, 0.0, 0.0])))
    block = jacobian[1:, 1:, 1:, 1:].reshape(4, 4)
    np.testing.assert_allclose(block, np.eye(4), atol=1e-6)
