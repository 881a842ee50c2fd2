"""Rollouts: the same samples, log-probs and updates however rows, mesh and parts are cut."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import online
import optax
import pytest
from tiny import relative_error

from dpo_jax import losses
from dpo_jax.algorithms.policy import grpo, rloo
from dpo_jax.algorithms.ppo import VALUE, ppo
from dpo_jax.algorithms.rollout import pieces
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import naive_token_logps, per_response
from dpo_jax.losses.advantage import whitened
from dpo_jax.parallel import make_mesh, shardings
from dpo_jax.structs import BadInput
from dpo_jax.train import make_update, split

COMMON: dict[str, Any] = {"rewards": (online.truth,), "max_tokens": online.STEPS}
GRPO = grpo(online.MODEL, **COMMON, n=5)
PPO = ppo(online.MODEL, **COMMON, n=2, passes=1, kl=losses.kl_exact, beta=0.2)
KEY = jax.random.key(3)


def collected(algorithm: Any, *, prompts=None, params=None, key=KEY, **layout):
    bound = online.bound(algorithm, **layout)
    state = online.started(bound, online.away() if params is None else params)
    prompts = online.asked() if prompts is None else prompts
    batch, memory = bound.collect(state, online.FROZEN, prompts, key)
    return bound, replace(state, memory=memory), batch


def responses(batch) -> list[tuple]:
    """(prompt and response, advantage, log-prob) of every response, sorted."""
    batch = jax.device_get(batch)
    found = []
    columns = [per_response(x, batch) for x in (batch.advantage_RN, batch.old_logp_RN)]
    for row, slot, k in np.argwhere(batch.end_RGK >= 0):
        here = batch.slot_RN[row] == slot * batch.end_RGK.shape[2] + k
        first = batch.source_RN[row][here][0]
        start = first - batch.positions_RT[row, first]
        ids = (*batch.tokens_RT[row, start : first + 1], -1, *batch.target_RN[row][here])
        found.append((ids, *(round(float(x[row, slot, k]), 4) for x in columns)))
    return sorted(found)


@pytest.mark.parametrize(
    ("lengths", "room", "parts"),
    [
        ([3, 3, 3], 9, [[0, 1, 2]]),
        ([3, 3, 3], 8, [[0, 1], [2]]),
        ([3, 3, 3], 3, [[0], [1], [2]]),
        ([1, 8, 1], 8, [[0], [1], [2]]),
    ],
)
def test_a_group_is_parted_where_its_row_is_full(lengths, room, parts):
    assert pieces(lengths, room) == parts


@pytest.mark.parametrize("layout", [{"row_tokens": 5}, {"row_tokens": 8, "rows": 4}])
def test_rows_change_no_sample_and_no_advantage(layout):
    """Groups that are split say their prompt again and keep the advantages of the whole."""
    whole = responses(collected(GRPO)[2])
    assert len(whole) == 8 * 5
    assert responses(collected(GRPO, **layout)[2]) == whole
    other = responses(collected(GRPO, key=jax.random.key(4))[2])
    assert [ids for ids, *_ in other] != [ids for ids, *_ in whole]


def test_a_prompt_that_stands_twice_in_a_step_is_answered_anew():
    """The samples go on counting: those of two steps of half the size are among them."""
    drawn = [ids for ids, *_ in responses(collected(GRPO)[2])]
    first = [ids for ids, *_ in responses(collected(GRPO, prompts=online.asked(2))[2])]
    assert all(ids in drawn for ids in first)
    repeats = [drawn.count(ids) for ids in set(drawn)]
    assert any(count % 4 for count in repeats)  # four equal groups would say all four times


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_fresh_forward_at_the_temperature(temperature):
    params = online.away()
    algorithm = rloo(online.MODEL, **COMMON, temperature=temperature)
    _, _, batch = collected(algorithm, params=params, row_tokens=9)
    found = responses(batch)
    tempered = online.MODEL._replace(
        unembed=lambda params, hidden: online.MODEL.unembed(params, hidden) / temperature
    )
    for ids, _, logp in found:
        mark = ids.index(-1)
        alone = pack([(ids[:mark], [ids[mark + 1 :]])], row_tokens=8)
        fresh = naive_token_logps(tempered, params, alone)
        assert abs(float(jnp.sum(fresh)) - logp) < 1e-4
    assert batch.shared["sampling/sampling_logp_difference/max"] < 1e-4
    ratio = np.asarray(batch.old_logp_RN)
    assert np.all(ratio[np.asarray(batch.slot_RN) < 0] == 0)


@pytest.mark.parametrize("algorithm", [GRPO, PPO], ids=["grpo", "ppo"])
def test_one_update_whatever_the_mesh_rows_and_microbatches(algorithm):
    def moved(mesh, microbatches, row_tokens):
        rows = 8 * microbatches
        bound, state, batch = collected(algorithm, mesh=mesh, rows=rows, row_tokens=row_tokens)
        tx = optax.sgd(1.0)
        state = replace(state, opt_state=tx.init(state.params))
        update = jax.jit(make_update(bound, tx, microbatches=microbatches))
        with jax.set_mesh(mesh):
            state = jax.device_put(state, shardings(mesh, state))
            frozen = jax.device_put(online.FROZEN, shardings(mesh, online.FROZEN))
            state, metrics = update(state, frozen, bound.measure(batch), KEY)
        return state.params, metrics

    one = make_mesh(devices=jax.devices()[:1])
    params, metrics = moved(one, 1, 64)
    assert relative_error(params, collected(algorithm)[1].params) > 1e-4
    for mesh, parts, T in [(one, 1, 7), (one, 2, 16), (make_mesh(data=4, fsdp=2), 1, 16)]:
        others, values = moved(mesh, parts, T)
        assert relative_error(others, params) < 2e-5
        for name, value in metrics.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_advantages_of_ppo_by_hand():
    """gae over each response: minus beta KL at every token, the score added to the last one."""
    beta, gamma, lam = 0.2, 0.9, 0.8
    algorithm = ppo(
        online.MODEL,
        **COMMON,
        n=2,
        kl=losses.kl_k1,
        beta=beta,
        gamma=gamma,
        lam=lam,
        whiten_advantages=False,
        missing_eos_penalty=5.0,
    )
    bound = online.bound(algorithm, row_tokens=9)
    state = online.started(bound, online.away())
    head = jax.random.normal(jax.random.key(0), state.params[VALUE].shape)
    state = replace(state, params={**state.params, VALUE: head})
    batch, _ = bound.collect(state, online.FROZEN, online.asked(), KEY)
    batch = jax.device_get(batch)
    slots = batch.end_RGK.shape[2]
    scores = []
    for row, slot, k in np.argwhere(batch.end_RGK >= 0):
        here = batch.slot_RN[row] == slot * slots + k
        ids = batch.target_RN[row][here]
        word = online.WORDS[batch.tokens_RT[row, batch.source_RN[row][here][0]]]
        text = " ".join(online.WORDS[i] for i in ids if i)
        score = online.truth([{"prompt": word}], [text])[0] - 5.0 * (ids[-1] != 0)
        scores.append(score)
        value = batch.value_RN[row][here]
        reward = -beta * (batch.old_logp_RN - batch.ref_logp_RN)[row][here]
        reward[-1] += score
        advantage, after = 0.0, 0.0
        for t in reversed(range(len(ids))):
            advantage = reward[t] + gamma * after - value[t] + gamma * lam * advantage
            after = value[t]
            np.testing.assert_allclose(batch.advantage_RN[row][here][t], advantage, atol=1e-4)
            np.testing.assert_allclose(batch.return_RN[row][here][t], advantage + after, atol=1e-4)
    assert np.ptp(batch.value_RN) > 0.1
    np.testing.assert_allclose(batch.shared["objective/scores"], np.mean(scores), rtol=1e-4)


def test_a_second_body_starts_as_the_policy_and_moves_apart():
    shared = collected(PPO)
    own = collected(ppo(online.MODEL, **COMMON, n=2, passes=1, critic="separate", beta=0.2))
    for bound, state, batch in (shared, own):
        gradient = jax.jit(jax.grad(bound.objective, has_aux=True))
        part = replace(bound.measure(batch), advantage_RN=np.zeros_like(batch.advantage_RN))
        grads, _ = gradient(state.params, online.FROZEN, state.memory, part, KEY)
        head = grads["critic"] if "critic" in grads else grads
        assert np.any(head[VALUE] != 0)
        # a value of 0 sends nothing below the head yet
        np.testing.assert_array_equal(grads["embed_VD"], 0)
    assert own[1].params["critic"].keys() == {*online.REFERENCE, VALUE}


def test_the_coefficient_follows_the_kl():
    target = 0.05
    algorithm = partial(rloo, online.MODEL, **COMMON, kl_target=target, kl_horizon=100, beta=0.1)
    _, state, batch = collected(algorithm())
    assert batch.shared["objective/kl"] > 2 * target
    np.testing.assert_allclose(state.memory["kl_coefficient"], 0.1 * (1 + 0.2 * 32 / 100), 1e-6)
    _, state, batch = collected(algorithm(), params=online.REFERENCE)
    assert abs(batch.shared["objective/kl"]) < 1e-5
    np.testing.assert_allclose(state.memory["kl_coefficient"], 0.1 * (1 - 0.2 * 32 / 100), 1e-6)


def test_whitened_values_have_mean_0_and_deviation_1():
    x, mask = np.array([[1.0, 2, 9], [4, 7, 9]], np.float32), np.array([[1, 1, 0], [1, 1, 0]])
    kept = np.array([1, 2, 4, 7])
    expected = (kept - kept.mean()) / kept.std(ddof=1)
    np.testing.assert_allclose(whitened(x, mask)[:, :2].ravel(), expected, rtol=1e-5)
    np.testing.assert_array_equal(whitened(x, mask)[:, 2], 0)
    still = whitened(x, mask, shift=False)[:, :2].ravel()
    np.testing.assert_allclose(still, expected + kept.mean(), rtol=1e-5)


def test_minibatches_share_the_responses_evenly():
    _, _, batch = collected(GRPO, rows=8)
    parts = split(batch, 2)
    counts = (np.asarray(parts.end_RGK) >= 0).sum(axis=(1, 2, 3))
    assert counts.sum() == 40 and abs(counts[0] - counts[1]) <= 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.0}, "algorithm.temperature=0.0"),
        ({"n": 1}, "algorithm.n=1: group_normalized compares"),
        ({"rewards": ()}, "algorithm.rewards="),
        ({"reward_weights": (1.0, 2.0)}, "one for each of truth"),
        ({"kl_in": "head"}, "algorithm.kl_in='head'"),
        ({"kl_target": 1.0, "beta": 0.0}, "algorithm.kl_target=1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, said):
    with pytest.raises(BadInput, match=said):
        grpo(online.MODEL, **COMMON | changes)


def test_rewards_that_are_no_numbers_are_refused():
    def broken(records, texts):
        return np.full(len(texts), np.nan)

    with pytest.raises(BadInput, match="broken gave"):
        collected(grpo(online.MODEL, rewards=(broken,), max_tokens=online.STEPS))
    with pytest.raises(BadInput, match=r"data.row_tokens=5 would do"):
        GRPO.prepare(online.groups(), 4)
