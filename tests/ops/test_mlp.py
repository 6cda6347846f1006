"""Two dense layers with the penalty of what lies between: the reference, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxreg as jr

from ._interpret import by_xla
from ._penalties import Root

RNG = np.random.default_rng(0)
X, W1, B1 = RNG.normal(size=(6, 5)), RNG.normal(size=(5, 8)), RNG.normal(size=8)
W2, B2 = RNG.normal(size=(8, 3)), RNG.normal(size=3)
L1 = jr.L1(0.3)


def test_output_hidden_and_value_are_the_formula():
    single = [jnp.asarray(a, jnp.float32) for a in (X, W1, B1, W2, B2)]
    y, h, value = jr.ops.mlp(*single, activation=jax.nn.relu, penalty=L1)
    hidden = np.maximum(X @ W1 + B1, 0)
    np.testing.assert_allclose(h, hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, hidden @ W2 + B2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, 0.3 * np.abs(hidden).sum() / 6, rtol=1e-6)
    x, w1, _, w2, _ = single
    y, h, value = jr.ops.mlp(
        x, w1, None, w2, None, activation=jnp.tanh, penalty=jr.L2(0.3), reduction="mean"
    )
    np.testing.assert_allclose(y, np.tanh(X @ W1) @ W2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, 0.3 * np.square(np.tanh(X @ W1)).mean(), rtol=1e-6)


def test_the_derivative_in_both_modes():
    with jax.enable_x64():
        operands = [jnp.asarray(a) for a in (X, W1, B1, W2, B2)]

        @jax.jit
        def loss(*operands):
            y, h, value = jr.ops.mlp(*operands, activation=jnp.tanh, penalty=jr.L2(0.3))
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(h)) + value

        check_grads(loss, operands, order=1, modes=["fwd", "rev"], rtol=1e-5)


REPLICATED = (P(), P(), P(), P())


@pytest.mark.parametrize(
    ("specs", "argnums"),
    [
        ((P("d"), *REPLICATED), (2,)),  # the bias alone: no tangent that varies
        ((P("d"), *REPLICATED), (0, 1, 2, 3, 4)),
        # Of a split output each shard would add the penalty's gradient.
        ((P(), P(), P(), P(None, "d"), P("d")), (0, 1, 2, 3, 4)),
    ],
)
def test_the_rules_around_the_kernels_inside_shard_map(specs, argnums):
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    shapes = ((512, 64), (64, 128), (128,), (128, 128), (128,))
    operands = [jnp.asarray(RNG.normal(size=s) / np.sqrt(s[0]), jnp.bfloat16) for s in shapes]

    def loss(implementation, *operands):
        y, _, value = jr.ops.mlp(
            *operands,
            activation=jax.nn.silu,
            penalty=jr.L2(1.0) + jr.HoyerSquare(1.0),
            reduction="sum",
            axis_name="d",
            implementation=implementation,
        )
        return jax.lax.psum(jnp.sum(jnp.square(y.astype(jnp.float32))), "d") + value

    def step(implementation):
        gradient = jax.grad(functools.partial(loss, implementation), argnums=argnums)

        def twice(*operands):
            def of(*chosen):
                given = dict(zip(argnums, chosen, strict=True))
                return gradient(*[given.get(i, operand) for i, operand in enumerate(operands)])

            chosen = tuple(operands[i] for i in argnums)
            return jax.jvp(of, chosen, chosen)

        outs = tuple(specs[i] for i in argnums)
        return jax.jit(jax.shard_map(twice, mesh=mesh, in_specs=specs, out_specs=(outs, outs)))

    with by_xla():
        got = step("mosaic_gpu")(*operands)
    expected = step("xla")(*[operand.astype(jnp.float32) for operand in operands])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(b.dtype), b, atol=0.03 * np.abs(b).max())


def test_the_rules_around_the_kernels_promote_no_ranks():
    shapes = ((256, 64), (64, 128), (128,), (128, 128), (128,))
    operands = [jnp.asarray(RNG.normal(size=s) / 8, jnp.bfloat16) for s in shapes]

    def loss(*operands):
        settings: Any = {"activation": jax.nn.relu, "penalty": jr.L1(1.0)}
        y, _, value = jr.ops.mlp(*operands, **settings, implementation="mosaic_gpu")
        a, own = jr.ops.dense(*operands[:3], **settings, implementation="mosaic_gpu")
        return sum(jnp.mean(b.astype(jnp.float32)) for b in (y, a)) + value + own

    with by_xla(), jax.numpy_rank_promotion("raise"):
        gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)))(*operands)
    assert [g.shape for g in gradient] == list(shapes[1:])


def test_bad_operands_are_named():
    x, w1, b1, w2, b2 = (jnp.asarray(a, jnp.float32) for a in (X, W1, B1, W2, B2))

    def run(*operands, penalty: Any = L1, **settings: Any):
        return jr.ops.mlp(*operands, activation=jax.nn.relu, penalty=penalty, **settings)

    with pytest.raises(ValueError, match=r"mlp` takes x .*got \(6, 5\), \(8, 3\).*first layer"):
        run(x, w2, b1, w2, b2)
    with pytest.raises(ValueError, match=r"got \(6, 8\), \(5, 8\), \(3,\) in the second"):
        run(x, w1, b1, w1, b2)
    with pytest.raises(TypeError, match="mlp` takes floating-point arrays; got dtype int32"):
        run(x, w1, b1, w2.astype(int), b2)
    with pytest.raises(TypeError, match=r"mlp\(penalty=\.\.\.\)` must be a Penalty; got 0\.1"):
        run(x, w1, b1, w2, b2, penalty=0.1)
    with pytest.raises(
        ValueError, match=r"ops\.mlp\(implementation.*one of None, 'xla', 'mosaic_gpu'"
    ):
        run(x, w1, b1, w2, b2, implementation="cuda")


def test_a_kernel_that_cannot_run_says_why(monkeypatch):
    def refused(match, out=128, activation=jax.nn.relu, penalty: jr.Penalty = L1, hidden=128):
        x, w1, w2 = (jnp.ones(s, jnp.bfloat16) for s in ((256, 64), (64, hidden), (hidden, out)))
        with pytest.raises(NotImplementedError, match=match):
            jr.ops.mlp(
                *(x, w1, None, w2, None),
                activation=activation,
                penalty=penalty,
                implementation="mosaic_gpu",
            )

    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    refused("its kernel needs JAX 0.11 or newer")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    refused("input's features must be multiples of 256, 128, 64; got 256, 100, 64", hidden=100)
    refused("output's features must be multiples of 256, 128, 64; got 256, 128, 100", out=100)
    refused("the activation is not one that a tile can take", activation=jax.nn.softmax)
    refused("the gradient of `jaxreg.Root` cannot be taken tile by tile", penalty=Root(0.1))
