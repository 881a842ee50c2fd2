"""The curves of the frontier against brute force, its words, and one whole small frontier."""

import json
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tiny import MODEL
from tiny_runs import EXPERIMENT, SFT, rows

from dpo_jax import frontier
from dpo_jax.evaluate import Completions, mean_and_error
from dpo_jax.experiment import Evaluation, override
from dpo_jax.frontier import curves
from dpo_jax.frontier.curves import Curve, Point, best_of_n, compared, gap, optimal_tilt, run_curve
from dpo_jax.structs import BadInput
from dpo_jax.train import Result

BETAS = tuple(override(EXPERIMENT, {"algorithm.loss.beta": beta}) for beta in (0.2, 1.0))


def curve(name: str, *points: tuple[float, float]) -> Curve:
    """A curve through (kl, reward) pairs."""
    return Curve(name, tuple(Point(reward, 0.1, kl, 0.1, "step") for kl, reward in points))


# Best of n


def test_best_of_n_by_hand():
    """Of 0 to 7 the j-th is the higher of a pair in j of 28 choices."""
    score_BK = np.array([[3.0, 0, 7, 4, 1, 2, 6, 5], [2, 2, 2, 2, 2, 2, 2, 2]])
    (point,) = best_of_n(score_BK).points
    expected = sum(j * j for j in range(8)) / 28
    assert point.label == "n 2"
    assert point.reward == pytest.approx((expected + 2) / 2)
    assert point.reward_se == pytest.approx(abs(expected - 2) / 2)  # of two prompt means
    assert point.kl == pytest.approx(np.log(2) - 1 / 2)


def test_best_of_n_is_the_exact_expectation_within_its_error():
    """E max = sum_v v (F(v)^n - F(v-)^n) for independent draws of a known distribution."""
    values, p = np.array([-1.0, 0.0, 2.0, 5.0]), np.array([0.4, 0.3, 0.2, 0.1])
    score_BK = np.random.default_rng(0).choice(values, p=p, size=(400, 64))
    points = best_of_n(score_BK).points
    assert [point.label for point in points] == ["n 2", "n 4", "n 8", "n 16"]
    for point, n in zip(points, (2, 4, 8, 16), strict=True):
        below = np.concatenate([[0.0], np.cumsum(p)])
        chance = np.diff(below**n)
        exact = values @ chance
        deviation = np.sqrt(values**2 @ chance - exact**2)
        assert abs(point.reward - exact) < 4 * point.reward_se
        # all choices of n say more than those without a score in common
        assert point.reward_se < 1.1 * deviation / np.sqrt(score_BK.size / n)
        assert point.kl == pytest.approx(np.log(n) - (n - 1) / n)


# The optimum


def test_the_tilt_is_exact_where_the_samples_enumerate_the_distribution():
    values, counts = np.array([-2.0, 0.0, 1.0, 1.5]), np.array([10, 26, 16, 12])
    score_BK = np.repeat(values, counts)[None, :] + np.array([[0.0], [7.0]])  # shifts cancel
    found = optimal_tilt(score_BK, (4.0, 1.0, 0.3)).points
    assert [point.label for point in found] == ["lambda 4.0", "lambda 1.0", "lambda 0.3"]
    p = counts / counts.sum()
    for point, value in zip(found, (4.0, 1.0, 0.3), strict=True):
        tilted = p * np.exp(values / value) / (p @ np.exp(values / value))
        assert point.reward == pytest.approx(tilted @ values + 3.5)
        assert point.kl == pytest.approx(tilted @ np.log(tilted / p))
        assert point.kl_se == pytest.approx(0, abs=1e-9)


def test_lambdas_that_leave_too_few_samples_are_left_out():
    """As lambda falls the weights gather on the best samples: 12 of them do, 4 do not."""
    enough = np.repeat([0.0, 1.0], [52, 12])[None, :]
    few = np.repeat([0.0, 1.0], [60, 4])[None, :]
    lambdas = (1.0, 0.1, 0.01)
    assert len(optimal_tilt(enough, lambdas).points) == 3
    assert [point.label for point in optimal_tilt(few, lambdas).points] == ["lambda 1.0"]
    last = optimal_tilt(enough, lambdas).points[-1]
    assert (last.reward, last.kl) == (pytest.approx(1.0), pytest.approx(np.log(64 / 12)))
    mostly = np.concatenate([enough] * 19 + [few])  # one prompt in twenty may be poor
    assert len(optimal_tilt(mostly, lambdas).points) == 3
    assert len(optimal_tilt(np.concatenate([enough] * 4 + [few]), lambdas).points) == 1


