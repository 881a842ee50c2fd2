"""`dpo-jax sample`: prompts from a pipe, the terminal or a file, by a run or a folder."""

import io
import json
import sys
from pathlib import Path

import pytest
from test_conversation_runs import MODULE, write
from test_conversation_runs import pair as talk
from tiny_runs import SFT
from trained import CHATML

import dpo_jax
from dpo_jax import cli
from dpo_jax.commands import names_model
from dpo_jax.experiment import Evaluation, load
from dpo_jax.export import export
from dpo_jax.structs import BadInput
from dpo_jax.train import Result


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def sft(place: Path) -> Result:
    Path("sft.py").write_text("from tiny_runs import SFT as EXPERIMENT\n")
    return dpo_jax.run(SFT)


@pytest.fixture(scope="module")
def worth(sft) -> Result:
    """A run whose evaluation has prompts and a reward."""
    Path("worth.py").write_text(
        "from dataclasses import replace\nfrom functools import partial\nimport tiny_runs\n"
        "from dpo_jax.experiment import Evaluation\nfrom dpo_jax.worlds import sentiment\n"
        "EXPERIMENT = replace(tiny_runs.SFT, evaluation=Evaluation(max_tokens=9, "
        "prompts=partial(sentiment.prompts, n=4, seed=5), rewards=(tiny_runs.words,)))\n"
    )
    return dpo_jax.run(load("worth.py").EXPERIMENT)


@pytest.fixture
def say(monkeypatch, capsys):
    """Run the command with lines on stdin; its output, as JSON where that came by a pipe."""

    def run(text: str, *words: str, terminal: bool = False):
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(text))
        capsys.readouterr()
        assert cli.main(["sample", *words]) == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()
        return lines if terminal else [json.loads(line) for line in lines]

    return run


def test_a_prompt_a_line(sft, say):
    greedy = ["evaluation.temperature=0", "evaluation.max_tokens=5"]
    rows = say("the film\n\nthe editing was\n", "sft.py", *greedy)
    assert [row["prompt"] for row in rows] == ["the film", "the editing was"]
    # the likeliest words are the same every time, and in any company
    assert say("the editing was", "sft.py", *greedy) == rows[1:]
    one = say("the film", "sft.py", "evaluation.top_k=1", "evaluation.max_tokens=5")
    assert one == rows[:1]
    many = say("the film", "sft.py", "evaluation.samples=3", *greedy)
    assert [row["response"] for row in many] == [rows[0]["response"]] * 3


def test_line_by_line_on_a_terminal(sft, say):
    greedy = ["evaluation.temperature=0", "evaluation.max_tokens=5"]
    rows = say("the film\nthe editing was\n", "sft.py", *greedy)
    lines = say("the film\n\nunknown\nthe editing was\n", "sft.py", *greedy, terminal=True)
    said = [line.lstrip("> ") for line in lines if line.strip("> ")]
    assert said == [row["response"] for row in rows]


def test_a_folder_says_what_its_run_says(sft, say):
    export(sft, "policy")
    greedy = ["evaluation.temperature=0", "evaluation.max_tokens=5"]
    for row, other in zip(
        say("the film\nwe cheered during this\n", "sft.py", *greedy),
        say("the film\nwe cheered during this\n", "policy", *greedy),
        strict=True,
    ):
        assert row["response"] == other["response"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [([], "message"), (["--chat"], "message"), (["--text"], "text")],
)
def test_a_line_is_a_message_where_the_data_are_conversations(place, say, words, asked):
    Path("chat.jinja").write_text(CHATML)
    write(talk("two", "four"), talk("a dog", "a fox"))
    Path("talks.py").write_text(MODULE.replace("TESTS", repr(str(Path(__file__).parent))))
    assert cli.main(["train", "talks.py"]) == 0
    (row,) = say("why\n", "talks.py", "evaluation.prompts=-", "evaluation.rewards=()", *words)
    assert row["prompt"] == ([{"role": "user", "content": "why"}] if asked == "message" else "why")


def test_a_chat_template_alone_makes_no_conversation(place, say):
    """The tokenizer has one, and the run's data are text."""
    write_run = """
from functools import partial
from dataclasses import replace
import trained
from dpo_jax.worlds import sentiment
from tiny_runs import SFT
from dpo_jax.experiment import Data

EXPERIMENT = replace(SFT, name="texts", run=replace(SFT.run, steps=1), data=Data(
    source=partial(sentiment.reviews, n=16, seed=0), tokenizer=trained.byte_level,
    template="{{ messages }}", groups=4, row_tokens=256,
), model=replace(SFT.model, V=600))
"""
    Path("texts.py").write_text(write_run)
    assert cli.main(["train", "texts.py"]) == 0
    (row,) = say("why\n", "texts.py", "evaluation.max_tokens=2")
    assert row["prompt"] == "why"


def test_the_best_of_several(worth, say):
    """Of the samples that are printed without --best-of, three by three, the longest."""
    rows = say("", "worth.py", "evaluation.samples=6")
    best = say("", "worth.py", "evaluation.samples=2", "--best-of", "3")
    assert len(rows) == 24 and len(best) == 8
    for i, row in enumerate(best):
        some = rows[3 * i : 3 * i + 3]
        assert row in some and row["words"] == max(each["words"] for each in some)
    assert sum(row["words"] for row in best) > sum(row["words"] for row in rows) / 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["worth.py", "--best-of", "0"], "--best-of 0: give 1 or more"),
        (["sft.py", "--best-of", "4"], "--best-of 4: give 1 or more, and evaluation.rewards"),
        (["worth.py", "--best-of", "4", "evaluation.prompts=-"], "rewards read records"),
        (["sft.py"], "no prompts: give evaluation.prompts=FILE.jsonl, or a prompt a line"),
        (["sft.py", "--chat"], "no chat template"),
        (["sft.py", "--chat", "--text"], "give one of them"),
        (["sft.py", "--chat", "evaluation.prompts=a.jsonl"], "from the terminal or a pipe"),
        (["reward.py"], "reward is a reward model: it has no policy to sample from"),
        (["none/here.py"], "no file none/here.py"),
        (["runs"], "runs/config.json"),
        (["sft.py", "FILE"], "'FILE' is no override"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(sft, worth, monkeypatch, capsys, words, said):
    Path("reward.py").write_text("from test_reward_run import REWARD as EXPERIMENT\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a line\n" if "--chat" in words else "\n"))
    assert cli.main(["sample", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_models_and_experiments_are_told_apart(place):
    Path("some").mkdir(exist_ok=True)
    Path("some/experiment.py").write_text("")
    for word in ("experiments/x.py", "experiments/x.py:SMOKE", "experiments.x", "some/experiment"):
        assert not names_model(word)
    for word in ("Qwen/Qwen3-0.6B", "some", "/data/models/llama", "./some"):
        assert names_model(word)


def test_a_cut_that_keeps_nothing_is_refused():
    with pytest.raises(BadInput, match=r"top_p=0.0: it must be above 0"):
        Evaluation(prompts="x.jsonl", top_p=0.0)
