"""What a run scores is what its training measured, for every kind of run and every way to score."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_reward_run import REWARD
from tiny_runs import EXPERIMENT as DPO
from tiny_runs import SFT

import dpo_jax
from dpo_jax import agreement, cli, losses, score
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reference import soft_update
from dpo_jax.algorithms.scores import length_normalized
from dpo_jax.data import views
from dpo_jax.data.packing import pack
from dpo_jax.data.sources import read
from dpo_jax.data.template import tokenize
from dpo_jax.experiment import Evaluation, Experiment
from dpo_jax.logprobs import naive_token_logps
from dpo_jax.structs import BadInput, Group
from dpo_jax.train import Result

BARE = replace(
    DPO, run=replace(DPO.run, eval_every=0), evaluation=Evaluation(DPO.evaluation.source)
)


def trained_with(name: str, **keywords) -> Experiment:
    return replace(BARE, name=name, algorithm=partial(preference, **keywords))


@pytest.fixture(scope="module")
def dpo(place: Path) -> Result:
    return dpo_jax.run(BARE)


@pytest.fixture(scope="module")
def trained(place: Path) -> Result:
    return dpo_jax.run(REWARD)


@pytest.fixture(scope="module")
def pairs(dpo: Result) -> str:
    return str(next(Path("runs").glob("sft-pairs-*/pairs.jsonl")))


def table(judge: score.Judge, source: str, **options) -> dict[str, float]:
    scored = [score.judged(row) for row in score.scores(judge, source, **options)]
    return agreement.rows(scored)[-1]


def assert_as_evaluated(result: Result, source: str) -> None:
    found = table(score.judge(result), source)
    for ours, name in (("accuracy", "accuracies"), ("ties", "ties"), ("margin", "margins")):
        assert found[ours] == pytest.approx(result.metrics[f"eval_rewards/{name}"], abs=2e-5)
    for side in ("chosen", "rejected"):
        assert found[side] == pytest.approx(result.metrics[f"eval_rewards/{side}"], abs=2e-5)
    assert abs(found["margin"]) > 1e-3


def test_implicit_rewards_are_those_of_training(dpo, pairs):
    assert_as_evaluated(dpo, pairs)


@pytest.mark.parametrize(
    "keywords",
    [
        {"loss": partial(losses.simpo, beta=2.0, gamma=0.5)},
        {"loss": partial(losses.orpo, lam=0.1)},
        {"loss": partial(losses.dpo, beta=0.5), "score": length_normalized},
        {
            "loss": partial(losses.dpo, beta=0.5),
            "reference": partial(soft_update, alpha=0.5, every=4),
        },
        {
            "loss": partial(losses.dpo, beta=0.5),
            "reference": partial(soft_update, alpha=0.5, every=3),
        },
    ],
    ids=["simpo", "orpo", "length_normalized", "moving", "moving at the end"],
)
def test_those_of_other_losses_scores_and_references_too(dpo, pairs, keywords):
    assert_as_evaluated(dpo_jax.run(trained_with("other", **keywords)), pairs)


def test_a_reward_model_scores_by_its_head(place):
    result = dpo_jax.run(REWARD)
    ranked = next(
        str(f) for f in Path("runs").glob("sft-pairs-*/pairs.jsonl") if "responses" in f.read_text()
    )
    assert_as_evaluated(result, ranked)
    found = table(score.judge(result), ranked)
    assert -1 <= found["tau"] <= 1 and found["best"] <= found["accuracy"]
    with pytest.raises(BadInput, match="by its reward head"):
        score.judge(result, per_token=True)


def test_every_record_alone_and_slowly(dpo, pairs):
    """beta (log p - log p_ref) of one record in a row, through the full logits."""
    records, _ = read(pairs)
    groups, _ = tokenize(records, dpo.tokenizer, row_tokens=128)
    sft = dpo_jax.run(SFT)
    rows = score.scores(score.judge(dpo), pairs)
    assert [row["record"] for row in rows] == [group.record for group in groups]
    for row, group in list(zip(rows, groups, strict=True))[:6]:
        batch = pack([group], row_tokens=128)
        sums = [
            np.bincount(
                batch.slot_RN[0][batch.slot_RN[0] >= 0],
                np.asarray(naive_token_logps(dpo.model, params, batch))[0][batch.slot_RN[0] >= 0],
            )
            for params in (dpo.params, sft.params)
        ]
        np.testing.assert_allclose(row["scores"], 0.5 * (sums[0] - sums[1]), atol=1e-4)
        np.testing.assert_allclose(row["logps"], sums[0], atol=1e-4)
        np.testing.assert_allclose(row["ref_logps"], sums[1], atol=1e-4)
        assert row["lengths"] == [len(response) for response in group.responses]
        assert row["where"] == records[row["record"]]["where"]


def test_without_reference_and_by_length(dpo, pairs):
    whole = score.scores(score.judge(dpo), pairs)
    free = score.judge(dpo, reference_free=True)
    each = score.judge(dpo, per_token=True)
    both = score.judge(dpo, reference_free=True, per_token=True)
    assert (free.says, each.says) == ("0.5 log p", "0.5 (log p - log p_ref) / tokens")
    assert both.says == "0.5 log p / tokens"
    names = ("scores", "logps", "lengths")
    for row, one, two, three in zip(
        whole, *(score.scores(judge, pairs) for judge in (free, each, both)), strict=True
    ):
        scores, logps, lengths = (np.array(row[name]) for name in names)
        np.testing.assert_allclose(one["scores"], 0.5 * logps, rtol=1e-5)
        np.testing.assert_allclose(two["scores"], scores / lengths, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(three["scores"], 0.5 * logps / lengths, rtol=1e-5)
    sft = score.judge(dpo_jax.run(SFT))
    assert sft.says == "log p"
    np.testing.assert_allclose(
        [row["scores"] for row in score.scores(sft, pairs)],
        [row["ref_logps"] for row in whole],
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("keywords", "options", "said"),
    [
        ({"loss": partial(losses.simpo, beta=2.0, gamma=0.5)}, {"per_token": True}, "simpo weighs"),
        (
            {"loss": partial(losses.dpo, beta=0.5), "score": length_normalized},
            {"per_token": True},
            "length_normalized weighs",
        ),
        ({"loss": partial(losses.orpo, lam=0.1)}, {"reference_free": True}, "no reference"),
    ],
)
def test_an_option_without_effect_is_refused(dpo, keywords, options, said):
    other = replace(dpo, experiment=trained_with("other", **keywords))
    with pytest.raises(BadInput, match=said):
        score.judge(other, **options)


def test_lone_responses_and_the_pairs_they_came_from(dpo, pairs):
    """A run on lone responses reads a file of pairs as such; plain, as it stands."""
    kto = replace(
        trained_with("kto", loss=partial(losses.kto, beta=0.5)),
        data=replace(BARE.data, arrange=views.unpaired),
    )
    judge = score.judge(dpo_jax.run(kto))
    rows, plain = (score.scores(judge, pairs, plain=plain) for plain in (False, True))
    assert [row["label"] for row in rows[:2]] == [1.0, 0.0] and len(rows) == 2 * len(plain)
    flat = [x for row in plain for x in row["scores"]]
    np.testing.assert_allclose([row["scores"][0] for row in rows], flat, atol=1e-5)
    assert "low" in table(judge, pairs, plain=True) and "low" not in table(judge, pairs)


# The command


def command(*words: str) -> int:
    Path("dpo.py").write_text("from test_score import BARE as EXPERIMENT\n")
    return cli.main(["score", "dpo.py", *words])


def test_the_command_prints_subsets_and_writes_what_it_found(dpo, pairs, capsys):
    lines = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    with Path("sets.jsonl").open("w") as file:
        for i, line in enumerate(lines):
            file.write(json.dumps(line | {"subset": f"s{i % 2}", "kind": "k"}) + "\n")
    assert command("sets.jsonl", "--out", "new/rows.jsonl", "--json", "new/table.json") == 0
    printed = capsys.readouterr().out
    assert "dpo: 0.5 (log p - log p_ref)" in printed
    found = json.loads(Path("new/table.json").read_text())
    assert [each["subset"] for each in found["rows"]] == ["s0", "s1", "all", "mean"]
    assert found["rows"][2]["accuracy"] == pytest.approx(dpo.metrics["eval_rewards/accuracies"])
    assert f"{found['rows'][0]['low']:.3f}..{found['rows'][0]['high']:.3f}" in printed
    rows = [json.loads(line) for line in Path("new/rows.jsonl").read_text().splitlines()]
    assert [row["subset"] for row in rows] == [f"s{row['record'] % 2}" for row in rows]
    assert rows[0]["source"] == "sets.jsonl" and rows[0]["where"] == "sets.jsonl:1"
    assert command("sets.jsonl", "--subset", "kind", "--json", "one.json") == 0
    assert [row["subset"] for row in json.loads(Path("one.json").read_text())["rows"]] == ["all"]
    # of several files each is a subset, where records name none
    Path("b.jsonl").write_text(Path(pairs).read_text())
    assert command(pairs, "b.jsonl", "--json", "two.json") == 0
    subsets = [row["subset"] for row in json.loads(Path("two.json").read_text())["rows"]]
    assert subsets == [pairs, "b.jsonl", "all", "mean"]


def test_without_a_file_and_held_out_data_there_is_nothing_to_score(dpo, capsys):
    Path("sft.py").write_text("from tiny_runs import SFT as EXPERIMENT\n")
    assert cli.main(["score", "sft.py"]) == 2
    assert "name a file of records" in capsys.readouterr().err


def test_without_a_file_the_held_out_data_are_scored(trained, capsys):
    """Of a reward model, as its evaluation says; the figure shows the pairs of the table."""
    Path("ranked.py").write_text("from test_reward_run import REWARD as EXPERIMENT\n")
    assert cli.main(["score", "ranked.py", "--figure", "new/r.png", "--json", "held.json"]) == 0
    printed, found = capsys.readouterr().out, json.loads(Path("held.json").read_text())
    (table,) = found["rows"]
    assert found["sources"] == ["evaluation.source"]
    assert table["accuracy"] == pytest.approx(trained.metrics["eval_rewards/accuracies"])
    assert f"{table['ece']:.3f}" in printed and "ece" in printed
    bins, count = found["reliability"], 3 * table["n"]
    assert sum(each["n"] for each in bins) == count
    misses = [each["n"] * abs(each["accuracy"] - each["confidence"]) for each in bins]
    assert table["ece"] == pytest.approx(sum(misses) / count)
    assert Path("new/r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["PAIRS", "--figure", "runs"], "runs: cannot be written (a folder)"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["ask.jsonl"], "ask.jsonl:1: the record has no response to score"),
        (["PAIRS", "--subset", "kind"], "--subset kind: no record of"),
        (["PAIRS", "--out", "runs"], "runs: cannot be written (a folder)"),
        (["PAIRS", "--row-tokens", "2"], "none of"),
        (["PAIRS", "--reference", "empty"], "empty/config.json"),
        (["PAIRS", "run.steps=9"], "holds no finished run"),
        (["PAIRS", "--refrence-free"], "nearest is"),
    ],
)
def test_what_cannot_be_scored_is_one_line(dpo, pairs, capsys, words, said):
    Path("ask.jsonl").write_text('{"prompt": "the film"}\n')
    Path("empty").mkdir(exist_ok=True)
    before = sorted(Path().rglob("*"))
    assert command(*(pairs if word == "PAIRS" else word for word in words)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("dpo-jax: error: ") and said in error[-1]
    assert [path for path in sorted(Path().rglob("*")) if path.name != "dpo.py"] == [
        path for path in before if path.name != "dpo.py"
    ]


def test_levels():
    """What the data says: order, a tie of two, equal scores of a list."""
    ids = np.ones(1, np.int32)

    def group(count: int, **fields):
        return score.levels(Group(ids, [ids] * count, **fields))

    assert group(2) == [2, 1] and group(3) == [3, 2, 1]
    assert group(2, soft_label=0.5) == [0, 0]
    assert group(2, soft_label=0.7) == [2, 1]
    assert group(3, scores=np.array([[4.0], [1.0], [1.0]])) == [4, 1, 1]
    named = {"criteria": ("a", "b"), "scores": np.array([[1.0, 2], [3, 4], [5, 6]])}
    assert group(3, **named) == [3, 2, 1]
