"""The public function: what it takes and promises."""

import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxreg.penalties._checks import (
    NON_NEGATIVE,
    require,
    require_choice,
    require_integer,
    require_real,
)
from jaxreg.terms import AxisName

from . import _check as check
from . import _chunked, _reference
from ._check import NAME
from ._cross_entropy import CrossEntropy
from ._forward import Forward, LinearCrossEntropy, Problem, on_mesh
from ._sharding import explicit


def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    z_loss: ArrayLike = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    layout: Literal["DV", "VD"] | None = None,
    chunk: int | None = None,
    dtype: DTypeLike | None = None,
    gradient_dtype: DTypeLike | None = None,
    batch_axis_name: AxisName | None = None,
    vocab_axis_name: AxisName | None = None,
    implementation: Literal["chunked", "reference"] | None = None,
) -> LinearCrossEntropy:
    r"""Return the cross-entropy and the z-loss of a linear layer's logits, which are never held.

    $$ z_k = c \tanh\big((W^\top h_k + b)/c\big), \qquad
       \mathrm{lse}_k = \log \sum_j e^{z_{kj}} $$
    $$ \ell_k = \mathrm{lse}_k - (1 - \epsilon)\, z_{k y_k} - \frac\epsilon V \sum_j z_{kj}, \qquad
       \text{total} = \frac{\sum_k w_k \ell_k}{\sum_k w_k}
                    + s\, \frac{\sum_k w_k\, \mathrm{lse}_k^2}{\sum_k w_k} $$

    Of the logits, the largest array of a language model's step, only a chunk of tokens is there
    at a time. Where a gradient is wanted it is computed in the forward pass, with three matrix
    products in place of the four of recomputation. Differentiate `total`; the other fields are
    differentiable too, with the logits computed once more.

    Args:
        hidden: h, (..., D): what the layer takes.
        weight: W, (D, V), a layer's kernel, or (V, D), an embedding that is tied.
        labels: y, (...): integers in [0, V), or `ignore_index`.
        bias: b, (V,). A bias of −∞ takes a word out, without smoothing and cap.
        weights: w, of the shape of the labels: real numbers, or a mask. 1 by default.
        ignore_index: a label that makes the token's weight 0; None if there is none.
        z_loss: s ≥ 0, a scalar, which may be traced. A usual one is 10⁻⁴.
        label_smoothing: ε in [0, 1), spread over all V words, the label's too.
        soft_cap: c > 0, or None, which leaves the logits as they are.
        reduction: "mean", by the sum of the weights; "sum"; "none", w_k ℓ_k and s w_k lse_k² for
            each token. A mean over weights that add up to 0 is 0.
        layout: "DV" or "VD", the axes of the weight. Needed where D = V; else the shape tells.
        chunk: how many tokens have their logits there at a time. By default the largest power of
            two with at most 2²⁷ logits, 512 MiB in float32, and at least 128. Under `jit` with
            sharded arrays it counts the tokens of all devices.
        dtype: of the factors of the matrix products; by default what hidden and weight promote to.
            With `dtype=jnp.bfloat16` a float32 weight gets a float32 gradient, never rounded.
        gradient_dtype: in which the weight's gradient adds up over the chunks. float32 by default;
            `jnp.bfloat16` saves half of its memory, and loses digits with each chunk.
        batch_axis_name: under `shard_map`, the mesh axes that the tokens are split over: the
            reductions are over all of them.
        vocab_axis_name: under `shard_map`, the mesh axes that the words are split over: weight and
            bias are blocks of a vocabulary, in order; labels count through all of it.
        implementation: "chunked", which None means; or "reference", which holds the logits.

    Returns:
        A `LinearCrossEntropy`. Sums are in float32 (float64 for float64 input), and so are its
        fields.

    Gradient:
        That of the formula, by hidden, weight, bias, weights and z_loss, through any field, in
        reverse and forward mode, of any order. The matrix products of the backward pass have
        factors in `dtype`, as the forward pass's do.

    Raises:
        TypeError: for hidden, weight, bias or weights that are not real, labels that are not
            integers, and a soft cap, smoothing or chunk that is not a concrete number.
        ValueError: for shapes that do not fit, an ambiguous layout, and settings out of range; for
            concrete labels out of range. Traced labels out of range cannot raise: their token's
            weight is NaN, and so are the reduced values and all gradients.
        NotImplementedError: for words that are split with `implementation="reference"`; inside of a
            `jax.shard_map` over some axes of a mesh, where explicit axes beside them split both
            tokens and words.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxreg as jr
        >>> hidden, weight = jnp.ones((4, 16)), jnp.zeros((16, 100))
        >>> labels = jnp.array([3, 14, 15, -100])                 # the last token is padding
        >>> def loss(weight):
        ...     result = jr.ops.linear_cross_entropy(hidden, weight, labels, z_loss=1e-4)
        ...     return result.total, result
        >>> (total, result), gradient = jax.value_and_grad(loss, has_aux=True)(weight)
        >>> round(float(result.loss), 4), float(result.weight)    # log(100)
        (4.6052, 3.0)

    References:
        Chowdhery et al., PaLM, JMLR 24, arXiv:2204.02311, 2023 (section 5: the z-loss). Hsu et
        al., Liger kernel, arXiv:2410.10989, 2024, and Wijmans et al., Cut your losses in
        large-vocabulary language models, ICLR, arXiv:2411.09009, 2025 (the gradient by chunks in
        the forward pass; none of the logits in memory). Szegedy et al., Rethinking the inception
        architecture, CVPR, arXiv:1512.00567, 2016 (smoothing). Gemma team, Gemma 2,
        arXiv:2408.00118, 2024 (the soft cap).
    """
    hidden = require_real(NAME, "hidden", hidden)
    weight = require_real(NAME, "weight", weight)
    labels = check.labels(labels, hidden)
    words = check.words(hidden, weight, layout)
    bias = None if bias is None else require_real(NAME, "bias", bias)
    block = weight.shape[words]
    if bias is not None and bias.shape != (block,):
        raise ValueError(
            f"`jaxreg.{NAME}(bias=...)` must be of shape ({block},), one for each word; got"
            f" {bias.shape}."
        )
    require(f"{NAME}(z_loss=...)", z_loss, *NON_NEGATIVE)
    smoothing = check.number("label_smoothing", label_smoothing, "in [0, 1)", lambda e: 0 <= e < 1)
    if soft_cap is not None:
        soft_cap = check.number("soft_cap", soft_cap, "positive", lambda c: 0 < c < math.inf)
    if chunk is not None:
        require_integer(f"{NAME}(chunk=...)", chunk, least=1)
    if ignore_index is not None:
        require_integer(f"{NAME}(ignore_index=...)", ignore_index)
    require_choice(f"{NAME}(reduction=...)", reduction, ("mean", "sum", "none"))
    implementations = (None, "chunked", "reference")
    require_choice(f"{NAME}(implementation=...)", implementation, implementations)
    if implementation == "reference" and vocab_axis_name is not None:
        raise NotImplementedError(check.WHOLE)

    vocabulary = block if vocab_axis_name is None else block * lax.axis_size(vocab_axis_name)
    for name, value in (("dtype", dtype), ("gradient_dtype", gradient_dtype)):
        check.floating(name, value)
    factors = jnp.dtype(jnp.promote_types(hidden.dtype, weight.dtype) if dtype is None else dtype)
    wide = jnp.promote_types(factors, jnp.float32)
    w, has_label = check.token_weights(weights, labels, ignore_index, vocabulary, wide)
    problem = Problem(
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=jnp.where(has_label, labels, -1),  # no word, so that its loss is finite
        weights=w,
        z_loss=jnp.asarray(z_loss, wide),
    )
    settings = _chunked.Settings(
        function=CrossEntropy(smoothing, soft_cap, vocab_axis_name),
        chunk=chunk,
        words=words,
        dtype=factors,
        gradient_dtype=wide if gradient_dtype is None else jnp.dtype(gradient_dtype),
        wide=wide,
    )
    forward = Forward(
        settings=settings,
        reduction=reduction,
        has_z_loss=not (isinstance(z_loss, int | float) and z_loss == 0),
        batch_axis_name=batch_axis_name,
        compute=_reference if implementation == "reference" else _chunked,
    )
    sharded = explicit(problem, words)
    return forward(problem) if sharded is None else on_mesh(forward, problem, sharded)
