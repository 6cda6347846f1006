"""The kernels of two dense layers, interpreted on the CPU, with detection of races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxreg as jr

from ._interpret import assert_close, interpreted, needs_kernels

pytestmark = needs_kernels
M, D, N, K = 256, 64, 128, 64


def operands(m=M, d=D, n=N, k=K, dtype=jnp.bfloat16):
    rng = np.random.default_rng(1)
    shapes = (m, d), (d, n), (n,), (n, k), (k,)
    return [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), dtype) for s in shapes]


def loss(*operands, penalty, activation, implementation="mosaic_gpu", hidden=False):
    y, h, value = jr.ops.mlp(
        *operands,
        activation=activation,
        penalty=penalty,
        reduction="sum",
        implementation=implementation,
    )
    of_hidden = jnp.sum(jnp.cos(h.astype(value.dtype))) if hidden else 0
    return jnp.sum(jnp.square(y.astype(value.dtype))) + of_hidden + value


# So strong that the penalty has a good part in each gradient.
CASES = {
    "relu, L1": (jax.nn.relu, lambda: jr.L1(1.0), jnp.bfloat16),
    "sigmoid, KL": (jax.nn.sigmoid, lambda: jr.KLSparsity(100.0, target=0.05), jnp.float16),
    "tanh, L1L2 and range": (
        jnp.tanh,
        lambda: jr.L1L2(0.3, 0.5) + jr.RangeHinge(1.0, lower=-0.5, upper=0.5),
        jnp.bfloat16,
    ),
    "gelu, Huber": (jax.nn.gelu, lambda: jr.Huber(2.0, delta=0.3), jnp.bfloat16),
    "silu, group": (jax.nn.silu, lambda: jr.GroupLasso(10.0), jnp.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_float64(name):
    activation, penalty, dtype = CASES[name]
    given = operands(dtype=dtype)
    step = functools.partial(loss, activation=activation)

    def by_all(implementation):
        def run(x, w1, b1, w2, b2, penalty):
            return step(x, w1, b1, w2, b2, penalty=penalty, implementation=implementation)

        return jax.value_and_grad(run, argnums=range(6))

    with interpreted():
        traced = jax.jit(by_all("mosaic_gpu")).trace(*given, penalty())
        got = traced.lower().compile()(*given, penalty())
    # The kernels, and of XLA's products the output and the gradients of the kernels and the input.
    program = str(traced.jaxpr)
    for name in ("jaxreg_dense", "jaxreg_mlp_backward"):
        assert program.count(f"name={name}") == 1
    assert program.count("dot_general[") == 4
    with jax.enable_x64():
        wide = [jnp.asarray(array, jnp.float64) for array in given]
        expected = by_all("xla")(*wide, penalty())
    assert_close(got, expected, 8 * float(jnp.finfo(dtype).eps))


def test_leading_axes_and_steps_and_no_bias():
    x, w1, _, w2, _ = operands(m=256, n=256, k=128)
    x = x.reshape(2, 128, D)

    def step(implementation):
        f = functools.partial(loss, activation=jax.nn.relu, implementation=implementation)
        return jax.grad(
            lambda x, w1, w2: f(x, w1, None, w2, None, penalty=jr.L2(1.0)), argnums=(0, 1, 2)
        )

    with interpreted():
        got = jax.jit(step("mosaic_gpu"))(x, w1, w2)
    with jax.enable_x64():
        expected = step("xla")(*(jnp.asarray(a, jnp.float64) for a in (x, w1, w2)))
    # Over two leading axes XLA's CPU adds up the kernels' gradients in bfloat16.
    assert_close(got, expected, 0.04)


def test_vmap_forward_mode_and_second_order():
    x, w1, b1, w2, b2 = operands()

    def everything(implementation):
        def value(w1, w2):
            return loss(
                *(x, w1, b1, w2, b2),
                activation=jnp.tanh,
                penalty=jr.L2(1.0),
                implementation=implementation,
            )

        gradient = jax.grad(value, argnums=(0, 1))
        batched = jax.vmap(gradient, in_axes=(0, None))(jnp.stack([w1, 2 * w1]), w2)
        return (
            batched,
            jax.jvp(value, (w1, w2), (w1, w2))[1],
            jax.jvp(gradient, (w1, w2), (w1, w2))[1],
        )

    with interpreted(dispatched=False):
        got = jax.jit(lambda: everything("mosaic_gpu"))()
    assert_close(got, jax.jit(lambda: everything("xla"))(), 0.03)


def test_a_loss_of_the_hidden_activation_leaves_the_backward_pass_to_xla():
    given = operands()
    step = functools.partial(loss, penalty=jr.L2(1.0), activation=jnp.tanh, hidden=True)
    with interpreted():
        traced = jax.jit(jax.grad(step, argnums=(1, 2))).trace(*given)
        got = traced.lower().compile()(*given)
    assert "jaxreg_dense" in str(traced.jaxpr)
    assert "jaxreg_mlp_backward" not in str(traced.jaxpr)
    plain = functools.partial(step, implementation="xla")
    assert_close(got, jax.jit(jax.grad(plain, argnums=(1, 2)))(*given), 0.03)


def test_inside_shard_map():
    # The interpreter takes one device; more are traced.
    x, w1, b1, w2, b2 = operands()

    def step(devices, implementation):
        def local(w1, b1, w2, b2, x):
            y, _, value = jr.ops.mlp(
                *(x, w1, b1, w2, b2),
                activation=jax.nn.sigmoid,
                penalty=jr.KLSparsity(100.0, target=0.05),
                axis_name="d",
                implementation=implementation,
            )
            return jax.lax.psum(jnp.sum(jnp.square(y.astype(value.dtype))), "d") + value

        mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
        specs = (P(), P(), P(), P(), P("d"))
        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3)))

    step(2, "mosaic_gpu").trace(w1, b1, w2, b2, jnp.concatenate([x, x]))
    with interpreted(dispatched=False):
        got = step(1, "mosaic_gpu")(w1, b1, w2, b2, x)
    assert_close(got, step(1, "xla")(w1, b1, w2, b2, x), 0.03)
