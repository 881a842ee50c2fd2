"""What algorithms share that train on their own samples, from the rollout to the loss."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.algorithms.margins import weighted
from dpo_jax.algorithms.penalty import Penalty
from dpo_jax.algorithms.rollout import Rollout, Sampler, summary
from dpo_jax.logprobs import TokenStatistics, token_statistics
from dpo_jax.losses.divergence import bounded
from dpo_jax.losses.measure import within
from dpo_jax.parallel import fetched, shard_batch
from dpo_jax.structs import Array, Batch, Memory, Metrics, Model, Params, join

Loss = Callable[[Array, Array, Array], Array]  # (logp, old_logp, advantage) -> loss, elementwise
WEIGHT = "weight"  # in `shared`: what the weights of a whole optimizer step sum to


# The rollout, on the host


def anchor(frozen: Params) -> Params | None:
    """The weights that the policy is held to, as a Model takes them; None where there are none."""
    return join(fetched(frozen["reference"]), frozen) if "reference" in frozen else None


def token_facts(
    model: Model,
    params: Params,
    frozen: Params,
    batch: Batch,
    *,
    temperature: float,
    readout_D: Array | None = None,
) -> TokenStatistics:
    """What policy and reference say of the sampled tokens, by the code that trains on them."""
    return token_statistics(
        model,
        join(params, frozen),
        batch,
        reference=anchor(frozen),
        policy_kl=True,
        entropy=True,
        readout_D=readout_D,
        temperature=temperature,
    )


def priced(
    penalty: Penalty, memory: Memory, rollout: Rollout, found: TokenStatistics
) -> np.ndarray:
    """The coefficient times the KL of every token, price_BKM; 0 without a coefficient."""
    if not penalty.beta:
        return np.zeros(rollout.sampled_BKM.shape)
    kl_BKM = rollout.by_response(penalty.tokens(found, found.ref_logp_RN))
    return float(penalty.coefficient(memory)) * kl_BKM


def objective_metrics(
    rollout: Rollout, found: TokenStatistics, score_BK: np.ndarray, reward_BK: np.ndarray
) -> dict[str, float]:
    """TRL's `objective/`: means over responses. kl, to the reference, and entropy are exact at
    every sampled token and summed over it; rlhf_reward is the score less the price of the KL."""
    gap = rollout.by_response(found.logp_RN)
    gap = np.abs(gap - rollout.sampled_BKM)[rollout.mask_BKM]
    values = {
        "objective/entropy": rollout.by_response(found.entropy_RN).sum(-1).mean(),
        "objective/scores": score_BK.mean(),
        "objective/rlhf_reward": reward_BK.mean(),
        "objective/non_score_reward": (reward_BK - score_BK).mean(),
        "sampling/sampling_logp_difference/mean": gap.mean(),
        "sampling/sampling_logp_difference/max": gap.max(),
    }
    if found.policy_kl_RN is not None:
        values["objective/kl"] = rollout.by_response(found.policy_kl_RN).sum(-1).mean()
    return {name: float(value) for name, value in values.items()}


def completed(
    penalty: Penalty,
    memory: Memory,
    sampler: Sampler,
    rollout: Rollout,
    found: TokenStatistics,
    price_BKM: np.ndarray,
    columns: Mapping[str, np.ndarray],
) -> tuple[Batch, Memory]:
    """The rows with the columns that training reads, the metrics of the rollout as `shared`; the
    memory with the coefficient that is next."""
    score_BK = rollout.scores.total_BK
    reward_BK = score_BK - price_BKM.sum(axis=-1)
    values = summary(rollout) | objective_metrics(rollout, found, score_BK, reward_BK)
    if penalty.target is not None:
        values["objective/kl_coef"] = float(penalty.coefficient(memory))
    known = {"old_logp_RN": found.logp_RN, "ref_logp_RN": found.ref_logp_RN}
    shared = {name: np.float32(value) for name, value in values.items()}
    host = replace(rollout.batch, **known, **columns, shared=shared)
    memory = penalty.adapted(memory, values.get("objective/kl", 0.0), score_BK.size)
    return shard_batch(sampler.context.mesh, host), memory


# An update, traced


def measured(measure: Callable[[Array, Array], Array], batch: Batch) -> Batch:
    """The tokens under a measure."""
    weight_RN = measure(batch.weight_RN, batch.slot_RN)
    return replace(batch, weight_RN=weight_RN, shared={WEIGHT: jnp.sum(weight_RN)})


def current(
    model: Model,
    penalty: Penalty,
    params: Params,
    frozen: Params,
    batch: Batch,
    *,
    temperature: float,
    readout_D: Array | None = None,
) -> TokenStatistics:
    """What the policy says of the tokens now; the reference beside it where the loss holds the
    policy to the whole of its distributions."""
    exact = penalty.in_loss and penalty.exact
    return token_statistics(
        model,
        join(params, frozen),
        batch,
        reference=anchor(frozen) if exact else None,
        policy_kl=exact,
        readout_D=readout_D,
        temperature=temperature,
    )


def held(
    penalty: Penalty, memory: Memory, found: TokenStatistics, batch: Batch
) -> tuple[jax.Array, Metrics]:
    """(price, metrics) of the KL in the loss; 0 where it does not stand there."""
    if not penalty.in_loss:
        return jnp.zeros(()), {}
    kl = weighted(batch.weight_RN, penalty.tokens(found, batch.ref_logp_RN))
    price = jnp.asarray(penalty.coefficient(memory)) * kl
    return price, {"loss/kl_avg": jax.lax.stop_gradient(kl)}


def surrogate(loss: Loss, logp_RN: Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """(value, metrics) of a loss of tokens under the measure.

    policy/clipfrac_avg is the share of the weight of tokens that have an advantage at which the
    loss stands still.
    """
    old_RN, advantage_RN = batch.old_logp_RN, batch.advantage_RN
    assert old_RN is not None and advantage_RN is not None
    fixed_RN = jax.lax.stop_gradient(logp_RN)
    _, back = jax.vjp(lambda x_RN: loss(x_RN, old_RN, advantage_RN), fixed_RN)
    (slope_RN,) = back(jnp.ones_like(fixed_RN))
    still_RN = (slope_RN == 0) & (advantage_RN != 0)
    value = weighted(batch.weight_RN, loss(logp_RN, old_RN, advantage_RN))
    share_RN = within(batch.weight_RN, batch.shared[WEIGHT])
    ratio_RN = jnp.exp(bounded(jnp.asarray(fixed_RN - old_RN)))
    return value, {
        "loss/policy_avg": jax.lax.stop_gradient(value),
        "policy/clipfrac_avg": weighted(share_RN, jnp.where(still_RN, 1.0, 0.0)),
        "policy/approxkl_avg": weighted(share_RN, losses.kl_k2(fixed_RN, old_RN)),
        "val/ratio": weighted(share_RN, ratio_RN),
    }
