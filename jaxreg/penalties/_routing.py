"""Penalties that balance the load of the experts in a mixture, by published convention."""

import abc
from dataclasses import KW_ONLY
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ._arithmetic import scaled_to_one, sum_examples
from ._checks import require_choice, require_integer
from ._fields import static
from ._statistic import Statistic

Scores = Literal["softmax", "sigmoid"]


class ImportanceCV(Statistic):
    r"""The squared coefficient of variation of the experts' importance.

    $$ R(G) = s\,\mathrm{CV}(I)^2 = s\,\frac{\tfrac1E \sum_e (I_e - \bar I)^2}{\bar I^2}, \qquad
       I_e = \sum_{k=1}^n G_{ke} $$

    It takes gate values, not logits: G_ke ≥ 0, the weight of expert e for token k, usually 0 for
    the experts that were not chosen. The last axis holds the E experts, all others together are the
    n tokens. 0 for equal importance, E − 1 where one expert has it all. The variance is that of the
    E values, not an unbiased one.

    Args:
        strength: s, a non-negative scalar (w_importance).

    Gradient:
        (2s / (E·Ī²))·(I_e − Ī − Ī·CV²). Value and gradient are 0 where all gates are 0.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.ImportanceCV(1.0)(jnp.array([[1.0, 0.0], [0.5, 0.5]])))
        0.25

    References:
        Shazeer et al., Outrageously large neural networks: the sparsely-gated mixture-of-experts
        layer, ICLR, arXiv:1701.06538, 2017 (equations 6 and 7).
    """

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        return sum_examples(x, where)

    def of_means(self, means: jax.Array) -> jax.Array:
        experts = max(means.size, 1)
        unused = jnp.all(means == 0)
        # Their scale counts for nothing, and would underflow in the square of the mean, which the
        # derivative divides by.
        _, means = scaled_to_one(means, (0,))
        relative = means / jnp.where(unused, 1, jnp.sum(means) / experts)
        return jnp.where(unused, 0, jnp.sum(jnp.square(relative - 1)) / experts)


