"""Preferences among a policy's own samples: the same labels however rows are cut, the value and
gradient of the same pairs as data, and where it comes to rest."""

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
from dpo_jax.algorithms import reference
from dpo_jax.algorithms.online import online_dpo, online_preference
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.packing import pack
from dpo_jax.parallel import make_mesh, shardings
from dpo_jax.structs import BadInput, Group
from dpo_jax.train import make_update
from dpo_jax.worlds import annotators, enumerable

BETA = 0.3
DPO = partial(losses.dpo, beta=BETA)
COMMON: dict[str, Any] = {"rewards": (online.truth,), "max_tokens": online.STEPS}
KEY = jax.random.key(3)
ALL_PAIRS = partial(online_preference, **COMMON, loss=DPO, annotator=annotators.bradley_terry, n=4)
RANKINGS = partial(
    online_preference, **COMMON, loss=partial(losses.plackett_luce_dpo, beta=BETA), n=4
)
JUDGED = partial(
    online_preference, **COMMON, loss=partial(losses.bco, beta=BETA), annotator=annotators.thumbs
)


def collected(made: Any, *, key=KEY, prompts=None, **layout):
    bound = online.bound(made(online.MODEL), **layout)
    state = started(bound)
    prompts = online.asked() if prompts is None else prompts
    batch, memory = bound.collect(state, online.FROZEN, prompts, key)
    return bound, replace(state, memory=memory), jax.device_get(batch)


def started(algorithm: Any) -> Any:
    """After a step that has moved the policy away from its reference, a moving one too."""
    state = online.started(algorithm, online.away())
    moving = {name: online.REFERENCE for name in state.memory if name == "reference"}
    return replace(state, step=jnp.int32(1), memory={**state.memory, **moving})


def groups(batch) -> list[Group]:
    """What stands in the rows, as data, sorted."""
    found = []
    for row, slot in np.argwhere(batch.record_RG >= 0):
        responses = []
        for k in range((batch.end_RGK[row, slot] >= 0).sum()):
            here = batch.slot_RN[row] == slot * batch.end_RGK.shape[2] + k
            responses.append(batch.target_RN[row][here])
        source = batch.source_RN[row][here][0]  # the prompt's last token, as of all of them
        start = source - batch.positions_RT[row, source]
        label, soft_label = (
            None if column is None else float(column[row, slot])
            for column in (batch.label_RG, batch.soft_label_RG)
        )
        group = Group(batch.tokens_RT[row, start : source + 1], responses)
        scores = batch.score_RGKC[row, slot, : len(responses)]
        weight = float(batch.weight_RG[row, slot])
        said_of_it = {"scores": scores, "weight": weight, "label": label, "soft_label": soft_label}
        found.append(replace(group, **said_of_it))
    return sorted(found, key=said)


def said(group: Group) -> tuple:
    """The group as something that can be compared."""
    ids = tuple(tuple(ids.tolist()) for ids in (group.prompt, *group.responses))
    scores = [] if group.scores is None else np.round(group.scores, 4).tolist()
    return ids, tuple(map(tuple, scores)), group.label, group.soft_label, group.weight


@pytest.mark.parametrize("made", [ALL_PAIRS, RANKINGS, JUDGED], ids=["pairs", "lists", "alone"])
def test_rows_and_mesh_change_no_sample_and_no_label(made):
    whole = list(map(said, groups(collected(made)[2])))
    assert len(whole) > 4
    assert all(len(set(responses)) == len(responses) for (_, *responses), *_ in whole)
    mesh = make_mesh(data=4, fsdp=2)
    layouts: tuple[dict[str, Any], ...] = (
        {"row_tokens": 16},
        {"row_tokens": 32, "rows": 8, "mesh": mesh},
    )
    for layout in layouts:
        assert list(map(said, groups(collected(made, **layout)[2]))) == whole
    assert list(map(said, groups(collected(made, key=jax.random.key(4))[2]))) != whole


def test_the_labels_of_a_record_do_not_hang_on_the_others_of_the_step():
    """Those of a step with each prompt once are among those of a step with each four times."""
    every = list(map(said, groups(collected(ALL_PAIRS)[2])))
    once = list(map(said, groups(collected(ALL_PAIRS, prompts=online.asked(2))[2])))
    assert once and all(one in every for one in once)


