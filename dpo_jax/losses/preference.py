"""Preference losses: one `Scored` in, one unreduced value a group out.

w and l are the summed log-probs of the chosen and the rejected response under the policy, rw and
rl those under the reference; a = w - rw and b = l - rl. Hyperparameters are keywords and may be
traced arrays; flags and functions may not. Float32 or better inside and out, whatever comes in,
with finite values and gradients at |a - b| up to 800.
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.divergence import Divergence, reverse_kl
from dpo_jax.losses.door import floating, present
from dpo_jax.losses.measure import per_token
from dpo_jax.losses.needs import Needs, needs
from dpo_jax.losses.ranking import logistic
from dpo_jax.structs import Array, BadInput, Scored


def _lengths(length_norm: bool) -> tuple[str, ...]:
    return ("length_BK",) if length_norm else ()


@needs(
    rule=lambda reference_free, length_norm, **_: Needs(
        reference=not reference_free, fields=_lengths(length_norm)
    )
)
def dpo(
    scored: Scored,
    *,
    beta: Array | float,
    label_smoothing: Array | float = 0.0,
    divergence: Divergence = reverse_kl,
    reference_free: bool = False,
    length_norm: bool = False,
) -> jax.Array:
    """Direct preference optimisation, Rafailov et al. 2305.18290 eq. 7.

        -(1-e) log sigmoid(z) - e log sigmoid(-z),   z = beta (s(a) - s(b)),   e = label_smoothing

    Label smoothing is conservative DPO (E. Mitchell, "A note on DPO with noisy preferences",
    2023): the optimum lies at z = log((1-e)/e). divergence: s of f-DPO (2309.16240).
    reference_free: rw = rl = 0. length_norm: a and b are divided by their token counts first
    (Tulu 3, 2411.15124 section 5, with a beta of 5).
    Needs K = 2, ref_logp_BK unless reference_free, length_BK with length_norm. Returns loss_B:
    log 2 where policy == reference, gradient in w there -beta/2, in general -beta sigmoid(-z).
    """
    ratio_BK = _ratio(scored, "dpo", reference=not reference_free, length_norm=length_norm)
    return logistic(beta * _margin(divergence(ratio_BK)), label_smoothing)


@needs(rule=lambda length_norm, **_: Needs(fields=_lengths(length_norm)))
def ipo(scored: Scored, *, beta: Array | float, length_norm: bool = True) -> jax.Array:
    """Identity preference optimisation, Azar et al. 2310.12036 eq. 17 (beta is its tau).

        (x - 1/(2 beta))^2,   x = a - b, each divided by its token count first with length_norm

    Published with sums of log-probs (length_norm=False); implementations are split between sum
    and mean, and a good beta of the one is not a good beta of the other.
    Needs K = 2, ref_logp_BK, length_BK with length_norm. Returns loss_B, 0 at x = 1/(2 beta).
    """
    margin_B = _margin(_ratio(scored, "ipo", length_norm=length_norm))
    beta = jnp.asarray(beta, margin_B.dtype)  # a bfloat16 beta would round the target
    return (margin_B - 1 / (2 * beta)) ** 2


@needs()
def hinge(scored: Scored, *, beta: Array | float, divergence: Divergence = reverse_kl) -> jax.Array:
    """The hinge on implicit rewards: SLiC 2305.10425, normalised by the reference: RSO 2309.06657.

        relu(1 - beta (s(a) - s(b)))

    divergence: s of f-DPO (2309.16240). Needs K = 2, ref_logp_BK. Returns loss_B: 1 where
    policy == reference; beyond the margin value and gradient are exactly 0.
    """
    margin_B = _margin(divergence(_ratio(scored, "hinge")))
    return jax.nn.relu(1 - beta * margin_B)


def _nll_needs(*, per: str, **_: object) -> Needs:
    if per not in ("token", "sequence"):
        raise BadInput(f'losses.nll: per={per!r} is neither "token" nor "sequence"; take one')
    measure = "tokens" if per == "token" else "groups"
    return Needs(reference=False, responses=None, measure=measure, fields=("length_BK",))


@needs(rule=_nll_needs)
def nll(scored: Scored, *, per: str = "token") -> jax.Array:
    """Mean negative log-likelihood of the first response's tokens:  -w / |w|.

    The loss of SFT, and the term that DPO is mixed with (RPO 2404.19733). per="token": the
    objective weighs group b by its share of the batch's tokens (the usual mean over tokens);
    per="sequence": by weight_B. The values are the same, the declared measure differs.
    Needs length_BK; any K, no reference. Returns loss_B; 0 for a response without tokens.
    """
    _nll_needs(per=per)  # the value does not depend on it, but a wrong word must not pass
    logp_BK, length_BK = present(scored, "logp_BK", "nll"), present(scored, "length_BK", "nll")
    return -per_token(logp_BK[:, 0], length_BK[:, 0])


def _ratio(
    scored: Scored, loss: str, *, reference: bool = True, length_norm: bool = False
) -> jax.Array:
    """a and b of pairs, (B, 2): log-probs less the reference's, per token with length_norm."""
    ratio_BK = present(scored, "logp_BK", loss)
    chex.assert_axis_dimension(ratio_BK, 1, 2, custom_message=f"losses.{loss} takes pairs, K = 2")
    if reference:
        ratio_BK = ratio_BK - present(scored, "ref_logp_BK", loss)
    if length_norm:
        ratio_BK = per_token(ratio_BK, present(scored, "length_BK", loss))
    return ratio_BK


def _margin(score_BK: Array) -> jax.Array:
    """s(a) - s(b); the score may come from a user's divergence, hence the cast."""
    score_BK = floating(score_BK)
    return score_BK[:, 0] - score_BK[:, 1]
