"""Losses of pairs that set the level of each log-ratio, not only their difference.

Notation and promises of `pairs.py`: a and b are the log-ratios of the chosen and the rejected
response, D = a - b. A constant common to both changes the value.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses.door import statistic
from dpo_jax.losses.needs import needs
from dpo_jax.losses.pairs import margin, ratio
from dpo_jax.losses.ranking import logistic
from dpo_jax.structs import Array, Scored


@needs()
def nca(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Noise contrastive alignment of pairs, Chen et al. 2402.05369.

        -log sig(beta a) - log sig(-beta a) / 2 - log sig(-beta b) / 2,   sig = sigmoid

    Keeps the chosen response likely. Needs K = 2, ref_logp_BK. Returns loss_B: 2 log 2 where
    policy == reference; over many pairs least where beta times the log-ratio of a response is
    log(2 p), p the share of its pairs in which it is chosen.
    """
    z_BK = beta * ratio(scored, "nca")
    return logistic(z_BK[:, 0]) + logistic(-z_BK[:, 0]) / 2 + logistic(-z_BK[:, 1]) / 2


@needs()
def bco_pair(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Binary classifier optimisation of pairs, Jung et al. 2404.04656.

        -log sigmoid(beta a - delta) - log sigmoid(-(beta b - delta))

    delta is a scalar of Scored, without gradient, 0 where absent, which is how the paired form is
    trained; the running mean of rewards belongs to `bco`, on `data.views.unpaired` groups.
    Needs K = 2, ref_logp_BK. Returns loss_B: 2 log 2 where policy == reference and delta = 0.
    """
    z_BK = beta * ratio(scored, "bco_pair") - statistic(scored, "delta", "bco_pair")
    return logistic(z_BK[:, 0]) + logistic(-z_BK[:, 1])


@needs()
def sppo_hard(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Self-play preference optimisation with certain labels, Wu et al. 2405.00675.

        (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2

    beta is 1 over the paper's eta. Needs K = 2, ref_logp_BK. Returns loss_B: 1/(2 beta^2) where
    policy == reference, 0 at a = -b = 1/(2 beta).
    """
    return _squares(ratio(scored, "sppo_hard"), beta)


@needs()
def apo_zero(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Anchored preference optimisation (zero), D'Oosterlinck et al. 2408.06266 eq. 7.

        1 - sigmoid(beta a) + sigmoid(beta b)

    Chosen up, rejected down: for data better than the policy. Needs K = 2, ref_logp_BK.
    Returns loss_B, in (0, 2): 1 where policy == reference; far from there no gradient is left.
    """
    z_BK = beta * ratio(scored, "apo_zero")
    return jax.nn.sigmoid(-z_BK[:, 0]) + jax.nn.sigmoid(z_BK[:, 1])


@needs()
def apo_down(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Anchored preference optimisation (down), D'Oosterlinck et al. 2408.06266 eq. 8.

        sigmoid(beta a) + 1 - sigmoid(beta D)

    Both down, the rejected one further: for data worse than the policy. Needs K = 2, ref_logp_BK.
    Returns loss_B, in (0, 2): 1 where policy == reference.
    """
    z_BK = beta * ratio(scored, "apo_down")
    return jax.nn.sigmoid(z_BK[:, 0]) + jax.nn.sigmoid(-margin(z_BK))


@needs()
def cal_dpo(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Calibrated DPO, Xiao et al. 2412.14516.

        -log sigmoid(D) + (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2

    No beta inside the sigmoid: the squares set the scale of the implicit rewards. Needs K = 2,
    ref_logp_BK. Returns loss_B: log 2 + 1/(2 beta^2) where policy == reference.
    """
    ratio_BK = ratio(scored, "cal_dpo")
    return logistic(margin(ratio_BK)) + _squares(ratio_BK, beta)


def _squares(ratio_BK: jax.Array, beta: Array | float) -> jax.Array:
    """Squared distances of a from 1/(2 beta) and of b from -1/(2 beta)."""
    target = 1 / (2 * jnp.asarray(beta, ratio_BK.dtype))
    return (ratio_BK[:, 0] - target) ** 2 + (ratio_BK[:, 1] + target) ** 2
