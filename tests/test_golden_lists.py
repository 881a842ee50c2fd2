"""Losses of single responses and of lists against recorded values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.structs import Scored

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-9)], ids=["float32", "float64"]
)
SIDES = ("chosen", "rejected")
LABELS = {"chosen": 1.0, "rejected": 0.0}


def close(actual, expected, tolerance, name=""):
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=tolerance, atol=tolerance, err_msg=name
    )


@PRECISIONS
@pytest.mark.parametrize("name", ["kto_kl0.0", "kto_kl2.5"])
def test_recorded_kto(oracles, name, dtype, tolerance):
    (case,) = (case for case in oracles["sequence_level"] if case["name"] == name)
    sides, params = oracles["inputs"], case["params"]
    B = oracles["B"]
    labels = jnp.concatenate([jnp.ones(B), jnp.zeros(B)])  # the losses of both sides in a row
    with jax.enable_x64(dtype == jnp.float64):
        policy, reference = (
            jnp.asarray([[x] for side in SIDES for x in sides[f"{model}_{side}_logps"]], dtype)
            for model in ("policy", "ref")
        )

        def values(policy, reference):
            scored = Scored(
                policy,
                ref_logp_BK=reference,
                label_B=labels,
                kl=jnp.asarray(params["kl"], dtype),
            )
            return losses.kto(scored, beta=params["beta"])

        value = values(policy, reference)
        slopes = jax.grad(lambda *x: jnp.sum(values(*x)), argnums=(0, 1))(policy, reference)
    assert value.dtype == dtype
    close(value, case["losses"], tolerance, name)
    # recorded for chosen and rejected under the policy, then under the reference
    expected = np.reshape(case["grad_sum_wrt_inputs"], (2, 2 * B, 1))
    close(np.stack(slopes), expected, tolerance, name)


@PRECISIONS
def test_recorded_kto_with_partners(oracles, dtype, tolerance):
    """The KL is estimated as a step does it: from partners, the mean over all responses."""
    record = oracles["halos_token_level"]
    (case,) = (case for case in record["cases"] if case["name"] == "KTOTrainer")
    params, B = case["params"], oracles["B"]

    def summed(model):
        return np.concatenate(
            [
                np.sum(np.array(record[f"{model}_{side}"]) * record[f"mask_{side}"], axis=1)
                for side in SIDES
            ]
        )

    policy, reference = summed("policy"), summed("ref")
    partners = np.tile(0.9 * policy[B:], 2), np.tile(reference[B:], 2)
    with jax.enable_x64(dtype == jnp.float64):
        scored = Scored(
            jnp.asarray(np.stack([policy, partners[0]], axis=1), dtype),
            ref_logp_BK=jnp.asarray(np.stack([reference, partners[1]], axis=1), dtype),
            label_B=jnp.concatenate([jnp.ones(B), jnp.zeros(B)]),
        )
        (estimate,) = losses.needs(losses.kto).statistics
        kl = jnp.mean(estimate.value(scored))
        value = losses.kto(
            replace(scored, kl=kl),
            beta=params["beta"],
            desirable=params["desirable_weight"],
            undesirable=params["undesirable_weight"],
        )
    close(kl, case["KL"], 1e-5)  # summed in another precision where it was recorded
    close(value, case["losses"], tolerance)


@PRECISIONS
def test_recorded_pair_losses_of_one_response_after_the_other(oracles, dtype, tolerance):
    """APO-zero is the sum of its two sides, BCO-pair that of BCO's at delta = 0."""
    sides = oracles["inputs"]
    cases = {case["name"]: case for case in oracles["sequence_level"]}
    for beta in (0.1, 0.5):
        total = {name: np.zeros(oracles["B"]) for name in ("apo", "bco")}
        for side, label in LABELS.items():
            with jax.enable_x64(dtype == jnp.float64):
                scored = Scored(
                    jnp.asarray(sides[f"policy_{side}_logps"], dtype)[:, None],
                    ref_logp_BK=jnp.asarray(sides[f"ref_{side}_logps"], dtype)[:, None],
                    label_B=np.full(oracles["B"], label),
                )
                total["apo"] += np.asarray(losses.apo_zero_unpaired(scored, beta=beta))
                total["bco"] += np.asarray(losses.bco(scored, beta=beta))
                forget = losses.npo(scored, beta=beta)
                if side == "rejected":
                    np.testing.assert_array_equal(forget, losses.bco(scored, beta=beta))
        close(total["apo"], cases[f"HFAPOZeroLoss_b{beta}"]["losses"], tolerance, "apo")
        close(total["bco"], cases[f"HFBCOPAIRLoss_b{beta}"]["losses"], tolerance, "bco")


@PRECISIONS
def test_recorded_pair_losses_of_lists(oracles, dtype, tolerance):
    """Two responses: Plackett-Luce is DPO, NCA of certain scores is the recorded pair form."""
    sides = oracles["inputs"]
    cases = {case["name"]: case for case in oracles["sequence_level"]}
    with jax.enable_x64(dtype == jnp.float64):
        policy, reference = (
            jnp.asarray([sides[f"{model}_{side}_logps"] for side in SIDES], dtype).T
            for model in ("policy", "ref")
        )
        scores = jnp.tile(jnp.asarray([[1.0], [0.0]], dtype), (oracles["B"], 1, 1))
        scored = Scored(policy, ref_logp_BK=reference, score_BKC=scores)
        for beta in (0.1, 0.5):
            dpo = cases[f"dpo_sigmoid_b{beta}_ls0.0"]["losses"]
            close(losses.plackett_luce_dpo(scored, beta=beta), dpo, tolerance)
            close(losses.info_nca(scored, beta=beta, alpha=1e-3), dpo, tolerance)
            nca = cases[f"HFNCAPAIRLoss_b{beta}"]["losses"]
            close(losses.nca_list(scored, beta=beta, alpha=1e-3), nca, tolerance)


def test_closed_forms(closed_forms):
    start = Scored(
        jnp.full((2, 1), -7.0), ref_logp_BK=jnp.full((2, 1), -7.0), label_B=jnp.array([1.0, 0.0])
    )
    close(losses.kto(start, beta=0.3), [closed_forms["kto_at_init"]] * 2, 1e-7)
    slope = jax.grad(lambda s: jnp.sum(losses.kto(s, beta=0.3)))(start).logp_BK
    close(slope, [[-0.3 / 4], [0.3 / 4]], 1e-7)
    score = jnp.float32([[1.25, -0.5], [-3.0, 2.0]])
    chance = jax.nn.sigmoid(score[:, 0] - score[:, 1])  # plackett_luce_k2_equals_bt
    pair = Scored(score, ref_logp_BK=jnp.zeros((2, 2)))
    close(jnp.exp(-losses.plackett_luce_dpo(pair, beta=1.0)), chance, 1e-6)
