"""Losses against values and gradients recorded by running other implementations in float64."""

import json
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


@pytest.fixture(scope="module")
def oracles(shared):
    return json.loads((shared / "golden" / "loss_oracles.json").read_text())


@pytest.fixture(scope="module")
def closed_forms(shared):
    entries = json.loads((shared / "golden" / "closed_forms.json").read_text())
    return {entry["name"]: entry["value"] for entry in entries}


@pytest.fixture(scope="module")
def vectors(shared):
    entries = json.loads((shared / "golden" / "peer_vectors.json").read_text())["vectors"]
    return {entry["name"]: entry for entry in entries}


def loss_of(case):
    """The loss that a recorded case ran, with its keywords; None where it is another loss."""
    name, params = case["name"], case["params"]
    beta = params.get("beta")
    if name.startswith(("dpo_sigmoid", "HFDPOLoss")):
        return partial(losses.dpo, beta=beta, label_smoothing=params.get("label_smoothing", 0.0))
    if name.startswith("dpo_reference_free"):
        return partial(losses.dpo, beta=beta, reference_free=True)
    if name.startswith("cpo_sigmoid"):
        smoothing = params["label_smoothing"]
        return partial(losses.dpo, beta=beta, label_smoothing=smoothing, reference_free=True)
    if name.startswith(("ipo_sum", "cpo_ipo")):
        return partial(losses.ipo, beta=beta, length_norm=False)
    if name.startswith(("HFHinge", "cpo_hinge")):
        return partial(losses.hinge, beta=beta)
    return None


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
    seen = 0
    for case in oracles["sequence_level"]:
        loss = loss_of(case)
        if loss is None:
            continue
        with jax.enable_x64(dtype == jnp.float64):
            policy, reference = (jnp.asarray(x, dtype) for x in recorded_inputs(oracles, case))

            def values(policy, reference, loss=loss):
                return loss(Scored(policy, ref_logp_BK=reference))

            value = values(policy, reference)
            slopes = jax.grad(lambda p, r, f=values: jnp.sum(f(p, r)), argnums=(0, 1))(
                policy, reference
            )
        close(value, case["losses"], tolerance, case["name"])
        expected = recorded_gradients(case)
        actual = np.concatenate([np.asarray(slope).T for slope in slopes])[: len(expected)]
        close(actual, expected, tolerance, case["name"])
        seen += 1
    assert seen == 27  # 15 of the DPO authors, 4 of Liger, 8 of TRL's CPO


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
