"""Losses of lists: one `Scored` of any K in, one unreduced value a group out.

Responses run best to worst along K; a_k is the log-ratio of the k-th, its summed log-prob under
the policy less that under the reference. Lists are padded: a place where mask_BK is 0 neither
scores nor competes, whatever stands in it (mask_BK absent: all are there). score_k is the first
criterion of score_BKC.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.losses.combine import Mix, mix
from dpo_jax.losses.divergence import LARGEST_EXPONENT
from dpo_jax.losses.door import floating, present
from dpo_jax.losses.measure import per_token
from dpo_jax.losses.needs import Loss, Needs, name_of, needs
from dpo_jax.losses.ranking import plackett_luce
from dpo_jax.structs import Array, BadInput, Scored


@needs(responses=None)
def plackett_luce_dpo(scored: Scored, *, beta: Array | float) -> jax.Array:
    """DPO on rankings: Plackett-Luce of implicit rewards, Rafailov et al. 2305.18290 app. A.3.

        sum_k [ log sum_{j >= k} exp(beta a_j) - beta a_k ]

    Needs ref_logp_BK; K = 2 is `dpo`, fewer than two responses give 0. Returns loss_B: log K!
    where policy == reference.
    """
    return plackett_luce(*_rewards(scored, "plackett_luce_dpo", beta))


@needs(responses=None, fields=("score_BKC",))
def info_nca(scored: Scored, *, beta: Array | float, alpha: Array | float) -> jax.Array:
    """InfoNCA, Chen et al. 2402.05369: a softmax over implicit rewards against one over scores.

        -sum_k softmax(score / alpha)_k log softmax(beta a)_k

    alpha: the temperature of the scores; towards 0 the best response takes all, and K = 2 is
    `dpo`. Needs ref_logp_BK, score_BKC. Returns loss_B: log K where policy == reference; least
    where beta a_k = score_k / alpha up to a constant of the prompt.
    """
    reward_BK, mask_BK = _rewards(scored, "info_nca", beta)
    share_BK = jnp.exp(_log_softmax(_scores(scored, "info_nca", mask_BK) / alpha, mask_BK))
    return -_total(share_BK * _log_softmax(reward_BK, mask_BK), mask_BK)


@needs(responses=None, fields=("score_BKC",))
def nca_list(scored: Scored, *, beta: Array | float, alpha: Array | float) -> jax.Array:
    """NCA on lists, Chen et al. 2402.05369: every response against the reference by itself.

        -sum_k [ softmax(score / alpha)_k log sigmoid(beta a_k) + log sigmoid(-beta a_k) / K ]

    K counts the responses that are there. It holds the likelihood itself, which `info_nca` leaves
    open up to a constant of the prompt; towards alpha = 0, K = 2 is `nca`. Needs ref_logp_BK,
    score_BKC. Returns loss_B: 2 log 2 where policy == reference.
    """
    reward_BK, mask_BK = _rewards(scored, "nca_list", beta)
    share_BK = jnp.exp(_log_softmax(_scores(scored, "nca_list", mask_BK) / alpha, mask_BK))
    good_B = _total(share_BK * jax.nn.log_sigmoid(reward_BK), mask_BK)
    bad_B = _total(jax.nn.log_sigmoid(-reward_BK), mask_BK)
    return -good_B - per_token(bad_B, jnp.sum(mask_BK, axis=1))


@needs(responses=None, fields=("score_BKC",))
def lipo(scored: Scored, *, beta: Array | float) -> jax.Array:
    """LiPO-lambda, Liu et al. 2402.01878: a logistic loss of every pair, by what a swap costs.

        -sum_{score_i > score_j} |G_i - G_j| |1/D_i - 1/D_j| log sigmoid(beta a_i - beta a_j)

    G = 2^score - 1, D = log(1 + t), t the rank of beta a, 1 = largest; of equal ones the earlier
    ranks higher. Ranks carry no gradient. Equal scores weigh 0. In 2^score the exponent of e
    stops at 80. Needs ref_logp_BK, score_BKC. Returns loss_B.
    """
    reward_BK, mask_BK = _rewards(scored, "lipo", beta)
    score_BK = _scores(scored, "lipo", mask_BK)
    gain_BK = jnp.expm1(jnp.minimum(score_BK * math.log(2), LARGEST_EXPONENT))
    discount_BK = 1 / jnp.log1p(_ranks(reward_BK, mask_BK).astype(reward_BK.dtype))
    weight_BKK = jnp.abs(_differences(gain_BK)) * jnp.abs(_differences(discount_BK))
    counts_BKK = (_differences(score_BK) > 0) & mask_BK[:, :, None] & mask_BK[:, None, :]
    loss_BKK = -weight_BKK * jax.nn.log_sigmoid(_differences(reward_BK))
    return jnp.sum(jnp.where(counts_BKK, loss_BKK, 0), axis=(1, 2))


def all_pairs(loss: Loss) -> Loss:
    """A pair loss over all pairs of a list, InstructGPT 2203.02155 eq. 1.

        mean_{i < j} loss(response i, response j)

    Every response is scored once, whatever the number of pairs it is in; the mean is over the
    pairs of a group that are there, a group without any gives 0. What belongs to a group (a
    margin, a soft label) holds for each of its pairs. The pairs of a `mix` are a mix of pairs.
    Errors: BadInput for a loss that does not compare two responses or that compares groups.
    """
    if isinstance(loss, Mix):
        return mix(*((coefficient, all_pairs(term)) for coefficient, term in loss.terms))
    _needs_of_pairs(loss=loss)
    return partial(over_pairs, loss=loss)


def _needs_of_pairs(*, loss: Loss, **_: object) -> Needs:
    inner = needs(loss)
    if inner.responses != 2 or isinstance(loss, Mix):
        raise BadInput(
            f"losses.all_pairs takes one loss of two responses, not {name_of(loss)}; what is no "
            "loss of pairs can stand beside it in a mix"
        )
    if inner.coupled:
        raise BadInput(
            f"losses.all_pairs({name_of(loss)}): it compares groups, whose pairs are no groups; "
            "take a loss that reads one pair at a time"
        )
    averaged = [
        each._replace(value=partial(_mean_over_pairs, value=each.value))
        for each in inner.statistics
    ]
    return replace(inner, responses=None, statistics=tuple(averaged))


@needs(rule=_needs_of_pairs)
def over_pairs(scored: Scored, *, loss: Loss) -> jax.Array:
    """What `all_pairs(loss)` makes a partial of: mean_{i < j} loss(response i, response j)."""
    _needs_of_pairs(loss=loss)  # it may have come by an override
    return _mean_over_pairs(scored, value=loss)


def _mean_over_pairs(scored: Scored, *, value: Callable[[Scored], Array]) -> jax.Array:
    """The mean of `value` over the pairs i < j of a group that are there; 0 where there is none."""
    mask_BK = _mask(scored, "all_pairs")
    first_P, second_P = jnp.triu_indices(mask_BK.shape[1], 1)
    there_BP = mask_BK[:, first_P] & mask_BK[:, second_P]
    B, P = there_BP.shape

    def of_pairs(name: str) -> jax.Array | None:
        x = getattr(scored, name)
        letters = name.rpartition("_")[2] if "_" in name else ""
        if x is None or not letters.startswith("B"):
            return x
        x = jnp.asarray(x)
        if not letters.startswith("BK"):
            return jnp.repeat(x, P, axis=0)
        x = jnp.stack([x[:, first_P], x[:, second_P]], axis=2)
        there = jnp.reshape(there_BP, (B, P) + (1,) * (x.ndim - 2))
        return jnp.reshape(jnp.where(there, x, 0), (B * P, *x.shape[2:]))

    pairs = replace(scored, **{each.name: of_pairs(each.name) for each in fields(scored)})
    value_BP = jnp.reshape(floating(value(pairs)), (B, P))
    total_B = jnp.sum(jnp.where(there_BP, value_BP, 0), axis=1)
    return per_token(total_B, jnp.sum(there_BP, axis=1))


def _mask(scored: Scored, loss: str) -> jax.Array:
    if scored.mask_BK is None:
        return jnp.ones(scored.logp_BK.shape, bool)
    return present(scored, "mask_BK", loss) != 0


def _rewards(scored: Scored, loss: str, beta: Array | float) -> tuple[jax.Array, jax.Array]:
    """(beta a, where there is a response), both (B, K); 0 where there is none."""
    mask_BK = _mask(scored, loss)
    ratio_BK = present(scored, "logp_BK", loss) - present(scored, "ref_logp_BK", loss)
    return jnp.multiply(beta, jnp.where(mask_BK, ratio_BK, 0)), mask_BK


def _scores(scored: Scored, loss: str, mask_BK: jax.Array) -> jax.Array:
    """The first criterion; 0 where there is no response."""
    return jnp.where(mask_BK, present(scored, "score_BKC", loss)[:, :, 0], 0)


def _log_softmax(x_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """Over the responses that are there; far below zero, but finite, where there is none."""
    return jax.nn.log_softmax(jnp.where(mask_BK, x_BK, jnp.finfo(x_BK.dtype).min / 4), axis=1)


def _total(x_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_BK, x_BK, 0), axis=1)


def _differences(x_BK: jax.Array) -> jax.Array:
    """x_i - x_j at [:, i, j]."""
    return x_BK[:, :, None] - x_BK[:, None, :]


def _ranks(reward_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """1 + how many of the group stand above; of equal ones the earlier stands above."""
    rise_BKK = _differences(reward_BK)
    earlier_KK = jnp.tril(jnp.ones(rise_BKK.shape[1:], bool), -1)
    above_BKK = (rise_BKK < 0) | ((rise_BKK == 0) & earlier_KK[None])
    return 1 + jnp.sum(above_BKK & mask_BK[:, None, :], axis=2)
