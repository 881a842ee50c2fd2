"""A reward model as a reward: what it says of texts, and runs that it stands in."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
from test_online_runs import EXPERIMENT as GRPO
from test_online_runs import PPO
from test_reward_run import REWARD, with_steps
from tiny import relative_error
from tiny_runs import EXPERIMENT as DPO
from tiny_runs import PAIRS, SFT, rows, words

import dpo_jax
from dpo_jax import cli, learned, parts
from dpo_jax.algorithms.reward import reward_scores
from dpo_jax.data.packing import pack
from dpo_jax.data.sources import read
from dpo_jax.experiment import Evaluation, Learned, Mesh, Run, digest, options, override
from dpo_jax.learned import RewardModel
from dpo_jax.parallel import make_mesh, shardings
from dpo_jax.structs import BadInput, Group
from dpo_jax.train import Result
from dpo_jax.worlds import sentiment

NAMED = Learned(parent=REWARD)
PROMPTS = sentiment.prompts(n=4, seed=11)
RL = replace(
    GRPO,
    algorithm=partial(GRPO.algorithm, rewards=(NAMED,)),
    evaluation=replace(GRPO.evaluation, rewards=(words, NAMED)),
    run=Run(steps=2),
)
ON_PPO = replace(RL, name="ppo", algorithm=partial(PPO.algorithm, rewards=(words, NAMED)))


@pytest.fixture(scope="module")
def trained(place: Path) -> Result:
    return dpo_jax.run(REWARD)


@pytest.fixture(scope="module")
def model(trained) -> RewardModel:
    return learned.rewards((NAMED,), dpo_jax.run)[NAMED]


def texts_of(lengths: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    some = [word for word in sentiment.VOCABULARY if not word.startswith("<")]
    return [" ".join(rng.choice(some, size=size)) for size in lengths]


def alone(trained, record, text: str) -> float:
    """The score of one response, by the ids of its words."""
    ids = [sentiment.WORDS[word] for word in f"{record['prompt']} {text}".split()]
    cut, bos, eos = (
        len(record["prompt"].split()),
        sentiment.INDEX["<bos>"],
        sentiment.INDEX["<eos>"],
    )
    group = Group(np.array([bos, *ids[:cut]], np.int32), [np.array([*ids[cut:], eos], np.int32)])
    batch = pack([group], row_tokens=group.tokens)
    return float(reward_scores(trained.model, trained.params, batch)[0, 0, 0])


def test_scores_are_those_of_the_head_less_the_mean_over_the_deviation(trained, model):
    """Texts of all lengths, equal ones and an empty one, prompts that come again and groups that
    take several rows."""
    records = [PROMPTS[i] for i in (0, 0, 0, 1, 2, 2, 0, 3)]
    texts = texts_of([3, 60, 80, 0, 5, 5, 110, 1])
    texts[5] = texts[4]
    found_B = model(records, texts)
    stored = json.loads((trained.directory / "result.json").read_text())["metrics"]
    mean, std = stored["eval_rewards/mean"], stored["eval_rewards/std"]
    expected_B = [alone(trained, *pair) for pair in zip(records, texts, strict=True)]
    np.testing.assert_allclose(found_B, (np.array(expected_B) - mean) / std, atol=1e-5)
    assert found_B.dtype == np.float64 and found_B[4] == pytest.approx(found_B[5], abs=1e-6)
    raw = Learned(parent=REWARD, normalised=False)
    raw_B = learned.rewards((raw,), dpo_jax.run)[raw](records, texts)
    np.testing.assert_allclose(raw_B, expected_B, atol=1e-5)


def test_held_out_responses_have_mean_0_and_deviation_1(trained, model):
    """Over the rankings of the reward model's evaluation."""
    records, _ = read(next(Path("runs").glob("sft-pairs-*/pairs.jsonl")))
    found = [model([record] * len(record["responses"]), record["responses"]) for record in records]
    assert np.mean([np.mean(score_K) for score_K in found]) == pytest.approx(0, abs=1e-5)
    assert np.mean([np.mean(score_K**2) for score_K in found]) == pytest.approx(1, abs=1e-5)