MOVING = partial(reference.soft_update, alpha=0.5, every=1)
LOSSES = {
    "dpo": ALL_PAIRS,
    "simpo": partial(ALL_PAIRS, loss=partial(losses.simpo, beta=2.0, gamma=0.5)),
    "tdpo": partial(ALL_PAIRS, loss=partial(losses.tdpo, beta=BETA)),
    "soft_dpo": partial(
        ALL_PAIRS,
        loss=partial(losses.soft_dpo, beta=BETA),
        annotator=partial(annotators.ties, threshold=0.5),
    ),
    "moving": partial(ALL_PAIRS, reference=MOVING),
    "lists": RANKINGS,
    "alone": JUDGED,
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_same_groups_as_data(name):
    """Collected online in one layout, packed anew and completed by `preference` in another."""
    made = LOSSES[name]
    bound, state, batch = collected(made, row_tokens=32)
    named = {key: made.keywords[key] for key in ("loss", "reference") if key in made.keywords}
    offline = preference(online.MODEL, **named)
    rows = pack(groups(batch), row_tokens=50)
    assert rows.tokens_RT.shape != batch.tokens_RT.shape
    rows, memory = jax.jit(offline.collect)(started(offline), online.FROZEN, rows, KEY)
    same(state.memory, memory)

    def value(algorithm, batch):
        objective = jax.jit(jax.value_and_grad(algorithm.objective, has_aux=True))
        return objective(state.params, online.FROZEN, memory, algorithm.measure(batch), KEY)

    (found, metrics), gradient = value(bound, batch)
    (expected, known), wanted = value(offline, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert relative_error(gradient, wanted) < 1e-5
    flat = [np.concatenate(list(map(np.ravel, jax.tree.leaves(x)))) for x in (gradient, wanted)]
    assert np.abs(flat[0] - flat[1]).max() < 1e-6 and np.abs(flat[1]).max() > 1e-3
    assert {x for x in known if not x.startswith("criteria/")} <= metrics.keys()
    for metric in known:
        np.testing.assert_allclose(metrics[metric], known[metric], rtol=1e-4, atol=1e-5)


def same(tree, other) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), tree, other)


def test_one_update_whatever_the_mesh_rows_and_microbatches():
    def moved(mesh, microbatches, row_tokens):
        rows = 8 * microbatches
        bound, state, batch = collected(ALL_PAIRS, mesh=mesh, rows=rows, row_tokens=row_tokens)
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
    assert relative_error(params, online.away()) > 1e-4
    for mesh, parts, T in [(one, 2, 16), (make_mesh(data=4, fsdp=2), 1, 16)]:
        others, values = moved(mesh, parts, T)
        assert relative_error(others, params) < 2e-5
        for name, value in metrics.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_best_stands_before_the_worst_and_equal_ones_make_no_pair():
    """Without an annotator. Of two prompts one is worth the same whatever is said."""

    def half(records, responses):
        return online.truth(records, responses) * [record["prompt"] == "a" for record in records]

    made = partial(online_dpo, **COMMON | {"rewards": (half,)}, n=3)
    _, _, batch = collected(made, prompts=online.asked(16))
    found = groups(batch)
    assert len({group.prompt.tobytes() for group in found}) == 1
    scores = [np.asarray(group.scores) for group in found]
    assert all(score_KC[0, 0] > score_KC[1, 0] for score_KC in scores)
    assert batch.shared["frac_unlabelled"] == 1 - len(found) / 16 >= 0.5
    bound, state, batch = collected(partial(made, rewards=(nothing,)))
    assert batch.shared["frac_unlabelled"] == 1 and (batch.record_RG >= 0).sum() == 1
    objective = jax.jit(jax.grad(bound.objective, has_aux=True))
    gradient, metrics = objective(
        state.params, online.FROZEN, state.memory, bound.measure(batch), KEY
    )
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient)) and metrics["loss"] == 0


def nothing(records, responses):
    return np.zeros(len(responses))


def length(records, responses):
    return np.array([float(len(text)) for text in responses])