# Words and numbers


def test_where_runs_lie_against_best_of_n():
    """Between the reference (0, 1) and n = 2 at (0.2, 3), at KL 0.1, best-of-n is worth 2."""
    best = curve("best", (0.2, 3.0), (0.6, 4.0))
    low = curve("low", (0.0, 1.0), (0.1, 1.5))
    high = curve("high", (0.0, 1.0), (0.4, 3.9))
    far = curve("far", (0.0, 1.0), (0.7, 9.0))
    assert compared([low, high, far], best) == (
        "At their last step the runs lie below best-of-n at equal KL: low (-0.50); "
        "at or above best-of-n at equal KL: high (+0.40); "
        "beyond the KL of best-of-n at equal KL: far."
    )
    assert compared([low], best).count("best-of-n") == 1
    assert gap(low, low.points[0], best) == pytest.approx(-0.5)
    assert gap(far, low.points[0], best) is None


def test_settings_are_members_but_for_their_seeds():
    def names(members):
        return [each.name for each in frontier.settings(members)]

    assert names(BETAS) == ["beta=0.2", "beta=1.0"]
    rates = [override(each, {"optim.learning_rate": 1e-3 * i}) for i, each in enumerate(BETAS, 1)]
    assert names(rates) == ["beta=0.2", "beta=1.0"]  # the algorithm's alone
    rates = [override(EXPERIMENT, {"optim.learning_rate": rate}) for rate in (1e-3, 2e-3)]
    assert names(rates) == ["learning_rate=0.001", "learning_rate=0.002"]
    seeds = [override(each, {"run.seed": seed}) for seed in (0, 1) for each in BETAS]
    other = override(EXPERIMENT, {"name": "other", "optim.learning_rate": 1.0})
    found = frontier.settings([*seeds, other])
    assert [each.name for each in found] == ["dpo beta=0.2", "dpo beta=1.0", "other"]
    assert [each.line for each in found] == ["dpo", "dpo", "other"]
    assert [len(each.members) for each in found] == [2, 2, 1]
    assert [found[0].place(epath.Path("x"), 1), found[2].place(epath.Path("x"), 0)] == [
        "x/dpo,beta=0.2/seed=1",
        "x/other",
    ]
    with pytest.raises(BadInput, match="must differ"):
        frontier.settings([EXPERIMENT, EXPERIMENT])


def test_members_that_cannot_be_compared_are_refused_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = BETAS
    unlike = replace(other, evaluation=replace(other.evaluation, max_tokens=5))
    blind = [replace(each, evaluation=Evaluation()) for each in BETAS]
    orphans = [replace(x, parent=None, model=SFT.model) for x in BETAS]
    for members, said in (
        ([one, unlike], "one parent and one evaluation of samples"),
        (blind, "evaluation.prompts and evaluation.rewards"),
        (orphans, "runs with a parent"),
    ):
        with pytest.raises(BadInput, match=said):
            frontier.frontier(members, directory="out", name="x")
    assert list(tmp_path.iterdir()) == []


