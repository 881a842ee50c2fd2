"""Reward models against the slow obvious way, TRL's recorded run, and worlds whose reward is known.

What a whole run of one leaves behind is in `test_reward_run.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from naive import (
    MODEL,
    Engine,
    Params,
    evaluated,
    gradient,
    groups,
    lists,
    mean,
    packed,
    started,
)
from safetensors.numpy import load_file, save_file
from test_trl_trajectories import CLOSE, SHAPE, Recorded, replay, same_weights

from dpo_jax import losses, parallel
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reward import reward, reward_scores
from dpo_jax.data.packing import pack
from dpo_jax.models import families, hf
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import BadInput, Batch, Group, TrainState
from dpo_jax.train import make_update
from dpo_jax.worlds.enumerable import World, random_world

HEAD = np.random.default_rng(7).standard_normal(8).astype(np.float32)
ls = jax.nn.log_sigmoid


# The slow obvious way: every response in a row of its own, behind its prompt


def spoken(params: Params, prompt: np.ndarray, response: np.ndarray) -> float:
    """The reward of one response by hand, in float64."""
    names = ("embed_VD", "mix_DF", "reward_D")
    embed, mix, head = (np.asarray(params[name], np.float64) for name in names)
    line = [*prompt, *response]
    seen = embed[line]
    return float(np.tanh(seen[-1] + np.cos(len(line) - 1.0) + seen.mean(axis=0) @ mix) @ head)


def alone(params: Params, items: Sequence[Group]) -> jax.Array:
    """score_BK of the groups, 0 where there is no response; differentiable."""
    B, K = len(items), max(len(group.responses) for group in items)
    lines = {
        (b, k): [*group.prompt, *response]
        for b, group in enumerate(items)
        for k, response in enumerate(group.responses)
    }
    T = max(map(len, lines.values()))
    tokens, last, there = np.zeros((B, K, T), np.int32), np.zeros((B, K), int), np.zeros((B, K))
    for at, line in lines.items():
        tokens[at][: len(line)], last[at], there[at] = line, len(line) - 1, 1
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B * K, T))
    hidden, _ = MODEL.hidden(params, tokens.reshape(B * K, T), positions, np.full((B * K, T), T))
    score_X = hidden[np.arange(B * K), last.ravel()] @ params["reward_D"]
    return jnp.where(there > 0, score_X.reshape(B, K), 0.0)


def scores(found_RGK: Any, batch: Batch, items: Sequence[Group]) -> list[np.ndarray]:
    """The scores of each group's responses."""
    found_RGK = np.asarray(found_RGK)
    places = [np.argwhere(np.asarray(batch.record_RG) == b)[0] for b in range(len(items))]
    return [
        found_RGK[r, g, : len(group.responses)] for (r, g), group in zip(places, items, strict=True)
    ]


def with_head(params: Params, head: Any = HEAD) -> Params:
    return {**params, "reward_D": jnp.asarray(head)}


def test_scores_are_those_of_every_response_alone():
    """Lists of 1 to 7 in packed rows against one response a row through the decoder; the head by
    numpy in float64."""
    items, params = lists(7, 1, 2, 3, 5), with_head(tiny.MODEL.init(jax.random.key(3)), 2 * HEAD16)
    batch = pack(items, row_tokens=64, rows=2)
    found_RGK = jax.jit(partial(reward_scores, tiny.MODEL))(params, batch)
    assert found_RGK.dtype == jnp.float32
    np.testing.assert_array_equal(found_RGK[batch.end_RGK < 0], 0)
    T, hidden = batch.tokens_RT.shape[1], jax.jit(tiny.MODEL.hidden)
    place, until = np.arange(T, dtype=np.int32)[None], np.full((1, T), T, np.int32)
    for group, found_K in zip(items, scores(found_RGK, batch, items), strict=True):
        for response, score in zip(group.responses, found_K, strict=True):
            line = [*group.prompt, *response]  # what follows is seen by nobody before it
            tokens = np.array([line + [0] * (T - len(line))], np.int32)
            last_D = hidden(params, tokens, place, until)[0][0, len(line) - 1]
            expected = np.asarray(last_D, np.float64) @ (2 * HEAD16).astype(np.float64)
            assert score == pytest.approx(expected, abs=1e-5)


HEAD16 = np.random.default_rng(8).standard_normal(16).astype(np.float32)