def test_criteria_are_the_sum_and_the_rewards_behind_the_first():
    """length_bias sees the second reward, which counts nothing in the sum."""
    seen = []

    def annotator(scores_KC, rng):
        seen.append(scores_KC)
        return annotators.best_and_worst(scores_KC, rng)

    made = partial(
        online_dpo,
        **COMMON | {"rewards": (online.truth, length)},
        reward_weights=(2.0, 0.0),
        annotator=annotator,
        missing_eos_penalty=5.0,
        n=3,
    )
    _, _, batch = collected(made)
    assert len(seen) == 1 + 8 and seen[-1].shape == (3, 2)
    scores = np.stack(seen[1:])
    mean = 2 * batch.shared["rewards/truth/mean"] - 5 * batch.shared["completions/clipped_ratio"]
    np.testing.assert_allclose(scores[..., 0].mean(), mean, rtol=1e-5)
    np.testing.assert_allclose(
        scores[..., 1].mean(), batch.shared["rewards/length/mean"], rtol=1e-5
    )
    np.testing.assert_allclose(batch.shared["objective/scores"], mean, rtol=1e-5)


def test_metrics_of_the_rollout():
    """The first loss is ln 2 at the reference, where there is no KL; away from it there is."""
    bound, state, batch = collected(online_dpo_here())
    kl = batch.shared["objective/kl"]
    assert kl > 0.01
    gap = batch.shared["objective/scores"] - batch.shared["objective/rlhf_reward"]
    np.testing.assert_allclose(gap, BETA * kl, rtol=1e-4)
    bound = online.bound(online_dpo_here()(online.MODEL))
    state = online.started(bound)
    batch, _ = bound.collect(state, online.FROZEN, online.asked(), KEY)
    assert abs(batch.shared["objective/kl"]) < 1e-6
    value, _ = jax.jit(bound.objective)(
        state.params, online.FROZEN, state.memory, bound.measure(batch), KEY
    )
    assert abs(value - np.log(2)) < 1e-6


def online_dpo_here():
    return partial(online_dpo, **COMMON, loss=DPO)


def test_the_rlhf_optimum_is_approached():
    """Bradley-Terry labels of fresh pairs: DPO's gradient is zero in the mean where beta times the
    difference of log-ratios is that of the rewards, at pi_ref exp(r / beta) / Z, whatever policy
    the pairs are drawn from, if only it draws all of them: that is the optimum of
    J = E[r] - beta KL. In a hundred steps of 128 responses: (J* - J) / (J* - J(reference))."""
    steps, world = 100, online.WORLD
    bound = online.bound(ALL_PAIRS(online.MODEL), step_groups=32)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.01, steps))
    )
    state = online.started(bound)
    state = replace(state, opt_state=tx.init(state.params))
    update, measure = jax.jit(make_update(bound, tx)), jax.jit(bound.measure)
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        batch, _ = bound.collect(state, online.FROZEN, online.asked(32, step=step), key)
        state, _ = update(state, online.FROZEN, measure(replace(batch, shared={})), key)

    def value(logp_BK):
        return float(enumerable.objective(logp_BK, world.ref_logp_BK, world.reward_BK, BETA).mean())

    best, first = value(world.optimal_policy(BETA)), value(world.ref_logp_BK)
    gap = (best - value(np.asarray(online.logps(state.params)))) / (best - first)
    assert 0 <= gap < 0.12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 1}, "algorithm.n=1: annotator best_and_worst says nothing"),
        ({"annotator": annotators.plackett_luce, "n": 3}, "dpo reads 2 .* plackett_luce has 3"),
        ({"annotator": annotators.thumbs}, "dpo reads 2 .* thumbs has 1"),
        ({"loss": partial(losses.kto, beta=1.0)}, "kto compares a response with one to another"),
        ({"loss": partial(losses.soft_dpo, beta=1.0)}, "reads soft_label, annotator best_and"),
        (
            {"loss": partial(losses.modpo, beta=1.0, weight=0.5)},
            "modpo reads margin, which labels do not have",
        ),
        (
            {"annotator": partial(annotators.ties, threshold=1.0)},
            "ties gives a soft_label, which loss dpo does not read",
        ),
        ({"temperature": 0.0}, "algorithm.temperature=0.0"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, said):
    with pytest.raises(BadInput, match=said):
        online_dpo(online.MODEL, **COMMON | changes)


def test_rows_that_cannot_hold_a_label_are_refused():
    """Prompts of 2 tokens, two responses of 3 share a row, or four."""
    assert len(online_dpo(online.MODEL, **COMMON).prepare(online.groups(), 8)) == 2
    with pytest.raises(BadInput, match=r"2 responses of .* take 8: data.row_tokens=8 would do"):
        online_dpo(online.MODEL, **COMMON, n=5).prepare(online.groups(), 7)
    with pytest.raises(BadInput, match=r"4 responses of .* take 14"):
        RANKINGS(online.MODEL).prepare(online.groups(), 13)
