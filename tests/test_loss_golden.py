"""Losses against values and gradients recorded by running other implementations in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import measure
from dpo_jax.structs import Scored

f32 = partial(np.asarray, dtype=np.float32)
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-9)], ids=["float32", "float64"]
)


OF_LIGER = {
    "HFDPOLoss": losses.dpo,
    "HFAPOZeroLoss": losses.apo_zero,
    "HFAPODownLoss": losses.apo_down,
    "HFSPPPOHARDLoss": losses.sppo_hard,
    "HFNCAPAIRLoss": losses.nca,
    "HFHingeLoss": losses.hinge,
    "HFBCOPAIRLoss": losses.bco_pair,
    "HFRobustLoss": losses.robust_dpo,
    "HFEXOPAIRLoss": losses.exo,
    "HFDiscoPOPLoss": losses.discopop,
}
OF_CPO = {
    "sigmoid": losses.cpo,
    "hinge": losses.hinge,
    "ipo": partial(losses.ipo, length_norm=False),
    "simpo": losses.simpo,
}


def loss_of(case):
    """The loss that a recorded case ran, with its keywords; None where it is not of pairs."""
    name, params = case["name"], case["params"]
    keywords = {key: params[key] for key in ("beta", "label_smoothing") if key in params}
    if name.startswith("dpo_"):
        free = params.get("reference_free", False)
        return partial(losses.dpo, **keywords, reference_free=free)
    if name.startswith("ipo_sum"):
        return partial(losses.ipo, beta=params["beta"], length_norm=False)
    if name.startswith("HF"):
        tau = {"tau": params["discopop_tau"]} if "discopop_tau" in params else {}
        return partial(OF_LIGER[name.split("_")[0]], **keywords, **tau)
    if name.startswith("cpo_"):
        return loss_of_cpo(params)
    return None


def loss_of_cpo(params):
    """TRL's CPO: its alpha is AlphaPO's; only its sigmoid reads the label smoothing."""
    kind, beta = params["loss_type"], params["beta"]
    if kind == "sigmoid":
        return partial(losses.cpo, beta=beta, label_smoothing=params["label_smoothing"])
    if kind != "simpo":
        return partial(OF_CPO[kind], beta=beta)
    gamma, alpha = params["simpo_gamma"], params["alpha"]
    if alpha:
        return partial(losses.alpha_po, beta=beta, gamma=gamma, alpha=alpha)
    return partial(losses.simpo, beta=beta, gamma=gamma)


def tolerance_of(case, tolerance):
    """Liger's EXO took the log of its label smoothing in float32."""
    return max(tolerance, 1e-7) if "EXO" in case["name"] else tolerance


def recorded_inputs(oracles, case):
    """Log-probs (B, K) of policy and reference; the CPO cases ran on a 20th, without reference."""
    sides = oracles["inputs"]
    policy = np.stack([sides["policy_chosen_logps"], sides["policy_rejected_logps"]], axis=1)
    reference = np.stack([sides["ref_chosen_logps"], sides["ref_rejected_logps"]], axis=1)
    if case["name"].startswith("cpo_"):
        return policy / 20, np.zeros_like(policy)
    return policy, reference


def recorded_gradients(case):
    """(4, B): chosen and rejected under the policy, then under the reference; null is 0."""
    rows = case["grad_sum_wrt_inputs"]
    B = len(case["losses"])
    return np.array([np.zeros(B) if row is None else row for row in rows])


@PRECISIONS
def test_recorded_pair_losses(oracles, dtype, tolerance):
    seen = []
    for case in oracles["sequence_level"]:
        loss = loss_of(case)
        if loss is None:
            continue
        seen.append(case["name"])
        within = tolerance_of(case, tolerance)
        with jax.enable_x64(dtype == jnp.float64):
            policy, reference = (jnp.asarray(x, dtype) for x in recorded_inputs(oracles, case))

            def values(policy, reference, loss=loss):
                # Length 1: where the record speaks of means per token they stand as they are.
                length_BK = np.ones(policy.shape, np.int32)
                return loss(Scored(policy, ref_logp_BK=reference, length_BK=length_BK))

            value = values(policy, reference)
            slopes = jax.grad(lambda p, r, f=values: jnp.sum(f(p, r)), argnums=(0, 1))(
                policy, reference
            )
        close(value, case["losses"], within, case["name"])
        expected = recorded_gradients(case)
        actual = np.concatenate([np.asarray(slope).T for slope in slopes])[: len(expected)]
        close(actual, expected, within, case["name"])
    # 15 of the DPO authors, 20 of Liger, 14 of TRL's CPO; the rest is KTO and ORPO.
    others = {case["name"] for case in oracles["sequence_level"]} - set(seen)
    assert len(seen) == 49
    assert others == {"kto_kl0.0", "kto_kl2.5", "orpo_odds_ratio_b0.1"}


