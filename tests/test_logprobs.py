"""Log-probabilities: chunked against naive, packed against alone, in value and gradient."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, MODEL, equations, groups, relative_error

from dpo_jax import head, losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import (
    naive_token_logps,
    per_response,
    response_lengths,
    response_logps,
    token_kls,
    token_logps,
)
from dpo_jax.structs import Batch, Group, Model, Scored, TrainState

PARAMS = MODEL.init(jax.random.key(0))
OTHER = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), PARAMS)
STATE = TrainState(jnp.int32(0), PARAMS, None, {}, jnp.int32(0))
LOGPS = jax.jit(partial(response_logps, MODEL))


def small_chunks(monkeypatch, batch, tokens: int):
    """Let the head hold `tokens` columns of scored tokens at a time."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", tokens * batch.tokens_RT.shape[0] * CONFIG.V)


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_chunked_head_equals_naive_in_value_and_gradient(monkeypatch, chunk):
    batch = pack(groups(7, seed=1), row_tokens=32)
    small_chunks(monkeypatch, batch, chunk)
    weight_RN = jax.random.normal(jax.random.key(2), batch.target_RN.shape)

    def total(f, params):
        return jnp.sum(weight_RN * f(MODEL, params, batch))

    np.testing.assert_allclose(
        token_logps(MODEL, PARAMS, batch), naive_token_logps(MODEL, PARAMS, batch), atol=2e-6
    )
    chunked = jax.jit(jax.grad(partial(total, token_logps)))(PARAMS)
    naive = jax.jit(jax.grad(partial(total, naive_token_logps)))(PARAMS)
    assert relative_error(chunked, naive) < 1e-5


def test_the_head_never_holds_all_logits(monkeypatch):
    batch = pack(groups(40, seed=2), row_tokens=128, rows=4)
    R, N = batch.target_RN.shape
    small_chunks(monkeypatch, batch, 4)

    def total(params):
        return jnp.sum(token_logps(MODEL, params, batch))

    shapes = {
        aval.shape
        for equation in equations(jax.make_jaxpr(jax.grad(total))(PARAMS).jaxpr)
        for aval in (variable.aval for variable in equation.outvars)
    }
    largest = max(int(np.prod(shape)) for shape in shapes if shape and shape[-1] == CONFIG.V)
    assert largest <= 4 * R * CONFIG.V < R * N * CONFIG.V


@pytest.mark.parametrize("loss", [partial(losses.dpo, beta=0.1), partial(losses.nll, per="token")])
def test_packed_rows_equal_one_response_a_row(loss):
    """Rows that share prompts against the slow layout: each response alone behind its prompt."""
    items = groups(6, seed=4)
    packed = pack(items, row_tokens=48)
    alone = [
        Group(g.prompt, [response], weight=g.weight) for g in items for response in g.responses
    ]
    rows = pack(alone, row_tokens=16, rows=len(alone))
    weight_B = np.array([g.weight for g in items], np.float32)
    algorithm = preference(MODEL, loss=loss)
    frozen = {"reference": OTHER}

    def through_packed(params):
        batch, _ = algorithm.collect(STATE, frozen, packed, None)
        return algorithm.objective(params, frozen, {}, algorithm.measure(batch), None)[0]

    def by_hand(params):
        order = np.argsort(rows.record_RG[:, 0])
        values = [
            response_logps(MODEL, p, rows)[order, 0, 0].reshape(-1, 2) for p in (params, OTHER)
        ]
        length_BK = response_lengths(rows)[order, 0, 0].reshape(-1, 2)
        loss_B = loss(Scored(logp_BK=values[0], ref_logp_BK=values[1], length_BK=length_BK))
        per_token = losses.needs(loss).measure == "tokens"
        share_B = weight_B * length_BK[:, 0] if per_token else weight_B
        return jnp.sum(loss_B * share_B) / jnp.sum(share_B)

    one, other = (jax.jit(jax.value_and_grad(f))(PARAMS) for f in (through_packed, by_hand))
    assert relative_error(one, other) < 1e-5

    packed_RGK = LOGPS(PARAMS, packed)
    at = packed.record_RG >= 0
    packed_BK = packed_RGK[at][np.argsort(packed.record_RG[at])]
    alone_B = LOGPS(PARAMS, rows)[np.argsort(rows.record_RG[:, 0]), 0, 0]
    np.testing.assert_allclose(packed_BK.reshape(-1), alone_B, rtol=1e-5)


