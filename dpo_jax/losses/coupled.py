"""Losses of pairs whose value depends on the other pairs of the batch.

Notation and promises of `pairs.py`. The batch is that of the whole optimizer step; pairs of
weight_B 0 (empty slots among them) are ignored and give 0, no weight_B = all count alike.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.losses.door import present, statistic
from dpo_jax.losses.needs import Needs, Statistic, needs
from dpo_jax.losses.pairs import margin, ratio
from dpo_jax.losses.ranking import logistic
from dpo_jax.structs import Array, Scored

ROUNDING = 1e-6  # of a share times a count: 0.7 * 10 is 7 pairs and not 8


@needs(coupled=True)
def aot(scored: Scored, *, beta: Array | float, label_smoothing: Array | float = 0.0) -> jax.Array:
    """Alignment via optimal transport of paired data, Melnyk et al. 2406.05882.

        cDPO of beta x,   x = sort(w - l) - sort(rw - rl) over the batch

    cDPO(z) = -(1-e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing. Pushes the whole
    distribution of the policy's margins above the reference's.
    Needs K = 2, ref_logp_BK; reads weight_B. Returns loss_B, each value at the pair whose w - l
    has that rank: log 2 where policy == reference.
    """
    policy_B = margin(ratio(scored, "aot", reference=False))
    reference_B = margin(present(scored, "ref_logp_BK", "aot"))
    return _transported(scored, "aot", policy_B, reference_B, beta, label_smoothing)


@needs(coupled=True)
def aot_unpaired(
    scored: Scored, *, beta: Array | float, label_smoothing: Array | float = 0.0
) -> jax.Array:
    """Alignment via optimal transport of unpaired data, Melnyk et al. 2406.05882.

        cDPO of beta x,   x = sort(a) - sort(b) over the batch

    cDPO(z) = -(1-e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing. Pushes the whole
    distribution of the chosen log-ratios above that of the rejected.
    Needs K = 2, ref_logp_BK; reads weight_B. Returns loss_B, each value at the pair whose a has
    that rank: log 2 where policy == reference.
    """
    ratio_BK = ratio(scored, "aot_unpaired")
    return _transported(
        scored, "aot_unpaired", ratio_BK[:, 0], ratio_BK[:, 1], beta, label_smoothing
    )


def _scaled_margin(scored: Scored, *, beta: Array | float) -> Array:
    return beta * margin(ratio(scored, "beta_dpo"))


def _beta_dpo_needs(*, beta: Array | float = 1.0, **_: object) -> Needs:
    memory = Statistic("delta", partial(_scaled_margin, beta=beta), keep=0.9)
    return Needs(coupled=True, statistics=(memory,))


@needs(rule=_beta_dpo_needs)
def beta_dpo(
    scored: Scored,
    *,
    beta: Array | float,
    alpha: Array | float = 0.6,
    rho: Array | float = 0.8,
) -> jax.Array:
    """DPO with a beta for every batch, Wu et al. 2407.08639.

        -log sigmoid(beta_b D),   beta_b = beta (1 + alpha (mean(M) - delta)),   M = beta D

    delta is the moving average of mean(M) over the steps so far (decay 0.9), 0 where absent. The
    ceil(rho n) of the n pairs whose M is nearest delta are kept, earlier ones first at a tie; the
    value of the others is 0. No gradient through beta_b or the choice; beta_b has no lower bound.
    Needs K = 2, ref_logp_BK; reads weight_B and delta. Returns loss_B: log 2 for what is kept
    where policy == reference.
    """
    D_B = margin(ratio(scored, "beta_dpo"))
    beta, alpha, rho = (jnp.asarray(number, D_B.dtype) for number in (beta, alpha, rho))
    used_B = _used(scored, "beta_dpo")
    count = jnp.sum(used_B)
    off_B = jax.lax.stop_gradient(beta * D_B) - statistic(scored, "delta", "beta_dpo")
    off_B = jnp.where(used_B, off_B, 0)
    beta_b = beta * (1 + alpha * jnp.sum(off_B) / jnp.maximum(count, 1))
    kept_B = used_B & (_rank(jnp.abs(off_B), used_B) < count * (rho - ROUNDING))
    return jnp.where(kept_B, logistic(beta_b * D_B), 0)


def _transported(
    scored: Scored,
    loss: str,
    owner_B: jax.Array,
    other_B: jax.Array,
    beta: Array | float,
    label_smoothing: Array | float,
) -> jax.Array:
    """cDPO of beta (owner less the other value of the same rank), where the owner stands."""
    used_B = _used(scored, loss)
    other_B = other_B[_order(other_B, used_B)]
    x_B = owner_B - other_B[_rank(owner_B, used_B)]
    return jnp.where(used_B, logistic(beta * x_B, label_smoothing), 0)


def _used(scored: Scored, loss: str) -> jax.Array:
    if scored.weight_B is None:
        return jnp.ones(scored.logp_BK.shape[0], bool)
    return present(scored, "weight_B", loss) > 0


def _order(x_B: jax.Array, used_B: jax.Array) -> jax.Array:
    """The places of x from least to greatest, earlier ones first at a tie, unused ones last."""
    return jnp.argsort(jnp.where(used_B, x_B, jnp.inf))


def _rank(x_B: jax.Array, used_B: jax.Array) -> jax.Array:
    return jnp.argsort(_order(x_B, used_B))
