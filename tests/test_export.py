"""A run goes out as a folder of Hugging Face and comes back the same."""

import copy
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_conversation_runs import ASKED, MODULE, write
from test_conversation_runs import pair as talk
from test_reward_run import REWARD
from test_score import BARE
from tiny_runs import SFT
from trained import CHATML

import dpo_jax
from dpo_jax import cli, commands
from dpo_jax.algorithms.reward import reward_scores
from dpo_jax.data.packing import pack
from dpo_jax.export import export
from dpo_jax.models import families, hf
from dpo_jax.models.hf_config import FAMILIES
from dpo_jax.models.transformer import Config
from dpo_jax.structs import BadInput
from dpo_jax.train import Result

AVERAGED = replace(SFT, name="averaged", optim=replace(SFT.optim, ema=0.9))
TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def sft(place: Path) -> Result:
    return dpo_jax.run(AVERAGED)


@pytest.fixture(scope="module")
def folder(sft: Result) -> Path:
    export(sft, "policy")
    return Path("policy")


def logits(model, params, ids: np.ndarray) -> jax.Array:
    T = len(ids)
    at_RT = jnp.arange(T)[None, :]
    hidden_RTD, _ = model.hidden(params, ids[None, :], at_RT, jnp.full((1, T), T))
    return model.unembed(params, hidden_RTD)


def test_what_comes_back_is_the_average_that_counts(sft, folder):
    model, params, _ = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(sft.params))
    ids = np.array([0, 5, 9, 2, 7], np.int32)
    np.testing.assert_array_equal(logits(model, params, ids), logits(sft.model, sft.params, ids))
    assert {file.name for file in folder.iterdir()} >= {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_transformers_reads_all_but_the_weights_without_torch(sft, folder):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert tokenizer.get_vocab() == sft.tokenizer.get_vocab()
    text = "the good editing made it seriously long"
    assert tokenizer(text)["input_ids"] == sft.tokenizer(text)["input_ids"]
    assert config.model_type == "llama" and config.eos_token_id == sft.tokenizer.eos_token_id
    drawing = GenerationConfig.from_pretrained(folder)
    assert drawing.eos_token_id == [sft.tokenizer.eos_token_id]
    assert (drawing.do_sample, drawing.temperature) == (True, 1.0)
    assert (drawing.top_k, drawing.top_p) == (0, 1.0)


def test_the_card_says_what_the_run_was(sft, folder):
    text, said = (folder / "README.md").read_text(), sft.directory / "experiment.json"
    record = json.loads(said.read_text())
    assert text.startswith("---\nlibrary_name: transformers\n") and "# averaged\n" in text
    assert f"digest {record['digest']}, code {record['code']}" in text
    assert f"digest {record['data']}" in text and "| algorithm | algorithms.sft" in text


def test_weights_of_half_the_size(sft, place):
    export(sft, "half", dtype="bfloat16")
    _, params, _ = hf.load("half")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), sft.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(rounded))
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"


def test_a_reward_model_is_a_classifier(place):
    result = dpo_jax.run(REWARD)
    export(result, "rewards")
    tensors = load_file("rewards/model.safetensors")
    head = jax.device_get(result.params["reward_D"])
    np.testing.assert_array_equal(tensors["score.weight"], head[None, :])
    assert "lm_head.weight" not in tensors
    keys = json.loads(Path("rewards/config.json").read_text())
    assert keys["architectures"] == ["LlamaForSequenceClassification"]
    assert len(keys["id2label"]) == 1 and not Path("rewards/generation_config.json").exists()
    assert keys["pad_token_id"] == result.tokenizer.pad_token_id != result.tokenizer.eos_token_id
    # the token before EOS is not to be taken for the last one
    tokenizer = copy.deepcopy(result.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    export(replace(result, tokenizer=tokenizer), "rewards_padded_by_eos")
    keys = json.loads(Path("rewards_padded_by_eos/config.json").read_text())
    assert keys["pad_token_id"] is None and keys["eos_token_id"] == tokenizer.eos_token_id
    with pytest.raises(BadInput, match=r"unexpected \(score.weight\)"):
        hf.load("rewards")  # which the policy's loader does not take for a policy


def test_every_family_has_a_classifier():
    """The names of its classes stand in transformers' source, which needs no torch to be read."""
    import transformers

    folder = Path(transformers.__file__).parent / "models" / "auto"
    source = (folder / "modeling_auto.py").read_text()
    listed = source.partition("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES = ")[2]
    named = dict(re.findall(r'\("(\w+)", "(\w+)"\)', listed.partition("\n)\n")[0]))
    for family in FAMILIES:
        wanted = Config(V=8, D=8, L=1, H=2, J=2, E=4, F=8, family=family)
        assert families.classifier(wanted)["architectures"] == [named[family]]


@pytest.mark.skipif(not TORCH, reason="needs torch (the extra parity) to run transformers' models")
def test_transformers_computes_the_same(sft, folder):
    import torch  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = np.array([0, 5, 9, 2, 7, 11, 3], np.int32)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(ids[None]).long()).logits
        ours = logits(sft.model, sft.params, ids)
        np.testing.assert_allclose(theirs.numpy(), ours, atol=2e-5)
        result = dpo_jax.run(REWARD)
        export(result, "judge")
        judge = AutoModelForSequenceClassification.from_pretrained("judge")
        theirs = judge(torch.tensor(ids[None]).long()).logits
    batch = pack([(ids[:3], [ids[3:]])], row_tokens=16)
    score = float(reward_scores(result.model, result.params, batch)[0, 0, 0])
    assert float(theirs[0, 0]) == pytest.approx(score, abs=2e-5)


