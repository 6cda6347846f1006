"""Penalties of logits: of their normalizer, and of the entropy of their softmax."""

import abc
import math

import jax
import jax.numpy as jnp

from ._arithmetic import sum_examples
from ._statistic import Statistic


class MeanOverTokens(Statistic):
    """A mean over tokens of one function of the logits, which the last axis holds."""

    @abc.abstractmethod
    def of_token(self, logits: jax.Array) -> jax.Array:
        """Return the value of each token, with a last axis of size 1."""

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        return jnp.sum(self.of_token(x), where=where)


class SquaredNormalizer(MeanOverTokens):
    """The mean over tokens of the squared logarithm of the softmax's normalizer."""

    def of_token(self, logits: jax.Array) -> jax.Array:
        if logits.shape[-1] == 0:
            return jnp.zeros((*logits.shape[:-1], 1), logits.dtype)
        return jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True))


class ZLoss(SquaredNormalizer):
    r"""The mean square of the log-normalizer of output logits, which keeps them from drifting.

    $$ R(z) = \frac sn \sum_{k=1}^n \Big( \log \sum_j e^{z_{kj}} \Big)^2 $$

    The last axis holds the logits, all others together are the n tokens. It is a mean over tokens
    by itself. Give it the logits of the cross-entropy; a usual strength is 10⁻⁴.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        (2s / n)·log Z_k·softmax(z_k), Z_k the inner sum; by differentiation, so that any cotangent
        is honoured. A logit of −∞, a vocabulary entry masked out, takes no part; a token that has
        no other makes the value infinite.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [1.0, 2.0]]))    # normalizers 1 and 3
        >>> round(float(jr.ZLoss(1.0)(logits)), 4)
        0.6035

    References:
        Chowdhery et al., PaLM: scaling language modeling with pathways, JMLR 24,
        arXiv:2204.02311, 2023 (section 5).
    """


class RouterZLoss(SquaredNormalizer):
    r"""The mean square of the log-normalizer of router logits: ST-MoE's router z-loss.

    $$ R(z) = \frac sn \sum_{k=1}^n \Big( \log \sum_{e=1}^E e^{z_{ke}} \Big)^2 $$

    The last axis holds the logits of the E experts, all others together are the n tokens. The
    paper's strength is 10⁻³. The formula is that of `ZLoss`; the name says which logits it is for.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        (2s / n)·log Z_k·softmax(z_k); see `ZLoss`.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> round(float(jr.RouterZLoss(1.0)(jnp.zeros((3, 8)))), 4)      # log(8)²
        4.3241

    References:
        Zoph et al., ST-MoE: designing stable and transferable sparse expert models,
        arXiv:2202.08906, 2022 (equation 5).
    """


class Entropy(MeanOverTokens):
    r"""The mean entropy of the softmax, in nats: entropy minimization.

    $$ R(z) = \frac sn \sum_{k=1}^n H(p_k), \qquad H(p) = -\sum_j p_j \log p_j, \qquad
       p_k = \mathrm{softmax}(z_k) $$

    It makes predictions confident: on unlabelled examples, or at test time. Its opposite is
    `ConfidencePenalty`. The last axis holds the logits, all others together are the n examples.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        −(s / n)·p_j·(log p_j + H(p)): 0 where all logits are equal. Logits of −∞ take no part.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> round(float(jr.Entropy(1.0)(jnp.zeros((5, 4)))), 4)          # log(4)
        1.3863

    References:
        Grandvalet and Bengio, Semi-supervised learning by entropy minimization, NeurIPS, 2004.
    """

    def of_token(self, logits: jax.Array) -> jax.Array:
        return -_mean_log(logits, 0.0)


class ConfidencePenalty(MeanOverTokens):
    r"""The mean divergence of the softmax from the uniform distribution, in nats.

    $$ R(z) = \frac sn \sum_{k=1}^n \log K - H(p_k)
            = \frac sn \sum_{k=1}^n \mathrm{KL}(p_k \,\Vert\, \mathrm{uniform}), \qquad
       p_k = \mathrm{softmax}(z_k) $$

    It penalizes confident predictions. Pereyra et al. add −β·H(p), which differs by the constant
    β·log K only: here the least value is 0. K is the number of logits, those of −∞ included. The
    last axis holds the logits, all others together are the n examples.

    Args:
        strength: s (β), a non-negative scalar.

    Gradient:
        (s / n)·p_j·(log p_j + H(p)): 0 where all logits are equal. Logits of −∞ take no part.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> logits = jnp.array([[0.0, -jnp.inf], [1.0, 1.0]])            # log(2) and 0
        >>> round(float(jr.ConfidencePenalty(1.0)(logits)), 4)
        0.3466

    References:
        Pereyra, Tucker, Chorowski, Kaiser and Hinton, Regularizing neural networks by penalizing
        confident output distributions, arXiv:1701.06548, 2017.
    """

    def of_token(self, logits: jax.Array) -> jax.Array:
        return _mean_log(logits, math.log(max(logits.shape[-1], 1)))


class LabelEntropy(Statistic):
    r"""How far the mean prediction of a batch is from uniform, in nats: against collapse.

    $$ R(z) = s\,\big( \log K - H(\bar p) \big), \qquad
       \bar p = \tfrac1n \sum_{k=1}^n \mathrm{softmax}(z_k) $$

    H(p̄) is the entropy of the marginal label distribution. With `Entropy`, which makes each
    prediction confident, it maximizes the mutual information of inputs and labels, as SHOT and RIM
    do; MSN maximizes the mean entropy so. The last axis holds K logits, all others together are the
    n examples: the value is that of the whole batch, not of its microbatches.

    Args:
        strength: s, a non-negative scalar.

    Gradient:
        (s / n)·p_kj·(log p̄_j − Σ_i p_ki·log p̄_i): 0 where all logits are equal.

    Raises:
        ValueError: for a concrete strength that is negative, NaN, infinite or not a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxreg as jr
        >>> penalty = jr.LabelEntropy(1.0)
        >>> confident = 50 * jnp.eye(2)
        >>> round(float(penalty(confident)), 4), round(float(penalty(confident[:1])), 4)
        (0.0, 0.6931)

    References:
        Krause, Perona and Gomes, Discriminative clustering by regularized information maximization,
        NeurIPS, 2010. Liang, Hu and Feng, Do we really need to access the source data? Source
        hypothesis transfer for unsupervised domain adaptation, ICML, arXiv:2002.08546, 2020.
        Assran et al., Masked siamese networks for label-efficient learning, ECCV,
        arXiv:2204.07141, 2022.
    """

    def sums(self, x: jax.Array, where: jax.Array | None) -> jax.Array:
        return sum_examples(jax.nn.softmax(x, axis=-1), where)

    def of_means(self, means: jax.Array) -> jax.Array:
        # The logarithm's derivative is infinite at 0, and 0 · inf would be NaN.
        logs = jnp.log(jnp.where(means == 0, 1, means)) + math.log(max(means.size, 1))
        return jnp.sum(means * logs)


def _mean_log(logits: jax.Array, offset: float) -> jax.Array:
    """Return Σ p (log p + offset) for p the softmax along the last axis, which is kept."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    # 0 · log 0 is 0; but where all logits are -inf, the probabilities are NaN and stay so.
    finite = jnp.where(logs == -jnp.inf, 0, logs + offset)
    return jnp.sum(jax.nn.softmax(logits, axis=-1) * finite, axis=-1, keepdims=True)
