"""A whole run: what its directory holds, what it finds again, evaluation, profiler, average."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import relative_error
from tiny_runs import EXPERIMENT, SFT, rows, snapshot

import dpo_jax
from dpo_jax import build, description, experiment, optim, parts
from dpo_jax.algorithms.preference import preference
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.structs import TrainState
from dpo_jax.train import Result
from dpo_jax.worlds import sentiment

TRL = {
    "step",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
    "data_wait_share",
}


@pytest.fixture(scope="module")
def dpo(place: Path) -> Result:
    return dpo_jax.run(EXPERIMENT)


def changed(trained: experiment.Experiment, **options) -> experiment.Experiment:
    """The same experiment with other options of its run."""
    return replace(trained, run=replace(trained.run, **options))


def test_a_run_directory_holds_what_it_should(dpo):
    home = Path(dpo.directory)
    assert home.parent.name == "runs" and home.name.startswith("dpo-")
    assert {path.name for path in home.iterdir()} == {
        "experiment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "weights",
        "tensorboard",
        "result.json",
    }
    assert [path.name for path in (home / "checkpoints").iterdir()] == ["6"]
    assert (home / "tensorboard").stat().st_size > 0
    assert len(rows(home, "samples.jsonl")) == 4 * 4  # prompts x (before, 2, 4, 6)
    assert {row["step"] for row in rows(home, "samples.jsonl")} == {0, 2, 4, 6}
    assert not list(home.rglob("*.tmp"))


def test_experiment_json_resolves_values_and_digests(dpo):
    stored = json.loads((Path(dpo.directory) / "experiment.json").read_text())
    assert stored["experiment"] == experiment.describe(EXPERIMENT)
    assert stored["options"]["algorithm.loss.label_smoothing"] == "0.0"  # a default, spelt out
    assert stored["model"]["D"] == 16  # the parent's, which the experiment does not repeat
    assert stored["code"] == description.code_digest()
    assert stored["parent"] == experiment.digest(SFT)
    pairs = next(Path("runs").glob("sft-pairs-*/pairs.jsonl"))
    known = build.grouped(
        EXPERIMENT,
        build.read_records("data.source", str(pairs), dpo_jax.run),
        sentiment.tokenizer(),
        EXPERIMENT.algorithm(parts.model(EXPERIMENT)),
    )
    assert stored["data"] == build.data_digest(known.groups)
    assert stored["data"] != build.data_digest(known.groups[1:])


def test_metrics_have_the_names_of_trl(dpo):
    lines = rows(dpo.directory)
    steps = [row for row in lines if "loss" in row]
    evaluations = [row for row in lines if "eval_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    assert set(steps[-1]) >= TRL
    assert set(evaluations[-1]) >= {f"eval_{name}" for name in TRL if "rewards" in name}
    assert all(name.startswith("eval_") for name in set(evaluations[-1]) - {"step"})
    assert dpo.metrics == {k: v for k, v in evaluations[-1].items() if k != "step"}
    samples = [row for row in rows(dpo.directory, "samples.jsonl") if row["step"] == 6]
    mean = np.mean([row["judged"] for row in samples])
    assert dpo.metrics["eval_samples/judged"] == pytest.approx(mean)


def test_the_first_step_of_dpo_is_at_its_reference(dpo):
    lines = rows(dpo.directory)
    first = next(row for row in lines if row["step"] == 1)
    before = next(row for row in lines if row["step"] == 0)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["rewards/accuracies"] == 0
    assert before["eval_samples/kl"] == pytest.approx(0, abs=1e-6)
    last = lines[-1]
    assert last["eval_loss"] < 0.68 and last["eval_samples/kl"] > 0
    assert last["eval_rewards/accuracies"] > 0.5


def test_a_finished_run_is_found_again_and_left_alone(dpo, capsys):
    before = snapshot("runs")
    again = dpo_jax.run(EXPERIMENT)
    assert f"{dpo.directory}: finished before, reused" in capsys.readouterr().err
    assert snapshot("runs") == before
    assert relative_error(again.params, dpo.params) == 0
    assert again.metrics == dpo.metrics


def test_parent_and_pairs_are_found_again(dpo, capsys):
    quick = replace(changed(EXPERIMENT, steps=1, eval_every=0), evaluation=experiment.Evaluation())
    dpo_jax.run(quick, directory="quick")
    said = capsys.readouterr().err
    assert "pairs.jsonl: finished before, reused" in said
    assert len([line for line in said.splitlines() if "sft-" in line]) == 2  # and its weights
    assert "sample sft" not in said
    assert "eval_loss" not in rows("quick")[-1]


def test_held_out_metrics_do_not_depend_on_the_evaluation_batch(dpo, monkeypatch):
    """A last batch of one pair and much padding: every pair still counts once."""
    pairs = next(Path("runs").glob("sft-pairs-*/pairs.jsonl"))
    count = len(pairs.read_text().splitlines())
    assert 4 < count <= build.HELD_OUT_GROUPS
    for groups in (count - 1, 4):
        monkeypatch.setattr(build, "HELD_OUT_GROUPS", groups)
        again = dpo_jax.run(EXPERIMENT, directory=f"by{groups}")
        for name, value in dpo.metrics.items():
            assert again.metrics[name] == pytest.approx(value, abs=1e-5), name


def test_microbatches_of_a_whole_run_change_nothing(dpo):
    split = dpo_jax.run(changed(EXPERIMENT, microbatches=2), directory="split")
    assert relative_error(split.params, dpo.params) < 1e-4
    for one, other in zip(rows(dpo.directory), rows(split.directory), strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert other["logps/chosen"] == pytest.approx(one["logps/chosen"], rel=1e-5)


def test_the_profiler_leaves_a_trace(place):
    dpo_jax.run(changed(SFT, steps=4, profile="1:3"), directory="traced")
    traces = [path for path in Path("traced/profile").rglob("*") if path.is_file()]
    assert any(path.name.endswith((".xplane.pb", ".trace.json.gz")) for path in traces)
    assert all(path.stat().st_size > 0 for path in traces)


def test_the_average_is_that_of_the_trajectory(place):
    """average_t = d average_{t-1} + (1 - d) params_t, from the start weights on."""
    short = changed(SFT, steps=3, save_every=1, keep=3)
    averaging = replace(short, optim=replace(SFT.optim, ema=0.8))
    kept = dpo_jax.run(averaging, directory="averaged")
    plain = dpo_jax.run(short, directory="plain")
    expected = jax.device_get(kept.model.init(jax.random.key(SFT.run.seed)))
    trajectory = [saved_params(averaging, "averaged", step, kept.params) for step in (1, 2, 3)]
    for params in trajectory:
        expected = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, expected, params)
    assert relative_error(trajectory[-1], plain.params) < 1e-7  # training itself is the same
    assert relative_error(kept.params, expected) < 1e-6
    assert relative_error(kept.params, plain.params) > 1e-3


def saved_params(trained: experiment.Experiment, directory: str, step: int, params):
    """The policy in a checkpoint of a run."""
    tx = optim.transformation(trained.optim, trained.run.steps)
    state = TrainState(jnp.int32(0), params, tx.init(params), {}, jnp.int32(0))
    checkpoints = Checkpoints(Path(directory) / "checkpoints")
    return jax.device_get(checkpoints.restore(jax.eval_shape(lambda: state), step)[0].params)


def test_a_loss_of_the_users_own(dpo):
    """A plain function of Scored beside the experiment is a loss; here it is dpo written out."""
    same = replace(EXPERIMENT, algorithm=partial(preference, loss=own_dpo))
    result = dpo_jax.run(same, directory="own")
    assert relative_error(result.params, dpo.params) < 1e-5


def own_dpo(scored, *, beta: float = 0.5):
    ratio_BK = scored.logp_BK - scored.ref_logp_BK
    return -jax.nn.log_sigmoid(beta * (ratio_BK[:, 0] - ratio_BK[:, 1]))