def test_responses_that_grow_meet_few_shapes(trained):
    """Sixty-four responses a call, from 4 to 40 words: the rungs of the row count alone differ."""
    found = RewardModel(
        "fresh", trained.model, trained.params, trained.tokenizer, mesh=make_mesh(), row_tokens=128
    )
    records = [record for record in sentiment.prompts(n=16, seed=3) for _ in range(4)]
    rng, compiled = np.random.default_rng(0), []

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def scored(low: int, high: int) -> int:
        sizes = rng.integers(low, high, size=len(records)).tolist()
        assert np.isfinite(found(records, texts_of(sizes))).all()
        return len(compiled)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        grown = [scored(longest // 2, longest + 1) for longest in range(4, 44, 4)]
        assert 1 <= grown[-1] <= 4
        assert scored(2, 41) == scored(2, 41)
        assert [scored(8, 13) for _ in range(5)] == [len(compiled)] * 5
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_rung_wastes_a_third_at_most():
    rungs = {count: learned._rung(count) for count in range(1, 200)}
    assert all(count <= rung < 1.5 * count for count, rung in rungs.items())
    assert len({*rungs.values()}) == 16


def test_the_mesh_changes_no_score(trained, model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(trained.params, shardings(mesh, trained.params))
    other = RewardModel("other", trained.model, params, trained.tokenizer, mesh=mesh, row_tokens=64)
    records = [record for record in PROMPTS for _ in range(3)]
    texts = texts_of([2, 9, 4] * 4)
    score_B = (other(records, texts) - model.mean) / model.std
    np.testing.assert_allclose(score_B, model(records, texts), atol=1e-5)


def test_a_run_that_lies_somewhere_is_the_same_reward(trained, model):
    by_path = Learned(parent=str(trained.directory))
    other = learned.rewards((by_path,), dpo_jax.run)[by_path]
    assert other.__name__ == trained.directory.name
    texts = texts_of([3, 5, 7, 2])
    np.testing.assert_allclose(other(PROMPTS, texts), model(PROMPTS, texts), atol=1e-6)


@pytest.mark.parametrize("experiment", [RL, ON_PPO], ids=lambda value: value.name)
def test_policies_learn_from_it(model, experiment):
    """What is reported is its score of what is written, beside the true reward."""
    result = dpo_jax.run(experiment)
    line = next(row for row in rows(result.directory) if "loss" in row)
    assert np.isfinite(line["rewards/reward/mean"]) and line["rewards/reward/std"] > 0
    samples = rows(result.directory, "samples.jsonl")
    assert all({"words", "reward"} <= row.keys() for row in samples)
    expected = model(samples, [row["response"] for row in samples])
    np.testing.assert_allclose([row["reward"] for row in samples], expected, atol=1e-5)
    assert result.metrics["eval_samples/reward"] == pytest.approx(expected.mean(), abs=1e-5)


def test_what_is_missing_is_trained_and_only_that(trained):
    """Another reward model of the same name, whose run is an option of the experiment's."""
    path = "algorithm.rewards.0.parent.run.steps"
    assert dict(options(RL))[path] == 6
    changed = override(RL, {path: "7"})
    assert changed.algorithm.keywords["rewards"][0].parent == with_steps(REWARD, 7)
    assert digest(changed) != digest(RL)
    assert digest(override(RL, {"algorithm.rewards.0.normalised": "false"})) != digest(RL)
    assert not list(Path("runs").glob(f"reward-{digest(with_steps(REWARD, 7))}"))
    dpo_jax.run(changed)
    assert len(list(Path("runs").glob(f"reward-{digest(with_steps(REWARD, 7))}"))) == 1


def test_the_parent_of_the_reward_model_follows_that_of_the_policy():
    """One SFT run for both, however it is overridden."""
    changed = override(RL, {"parent.run.steps": "5"})
    (reward,) = changed.algorithm.keywords["rewards"]
    assert reward.parent.parent == changed.parent == with_steps(SFT, 5)
    assert reward.parent.data.source.parent == changed.parent
    assert changed.evaluation.rewards[1] == reward


def test_it_labels_samples(trained, model):
    """A data set that the reward model judged: its scores stand beside the responses."""
    judged = replace(PAIRS, rewards=(NAMED, words), seed=5)
    dpo_jax.run(replace(with_steps(DPO, 1), data=replace(DPO.data, source=judged)), directory="d")
    found, _ = read(next(Path("runs").glob(f"sft-pairs-{digest(judged)}/pairs.jsonl")))
    for record in found[:5]:
        expected = model([record] * 2, record["responses"])
        column = [
            row[record["criteria"].index("reward")] for row in np.array(record["scores"]).tolist()
        ]
        np.testing.assert_allclose(column, expected, atol=1e-5)


def test_commands_know_it(trained, capsys):
    Path("judged_run.py").write_text("from test_learned import RL as EXPERIMENT\n")
    dpo_jax.run(RL)
    assert cli.main(["sample", "judged_run.py"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and all({"words", "reward"} <= line.keys() for line in lines)
    assert cli.main(["eval", "judged_run.py"]) == 0
    assert "eval_samples/reward = " in capsys.readouterr().out
    assert cli.main(["train", "judged_run.py", "--help"]) == 0
    assert "algorithm.rewards.0.normalised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Learned(parent=SFT), "sft is no reward model"),
        (Learned(parent="runs/nowhere"), "runs/nowhere is no run"),
        (Learned(parent=replace(REWARD, evaluation=Evaluation())), "no held-out rewards"),
    ],
)
def test_what_is_no_reward_model_is_refused(place, wanted, said):
    before = set(Path("runs").iterdir()) if Path("runs").exists() else set()
    with pytest.raises(BadInput, match=said):
        dpo_jax.run(override(RL, {"algorithm.rewards": (wanted,)}), directory="refused")
    assert not Path("refused").exists()
    if "held-out" not in said:
        assert set(Path("runs").iterdir() if Path("runs").exists() else ()) == before


def test_names_tell_rewards_apart_and_a_run_resolves_them():
    twice = (NAMED, Learned(parent=REWARD, normalised=False))
    with pytest.raises(BadInput, match="of different names"):
        RL.algorithm.func(parts.model(RL), rewards=twice)
    with pytest.raises(BadInput, match="name of its own"):
        Evaluation(prompts="x", rewards=twice)
    with pytest.raises(BadInput, match="reward scores nothing by itself: a run loads"):
        NAMED([], [])
    assert NAMED.__name__ == "reward"
    assert Learned(parent="runs/reward-0123abcd/").__name__ == "reward-0123abcd"


def test_a_run_comes_out_the_same_twice(trained):
    whole = dpo_jax.run(replace(RL, run=Run(steps=2, mesh=Mesh())))
    again = dpo_jax.run(RL, directory="again")
    assert relative_error(again.params, whole.params) == 0