@PRECISIONS
def test_recorded_orpo(oracles, dtype, tolerance):
    """TRL adds what it returns with a minus; it was recorded in float32."""
    (case,) = [each for each in oracles["sequence_level"] if each["name"].startswith("orpo")]
    sides = ("avg_policy_chosen_logps", "avg_policy_rejected_logps")
    mean_BK = np.stack([case[side] for side in sides], axis=1)
    with jax.enable_x64(dtype == jnp.float64):
        scored = Scored(jnp.asarray(mean_BK, dtype), length_BK=np.ones(mean_BK.shape, np.int32))
        value = losses.orpo(scored, lam=case["params"]["beta"])
        log_odds = -jnp.log(jnp.expm1(losses.orpo(scored, lam=1.0)))
    close(value, -np.array(case["losses"]), max(tolerance, 1e-6))
    close(np.mean(np.asarray(log_odds)), case["mean_log_odds"], max(tolerance, 1e-6))


@PRECISIONS
def test_recorded_token_level_losses(oracles, dtype, tolerance):
    record = oracles["halos_token_level"]
    sides = ("chosen", "rejected")
    masks = [np.array(record[f"mask_{side}"]) for side in sides]

    def summed(model):
        rows = [
            np.array(record[f"{model}_{side}"]) * m for side, m in zip(sides, masks, strict=True)
        ]
        return np.stack([row.sum(axis=1) for row in rows], axis=1)

    expected = {case["name"]: case["losses"] for case in record["cases"]}
    with jax.enable_x64(dtype == jnp.float64):
        scored = Scored(
            jnp.asarray(summed("policy"), dtype),
            ref_logp_BK=jnp.asarray(summed("ref"), dtype),
            length_BK=np.stack([mask.sum(axis=1) for mask in masks], axis=1),
        )
        actual = {
            "DPOTrainer": losses.dpo(scored, beta=0.1),
            "CDPOTrainer": losses.dpo(scored, beta=0.1, label_smoothing=0.1),
            "IPOTrainer": losses.ipo(scored, beta=0.1),
            # gamma_beta_ratio 0.5 of a beta of 2.
            "SimPOTrainer": losses.simpo(scored, beta=2.0, gamma=1.0),
        }
    for name, value in actual.items():
        close(value, expected[name], tolerance, name)


def close(actual, expected, tolerance, name=""):
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=tolerance, atol=tolerance, err_msg=name
    )


def at_margin(D):
    """One pair whose log-ratio margin is D."""
    return Scored(jnp.array([[D, 0.0]]), ref_logp_BK=jnp.zeros((1, 2)))


def test_closed_forms_of_pairs(closed_forms):
    tie = at_margin(0.0)
    with jax.enable_x64(True):
        close(losses.dpo(at_margin(0.0), beta=0.7), closed_forms["dpo_loss_at_zero_margin"], 1e-12)
        close(-losses.dpo(at_margin(-200.0), beta=1.0), closed_forms["log_sigmoid_-200"], 1e-12)
    close(losses.hinge(tie, beta=0.7), closed_forms["hinge_at_zero"], 1e-7)
    for beta in (0.05, 0.1, 0.5):
        slope = jax.grad(lambda s, b=beta: jnp.sum(losses.dpo(s, beta=b)))(tie).logp_BK
        value = closed_forms[f"dpo_grad_chosen_logp_at_zero_b{beta}"]
        close(slope, [[value, -value]], 1e-7)
        target = closed_forms[f"ipo_target_tau{beta}"]
        close(losses.ipo(at_margin(target), beta=beta, length_norm=False), 0, 1e-6)
    for h in (-4, -1, 1, 4):
        slope = jax.grad(lambda s: jnp.sum(losses.dpo(s, beta=1.0)))(at_margin(float(h))).logp_BK
        close(-slope[0, 0], closed_forms[f"dpo_grad_weight_at_beta_h_{h}"], 1e-6)
    for e in (0.05, 0.1, 0.3):
        best = at_margin(closed_forms[f"cdpo_optimum_beta_h_eps{e}"])
        slope = jax.grad(lambda s, e=e: jnp.sum(losses.dpo(s, beta=1.0, label_smoothing=e)))(best)
        close(slope.logp_BK, 0, 1e-7)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (partial(losses.bco_pair, beta=0.1), "bco_pair_at_zero"),
        (partial(losses.nca, beta=0.1), "nca_pair_at_zero"),
        (partial(losses.sppo_hard, beta=0.1), "sppo_hard_at_zero_b0.1"),
        (partial(losses.apo_zero, beta=0.1), "apo_zero_at_zero"),
        (partial(losses.apo_down, beta=0.1), "apo_down_at_zero"),
        (partial(losses.exo, beta=0.1), "exo_pair_at_zero_eps1e-3"),
        (partial(losses.discopop, beta=0.1), "discopop_at_zero"),
        (partial(losses.orpo, lam=1.0), "orpo_or_loss_equal_logps"),
        (partial(losses.simpo, beta=2.0, gamma=0.5), "simpo_equal_avg_logps_gamma0.5"),
        (partial(losses.simpo, beta=2.0, gamma=1.6), "simpo_equal_avg_logps_gamma1.6"),
    ],
)
def test_closed_forms_where_policy_and_reference_agree(closed_forms, loss, name):
    with jax.enable_x64(True):
        logp_BK = jnp.full((1, 2), -12.0)
        scored = Scored(logp_BK, ref_logp_BK=logp_BK, length_BK=np.full((1, 2), 8, np.int32))
        close(loss(scored), [closed_forms[name]], 1e-12)


