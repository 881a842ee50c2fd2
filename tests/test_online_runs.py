"""Whole runs of algorithms that sample: resumed, compiled once, said in the field's names."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.monitoring
import pytest
from tiny import relative_error
from tiny_runs import SFT, rows, timeless, words

import dpo_jax
from dpo_jax import build, cli, parts
from dpo_jax.algorithms.online import online_dpo
from dpo_jax.algorithms.policy import grpo
from dpo_jax.algorithms.ppo import ppo
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Evaluation, Experiment, Mesh, Optim, Run, Sampled
from dpo_jax.structs import BadInput
from dpo_jax.worlds import annotators, sentiment

EXPERIMENT = Experiment(
    name="grpo",
    parent=SFT,
    data=Data(
        source=partial(sentiment.prompts, n=6, seed=3),
        tokenizer=sentiment.tokenizer,
        groups=4,
        row_tokens=40,
    ),
    algorithm=partial(grpo, rewards=(words,), n=3, max_tokens=8, passes=2, minibatches=2),
    optim=Optim(learning_rate=0.01),
    run=Run(steps=4, save_every=2, keep=9),
    evaluation=Evaluation(
        prompts=partial(sentiment.prompts, n=4, seed=5), rewards=(words,), max_tokens=8
    ),
)
PPO = replace(
    EXPERIMENT,
    name="ppo",
    algorithm=partial(ppo, rewards=(words,), max_tokens=8, kl_target=0.01, kl_horizon=50, passes=2),
)
DPO = replace(
    EXPERIMENT,
    name="online_dpo",
    data=replace(EXPERIMENT.data, row_tokens=32),
    algorithm=partial(
        online_dpo, rewards=(words,), annotator=annotators.bradley_terry, n=3, max_tokens=8
    ),
)
EXPECTED = {
    "grpo": {
        *("reward", "reward_std", "frac_reward_zero_std", "rewards/words/mean", "num_tokens"),
        *("completions/mean_length", "completions/clipped_ratio", "completions/max_length"),
        *("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward"),
        *("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "loss/policy_avg"),
        *("loss/kl_avg", "loss", "grad_norm", "learning_rate", "step"),
    },
    "online_dpo": {
        *("reward", "rewards/words/mean", "completions/mean_length", "frac_unlabelled"),
        *("objective/kl", "objective/scores", "objective/rlhf_reward", "loss", "grad_norm"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected", "criteria/reward/margins"),
    },
    "ppo": {"loss/value_avg", "val/clipfrac_avg", "objective/kl_coef", "objective/kl"},
}


@pytest.mark.parametrize("experiment", [EXPERIMENT, PPO, DPO], ids=lambda value: value.name)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(place, experiment):
    """From the checkpoint of step 2, bit for bit; the adapted coefficient with it."""
    whole = dpo_jax.run(experiment, directory=f"{experiment.name}_whole")
    home = Path(f"{experiment.name}_broken")
    shutil.copytree(whole.directory, home)
    (home / "result.json").unlink()
    shutil.rmtree(home / "checkpoints" / "4")
    resumed = dpo_jax.run(experiment, directory=str(home))
    assert relative_error(resumed.params, whole.params) == 0
    assert timeless(home) == timeless(whole.directory)
    steps = [row for row in rows(home) if "loss" in row]
    assert len(steps) == 4
    assert EXPECTED[experiment.name] <= steps[0].keys()
    assert all(value is not None for row in steps for value in row.values())
    assert whole.metrics["eval_samples/words"] > 0
    if experiment is PPO:
        assert steps[-1]["objective/kl_coef"] != steps[0]["objective/kl_coef"]


def test_nothing_is_compiled_after_the_first_steps(place):
    """One row count serves all steps here; a compilation later would be a shape that moved."""
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def counted(records, responses):
        marks.append(len(compiled))
        return words(records, responses)

    marks: list[int] = []
    jax.monitoring.register_event_duration_secs_listener(count)
    longer = replace(
        EXPERIMENT,
        algorithm=partial(grpo, rewards=(counted,), n=3, max_tokens=8, passes=2, minibatches=2),
        run=Run(steps=8),
        evaluation=Evaluation(),
        data=replace(EXPERIMENT.data, row_tokens=20),
    )
    try:
        dpo_jax.run(longer, directory="compiled")
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(marks) == 8 and marks[0] < marks[1]
    assert marks[3] == marks[-1]


@pytest.mark.parametrize("experiment", [EXPERIMENT, DPO], ids=lambda value: value.name)
def test_the_mesh_changes_no_sample(place, experiment):
    """The runs part by rounding alone, so their first rollouts are the same."""
    short = replace(experiment, run=Run(steps=1), evaluation=Evaluation())
    one = replace(short, run=Run(steps=1, mesh=Mesh(data=2, fsdp=2, tensor=2)))
    found = [
        rows(dpo_jax.run(each, directory=f"{each.name}{i}").directory)[0]
        for i, each in enumerate((short, one))
    ]
    for name in ("reward", "completions/mean_length", "num_tokens"):
        assert found[0][name] == found[1][name]
    labels = [row.get("criteria/reward/margins", 0.0) for row in found]
    assert labels[0] == pytest.approx(labels[1], rel=1e-6)
    assert abs(found[0]["grad_norm"] / found[1]["grad_norm"] - 1) < 1e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"evaluation": Evaluation(source=partial(sentiment.reviews, n=4, seed=0))},
            "evaluation.source has no effect",
        ),
        ({"data": replace(EXPERIMENT.data, row_tokens=12)}, r"data.row_tokens=\d+ would do"),
        ({"data": replace(EXPERIMENT.data, groups=1)}, "algorithm.minibatches=2"),
        (
            {"algorithm": DPO.algorithm, "data": replace(EXPERIMENT.data, row_tokens=20)},
            r"and 2 responses of algorithm.max_tokens=8 take \d+: data.row_tokens=\d+ would do",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(place, change, said):
    with pytest.raises(BadInput, match=said):
        dpo_jax.run(replace(EXPERIMENT, **change), directory="refused")
    assert not Path("refused").exists()


def brief(records, responses):
    return -words(records, responses)


def test_best_of_n_is_imitated(place):
    """SFT on the best of eight that its parent says: shorter answers where short is best."""
    best = Sampled(
        parent=SFT,
        prompts=partial(sentiment.prompts, n=64, seed=3),
        rewards=(brief,),
        annotator=annotators.best,
        n=8,
        max_tokens=32,
    )
    experiment = replace(
        EXPERIMENT,
        name="best",
        algorithm=sft,
        data=replace(EXPERIMENT.data, source=best, groups=16, row_tokens=64),
        run=Run(steps=30, eval_every=30),
        evaluation=Evaluation(
            prompts=partial(sentiment.prompts, n=32, seed=5), rewards=(brief,), max_tokens=32
        ),
    )
    result = dpo_jax.run(experiment, directory="best")
    before, *_, after = [r["eval_samples/brief"] for r in rows("best") if "eval_samples/brief" in r]
    assert after > before + 1 and result.metrics["eval_samples/brief"] == after


def test_flops_count_passes_and_samples(place):
    """A token is drawn, its log-prob and the reference's taken, and trained on in two passes."""
    given = build.materials(EXPERIMENT, dpo_jax.run)
    setup = build.setup(EXPERIMENT, parts.mesh(EXPERIMENT), given)
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.params))
    assert setup.flops_per_token == 2 * count * (1 + 1 + 1 + 2 * 3)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_goes_on_from_a_parent_that_is_a_path(place, critic):
    """Its body, where it has one, and its head; at rate 0 they end as they began."""
    short = replace(
        PPO,
        algorithm=partial(ppo, rewards=(words,), max_tokens=8, critic=critic),
        run=Run(steps=1),
        evaluation=Evaluation(),
    )
    parent = dpo_jax.run(short, directory=f"{critic}_parent")
    child = replace(short, parent=str(parent.directory), optim=Optim(learning_rate=0.0))
    went_on = dpo_jax.run(child, directory=f"{critic}_child")
    assert relative_error(went_on.params, parent.params) == 0
    head = parent.params["critic"] if critic == "separate" else parent.params
    assert abs(head["value_D"]).max() > 0  # a new one says 0


def test_options_are_found_by_their_path(place, capsys):
    file = Path("online_run.py")
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_online_runs import EXPERIMENT\n"
    )
    asked = ["run.dir=by_path", "run.steps=1", "algorithm.n=2", "algorithm.loss.high=0.28"]
    assert cli.main(["train", str(file), *asked]) == 0
    wrong = cli.main(["train", str(file), "run.dir=other", "algorithm.lamda=3"])
    assert wrong == 2 and "no option algorithm.lamda" in capsys.readouterr().err
