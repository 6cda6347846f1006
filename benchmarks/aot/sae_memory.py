"""Ways to write a sparse autoencoder's step, and the temporary memory that each takes on a TPU.

With an L1 of the code, XLA keeps the code and its cotangent at once, where without it the one takes
the other's place. This compiles what might change that.

Run:
    python -m benchmarks.aot.sae_memory [--device "TPU v5e"] [NAME ...]
"""

import argparse
from collections.abc import Callable
from typing import Any

from . import DEVICES, compiled_for

import jax  # isort: skip
import jax.numpy as jnp

BATCH, WIDTH, HIDDEN, CHUNKS = 8192, 1024, 16384, 8
STRENGTH = 1e-3
ARRAY: Any = jax.ShapeDtypeStruct


def code(x: Any, w: Any, b: Any) -> Any:
    """Return the code."""
    return jax.nn.relu(x @ w + b)


def total(h: Any) -> Any:
    """Return the sum of the code, which is its L1."""
    return jnp.sum(h.astype(jnp.float32)) / BATCH


def step(forward: Callable[..., Any], strength: float = STRENGTH) -> Callable[..., Any]:
    """Return the step of a forward pass that gives the output and the penalty."""

    def loss(params: Any, x: Any) -> Any:
        y, value = forward(x, *params)
        return jnp.mean(jnp.square((y - x).astype(jnp.float32))) + strength * value

    return jax.value_and_grad(loss)


def plain(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
    """Leave the derivative to JAX."""
    h = code(x, w, b)
    return h @ v + c, total(h)


def unpenalized(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
    """Leave out the penalty."""
    return code(x, w, b) @ v + c, jnp.float32(0)


def owned(ordered: bool = False, barrier: bool = False, valued: bool = True) -> Callable[..., Any]:
    """Return a forward pass whose backward pass is written out.

    Args:
        ordered: whether the code's cotangent waits for the decoder's gradient, the code's other
            reader, so that nothing reads the code after it.
        barrier: whether the saved code is kept apart from what the forward pass makes of it.
        valued: whether the penalty's value is computed, and not its gradient alone.
    """

    @jax.custom_vjp
    def run(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
        return forward(x, w, b, v, c)[0]

    def forward(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
        h = code(x, w, b)
        value = total(h) if valued else jnp.float32(0)
        if barrier:
            h = jax.lax.optimization_barrier(h)
        return (h @ v + c, value), (x, w, v, h)

    def backward(saved: Any, cotangents: Any) -> Any:
        x, w, v, h = saved
        dy, dvalue = cotangents
        dv = h.T @ dy
        dc = jnp.sum(dy, 0)
        if ordered:
            dv, dy = jax.lax.optimization_barrier((dv, dy))
        dh = jnp.matmul(dy, v.T, preferred_element_type=jnp.float32) + dvalue / BATCH
        dz = jnp.where(h > 0, dh, 0).astype(h.dtype)
        return dz @ w.T, x.T @ dz, jnp.sum(dz, 0), dv, dc

    run.defvjp(forward, backward)
    return run


def chunked(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
    """Go through the hidden units in chunks, in the backward pass."""

    @jax.custom_vjp
    def run(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
        return forward(x, w, b, v, c)[0]

    def forward(x: Any, w: Any, b: Any, v: Any, c: Any) -> Any:
        h = code(x, w, b)
        return (h @ v + c, total(h)), (x, w, v, h)

    def backward(saved: Any, cotangents: Any) -> Any:
        x, w, v, h = saved
        dy, dvalue = cotangents
        size = HIDDEN // CHUNKS

        def body(i: Any, gradients: Any) -> Any:
            start = i * size
            hi = jax.lax.dynamic_slice(h, (0, start), (BATCH, size))
            vi = jax.lax.dynamic_slice(v, (start, 0), (size, WIDTH))
            dh = jnp.matmul(dy, vi.T, preferred_element_type=jnp.float32) + dvalue / BATCH
            dz = jnp.where(hi > 0, dh, 0).astype(h.dtype)
            dw, db, dv = gradients
            return (
                jax.lax.dynamic_update_slice(dw, x.T @ dz, (0, start)),
                jax.lax.dynamic_update_slice(db, jnp.sum(dz, 0), (start,)),
                jax.lax.dynamic_update_slice(dv, hi.T @ dy, (start, 0)),
            )

        start = (jnp.zeros_like(w), jnp.zeros(HIDDEN, h.dtype), jnp.zeros_like(v))
        dw, db, dv = jax.lax.fori_loop(0, CHUNKS, body, start)
        return jnp.zeros_like(x), dw, db, dv, jnp.sum(dy, 0)

    run.defvjp(forward, backward)
    return run(x, w, b, v, c)


FORMULATIONS: dict[str, Callable[..., Any]] = {
    "without the penalty": step(unpenalized, 0.0),
    "with it": step(plain),
    "backward pass written out": step(owned()),
    "and ordered by an optimization barrier": step(owned(ordered=True)),
    "and the saved code behind a barrier": step(owned(ordered=True, barrier=True)),
    f"in {CHUNKS} chunks of hidden units": step(chunked),
    "ordered, its gradient without its value": step(owned(ordered=True, valued=False)),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.sae_memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="TPU v5e", choices=DEVICES)
    parser.add_argument("names", nargs="*", default=list(FORMULATIONS))
    options = parser.parse_args()
    bf16: Any = jnp.bfloat16
    shapes = ((WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,))
    arguments = (tuple(ARRAY(s, bf16) for s in shapes), ARRAY((BATCH, WIDTH), bf16))
    u = 2 * BATCH * HIDDEN
    print(f"{options.device}: temporary memory, and ÷ the code's {u:,} bytes")
    for name in options.names:
        size = compiled_for(FORMULATIONS[name], arguments, options.device).memory_analysis()
        print(
            f"{name:42}{size.temp_size_in_bytes:>14,}{size.temp_size_in_bytes / u:>8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