class LoadBalance(Statistic):
    r"""A multiple of Σ_e f_e·P_e, over all tokens or group by group.

    Of the tokens that count, f_e is the fraction whose chosen experts include e, and P_e the mean
    probability of e. f, a matter of choice, is not differentiated. Ties go to the first expert.

    Args:
        strength: s, a non-negative scalar.
        per_group: whether the product f·P is formed for each group of tokens, which the last axis
            but one holds, and averaged over the groups.
    """

    _: KW_ONLY
    per_group: bool = static(default=False)

    @abc.abstractmethod
    def convention(self, experts: int) -> tuple[int, float]:
        """Return how many experts are chosen for a token, and the multiple of Σ f·P."""

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """Return the probability of each expert for each token."""
        return jax.nn.softmax(logits, axis=-1)

    def check(self, x: jax.Array, name: str = "x") -> None:
        super().check(x, name)
        experts = x.shape[-1] if x.ndim else 1
        chosen, _ = self.convention(experts)
        if 0 < experts < chosen:
            raise ValueError(
                f"`jaxreg.{type(self).__name__}(k=...)` must not exceed the number of experts, the"
                f' size of the last axis; got k={chosen} for "{name}" of shape {x.shape}.'
            )

    def adds_up(self, ndim: int) -> bool:
        return not self.per_group or ndim > 2

    def moments(self, x: jax.Array, where: jax.Array | None = None) -> tuple[Any, jax.Array]:
        if not self.per_group:
            return super().moments(x, where)
        x = jnp.atleast_2d(x)
        counts = jnp.broadcast_to(True if where is None else where, (*x.shape[:-1], 1))
        tokens = jnp.sum(counts, axis=-2, dtype=x.dtype)
        dispatched, probability = (
            jnp.sum(routed, axis=-2, where=counts) / jnp.maximum(tokens, 1)
            for routed in (self._dispatch(x), self.probabilities(x))
        )
        return jnp.sum(self._product(dispatched, probability)), jnp.sum(tokens > 0, dtype=x.dtype)

    def sums(self, x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return sum_examples(self._dispatch(x), where), sum_examples(self.probabilities(x), where)

    def of_means(self, means: Any) -> jax.Array:
        return means if self.per_group else self._product(*means)

    def _dispatch(self, logits: jax.Array) -> jax.Array:
        """Return 1 for each chosen expert of each token, and 0 for the others."""
        experts = logits.shape[-1]
        # One maximum after the other is a reduction, which each device takes of its own tokens. For
        # `lax.top_k` XLA gathers all tokens on CPU devices.
        lowest = jnp.finfo(logits.dtype).min  # type: ignore[no-untyped-call]
        scores = jnp.maximum(logits, lowest)
        chosen = jnp.zeros(logits.shape, bool)
        for _ in range(min(self.convention(experts)[0], experts)):
            best = jnp.argmax(jnp.where(chosen, -jnp.inf, scores), axis=-1)
            chosen |= jax.nn.one_hot(best, experts, dtype=bool)
        return chosen.astype(logits.dtype)

    def _product(self, dispatched: jax.Array, probability: jax.Array) -> jax.Array:
        _, multiple = self.convention(dispatched.shape[-1])
        return multiple * jnp.sum(dispatched * probability, axis=-1)


class SwitchLoadBalance(LoadBalance):
    r"""The load-balancing loss of Switch Transformers and ST-MoE: 1 at balance.

    $$ R(z) = s\,E \sum_{e=1}^E f_e P_e, \qquad
       f_e = \tfrac1n \sum_{t=1}^n [\arg\max_j z_{tj} = e], \qquad
       P_e = \tfrac1n \sum_{t=1}^n \mathrm{softmax}(z_t)_e $$

    It takes router logits: the last axis holds the E experts, all others together are the n tokens.
    Only the first choice counts; where more experts are chosen and count, see `TopKLoadBalance` and
    `DeepSeekLoadBalance`. Balanced routing gives s, all tokens to one expert with certainty s·E.

    Args:
        strength: s, a non-negative scalar; the paper's α is 10⁻².
        per_group: False, over all tokens, as in the paper. True takes f·P for each group of tokens,
            (..., tokens, experts), and its mean over the groups, E²·mean_{g,e}(f·P), as
            Mesh TensorFlow and flaxformer do. Groups with tokens that count have the same weight.

    Gradient:
        (s·E / n)·p_te·(f_e − Σ_j f_j·p_tj), for p = softmax(z): f is a constant. Where logits are
        equal the first expert is the chosen one.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> balance = jr.SwitchLoadBalance(1.0)
        >>> logits = 50 * jnp.eye(4)                          # token t to expert t
        >>> float(balance(logits)), float(balance(logits[:1]))
        (1.0, 4.0)

    References:
        Fedus, Zoph and Shazeer, Switch Transformers: scaling to trillion parameter models with
        simple and efficient sparsity, JMLR 23, arXiv:2101.03961, 2022 (equations 4 to 6). Zoph et
        al., ST-MoE, arXiv:2202.08906, 2022.
    """

    def convention(self, experts: int) -> tuple[int, float]:
        return 1, experts


class GShardLoadBalance(LoadBalance):
    r"""The auxiliary loss of GShard's top-2 gating: 1/E² at balance.

    $$ R(z) = s\,\Big\langle \frac1E \sum_{e=1}^E \frac{c_e}{S}\,m_e \Big\rangle_{\text{groups}},
       \qquad c_e = \sum_{t=1}^S [\arg\max_j z_{tj} = e], \qquad
       m_e = \tfrac1S \sum_{t=1}^S \mathrm{softmax}(z_t)_e $$

    It takes router logits (..., tokens, experts); the S tokens of one such matrix are a group. The
    count c_e is of first choices only, although each token goes to two experts, and is taken before
    the capacity limits it. Per group it is `SwitchLoadBalance` divided by E².

    Args:
        strength: s, a non-negative scalar.
        per_group: True, the mean over groups, as in the paper; each group with tokens that count
            has the same weight. Of logits (tokens, experts) all are one group, and so each
            microbatch is. False takes the tokens of all groups as one.

    Gradient:
        s / (E·S·groups)·p_te·(f_e − Σ_j f_j·p_tj), for f = c / S, a constant, and p = softmax(z).

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> float(jr.GShardLoadBalance(1.0)(50 * jnp.eye(4)))
        0.0625

    References:
        Lepikhin et al., GShard: scaling giant models with conditional computation and automatic
        sharding, ICLR, arXiv:2006.16668, 2021 (algorithm 1).
    """

    _: KW_ONLY
    per_group: bool = static(default=True)

    def convention(self, experts: int) -> tuple[int, float]:
        return 1, 1 / max(experts, 1)


class TopKLoadBalance(LoadBalance):
    r"""The load-balancing loss of Mixtral in Transformers, and of flaxformer: k at balance.

    $$ R(z) = s\,E \sum_{e=1}^E f_e P_e, \qquad
       f_e = \tfrac1n \sum_{t=1}^n [e \in \mathrm{top}_k(z_t)], \qquad
       P_e = \tfrac1n \sum_{t=1}^n \mathrm{softmax}(z_t)_e $$

    It takes router logits: the last axis holds the E experts, all others together are the n tokens.
    All k choices count, so that f sums to k: the value is k times that of `DeepSeekLoadBalance`.
    For k = 1 it is `SwitchLoadBalance`. Transformers puts the tokens of all layers together before
    it multiplies; here each layer is a term of its own.

    Args:
        strength: s, a non-negative scalar.
        k: how many experts each token goes to.
        per_group: False, over all tokens, as in Transformers. True takes f·P for each group of
            tokens and the mean over groups, as in flaxformer; see `SwitchLoadBalance`.

    Gradient:
        (s·E / n)·p_te·(f_e − Σ_j f_j·p_tj), for p = softmax(z): f is a constant.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a k
            that is not a positive integer, or exceeds the number of experts.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> logits = jnp.array([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
        >>> round(float(jr.TopKLoadBalance(1.0, k=2)(logits)), 4)
        2.0

    References:
        Jiang et al., Mixtral of experts, arXiv:2401.04088, 2024; its loss is that of the model's
        code in Hugging Face Transformers (`load_balancing_loss_func`). Fedus, Zoph and Shazeer,
        Switch Transformers, JMLR 23, arXiv:2101.03961, 2022.
    """

    _: KW_ONLY
    k: int = static()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("TopKLoadBalance(k=...)", self.k, least=1)

    def convention(self, experts: int) -> tuple[int, float]:
        return self.k, experts


class DeepSeekLoadBalance(LoadBalance):
    r"""The expert-level balance loss of DeepSeekMoE, V2 and V3: 1 at balance, whatever k.

    $$ R(z) = s\,\Big\langle \sum_{e=1}^E f_e P_e \Big\rangle_{\text{sequences}}, \qquad
       f_e = \frac{E}{k\,T} \sum_{t=1}^T [e \in \mathrm{top}_k(z_t)], \qquad
       P_e = \tfrac1T \sum_{t=1}^T p_{te} $$

    It takes the logits of the E routed experts, (..., tokens, experts); the T tokens of one such
    matrix are a sequence. p_t is softmax(z_t) in DeepSeekMoE and V2. In V3 it is σ(z_t) divided by
    its sum, and this loss complements balance by a bias on the choice: the logits are those without
    the bias. Megatron's `seq_aux_loss` and `aux_loss` are the same with `per_group` True and False.

    Args:
        strength: s, a non-negative scalar; V3's α is 10⁻⁴.
        k: how many routed experts each token goes to.
        scores: "softmax", or "sigmoid" as in V3.
        per_group: True, the mean over sequences; each one with tokens that count has the same
            weight. Of logits (tokens, experts) all are one sequence, and so each microbatch is.
            False takes the tokens of all sequences as one.

    Gradient:
        For softmax (s / (T·sequences))·p_te·(f_e − Σ_j f_j·p_tj): f is a constant.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar; for a k
            that is not a positive integer, or exceeds the number of experts; for unknown scores.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> logits = jnp.array([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
        >>> round(float(jr.DeepSeekLoadBalance(1.0, k=2)(logits)), 4)
        1.0

    References:
        Dai et al., DeepSeekMoE: towards ultimate expert specialization in mixture-of-experts
        language models, ACL, arXiv:2401.06066, 2024 (equations 12 to 14). DeepSeek-AI, DeepSeek-V2,
        arXiv:2405.04434, 2024. DeepSeek-AI, DeepSeek-V3 technical report, arXiv:2412.19437, 2024
        (equations 17 to 20).
    """

    _: KW_ONLY
    k: int = static()
    scores: Scores = static(default="softmax")
    per_group: bool = static(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("DeepSeekLoadBalance(k=...)", self.k, least=1)
        require_choice("DeepSeekLoadBalance(scores=...)", self.scores, get_args(Scores))

    def convention(self, experts: int) -> tuple[int, float]:
        return self.k, experts / self.k

    def probabilities(self, logits: jax.Array) -> jax.Array:
        # Sigmoids divided by their sum, also where they all underflow.
        sigmoid = self.scores == "sigmoid"
        return jax.nn.softmax(jax.nn.log_sigmoid(logits) if sigmoid else logits, axis=-1)
