"""What the compiled program does: matrix products, and the memory for what it does not return."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxreg as jr
from jaxreg.ops.linear_cross_entropy._chunked import Settings
from jaxreg.ops.linear_cross_entropy._cross_entropy import CrossEntropy

TOKENS, FEATURES, WORDS = 512, 32, 1000


def shapes(tokens=TOKENS, words=WORDS, dtype=jnp.float32):
    return (
        jax.ShapeDtypeStruct((tokens, FEATURES), dtype),
        jax.ShapeDtypeStruct((FEATURES, words), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def compiled(select, *, argnums=(0, 1), arrays=None, **options):
    """Compile the gradient of what is selected of the result, or its value."""

    def value(hidden, weight, labels):
        result = jr.ops.linear_cross_entropy(hidden, weight, labels, **options)
        return select(result), result

    function = jax.value_and_grad(value, argnums, has_aux=True) if argnums != () else value
    return jax.jit(function).lower(*(arrays or shapes())).compile()


def products(program):
    """Return how many matrix products there are: none is in more than one loop here."""
    return len(
        re.findall(r" dot\(|__onednn\$matmul|runtime_matmul|\"__cpu\$gemm", program.as_text())
    )


PRODUCTS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "value": (lambda r: r.total, {"argnums": ()}, 1),
    "gradient, all fields returned": (lambda r: r.total, {}, 3),
    "gradient of loss, no z-loss": (lambda r: r.loss, {"z_loss": 0.0}, 3),
    "gradient of a frozen weight": (lambda r: r.total, {"argnums": 0}, 2),
    "gradient of frozen hidden states": (lambda r: r.total, {"argnums": 1}, 2),
    # The weights of the tokens are not known before the backward pass.
    "gradient of loss + z_loss": (lambda r: r.loss + r.z_loss, {}, 4),
    "gradient of lse": (lambda r: jnp.sum(r.lse), {}, 4),
    "gradient of each token": (lambda r: jnp.sum(r.total), {"reduction": "none"}, 4),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_number_of_matrix_products(name):
    select, options, expected = PRODUCTS[name]
    assert products(compiled(select, **{"z_loss": 1e-4, "chunk": 64} | options)) == expected


def temporary(**options):
    arrays = shapes(options.pop("tokens", TOKENS), options.pop("words", WORDS))
    program = compiled(lambda r: r.total, arrays=arrays, z_loss=1e-4, **options)
    return program.memory_analysis().temp_size_in_bytes


def test_memory_is_flat_in_tokens_and_linear_in_chunk_and_words():
    base = temporary(chunk=64)
    by_hidden = TOKENS * FEATURES * 4
    assert temporary(chunk=64, tokens=2 * TOKENS) < base + 3 * by_hidden
    logits = 64 * WORDS * 4
    for more in ({"chunk": 128}, {"chunk": 64, "words": 2 * WORDS}):
        growth = temporary(**more) - base
        assert 0.9 * logits < growth < 5 * logits


def test_memory_is_a_fifth_of_that_of_the_logits():
    reference = temporary(implementation="reference")
    assert temporary(chunk=64) < 0.2 * reference
    assert reference >= 8 * TOKENS * WORDS


def test_recomputation_keeps_no_logits():
    program = compiled(lambda r: jnp.sum(r.total), reduction="none", chunk=64)
    assert program.memory_analysis().temp_size_in_bytes < TOKENS * WORDS * 4


@pytest.fixture(scope="module")
def text():
    """Return a program's text, without its comments."""
    program = compiled(lambda r: r.total, z_loss=1e-4, label_smoothing=0.1, chunk=64)
    return re.sub(r"/\*.*?\*/", "", program.as_text())


def test_no_array_of_a_chunk_is_carried_through_the_loop(text):
    """Not even one of zeros or of indices: each would be as large as the logits."""
    loops = re.findall(r"= \(([^=]*?)\) while\(", text)
    assert loops
    for loop in loops:
        assert f"[{FEATURES},{WORDS}]" in loop
        assert f"[64,{WORDS}]" not in loop


def test_arrays_of_a_chunk_are_the_logits_these_shifted_and_their_gradient(text):
    """Not one that holds the label's logit, and zeros elsewhere."""
    assert len(re.findall(rf"= f32\[64,{WORDS}\]\S* fusion\(", text)) == 3


def test_no_product_transposes_its_first_factor(text):
    """XLA for the CPU would copy the second in each chunk, which is as large as the logits."""
    assert "lhs_contracting_dims={1}" in text
    assert "lhs_contracting_dims={0}" not in text


@pytest.mark.parametrize(
    ("words", "tokens"),
    [(256, 2**19), (32_768, 4096), (131_072, 1024), (128_256, 1024), (2**24, 128)],
)
def test_the_chunk_that_is_chosen(words, tokens):
    function = CrossEntropy(0.0, None, None)
    settings = Settings(function, None, 1, jnp.float32, jnp.float32, jnp.float32)
    assert settings.chunk_of((8, words)) == tokens