def test_an_end_that_is_padding_too_is_scored():
    """0 ends a response, fills the rows, and stands inside a response; a cut response has none."""
    ends = [np.array(ids) for ids in ([5, 6, 0], [5, 6], [5, 0, 6, 0], [0], [5, 6, 6, 0, 0])]
    group, params = Group(np.array([0, 3]), ends), with_head(MODEL.init(jax.random.key(0)))
    batch = pack([group], row_tokens=24, rows=2)
    found_K = np.asarray(reward_scores(MODEL, params, batch))[0, 0]
    assert np.sum(np.asarray(batch.tokens_RT)[0, 18:] == 0) == 6
    expected = [spoken(params, group.prompt, response) for response in ends]
    np.testing.assert_allclose(found_K, expected, atol=1e-5)
    assert np.min(np.abs(np.subtract.outer(expected, expected))[~np.eye(5, dtype=bool)]) > 1e-3


def test_half_precision_ends_in_float32():
    model = decoder(tiny.CONFIG, dtype="bfloat16")
    params, _ = reward(model).init(jax.random.key(0), model.init(jax.random.key(1)), {})
    assert params["reward_D"].dtype == jnp.float32
    batch = pack(lists(3, 2), row_tokens=32)
    found, exact = (reward_scores(each, params, batch) for each in (model, tiny.MODEL))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.1)  # bfloat16 has 8 bits


def test_a_new_head_makes_rewards_of_about_one_and_an_old_one_stays():
    model, key = decoder(replace(tiny.CONFIG, D=256)), jax.random.key(0)
    before = model.init(key)
    params, memory = reward(model).init(jax.random.key(1), before, {})
    assert memory == {} and set(params) - set(before) == {"reward_D"}
    assert float(jnp.std(params["reward_D"])) * 257**0.5 == pytest.approx(1, abs=0.1)
    again, _ = reward(model).init(jax.random.key(2), params, {})
    assert again["reward_D"] is params["reward_D"]


def test_weights_without_a_head_are_refused():
    with pytest.raises(BadInput, match="these weights have no reward_D: take those of a run"):
        reward_scores(MODEL, MODEL.init(jax.random.key(0)), packed(groups(2)))


# Value, gradient and metrics, whole, in microbatches and on meshes


def plackett_luce(score_BK: jax.Array, items: Sequence[Group]) -> list[jax.Array]:
    """One softmax after the other over those that are left."""
    loss_B = [jnp.zeros(()) for _ in items]
    for b, group in enumerate(items):
        left_K = score_BK[b, : len(group.responses)]
        for k in range(len(group.responses)):
            loss_B[b] += jax.nn.logsumexp(left_K[k:]) - left_K[k]
    return loss_B


def bradley_terry(score_BK: jax.Array, items: Sequence[Group]) -> list[jax.Array]:
    return [-ls(won - lost) for won, lost in score_BK]


def smoothed(score_BK: jax.Array, items: Sequence[Group]) -> list[jax.Array]:
    """With the margins of the data and labels of which a tenth is wrong."""
    pairs = zip(score_BK, (group.margin for group in items), strict=True)
    z_B = [won - lost - margin for (won, lost), margin in pairs]
    return [-0.9 * ls(z) - 0.1 * ls(-z) for z in z_B]


def fitted(score_BK: jax.Array, items: Sequence[Group]) -> list[jax.Array]:
    pairs = [(s_K, np.asarray(g.scores)) for s_K, g in zip(score_BK, items, strict=True)]
    return [jnp.sum((s_K[: len(goal)] - goal[:, 0]) ** 2) for s_K, goal in pairs]


def squares(score_BK, mask_BK, margin, *, power=2.0):
    """A loss of the user's own."""
    lead_B = score_BK[:, 0] - score_BK[:, 1] - margin
    return lead_B**power + jnp.sum(mask_BK, axis=1)


def squared(score_BK: jax.Array, items: Sequence[Group]) -> list[jax.Array]:
    pairs = zip(score_BK, (group.margin for group in items), strict=True)
    return [(won - lost - margin) ** 2 + 2 for (won, lost), margin in pairs]


def with_margins(n: int) -> list[Group]:
    return [replace(g, margin=0.25 * (b % 4)) for b, g in enumerate(groups(n))]


def scored(items: Sequence[Group]) -> list[Group]:
    """With two criteria, of which the first counts."""
    rng = np.random.default_rng(0)
    return [
        replace(g, scores=rng.normal(size=(len(g.responses), 2)), criteria=("total", "other"))
        for g in items
    ]


