"""Experiments on the hub's models and data in small: each trains offline, from end to end."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

import dpo_jax
from dpo_jax import cli, experiment, parts
from dpo_jax.data import bpe
from dpo_jax.experiment import Experiment, override
from dpo_jax.models import hf
from dpo_jax.models.transformer import decoder
from dpo_jax.smoke import MODELS, smoke
from dpo_jax.structs import BadInput
from dpo_jax.worlds import lookalikes

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
LARGE = [path for path in sorted(FOLDER.glob("[!_]*.py")) if "\nSMOKE = " in path.read_text()]
DPO = [path for path in LARGE if not path.stem.endswith("_sft")]

ROUNDING = 1e-6  # in bfloat16 too, for policy and reference round alike


def chain(value: Experiment) -> list[Experiment]:
    """An experiment and its parents, as far as they are experiments."""
    parent = value.parent
    return [value, *(chain(parent) if isinstance(parent, Experiment) else [])]


def options(value: Experiment) -> dict:
    """What a smoke run keeps of each."""
    kept = ("mesh", "dtype", "remat", "microbatches")
    return {name: getattr(value.run, name) for name in kept} | {
        "algorithm": experiment.describe(value)["algorithm"],
        "truncation": value.data.truncation,
        "schedule": value.optim.schedule,
        "optimizer": value.optim.optimizer,
    }


@pytest.mark.parametrize("path", LARGE, ids=[path.stem for path in LARGE])
def test_a_smoke_is_the_experiment_in_small(path: Path):
    module = experiment.load(str(path))
    large, small = chain(module.EXPERIMENT), chain(module.SMOKE)
    assert [options(value) for value in small] == [options(value) for value in large]
    root = large[-1].parent
    assert isinstance(root, str) and small[-1].parent is None
    assert small[-1].model == MODELS[root]
    assert "hub:" not in json.dumps(experiment.describe(module.SMOKE))


@pytest.mark.parametrize("path", DPO, ids=[path.stem for path in DPO])
def test_a_smoke_trains_offline(path: Path, place: Path):
    """With its parents, on the mesh of eight devices; at step 0 policy and reference agree."""
    result = dpo_jax.run(experiment.load(f"{path}:SMOKE").EXPERIMENT)
    lines = [row for row in tiny_runs.rows(result.directory) if "loss" in row]
    assert len(lines) == 3 and all(np.isfinite(row["loss"]) for row in lines)
    np.testing.assert_allclose(lines[0]["loss"], np.log(2), atol=ROUNDING)
    assert lines[-1]["rewards/margins"] != 0 and "eval_rewards/accuracies" in result.metrics


def test_a_smoke_trains_by_the_command(place: Path, capsys):
    assert cli.main(["train", f"{FOLDER}/hh_sft.py:SMOKE", "run.dir=by_command"]) == 0
    assert "prompts cut" in capsys.readouterr().err
    assert [row["step"] for row in tiny_runs.rows("by_command") if "loss" in row] == [1, 2, 3]


def test_what_is_like_nothing_is_refused():
    base = experiment.load(str(FOLDER / "ultrafeedback_qwen3.py")).EXPERIMENT
    for change in ({"data.source": "hub:a/b"}, {"parent": "a/b"}, {"data.tokenizer": "a/b"}):
        with pytest.raises(BadInput, match="nothing is like a/b; there is "):
            smoke(override(base, change))


def test_the_real_path_from_a_folder(place: Path):
    """The experiment itself, of which only model, tokenizer and data are files here."""
    name = "allenai/Llama-3.1-Tulu-3-8B-SFT"
    module = experiment.load(str(FOLDER / "ultrafeedback_zephyr.py"))
    tokenizer = parts.tokenizer(module.SMOKE)
    hf.save("llama", MODELS[name], decoder(MODELS[name]).init(_key()))
    tokenizer.save_pretrained("llama")
    rows = lookalikes.ultrafeedback_h4(n=200, seed=3)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"parent": "llama", "data.tokenizer": "llama", "data.source": "pairs.jsonl"}
    short = {"evaluation.source": None, "run.steps": 1, "optim.warmup": 0, "run.microbatches": 1}
    result = dpo_jax.run(override(module.EXPERIMENT, given | short | {"data.row_tokens": 160}))
    (line,) = [row for row in tiny_runs.rows(result.directory) if "loss" in row]
    np.testing.assert_allclose(line["loss"], np.log(2), atol=ROUNDING)
    assert result.tokenizer.chat_template == lookalikes.TULU3
    shutil.rmtree("llama")


def _key():
    import jax

    return jax.random.key(0)


# The made-up rows


@pytest.mark.parametrize("name", lookalikes.ROWS)
def test_rows_are_the_same_for_a_seed_and_more_change_none(name: str):
    rows = lookalikes.ROWS[name]
    few = list(rows(n=5, seed=2))
    assert json.dumps(few) == json.dumps(list(rows(n=9, seed=2))[:5])
    assert json.dumps(few) != json.dumps(list(rows(n=5, seed=3)))


COLUMNS = {
    "Anthropic/hh-rlhf": {"chosen", "rejected"},
    "trl-lib/tldr": {"prompt", "completion"},
    "trl-lib/tldr-preference": {"prompt", "chosen", "rejected"},
    "trl-lib/ultrafeedback_binarized": {"chosen", "rejected", "score_chosen", "score_rejected"},
    "HuggingFaceH4/ultrafeedback_binarized": {
        *("prompt", "prompt_id", "chosen", "rejected"),
        *("messages", "score_chosen", "score_rejected"),
    },
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": {
        *("id", "prompt", "chosen", "rejected", "source"),
    },
}


@pytest.mark.parametrize("name", lookalikes.ROWS)
def test_rows_have_the_published_columns(name: str):
    assert {frozenset(row) for row in lookalikes.ROWS[name](n=20, seed=0)} == {
        frozenset(COLUMNS[name])
    }


def test_templates_write_what_those_of_the_models_write():
    talk = [
        {"role": role, "content": content}
        for role, content in [("system", "be"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    learn = partial(bpe.byte_level, source=partial(lookalikes.sentences, n=8, seed=0), size=300)
    qwen, tulu = (
        learn(**lookalikes.TOKENIZERS[name])
        for name in ("Qwen/Qwen3-0.6B", "allenai/Llama-3.1-Tulu-3-8B-SFT")
    )
    said = [{"role": "assistant", "content": "d"}]
    assert qwen.apply_chat_template(talk + said, tokenize=False) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n"
    )
    head = (
        "<|begin_of_text|><|system|>\nbe\n<|user|>\na\n<|assistant|>\nb<|end_of_text|>\n"
        "<|user|>\nc\n<|assistant|>\n"
    )
    prompt = tulu.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert prompt == head
    assert tulu.apply_chat_template(talk + said, tokenize=False) == f"{head}d<|end_of_text|>"
