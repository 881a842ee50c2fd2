"""TRL's metrics of preference training, each a sum under the measure, so that batches add up.

rewards are beta (log p - log p_ref), or beta log p without a reference (divided by the length
where the loss does so); those of a combination are those of its first loss.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax import losses
from dpo_jax.losses.needs import parts_of
from dpo_jax.structs import Array, Metrics, Scored

Loss = Callable[[Scored], Array]


def flat(x_RG: Array) -> jax.Array:
    """The groups of all rows side by side: x_B, or x_BK of x_RGK."""
    return jnp.reshape(x_RG, (-1, *x_RG.shape[2:]))


def weighted(weight_B: Array, x_B: Array) -> jax.Array:
    """sum_b weight_b x_b, where what has no weight cannot spoil the sum."""
    return jnp.sum(jnp.where(weight_B > 0, weight_B * x_B, 0.0))


def leading(loss: Loss) -> Loss:
    """The loss whose rewards are reported: the first one inside a combination."""
    function, keywords = parts_of(loss)
    inner = function.terms[0][1] if isinstance(function, losses.Mix) else keywords.get("loss")
    return loss if inner is None else leading(inner)


def reward_scale(loss: Loss) -> float | Array:
    """The factor of the reported rewards: `beta` of the leading loss, 1 where it has none."""
    return parts_of(leading(loss))[1].get("beta", 1.0)


def implicit_rewards(scored: Scored, loss: Loss) -> jax.Array:
    """reward_BK of the metrics, without gradient."""
    logp_BK, needs = jnp.asarray(scored.logp_BK), losses.needs(leading(loss))
    if needs.reference and scored.ref_logp_BK is not None:
        logp_BK = logp_BK - scored.ref_logp_BK
    elif "length_BK" in needs.fields and scored.length_BK is not None:
        logp_BK = losses.measure.per_token(logp_BK, scored.length_BK)
    return jax.lax.stop_gradient(jnp.asarray(reward_scale(loss)) * logp_BK)


def metrics(scored: Scored, weight_B: Array, reward_BK: Array, names: tuple[str, ...]) -> Metrics:
    """`reward_metrics` of implicit rewards, and the log-probs of chosen and rejected."""
    assert scored.mask_BK is not None
    found = {"logps/chosen": weighted(weight_B, scored.logp_BK[:, 0])}
    if reward_BK.shape[1] > 1:
        found["logps/rejected"] = weighted(weight_B, _last(scored.logp_BK, scored.mask_BK))
    rewards = reward_metrics(weight_B, reward_BK, scored.mask_BK, scored.score_BKC, names)
    return rewards | found


def reward_metrics(
    weight_B: Array,
    reward_BK: Array,
    mask_BK: Array,
    score_BKC: Array | None,
    names: tuple[str, ...],
) -> Metrics:
    """Chosen is the first response of a group and rejected the last one that is there.

    A tie counts 0 in `rewards/accuracies` and 1 in `rewards/ties`. names: those of the criteria;
    `criteria/NAME/margins` is the gap of their scores between chosen and rejected and
    `criteria/NAME/accuracies` how often the rewards agree with the sign of that gap.
    """
    summed = partial(weighted, weight_B)
    found = {"rewards/chosen": summed(reward_BK[:, 0])}
    if reward_BK.shape[1] == 1:
        return found
    rejected_B = _last(reward_BK, mask_BK)
    margin_B = reward_BK[:, 0] - rejected_B
    found |= {
        "rewards/rejected": summed(rejected_B),
        "rewards/margins": summed(margin_B),
        "rewards/accuracies": summed(jnp.where(margin_B > 0, 1.0, 0.0)),
        "rewards/ties": summed(jnp.where(margin_B == 0, 1.0, 0.0)),
    }
    for c, name in enumerate(names):
        assert score_BKC is not None
        gap_B = score_BKC[:, 0, c] - _last(score_BKC[:, :, c], mask_BK)
        found[f"criteria/{name}/margins"] = summed(gap_B)
        agrees_B = jnp.where(margin_B * gap_B > 0, 1.0, 0.0)
        found[f"criteria/{name}/accuracies"] = summed(agrees_B)
    return found


def _last(x_BK: Array, mask_BK: Array) -> jax.Array:
    """x of the last response that is there."""
    last_B = jnp.maximum(jnp.sum(mask_BK, axis=1).astype(jnp.int32) - 1, 0)
    return jnp.take_along_axis(jnp.asarray(x_BK), last_B[:, None], axis=1)[:, 0]


def unpaired_metrics(
    scored: Scored, weight_B: Array, reward_BK: Array, desirable: Array
) -> Metrics:
    """Chosen are the desirable responses and rejected the others, each averaged over its class.

    desirable: the share of the step's weight that desirable responses have, for a class is a
    measure of its own; a class that is not there gives 0.
    """
    assert scored.label_B is not None
    label_B = jnp.where(scored.label_B > 0.5, 1.0, 0.0)
    found = {}
    for side, of_B, share in (
        ("chosen", label_B, desirable),
        ("rejected", 1 - label_B, 1 - desirable),
    ):
        class_B = losses.measure.within(weight_B * of_B, share)
        found[f"rewards/{side}"] = weighted(class_B, reward_BK[:, 0])
        found[f"logps/{side}"] = weighted(class_B, scored.logp_BK[:, 0])
    return found | {"rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}