def weighed(items: Sequence[Group]) -> list[Group]:
    return [replace(g, weight=1.0 + b % 3) for b, g in enumerate(items)]


class Case(NamedTuple):
    """A loss, its groups, and its values by the slow way."""

    loss: Callable[..., Any]
    items: Sequence[Group]
    expected: Callable[[jax.Array, Sequence[Group]], list[jax.Array]]
    centering: float = 0.0


LISTS = weighed(lists(7, 2, 1, 3, 5, 2))
CASES = {
    "bradley_terry": Case(losses.bradley_terry, groups(11), bradley_terry),
    "pairs_with_everything": Case(
        partial(losses.bradley_terry, label_smoothing=0.1), with_margins(11), smoothed, 0.01
    ),
    "margins_are_not_needed": Case(losses.plackett_luce, with_margins(11), bradley_terry),
    "plackett_luce": Case(losses.plackett_luce, LISTS, plackett_luce),
    "centered_lists": Case(losses.plackett_luce, LISTS, plackett_luce, 0.3),
    "regression": Case(losses.regression, scored(LISTS), fitted),
    "own": Case(squares, with_margins(11), squared),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def start(case: Case) -> TrainState:
    return started(reward(MODEL, loss=case.loss, centering=case.centering))


def slow(case: Case, params: Params) -> jax.Array:
    score_BK = alone(params, case.items)
    loss_B = jnp.stack(case.expected(score_BK, case.items))
    loss_B += case.centering * jnp.sum(score_BK, axis=1) ** 2
    weight_B = np.array([group.weight for group in case.items], np.float32)
    return jnp.sum(weight_B * loss_B) / weight_B.sum()


def laid_out(case: Case) -> Batch:
    algorithm = reward(MODEL, loss=case.loss)
    return pack(algorithm.prepare(case.items), row_tokens=48, rows=8, slots=6)


@each_case
@pytest.mark.parametrize("microbatches", [1, 2])
def test_value_and_gradient_are_those_of_the_slow_way(case, microbatches):
    algorithm = reward(MODEL, loss=case.loss, centering=case.centering)
    after, metrics = Engine(algorithm, microbatches=microbatches)(laid_out(case))
    value, slope = jax.jit(jax.value_and_grad(partial(slow, case)))(start(case).params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert float(np.linalg.norm(slope["reward_D"])) > 1e-3
    assert tiny.relative_error(gradient(after), slope) < 1e-5


@pytest.mark.parametrize("name", ["pairs_with_everything", "centered_lists"])
def test_metrics_count_what_they_say(name):
    case, params = CASES[name], start(CASES[name]).params
    items = case.items
    _, found = Engine(reward(MODEL, loss=case.loss), microbatches=2)(laid_out(case))
    reward_of = {
        id(g): [spoken(params, g.prompt, response) for response in g.responses] for g in items
    }

    def averaged(value: Callable[[list[float]], float]) -> float:
        return mean(items, lambda group: value(reward_of[id(group)]))

    expected = {
        "rewards/chosen": averaged(lambda r: r[0]),
        "rewards/rejected": averaged(lambda r: r[-1]),
        "rewards/margins": averaged(lambda r: r[0] - r[-1]),
        "rewards/accuracies": averaged(lambda r: float(r[0] > r[-1])),
        "rewards/ties": averaged(lambda r: float(len(r) == 1)),
        "rewards/mean": averaged(lambda r: float(np.mean(r))),
        "rewards/square": averaged(lambda r: float(np.mean(np.square(r)))),
        "rewards/variance": averaged(lambda r: float(np.var(r))),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 0 < expected["rewards/accuracies"] < 1
    assert set(found) == {"loss", "grad_norm", "skipped", *expected}


def test_criteria_are_counted():
    case = CASES["regression"]
    _, found = Engine(reward(MODEL, loss=case.loss))(laid_out(case))
    gap = {g.record: np.asarray(g.scores)[0] - np.asarray(g.scores)[-1] for g in case.items}
    for c, name in enumerate(("total", "other")):
        expected = mean(case.items, lambda group, c=c: gap[group.record][c])
        assert found[f"criteria/{name}/margins"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_no_mesh_changes_a_step(shape):
    case = CASES["centered_lists"]
    algorithm, batch = reward(MODEL, loss=case.loss, centering=case.centering), laid_out(case)
    alone_after, expected = Engine(algorithm)(batch)
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        state = jax.device_put(start(case), parallel.shardings(mesh, start(case)))
        after, metrics = Engine(algorithm)(parallel.shard_batch(mesh, batch), state)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert tiny.relative_error(gradient(after), gradient(alone_after)) < 1e-5


def test_padding_places_of_a_list_cannot_be_seen():
    """A wider K, more slots, more rows: the same step, for what does not exist has no gradient."""
    algorithm = reward(MODEL, centering=0.3)
    narrow = pack(LISTS, row_tokens=64, rows=4, scored=48)
    wide = pack(LISTS, row_tokens=64, rows=8, scored=64, slots=9, responses=16)
    (first, expected), (second, found) = (Engine(algorithm)(batch) for batch in (narrow, wide))
    assert found == pytest.approx(expected, rel=1e-5)
    assert tiny.relative_error(gradient(second), gradient(first)) < 1e-5


def test_a_pair_is_a_list_of_two():
    batch = packed(groups(11))
    pair, ranked = (
        Engine(reward(MODEL, loss=loss))(batch)
        for loss in (losses.bradley_terry, losses.plackett_luce)
    )
    assert ranked[1] == pytest.approx(pair[1], rel=1e-6)
    assert tiny.relative_error(gradient(ranked[0]), gradient(pair[0])) < 1e-6


def test_numbers_may_be_traced():
    """As in a sweep, where the algorithm is built inside the compiled program."""
    batch = packed(with_margins(11))

    @jax.jit
    def value(smoothing, centering):
        loss = partial(losses.bradley_terry, label_smoothing=smoothing)
        return evaluated(reward(MODEL, loss=loss, centering=centering), batch)[0]

    for smoothing, centering in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.5)):
        loss = partial(losses.bradley_terry, label_smoothing=smoothing)
        expected, _ = evaluated(reward(MODEL, loss=loss, centering=centering), batch)
        assert value(smoothing, centering) == pytest.approx(float(expected), rel=1e-6)


# What is refused


@losses.needs(responses=None)
def any_list(score_BK, mask_BK):
    return jnp.sum(score_BK * mask_BK, axis=1)


@pytest.mark.parametrize(
    ("loss", "items", "said"),
    [
        (losses.bradley_terry, lists(3), "bradley_terry compares 2 .* has 3 .*data.views.pairs"),
        (lambda score_BK: score_BK[:, 0], lists(3), "compares 2 responses, the data has 3"),
        (losses.plackett_luce, lists(1), "plackett_luce compares responses, the data has 1 a"),
        (losses.plackett_luce, [Group(np.ones(1), [])], "reads responses, the data has 0"),
        (losses.regression, lists(2), "regression reads scores, the data has none: give every"),
        (squares, groups(2), "squares reads margin, the data has none: .*data.criteria.margins"),
        (
            partial(losses.bradley_terry, margin=0.5),
            with_margins(2),
            "bradley_terry is given a margin, and the data has one on every record: leave one out",
        ),
        (
            losses.plackett_luce,
            [replace(g, soft_label=0.5) for g in groups(2)],
            "the data has a soft_label .*plackett_luce does not read",
        ),
    ],
)
def test_data_that_a_loss_cannot_use_is_refused(loss, items, said):
    with pytest.raises(BadInput, match=said):
        reward(MODEL, loss=loss).prepare(items)


def test_other_lists_are_taken_as_they_are():
    assert reward(MODEL).prepare(LISTS) == LISTS and reward(MODEL).prepare([]) == []
    assert reward(MODEL, loss=any_list).prepare(LISTS) == LISTS
    judged = scored(lists(1, 1))
    assert reward(MODEL, loss=losses.regression).prepare(judged) == judged


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (partial(losses.dpo, beta=0.1), "dpo reads log-probs, .*take a loss of scores, as"),
        (losses.mix((1.0, losses.nll)), "reads log-probs, .*take a loss of scores, as"),
        (
            partial(losses.bradley_terry, **{"smoothing": 0.1}),
            "bradley_terry has no keyword smooth",
        ),
        (lambda score_BK, mask_BK, rate: rate, "requires rate: give it by `partial`"),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused(loss, said):
    with pytest.raises(BadInput, match=said):
        reward(MODEL, loss=loss)


def test_a_loss_of_scores_is_refused_by_preference():
    of_scores: tuple[Any, ...] = (losses.plackett_luce, partial(losses.bradley_terry, margin=1.0))
    for loss in of_scores:
        with pytest.raises(BadInput, match=r"reads scores, .*train it with algorithms\.reward"):
            preference(MODEL, loss=loss)


# TRL's recorded run


def recorded_pairs(batch: dict[str, Any]) -> Batch:
    """TRL's chosen rows stand above the rejected ones; what a pair shares is its prompt here."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    lines = [np.array(ids[: sum(mask)]) for ids, mask in rows]
    items = []
    for chosen, rejected in zip(lines[: len(lines) // 2], lines[len(lines) // 2 :], strict=True):
        n = min(len(chosen), len(rejected)) - 1
        shared = int(np.argmin(np.append(chosen[:n] == rejected[:n], False)))
        assert shared > 0
        items.append(Group(chosen[:shared], [chosen[shared:], rejected[shared:]]))
    return pack(items, **SHAPE)


def test_a_reward_model_trains_as_recorded(shared, tmp_path):
    folder = shared / "golden" / "trl_traj"
    record = Recorded(folder, json.loads((folder / "trajectory.json").read_text()))
    # tied, for there is no head over the vocabulary
    keys = (
        {"model_type": "llama"} | record.values["llama"]["config"] | {"tie_word_embeddings": True}
    )
    config = families.read(keys)

    def weights(name: str) -> Params:
        found, home = load_file(folder / f"{name}.safetensors"), tmp_path / name
        head = found.pop("score.weight")[0]
        home.mkdir()
        (home / "config.json").write_text(json.dumps(keys))
        save_file(found, home / "model.safetensors")
        return with_head(hf.load(home)[1], head)

    batches = [recorded_pairs(batch) for batch in record.batches("reward_llama")]
    algorithm = reward(decoder(config), loss=losses.bradley_terry)
    steps, params = replay(algorithm, batches, weights("reward_llama_init"))
    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "learning_rate": "learning_rate",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "mean_reward": "rewards/mean",
    }
    for step, (values, expected) in enumerate(
        zip(steps, record.steps("reward_llama"), strict=True)
    ):
        for theirs, ours in names.items():
            rtol, atol = CLOSE.get(ours, CLOSE["rewards/chosen"])
            np.testing.assert_allclose(
                values[ours], expected[theirs], rtol=rtol, atol=atol, err_msg=f"{ours}, {step}"
            )
    same_weights(params, weights("reward_llama_final"))


# The world where every response can be listed


WORLD = random_world(steps=2, seed=1)  # 2 prompts, 7 responses
SMALL = decoder(Config(V=3, D=16, L=1, H=2, J=2, E=8, F=32))


def population(world: World, size: int) -> list[Group]:
    """Every ranking of `size` responses by its probability, all sets met equally often."""
    met = world.lists(size, np.full(world.reward_BK.shape, 1 / len(world.responses)))
    rows = zip(met.prompt_B, met.response_BK, met.weight_B, strict=True)
    return [
        Group(
            np.array(world.prompts[b], np.int32),
            [np.array(world.responses[k], np.int32) for k in response_K],
            weight=float(weight),
        )
        for b, response_K, weight in rows
    ]


def descended(algorithm, params: Params, batch: Batch, *, steps: int, rate: float) -> Params:
    """The weights after steps of Adam on the whole population, the rate falling to zero."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    params, memory = algorithm.init(jax.random.key(1), params, {})
    state = TrainState(jnp.int32(0), params, tx.init(params), memory, jnp.int32(0))
    update = make_update(algorithm, tx)

    @jax.jit
    def train(state: TrainState, batch: Batch) -> TrainState:
        def step(state: TrainState, _: None):
            return update(state, {}, batch, jax.random.key(0))[0], None

        return jax.lax.scan(step, state, length=steps)[0]

    return train(state, batch).params


@pytest.mark.parametrize(("loss", "size"), [("bradley_terry", 2), ("plackett_luce", 3)])
def test_the_true_reward_is_found_up_to_a_constant_of_the_prompt(loss, size):
    """By a transformer from all rankings with their probabilities."""
    batch = pack(population(WORLD, size), row_tokens=64)
    algorithm = reward(SMALL, loss=getattr(losses, loss))
    params = descended(algorithm, SMALL.init(jax.random.key(0)), batch, steps=300, rate=0.01)
    whole = pack(WORLD.groups(), row_tokens=64)
    found_BK = np.stack(scores(reward_scores(SMALL, params, whole), whole, WORLD.groups()))
    gap_BK = found_BK - WORLD.reward_BK
    gap_BK -= gap_BK.mean(axis=1, keepdims=True)
    assert np.abs(gap_BK).max() < 1e-3 and np.std(WORLD.reward_BK) > 0.5, gap_BK
