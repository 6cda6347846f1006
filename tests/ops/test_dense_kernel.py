"""The dense layer's kernel, interpreted on the CPU, with detection of races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import jaxreg as jr

from ._interpret import assert_close, interpreted, needs_kernels

pytestmark = needs_kernels
M, N, K = 256, 128, 64


def operands(m=M, n=N, k=K, dtype=jnp.bfloat16):
    rng = np.random.default_rng(1)
    x, w, b = rng.normal(size=(m, k)), rng.normal(size=(k, n)) / np.sqrt(k), rng.normal(size=n)
    return [jnp.asarray(array, dtype) for array in (x, w, b)]


def loss(x, w, b, penalty, activation, implementation="mosaic_gpu"):
    a, value = jr.ops.dense(
        x, w, b, activation=activation, penalty=penalty, implementation=implementation
    )
    return jnp.sum(jnp.square(a.astype(value.dtype))) / M + value, (a, value)


# The other activations and penalties are those of `test_mlp_kernel.py`, which runs the same kernel.
CASES = {
    "relu, L1": (jax.nn.relu, lambda: jr.L1(0.1), jnp.bfloat16),
    "gelu, Huber": (jax.nn.gelu, lambda: jr.Huber(0.1, delta=0.3), jnp.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_float64(name):
    activation, penalty, dtype = CASES[name]
    # Two steps of the product where there is one case only: the interpreter is slow.
    x, w, b = operands(k=128 if name == "relu, L1" else K, dtype=dtype)
    step = functools.partial(loss, activation=activation)
    with interpreted():
        (_, (a, value)), gradient = jax.jit(
            jax.value_and_grad(step, argnums=(0, 1, 2, 3), has_aux=True)
        )(x, w, b, penalty())
    assert (a.dtype, value.dtype) == (dtype, jnp.float32)
    with jax.enable_x64():
        wide = [jnp.asarray(array, jnp.float64) for array in (x, w, b)]
        (_, (a64, value64)), gradient64 = jax.value_and_grad(
            functools.partial(step, implementation="xla"), argnums=(0, 1, 2, 3), has_aux=True
        )(*wide, penalty())
    epsilon = float(jnp.finfo(dtype).eps)
    assert_close(a, a64, epsilon)  # rounded once
    assert_close(gradient[:3], gradient64[:3], 8 * epsilon)
    # The penalty's own settings; sums over all entries.
    assert_close((value, gradient[3]), (value64, gradient64[3]), epsilon)


def test_leading_axes_and_no_bias():
    x, w, _ = operands(256, 256, 64)
    x = x.reshape(2, 128, 64)
    with interpreted():
        a, value = jax.jit(
            functools.partial(
                jr.ops.dense, penalty=jr.L2(0.1), reduction="mean", implementation="mosaic_gpu"
            )
        )(x, w)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert_close(a, expected, 2**-8)
    np.testing.assert_allclose(value, 0.1 * np.square(expected).mean(), rtol=1e-3)


def test_vmap_and_forward_mode():
    x, w, b = operands()
    penalty = jr.L1(0.1)

    def everything(implementation):
        def value(w):
            return loss(x, w, b, penalty, jax.nn.relu, implementation)[0]

        return jax.vmap(value)(jnp.stack([w, 2 * w])), jax.jvp(value, (w,), (w,))[1]

    with interpreted(dispatched=False):
        got = jax.jit(lambda: everything("mosaic_gpu"))()
    assert_close(got, jax.jit(lambda: everything("xla"))(), 0.02)


def test_second_order():
    x, w, b = operands()

    def hessian_product(implementation):
        f = functools.partial(
            loss, penalty=jr.L2(0.1), activation=jnp.tanh, implementation=implementation
        )
        return jax.grad(lambda b: jnp.sum(jax.grad(lambda b: f(x, w, b)[0])(b) ** 2))(b)

    with interpreted():
        got = jax.jit(lambda: hessian_product("mosaic_gpu"))()
    with jax.enable_x64():
        x, w, b = (jnp.asarray(array, jnp.float64) for array in (x, w, b))
        expected = hessian_product("xla")
    assert_close(got, expected, 0.05)


def test_the_kernel_and_no_other_product_is_in_the_program():
    x, w, b = operands()
    with interpreted():
        traced = jax.make_jaxpr(
            lambda: jr.ops.dense(x, w, b, penalty=jr.L1(0.1), implementation="mosaic_gpu")
        )()
    assert "jaxreg_dense" in str(traced)
    assert "dot_general" not in str(traced)


def test_inside_shard_map():
    # The interpreter takes one device; more are traced.
    x, w, _ = operands()
    penalty = jr.Huber(0.1, delta=0.2)

    def step(devices, implementation):
        def local(w, x):
            return jr.ops.dense(
                x,
                w,
                activation=jax.nn.gelu,
                penalty=penalty,
                axis_name="d",
                implementation=implementation,
            )[1]

        mesh, specs = Mesh(np.array(jax.devices()[:devices]), ("d",)), (P(), P("d"))
        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(jax.value_and_grad(sharded))

    step(2, "mosaic_gpu").trace(w, jnp.concatenate([x, x]))
    with interpreted(dispatched=False):
        got = step(1, "mosaic_gpu")(w, x)
    assert_close(got, step(1, "xla")(w, x), 0.02)


def test_an_activation_that_closes_over_an_array_is_lowered():
    # A kernel cannot: it would be handed a reference in place of a number.
    slope = jnp.float32(0.1)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    layer = functools.partial(
        jr.ops.dense,
        activation=lambda z: jnp.maximum(z, (slope * z).astype(z.dtype)),
        penalty=jr.L1(0.1),
        implementation="mosaic_gpu",
    )
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(layer).trace(*operands()).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
