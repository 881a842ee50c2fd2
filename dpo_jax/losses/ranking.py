"""Links: how scores of K responses, best to worst, become the probability of that order.

Reward models (`algorithms.reward`) use them on rewards, the DPO family on implicit rewards. Float32
or better inside and out, whatever comes in; one unreduced value a group.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.door import floating
from dpo_jax.losses.needs import needs
from dpo_jax.structs import Array


@needs(reference=False)
def bradley_terry(
    score_BK: Array, margin: Array | float = 0.0, label_smoothing: Array | float = 0.0
) -> jax.Array:
    """Negative log-likelihood of the first response beating the second.

        -(1-e) log sigmoid(z) - e log sigmoid(-z),   z = r_w - r_l - margin,   e = label_smoothing

    Bradley & Terry 1952; as a reward model's loss InstructGPT 2203.02155 eq. 1, with a margin
    Llama 2 2307.09288 eq. 2. score_BK: K = 2, chosen first. margin: a number or margin_B.
    label_smoothing: the probability that a label is flipped, a number. Returns loss_B; log 2 at
    a tie without margin.
    """
    score_BK = floating(score_BK)
    chex.assert_shape(score_BK, (None, 2), custom_message="losses.bradley_terry takes K = 2")
    margin = jnp.asarray(margin, score_BK.dtype)
    if margin.ndim:
        chex.assert_shape(margin, score_BK.shape[:1], custom_message="margin_B, of score_BK")
    return logistic(score_BK[:, 0] - score_BK[:, 1] - margin, label_smoothing)


@needs(reference=False, responses=None)
def plackett_luce(score_BK: Array, mask_BK: Array | None = None) -> jax.Array:
    """Negative log-likelihood of the order best to worst, chosen one after the other.

        sum_k [ log sum_{j >= k} exp(r_j) - r_k ]

    Plackett 1975; DPO 2305.18290 eq. 18. score_BK: any K. mask_BK: nonzero where there is a
    response; lists are padded, and a place without response neither scores nor competes. K = 2 is
    `bradley_terry`, K = 1 and a group without responses give 0. Returns loss_B.
    """
    score_BK = floating(score_BK)
    chex.assert_rank(score_BK, 2)
    mask_BK = jnp.ones(score_BK.shape, bool) if mask_BK is None else jnp.asarray(mask_BK) != 0
    chex.assert_equal_shape([score_BK, mask_BK])
    # Finite, so that an empty tail has no inf - inf; far below any score, so that it loses.
    nothing = jnp.finfo(score_BK.dtype).min / 4
    score_BK = jnp.where(mask_BK, score_BK, nothing)
    # The stage of k is Bradley-Terry between k and all that follow, pooled by logsumexp: relative
    # precision where the winner is clear, and exactly the pair's loss at K = 2.
    stage_BK = -jax.nn.log_sigmoid(score_BK[:, :-1] - _following(score_BK))
    return jnp.sum(jnp.where(mask_BK[:, :-1], stage_BK, 0), axis=1)


@jax.jit  # its derivative is a tree of small operations, slow to call one by one
def _following(score_BK: jax.Array) -> jax.Array:
    """log sum_{j > k} exp(score_j), of all places but the last."""
    return jax.lax.cumlogsumexp(score_BK, axis=1, reverse=True)[:, 1:]


@needs(reference=False, responses=None)
def centering(score_BK: Array) -> jax.Array:
    """What keeps the rewards of a prompt around 0, Eisenstein et al. 2312.09244.

        (sum_k r_k)^2

    Rankings fix rewards up to a constant of the prompt; a hundredth of this fixes the constant.
    The paper's (r_w + r_l)^2 at K = 2. score_BK: any K, 0 where there is no response. Returns
    loss_B.
    """
    score_BK = floating(score_BK)
    chex.assert_rank(score_BK, 2)
    return jnp.sum(score_BK, axis=1) ** 2


@needs(reference=False, responses=None, fields=("score_BKC",))
def regression(score_BK: Array, target_BK: Array) -> jax.Array:
    """Rewards fitted to scores, as HelpSteer 2311.09528 does.

        sum_k (r_k - target_k)^2

    A sum over the responses of a group, not a mean; any K. Returns loss_B.
    """
    score_BK, target_BK = floating(score_BK), floating(target_BK)
    chex.assert_rank(score_BK, 2)
    chex.assert_equal_shape([score_BK, target_BK])
    return jnp.sum((score_BK - target_BK) ** 2, axis=1)


def logistic(z_B: Array, label_smoothing: Array | float = 0.0) -> jax.Array:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z) of margins z_B."""
    z_B = floating(z_B)
    e = jnp.asarray(label_smoothing, z_B.dtype)
    return -(1 - e) * jax.nn.log_sigmoid(z_B) - e * jax.nn.log_sigmoid(-z_B)