def test_annotator_accuracy_is_that_of_the_likelier_label(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    lines = [pair | {"p": p} for p in (0.9, 0.2, 0.5)] + [pair]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = replace(EXPERIMENT, evaluation=Evaluation(source=str(file)))
    assert frontier.annotator_accuracy(held) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    # of a tie, and of a ranking of three, p is not that of the one of two that is preferred
    ranking = {"prompt": "a", "responses": ["b", "c", "d"], "p": 0.1}
    for line in (ranking, pair | {"p": 0.1, "soft_label": 0.5}):
        file.write_text(json.dumps(line) + "\n")
        assert frontier.annotator_accuracy(held) is None
    file.write_text(json.dumps(pair) + "\n")
    assert frontier.annotator_accuracy(held) is None


def test_the_curve_of_a_run_is_read_from_its_metrics(tmp_path):
    samples = {"eval_samples/good": 2.0, "eval_samples/good_se": 0.2}
    samples |= {"eval_samples/kl": 1.0, "eval_samples/kl_se": 0.1}
    lines = [{"step": 0, **samples}, {"step": 1, "loss": 0.7}, {"step": 4, **samples}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    result = Result(epath.Path(tmp_path), EXPERIMENT, MODEL, {}, None, {})
    found = run_curve([result], "mine", "good")
    assert found == Curve(
        "mine", (Point(2.0, 0.2, 1.0, 0.1, "step 0"), Point(2.0, 0.2, 1.0, 0.1, "step 4"))
    )
    # a second seed, 4 and 3 where the first has 2 and 1: errors are half the difference
    (tmp_path / "other").mkdir()
    text = text.replace("2.0", "4.0").replace("1.0", "3.0")
    (tmp_path / "other" / "metrics.jsonl").write_text(text)
    other = replace(result, directory=epath.Path(tmp_path / "other"))
    both = run_curve([result, other], "both", "good").points[0]
    assert (both.reward, both.kl, both.label) == (3.0, 2.0, "step 0")
    assert (both.reward_se, both.kl_se) == (pytest.approx(1.0), pytest.approx(1.0))


def test_mean_and_error_by_hand():
    """Row means 2 and 6: mean 4, standard deviation sqrt(8), over sqrt(2) rows: 2."""
    assert mean_and_error(np.array([[1.0, 3.0], [6.0, 6.0]])) == (4.0, pytest.approx(2.0))
    assert mean_and_error(np.array([[1.0, 3.0]])) == (2.0, 0.0)
    done = Completions(
        records=[{"prompt": "a"}, {"prompt": "b"}],
        texts=[["x", "y"], ["z", "w"]],
        rewards={"good": np.array([[1.0, 3.0], [6.0, 6.0]])},
        kl=np.array([[0.0, 1.0], [1.0, 2.0]]),
        finished=np.array([[True, False], [True, True]]),
        tokens=np.array([[2, 5], [3, 2]]),
    )
    assert done.metrics() == {
        "samples/length": 3.0,
        "samples/finished": 0.75,
        "samples/good": 4.0,
        "samples/good_se": pytest.approx(2.0),
        "samples/kl": 1.0,
        "samples/kl_se": pytest.approx(0.5),
    }


# The whole


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("frontier")
    with chdir(folder):
        yield folder


def test_a_whole_frontier(place, monkeypatch, capsys):
    monkeypatch.setattr(curves, "PROMPTS", 4)
    monkeypatch.setattr(curves, "SAMPLES", 32)
    figure = frontier.frontier(BETAS, directory="out", name="tiny")
    printed = capsys.readouterr().out
    assert str(figure) == "out/frontier.png"
    content = Path(figure).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
    record = json.loads(Path("out/frontier.json").read_text())
    names = [curve["name"] for curve in record["curves"]]
    assert names == [
        "reference (SFT)",
        "beta=0.2",
        "beta=1.0",
        "best of n (reference samples)",
        "optimum (importance weights)",
    ]
    start, *runs, best, _ = (curve["points"] for curve in record["curves"])
    assert start[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert [point["label"] for point in best] == ["n 2", "n 4", "n 8"]
    for row, points in zip(record["runs"], runs, strict=True):
        last = rows(f"out/{row['name']}")[-1]
        assert [point["label"] for point in points] == ["step 0", "step 2", "step 4", "step 6"]
        assert points[0] == start[0]  # both start from the reference
        assert (row["reward"], row["kl"]) == (points[-1]["reward"], points[-1]["kl"])
        assert row["reward"] == last["eval_samples/judged"]
        ceiling = row["annotator_accuracy"]
        assert row["accuracy"] == last["eval_rewards/accuracies"]
        assert row["gap_closed"] == pytest.approx((row["accuracy"] - 0.5) / (ceiling - 0.5))
        assert row["name"] in printed
    assert record["reward"] == "judged" and "judged" in printed
    assert "figure: out/frontier.png" in printed
    assert printed.count("[") >= 8  # four prompts, before and after, with their rewards

    frontier.frontier(BETAS, directory="out", name="tiny")
    said = capsys.readouterr().err
    assert all(f"out/{row['name']}: finished before, reused" in said for row in record["runs"])
    assert json.loads(Path("out/frontier.json").read_text()) == record
