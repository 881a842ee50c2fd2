"""A whole run of a reward model: its head is kept, found again, and goes where it is wanted."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import relative_error
from tiny_runs import EXPERIMENT as DPO
from tiny_runs import PAIRS, SFT, rows, snapshot

import dpo_jax
from dpo_jax import cli
from dpo_jax.algorithms.reward import reward, reward_scores
from dpo_jax.data.packing import pack
from dpo_jax.data.sources import read
from dpo_jax.data.template import tokenize
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run, override
from dpo_jax.together import programs, run_all
from dpo_jax.train import Result
from dpo_jax.worlds import annotators, sentiment

# with this seed no response is empty, cut or said twice: every ranking is whole
RANKED = replace(PAIRS, annotator=partial(annotators.plackett_luce, temperature=4.0), seed=5)
REWARD = Experiment(
    name="reward",
    parent=SFT,
    data=Data(source=RANKED, tokenizer=sentiment.tokenizer, groups=4, row_tokens=128),
    algorithm=reward,
    optim=Optim(learning_rate=0.01),
    run=Run(steps=6, eval_every=3),
    evaluation=Evaluation(source=RANKED),
)
BARE = {"evaluation": Evaluation()}


@pytest.fixture(scope="module")
def trained(place: Path) -> Result:
    return dpo_jax.run(REWARD)


def with_steps(experiment: Experiment, steps: int) -> Experiment:
    return replace(experiment, run=replace(experiment.run, steps=steps))


def test_a_run_learns_and_says_so(trained):
    lines = [row for row in rows(trained.directory) if "eval_loss" in row]
    assert [row["step"] for row in lines] == [0, 3, 6]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.1
    assert trained.metrics["eval_rewards/accuracies"] > lines[0]["eval_rewards/accuracies"]
    names = "accuracies chosen margins mean rejected square std ties variance".split()
    assert {name for name in trained.metrics if "/" in name} == {
        *(f"eval_rewards/{name}" for name in names),
        "eval_criteria/words/margins",
        "eval_criteria/words/accuracies",
        *(f"eval_criteria/words/{name}" for name in ("covariance", "variance", "correlation")),
    }
    stored = json.loads((Path(trained.directory) / "experiment.json").read_text())["options"]
    assert stored["algorithm.centering"] == "0.0"


def test_the_evaluation_is_that_of_the_scores(trained):
    """Every ranking alone, through `reward_scores`."""
    records, _ = read(next(Path("runs").glob("sft-pairs-*/pairs.jsonl")))
    groups, dropped = tokenize(records, trained.tokenizer, row_tokens=128)
    assert not dropped and {len(group.responses) for group in groups} >= {3}
    right, mean, square, found, true = [], [], [], [], []
    for group in groups:
        score_K = reward_scores(trained.model, trained.params, pack([group], row_tokens=128))[0, 0]
        right.append(float(score_K[0] > score_K[-1]))
        mean.append(float(np.mean(score_K)))
        square.append(float(np.mean(score_K**2)))
        found.append(score_K - mean[-1])
        said_K = np.asarray(group.scores)[:, 0]
        true.append(said_K - said_K.mean())
    metrics = trained.metrics
    assert metrics["eval_rewards/accuracies"] == pytest.approx(np.mean(right), abs=1e-6)
    assert metrics["eval_rewards/mean"] == pytest.approx(np.mean(mean), abs=1e-5)
    deviation = np.sqrt(np.mean(square) - np.mean(mean) ** 2)
    assert metrics["eval_rewards/std"] == pytest.approx(deviation, abs=1e-5)
    within = np.corrcoef(np.concatenate(found), np.concatenate(true))[0, 1]  # all lists are of 3
    assert metrics["eval_criteria/words/correlation"] == pytest.approx(within, abs=1e-4)


def test_a_finished_run_is_found_again_with_its_head(trained, capsys):
    before = snapshot("runs")
    again = dpo_jax.run(REWARD)
    assert f"{trained.directory}: finished before, reused" in capsys.readouterr().err
    assert snapshot("runs") == before and again.metrics == trained.metrics
    assert "reward_D" in again.params and relative_error(again.params, trained.params) == 0


def test_eval_prints_it(trained, capsys):
    Path("ranked.py").write_text("from test_reward_run import REWARD as EXPERIMENT\n")
    assert cli.main(["eval", "ranked.py"]) == 0
    lines = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(trained.metrics)
    accuracy = trained.metrics["eval_rewards/accuracies"]
    assert float(lines["eval_rewards/accuracies"]) == pytest.approx(accuracy, rel=1e-5)


def test_a_run_that_was_broken_goes_on(trained):
    dpo_jax.run(with_steps(REWARD, 3), directory="broken")
    resumed = dpo_jax.run(REWARD, directory="broken")
    assert relative_error(resumed.params, trained.params) == 0


def test_microbatches_change_nothing(trained):
    parted = replace(REWARD, run=replace(REWARD.run, microbatches=2))
    found = dpo_jax.run(parted, directory="parted")
    assert relative_error(found.params, trained.params) < 1e-4
    assert found.metrics == pytest.approx(trained.metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("by_path", [False, True], ids=["experiment", "path"])
def test_a_policy_starts_without_the_head(trained, capsys, by_path):
    parent = str(trained.directory) if by_path else REWARD
    child = with_steps(replace(DPO, parent=parent, **BARE), 1)
    child = replace(child, run=replace(child.run, eval_every=0))
    result = dpo_jax.run(child, directory=f"policy{by_path}")
    assert "dpo: starts without reward_D of its parent, which" in capsys.readouterr().err
    assert set(result.params) == set(trained.params) - {"reward_D"}
    first = next(row for row in rows(result.directory) if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("by_path", [False, True], ids=["experiment", "path"])
def test_a_reward_model_goes_on_with_the_head_of_its_parent(trained, capsys, by_path):
    parent = str(trained.directory) if by_path else REWARD
    child = with_steps(replace(REWARD, name="further", parent=parent, optim=Optim(0.0)), 1)
    result = dpo_jax.run(child, directory=f"further{by_path}")
    assert "without" not in capsys.readouterr().err
    assert relative_error(result.params, trained.params) == 0
    assert result.metrics == pytest.approx(trained.metrics, rel=1e-5)


def test_a_parent_without_a_head_may_be_a_path(trained):
    home = next(path for path in Path("runs").glob("sft-*") if "pairs" not in path.name)
    found = dpo_jax.run(replace(REWARD, parent=str(home)), directory="by_path")
    assert relative_error(found.params, trained.params) == 0


def test_runs_that_differ_in_numbers_train_together(trained):
    base = with_steps(REWARD, 3)
    changes = ({"algorithm.centering": 0.0}, {"algorithm.centering": 0.1})
    members = [override(base, change) for change in changes]
    assert programs(members) == [[0, 1]]
    together = run_all(members, ["a", "b"])
    for member, found in zip(members, together, strict=True):
        alone = dpo_jax.run(member, directory=f"alone-{found.directory.name}")
        assert relative_error(found.params, alone.params) < 1e-5
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-5)
    norms = [float(np.abs(jax.device_get(found.params["reward_D"])).max()) for found in together]
    assert norms[0] != norms[1]