def policy_mean(estimate, p, q):
    """E of an estimate over the policy's tokens."""
    return jnp.sum(jnp.exp(p) * estimate(p, q))


def test_closed_forms_of_links_and_divergences(closed_forms):
    for difference in ("0", "1", "2", "1.09861"):
        chance = np.exp(-losses.bradley_terry(np.array([[float(difference), 0.0]])))
        close(chance, closed_forms[f"bt_prob_diff_{difference}"], 1e-6)
    with jax.enable_x64(True):
        p, q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.4, 0.4, 0.2]))
        close(losses.kl_exact(p, q), closed_forms["kl_categorical_p_q"], 1e-12)
        close(losses.kl_exact(q, p), closed_forms["reverse_kl_q_p"], 1e-12)
        mean = partial(policy_mean, p=p, q=q)
        close(mean(losses.kl_k1), closed_forms["kl_categorical_p_q"], 1e-12)
        close(mean(losses.kl_k2), closed_forms["k2_expectation"], 1e-12)
        close(mean(losses.kl_k3), closed_forms["k3_expectation"], 1e-12)


def test_recorded_dpo_of_tunix(vectors):
    entry = vectors["tunix_dpo_loss"]
    inputs = entry["inputs"]
    policy = np.sum(inputs["per_token_logps"], axis=1).reshape(2, 4).T
    reference = np.array(inputs["ref_seq_logps"]).reshape(2, 4).T
    scored = Scored(policy, ref_logp_BK=reference)
    for smoothing, expected in zip(inputs["label_smoothing"], entry["expected"], strict=True):
        value = losses.dpo(scored, beta=inputs["beta"], label_smoothing=smoothing)
        np.testing.assert_allclose(value.mean(), expected, **entry["tol"])


def test_recorded_orpo_of_tunix(vectors):
    entry = vectors["tunix_orpo_average_log_prob"]
    mask = np.array(entry["inputs"]["completion_mask"])
    logp = np.sum(mask * np.array(entry["inputs"]["per_token_logps"]), axis=1)
    scored = Scored(logp.reshape(2, 4).T, length_BK=mask.sum(axis=1).reshape(2, 4).T)
    likelihood = np.mean(losses.nll(scored, per="sequence"))
    odds = np.mean(losses.orpo(scored, lam=1.0))
    # Recorded to 6, 4 and 6 decimals; the entry's own tolerance of 1e-4 is looser.
    close(likelihood, entry["expected"]["sft_loss"], 1e-6)
    close(odds, entry["expected"]["or_loss"], 3e-5)
    total = likelihood + entry["inputs"]["lambda_orpo"] * odds
    close(total, entry["expected"]["loss"], 1e-6)


@pytest.mark.parametrize(
    ("name", "estimate"),
    [
        ("tunix_k1_kl", losses.kl_k1),
        ("tunix_k2_mse_kl", losses.kl_k2),
        ("tunix_k3_low_var_kl", losses.kl_k3),
    ],
)
def test_recorded_kl_of_tunix(vectors, name, estimate):
    entry = vectors[name]
    inputs = entry["inputs"]
    value = estimate(np.array(inputs["per_token_logps"]), np.array(inputs["ref_per_token_logps"]))
    # Recorded to 7 decimals; the entry's own rtol of 1e-2 is looser than the record.
    np.testing.assert_allclose(value, entry["expected"], rtol=0, atol=2e-7)


def test_recorded_aggregations(vectors):
    packed = measure.sequence_mean(np.ones((1, 4)), np.array([[0, 0, 0, 1]]))
    loss = -f32([[1.5, 1.5, 1.5, 3.0]])
    close(np.sum(packed * loss), vectors["tunix_packed_equals_unpacked"]["expected"], 1e-6)

    entry = vectors["openrlhf_token_mean_global"]
    loss = f32(entry["inputs"]["mb0"] + entry["inputs"]["mb1"])
    mask = f32(entry["inputs"]["mask0"] + entry["inputs"]["mask1"])
    mean = np.sum(measure.token_mean(mask) * loss)
    close(mean, entry["expected"]["global_token_mean"], 1e-6)

    entry = vectors["openrlhf_fully_masked_sequence"]
    weight = measure.sequence_mean(f32(entry["inputs"]["mask"]))
    mean = np.sum(weight * f32(entry["inputs"]["loss"]))
    close(mean, entry["expected"]["seq_mean"], 1e-6)

    entry = vectors["tunix_masked_mean"]
    x, mask = (f32(entry["inputs"][name]) for name in ("x", "mask"))
    close(np.sum(measure.token_mean(mask) * x), entry["expected"]["no_axis"], 1e-6)
