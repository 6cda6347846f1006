"""Eight devices, programmed by `shard_map`: sums cross the mesh, each penalty is finished once."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxreg as jr

from ._programs import MESH, assert_all_close, exchanges, put

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 4, 6)).astype(np.float32)
MASK = RNG.uniform(size=(16, 4)) < 0.6
BATCH = ("data", "model")
SAME = P()

ENCODER: dict[str, Any] = {
    "separable": jr.L1(0.3),
    "statistic": jr.KLSparsity(0.3, target=0.2) + jr.Decorrelation(0.3),
    "columns": jr.GroupLasso(0.2),
    "time": jr.TemporalDifference(0.3),
}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        code = nn.sigmoid(nn.Dense(5, name="encoder")(x))
        for name, penalty in ENCODER.items():
            jr.sow(self, name, code, penalty)
        return nn.Dense(6, name="decoder")(code)


PARAMS = Model().init(jax.random.key(0), X)["params"]


def loss(params, x, mask=None, across=lambda mean, terms: (mean, terms)):
    forward = jr.activity({"encoder": jr.L2(0.1)}, reduction="token_mean", mask=mask)
    y, terms = forward(Model().apply)({"params": params}, x)
    mean, terms = across(jnp.mean((y - x) ** 2), terms)
    return mean + terms.total, terms.as_dict()


def over(axes):
    return lambda mean, terms: (
        jax.lax.pmean(mean, axes),
        jr.combine(terms, axis_name=axes),
    )


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, X, MASK)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_shards_combine_to_the_whole_batch(check_vma, on_one_device):
    @partial(
        jax.shard_map,
        mesh=MESH,
        in_specs=(SAME, P(BATCH), P(BATCH)),
        out_specs=SAME,
        check_vma=check_vma,
    )
    def step(params, x, mask):
        value, gradient = jax.value_and_grad(loss, has_aux=True)(params, x, mask, over(BATCH))
        # Unchecked, JAX does not know that parameters are the same: each shard has its part.
        return value, gradient if check_vma else jax.lax.pmean(gradient, BATCH)

    compiled = jax.jit(step).lower(PARAMS, X, MASK).compile()
    assert_all_close(compiled(PARAMS, X, MASK), on_one_device)
    for exchange in exchanges(compiled):
        assert exchange.kind == "all-reduce"
        assert exchange.entries <= 6 * 5  # a kernel's gradient; Decorrelation's 5 · 5


def test_one_axis_splits_the_batch_and_the_other_is_left_to_the_compiler():
    kernel = jr.kernel({"w": jr.GroupLasso(0.1)})

    def objective(params, x, across=lambda mean: mean, **kwargs):
        y = nn.sigmoid(x @ params["w"])
        penalty = jr.penalize(y, ENCODER["statistic"], **kwargs) + kernel(params)
        return across(jnp.mean(y**2)) + penalty

    @partial(
        jax.shard_map, mesh=MESH, in_specs=(SAME, P("data")), out_specs=SAME, axis_names={"data"}
    )
    def step(params, x):
        mean = partial(jax.lax.pmean, axis_name="data")
        return jax.value_and_grad(objective)(params, x, mean, axis_name="data")

    params = {"w": RNG.normal(size=(6, 8)).astype(np.float32)}
    placed = {"w": put(params["w"], None, "model")}
    assert_all_close(jax.jit(step)(placed, X), jax.jit(jax.value_and_grad(objective))(params, X))


def shard_map(function, *in_specs, out_specs=SAME):
    return jax.jit(jax.shard_map(function, mesh=MESH, in_specs=in_specs, out_specs=out_specs))


def test_penalize_takes_the_axes_too():
    penalty = ENCODER["statistic"] + ENCODER["columns"] + jr.SoftOrthogonal(0.1, batch_axes=0)
    codes = jax.nn.sigmoid(X)

    def both(x, **kwargs):
        return jax.value_and_grad(lambda x: jr.penalize(x, penalty, **kwargs))(x)

    sharded = shard_map(partial(both, axis_name=BATCH), P(BATCH), out_specs=(SAME, P(BATCH)))
    assert_all_close(sharded(codes), jax.jit(both)(codes))


def test_what_is_the_same_on_every_shard_counts_once():
    def totals(x):
        forward = jr.activity({}, reduction="sum")(jr.nnx.ActivityRegularization(jr.L2(0.5)))
        _, terms = forward(x)
        once = jr.combine(terms, axis_name=BATCH)
        return once.total, jr.combine(once, axis_name=BATCH).total

    expected = jr.L2(0.5)(X)
    for spec in (SAME, P("data"), P(BATCH)):
        np.testing.assert_allclose(shard_map(totals, spec)(X), (expected, expected), rtol=1e-6)


def test_sums_over_features_add_up_over_shards_of_features():
    penalty = jr.L1(0.3) + jr.GroupLasso(0.2) + jr.KLSparsity(0.3, target=0.2)
    codes = jax.nn.sigmoid(X)

    def both(x):
        def total(x):
            value = jr.penalize(x, penalty, axis_name="data")
            return jax.lax.psum(value, "model")

        return jax.value_and_grad(total)(x)

    spec = P("data", None, "model")
    sharded = shard_map(both, spec, out_specs=(SAME, spec))
    expected = jax.jit(jax.value_and_grad(lambda x: jr.penalize(x, penalty)))(codes)
    assert_all_close(sharded(codes), expected)


def test_microbatches_on_each_shard(on_one_device):
    def accumulated(params, x, mask):
        def part(total, microbatch):
            x, mask = microbatch
            forward = jr.activity({"encoder": jr.L2(0.1)}, reduction="token_mean", mask=mask)
            y, terms = forward(Model().apply)({"params": params}, x)
            return total + jnp.sum((y - x) ** 2), terms

        start = jax.lax.pcast(0.0, BATCH, to="varying")
        microbatches = jax.tree.map(lambda a: a[:, None], (x, mask))
        squares, stacked = jax.lax.scan(jax.checkpoint(part), start, microbatches)
        terms = jr.combine(jr.combine(stacked), axis_name=BATCH)
        return jax.lax.psum(squares, BATCH) / X.size + terms.total, terms.as_dict()

    step = shard_map(jax.value_and_grad(accumulated, has_aux=True), SAME, P(BATCH), P(BATCH))
    assert_all_close(step(PARAMS, X, MASK), on_one_device)


def test_shards_of_an_nnx_module_combine():
    definition, params = nnx.split(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    activity = jr.activity({".": jr.GroupLasso(0.2) + jr.VarianceHinge(0.3)})

    def total(params, x, axis_name=None):
        _, terms = activity(nnx.merge(definition, params))(x)
        return (jr.combine(terms, axis_name=axis_name) if axis_name else terms).total

    sharded = shard_map(jax.value_and_grad(partial(total, axis_name=BATCH)), SAME, P(BATCH))
    assert_all_close(sharded(params, X), jax.jit(jax.value_and_grad(total))(params, X))


def test_a_list_of_microbatches_and_an_axis():
    forward = jr.activity({})(jr.nnx.ActivityRegularization(jr.L1(0.5)))

    def total(x):
        return jr.combine([forward(x[:1])[1], forward(x[1:])[1]], axis_name="data").total

    expected = jr.penalize(X, jr.L1(0.5))
    np.testing.assert_allclose(shard_map(total, P("data"))(X), expected, rtol=1e-6)


def test_a_kernel_beside_the_shard_map_is_partitioned_whatever_the_split():
    split = {"encoder": ("model", "data"), "decoder": (None, "data")}
    specs = {name: P(*axes) for name, axes in split.items()}
    params = dict(zip(split, RNG.normal(size=(2, 8, 8)).astype(np.float32), strict=True))
    kernel = jr.kernel({"*": jr.GroupLasso(0.1) + jr.HoyerSquare(0.2) + jr.L2(0.1)})

    def of_shards(params):
        encoder, decoder = (jnp.sum(params[name] ** 3) for name in ("encoder", "decoder"))
        return jax.lax.psum(encoder, BATCH) + jax.lax.psum(decoder, "data")

    def of_whole(params):
        return jnp.sum(params["encoder"] ** 3) + jnp.sum(params["decoder"] ** 3)

    def both(of, params):
        return jax.value_and_grad(lambda p: of(p) + kernel(p))(params)

    placed = {name: put(params[name], *axes) for name, axes in split.items()}
    sharded = jax.shard_map(of_shards, mesh=MESH, in_specs=(specs,), out_specs=SAME)
    compiled = jax.jit(partial(both, sharded)).lower(placed).compile()
    assert_all_close(compiled(placed), jax.jit(partial(both, of_whole))(params))
    assert all(e.kind == "all-reduce" and e.entries <= 8 for e in exchanges(compiled))


def test_a_kernel_inside_adds_up_what_is_split():
    specs = {"a": P("model", "data"), "b": P(None, "data"), "c": P(BATCH), "d": SAME, "e": SAME}
    params = {name: RNG.normal(size=(8, 8)).astype(np.float32) for name in specs}
    rules = {"[abc]": jr.L1(0.2) + jr.L2(0.1), "d": jr.L2(0.3), "e": jr.GroupLasso(0.1)}
    kernel = jr.kernel(rules)

    def loss(params, **axis_name):
        return kernel(params, **axis_name) ** 2

    sharded = shard_map(
        jax.value_and_grad(partial(loss, axis_name=BATCH)), specs, out_specs=(SAME, specs)
    )
    assert_all_close(sharded(params), jax.jit(jax.value_and_grad(loss))(params))


def test_a_part_of_a_kernel_is_no_penalty_of_the_whole():
    params = {"kernel": X[0]}
    with pytest.raises(ValueError, match="out_specs"):
        shard_map(jr.kernel(jr.L2(0.1)), P("data"))(params)
    of_groups = partial(jr.kernel(jr.GroupLasso(0.1)), axis_name=BATCH)
    with pytest.raises(ValueError, match=r'parts of "kernel".*\(\'data\',\): GroupLasso is no sum'):
        shard_map(of_groups, P("data"))(params)
    of_entries = partial(jr.kernel(jr.L2(0.1)), axis_name="data")
    unchecked = partial(jax.shard_map, mesh=MESH, out_specs=SAME, check_vma=False)
    with pytest.raises(ValueError, match="must know which leaves are split"):
        jax.jit(unchecked(of_entries, in_specs=P("data")))(params)


class Sharded(nn.Module):
    inside: bool

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (6, 5))

        def encode(w, x):
            code = x @ w
            return jr.sow(self, "code", code, jr.L1(0.5)) if self.inside else code

        sharded = jax.shard_map(encode, mesh=MESH, in_specs=(SAME, P(BATCH)), out_specs=P(BATCH))
        code = sharded(w, x)
        return code if self.inside else jr.sow(self, "code", code, jr.L1(0.5))


def test_a_shard_map_inside_of_a_model_lets_the_value_out_and_not_the_term():
    params = {"w": PARAMS["encoder"]["kernel"]}
    forward = jax.jit(jr.activity({})(Sharded(inside=False).apply))
    code, terms = forward({"params": params}, X)
    np.testing.assert_allclose(terms["code"], 0.5 * np.abs(code).sum() / len(X), rtol=1e-5)
    with pytest.raises(ValueError, match='cannot carry the term "code" out of the transformation'):
        jax.eval_shape(jr.activity({})(Sharded(inside=True).apply), {"params": params}, X)


@pytest.mark.parametrize(
    "of_rows",
    [
        jr.Simplex(axis=-1).project,
        jr.L1Ball(0.5, axis=-1).project,
        partial(jr.TotalVariation(0.3).prox, step=1.0),
        partial(jr.Nuclear(0.3, method="polar", batch_axes=0).prox, step=1.0),
        partial(jr.gates.top_k, k=2),
    ],
    ids=["Simplex", "L1Ball", "TotalVariation", "Nuclear", "top_k"],
)
def test_what_moves_each_row_moves_those_of_a_shard(of_rows):
    sharded = shard_map(of_rows, P("data"), out_specs=P("data"))
    np.testing.assert_allclose(sharded(X), jax.jit(of_rows)(X), atol=2e-6)


def test_jacobians_of_shards():
    kernel = RNG.normal(size=(6, 9)).astype(np.float32)

    def norms(x, across=lambda norms: norms):
        wide = jr.functional.jacobian_norm(lambda x: jnp.tanh(x @ kernel), x)
        narrow = jr.functional.jacobian_norm(lambda x: jnp.tanh(x @ kernel[:, :2]), x)
        return across((wide, narrow))

    def estimate(x):
        return jax.lax.pmean(
            jr.functional.jacobian_norm(lambda x: x[:, :1], x, key=jax.random.key(0)), BATCH
        )

    mean = partial(jax.lax.pmean, axis_name=BATCH)
    rows = X[:, 0]
    assert_all_close(shard_map(partial(norms, across=mean), P(BATCH))(rows), jax.jit(norms)(rows))
    assert shard_map(estimate, P(BATCH))(rows) == 1


def test_rows_of_a_kernel_by_hand():
    w = RNG.normal(size=(8, 6)).astype(np.float32)
    penalty = jr.GroupLasso(0.1) + jr.L2(0.2)
    rows = shard_map(
        jax.value_and_grad(lambda w: jr.penalize(w, penalty, reduction="sum", axis_name="data")),
        P("data"),
        out_specs=(SAME, P("data")),
    )
    assert_all_close(rows(w), jax.value_and_grad(penalty)(w))


@pytest.mark.parametrize(
    "penalty",
    [jr.L1Inf(0.1), jr.Nuclear(0.1), jr.L1(0.1) + jr.TotalVariation(0.1, axis=0)],
    ids=["maxima", "matrix", "neighbours"],
)
def test_what_reaches_over_the_batch_is_an_error(penalty):
    message = "`jaxreg.penalize` cannot add up parts of a batch for"
    with pytest.raises(ValueError, match=re.escape(message)):
        shard_map(partial(jr.penalize, penalty=penalty, axis_name="data"), P("data"))(X[..., 0])


def test_an_axis_that_is_not_there_is_an_error():
    with pytest.raises(NameError, match="unbound axis name: batch"):
        jr.penalize(X, jr.L1(0.1), axis_name="batch")


class Branching(nn.Module):
    @nn.compact
    def __call__(self, x, taken):
        encoder = nn.Dense(5, name="encoder")
        encoder(x)  # its parameters are made outside of the branches

        def penalized(module, x):
            return jr.sow(module, "code", encoder(x), jr.L1(0.3))

        return nn.cond(taken, penalized, lambda module, x: encoder(x), self, x)


@pytest.mark.parametrize("taken", [True, False])
def test_a_term_of_one_branch_only(taken):
    model = Branching()
    params = model.init(jax.random.key(0), X, True)

    def total(x, across):
        _, terms = jr.activity({})(model.apply)(params, x, jnp.asarray(taken))
        return (jr.combine(terms, axis_name=BATCH) if across else terms).total

    sharded = jax.jit(shard_map(partial(total, across=True), P(BATCH)))
    whole = total(X, across=False)
    assert (whole > 0) == taken
    np.testing.assert_allclose(sharded(X), whole, rtol=1e-5)