def test_padding_rows_and_places_change_nothing():
    items = groups(4, seed=6)
    small, large = pack(items, row_tokens=48), pack(items, row_tokens=64, rows=5)
    values = []
    for batch in (small, large):
        logp_RGK = LOGPS(PARAMS, batch)
        at = batch.record_RG >= 0
        values.append(np.asarray(logp_RGK[at][np.argsort(batch.record_RG[at])]))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_temperature_divides_the_logits():
    batch = pack(groups(3), row_tokens=32)
    hidden, _ = MODEL.hidden(PARAMS, batch.tokens_RT, batch.positions_RT, batch.until_RT)
    logp = jax.nn.log_softmax(MODEL.unembed(PARAMS, hidden) / 0.7)
    rows = np.arange(batch.target_RN.shape[0])[:, None]
    expected = np.where(batch.slot_RN >= 0, logp[rows, batch.source_RN, batch.target_RN], 0.0)
    np.testing.assert_allclose(
        token_logps(MODEL, PARAMS, batch, temperature=0.7), expected, atol=2e-6
    )


def test_token_kls_equal_the_sum_over_the_vocabulary(monkeypatch):
    batch = pack(groups(5, seed=7), row_tokens=32)
    small_chunks(monkeypatch, batch, 4)
    logp, ref = (
        jax.nn.log_softmax(
            MODEL.unembed(
                p, MODEL.hidden(p, batch.tokens_RT, batch.positions_RT, batch.until_RT)[0]
            )
        )
        for p in (PARAMS, OTHER)
    )
    kl_RT = jnp.sum(jnp.exp(logp) * (logp - ref), axis=-1)
    expected = np.take_along_axis(np.asarray(kl_RT), np.asarray(batch.source_RN), axis=1)
    expected = np.where(batch.slot_RN >= 0, expected, 0.0)
    np.testing.assert_allclose(token_kls(MODEL, PARAMS, OTHER, batch), expected, atol=2e-6)
    assert (expected >= -1e-6).all() and expected.max() > 0.01
    np.testing.assert_allclose(token_kls(MODEL, PARAMS, PARAMS, batch), 0.0, atol=1e-6)


def test_per_response_sums_by_a_loop():
    batch = pack(groups(5, responses=3, seed=8), row_tokens=64)
    x_RN = np.random.default_rng(0).normal(size=batch.slot_RN.shape).astype(np.float32)
    R, G, K = batch.end_RGK.shape
    expected = np.zeros((R, G, K))
    for r, n in np.ndindex(*batch.slot_RN.shape):
        slot = batch.slot_RN[r, n]
        if slot >= 0:
            expected[r, slot // K, slot % K] += x_RN[r, n]
    np.testing.assert_allclose(per_response(x_RN, batch), expected, atol=1e-6)


def table(logits_RTV):
    """A model that says what a table says, row by row; with its batch of labels to score."""
    return Model(
        init=lambda key: jnp.asarray(logits_RTV, jnp.float32),
        hidden=lambda params, tokens, positions, until, cache=None: (params, cache),
        unembed=lambda params, hidden: hidden,
    )


def one_response_a_row(label_RN, source_N):
    """Every label of a row is scored as one response, -100 is not; its source is a place of it."""
    R, N = label_RN.shape
    used_RN = label_RN >= 0
    some_RT = np.zeros((R, N + 1), np.int32)  # a table reads neither tokens nor places
    return Batch(
        tokens_RT=some_RT,
        positions_RT=some_RT,
        until_RT=some_RT,
        target_RN=np.where(used_RN, label_RN, 0),
        source_RN=np.broadcast_to(source_N, (R, N)),
        slot_RN=np.where(used_RN, 0, -1),
        end_RGK=np.zeros((R, 1, 1), np.int32),
        weight_RN=used_RN.astype(np.float32),
        weight_RG=np.ones((R, 1), np.float32),
        record_RG=np.arange(R)[:, None],
    )


def test_recorded_sums_and_means_of_the_dpo_authors(shared):
    """`_get_batch_logps`: label t is said by place t - 1, and the label -100 does not count."""
    record = json.loads((shared / "golden" / "loss_oracles.json").read_text())["batch_logps"]
    model = table(record["logits"])
    batch = one_response_a_row(np.array(record["labels"])[:, 1:], np.arange(5))
    total_B = response_logps(model, model.init(jax.random.key(0)), batch)[:, 0, 0]
    np.testing.assert_allclose(total_B, record["sum"], rtol=1e-6)
    mean_B = losses.measure.per_token(total_B, response_lengths(batch)[:, 0, 0])
    np.testing.assert_allclose(mean_B, record["mean"], rtol=1e-6)


def test_recorded_log_softmax_of_tunix(shared):
    entries = json.loads((shared / "golden" / "peer_vectors.json").read_text())["vectors"]
    (entry,) = [each for each in entries if each["name"] == "tunix_selective_log_softmax"]
    model = table(entry["inputs"]["logits"])
    batch = one_response_a_row(np.array(entry["inputs"]["ids"]), np.arange(4))
    logp_RN = token_logps(model, model.init(jax.random.key(0)), batch)
    np.testing.assert_allclose(logp_RN, entry["expected"], rtol=1e-6)