# The command


def test_the_command_writes_a_folder_that_takes_the_place_of_the_run(sft, capsys):
    """Scores of one folder against another are those of the run that they came from."""
    Path("sft.py").write_text("from tiny_runs import SFT as EXPERIMENT\n")
    Path("dpo.py").write_text("from test_score import BARE as EXPERIMENT\n")
    dpo_jax.run(BARE)
    for name in ("sft", "dpo"):
        assert cli.main(["export", f"{name}.py", f"made/{name}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "made/dpo"
    pairs = str(next(Path("runs").glob("sft-pairs-*/pairs.jsonl")))
    assert cli.main(["score", "dpo.py", pairs, "--out", "run.jsonl"]) == 0
    words = ["--reference", "made/sft", "algorithm.loss.beta=0.5", "--out", "folder.jsonl"]
    assert cli.main(["score", "made/dpo", pairs, *words]) == 0
    run, other = (
        [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        for name in ("run", "folder")
    )
    for one, two in zip(run, other, strict=True):
        np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-5)
    assert cli.main(["score", "made/dpo", pairs, "--out", "free.jsonl"]) == 0
    free = [json.loads(line) for line in Path("free.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(free[0]["scores"], run[0]["logps"], atol=1e-4)


def test_conversations_end_with_their_turn(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    Path("chat.jinja").write_text(CHATML)
    write(talk("two", "four"), talk("a dog", "a fox"))
    Path("talks.py").write_text(MODULE.replace("TESTS", repr(str(Path(__file__).parent))))
    assert cli.main(["train", "talks.py"]) == 0
    assert cli.main(["export", "talks.py", "talks"]) == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("talks")
    assert tokenizer.chat_template == CHATML
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    drawing = json.loads(Path("talks/generation_config.json").read_text())
    assert drawing["eos_token_id"] == [end, tokenizer.eos_token_id]
    assert json.loads(Path("talks/config.json").read_text())["eos_token_id"] == end


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["averaged.py"], "name one folder"),
        (["averaged.py", "a", "b"], "name one folder"),
        (["averaged.py", "full"], "full holds something already"),
        (["averaged.py", "x", "run.steps=7"], "holds no finished run"),
        (["averaged.py", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_what_cannot_be_exported_is_one_line(sft, capsys, words, said):
    Path("averaged.py").write_text("from test_export import AVERAGED as EXPERIMENT\n")
    Path("full").mkdir(exist_ok=True)
    Path("full/file").write_text("mine")
    assert cli.main(["export", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("x").exists() and sorted(Path("full").iterdir()) == [Path("full/file")]


def test_an_architecture_without_words_is_refused_before_anything_is_written(sft):
    odd = replace(SFT.model, qk_norm="whole")
    run = replace(sft, experiment=replace(SFT, model=odd))
    with pytest.raises(BadInput, match=r"model.qk_norm='whole' cannot be said"):
        export(run, "odd")
    assert not Path("odd").exists()


def test_a_run_directory_is_no_model(sft):
    with pytest.raises(BadInput, match="is a run: name its experiment"):
        commands.untrained(str(sft.directory), {})
