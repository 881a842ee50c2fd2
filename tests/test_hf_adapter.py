"""Adapters in PEFT's files: what PEFT would add to the tensors of the model, derived by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from test_families import tensors, write

from dpo_jax.models import hf
from dpo_jax.models.hf_adapter import base_of, load_adapter, save_adapter
from dpo_jax.models.lora import Lora, merged
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import BadInput

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CASES = {  # and modules of a layer that get an adapter
    "llama tied, biases, linear": 7,
    "gpt2": 4,
    "gpt_neox": 4,
    "phi3": 4,
    "gemma3_text": 7,
}
SOME = [("gpt2", ("q", "v")), ("gpt_neox", ("k", "o")), ("phi3", ("up", "v")), ("llama", ("o",))]


def architecture(folder: Path, case: str) -> Config:
    return hf.read_config(epath.Path(write(folder, case)))


def drawn(config, lora: Lora, seed: int = 0) -> dict[str, Any]:
    """Adapters whose B is not zero."""
    shapes = jax.eval_shape(decoder(config, lora=lora).init, jax.random.key(0))["lora"]["layers"]
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in shapes.items()}
    return {"lora": {"layers": values}}


def added(folder: Path, before: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors after PEFT's rule: W + alpha / r * B A, turned round for a Conv1D of GPT-2."""
    said, found = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert said["peft_type"] == "LORA"
    after = dict(before)
    for name in [name for name in found if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        [end] = [end for end in said["target_modules"] if f".{module}".endswith(f".{end}")]
        rank, alpha = (
            said[pattern].get(end, said[default])
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        a, b = found[name], found[name.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] == rank
        product = alpha / rank * b @ a
        assert said["fan_in_fan_out"] == ("c_" in module)
        after[f"{module}.weight"] = before[f"{module}.weight"] + (
            product.T if said["fan_in_fan_out"] else product
        )
    return after


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_adds_what_merging_adds(case, tmp_path):
    _, params, config = hf.load(write(tmp_path / "base", case))
    lora = Lora(rank=3, alpha=7.5)
    whole = {"base": params, **drawn(config, lora)}
    save_adapter(tmp_path / "adapter", config, lora, whole, base="base")
    hf.save(tmp_path / "merged", config, merged(whole, lora))
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = added(tmp_path / "adapter", tensors(case))
    changed = [name for name in ours if not np.array_equal(ours[name], tensors(case)[name])]
    assert len(changed) == CASES[case] * config.L
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("case, targets", [*((case, None) for case in CASES), *SOME])
def test_adapters_come_back(case, targets, tmp_path):
    config = architecture(tmp_path, case)
    lora = Lora(4, 6.0, targets)
    own = drawn(config, lora)
    save_adapter(tmp_path, config, lora, own)
    found, again = load_adapter(tmp_path, config)
    assert found == lora
    assert again["layers"].keys() == own["lora"]["layers"].keys()
    for name, value in own["lora"]["layers"].items():
        np.testing.assert_array_equal(again["layers"][name], value)


def foreign(folder: Path, ranks: dict[str, int], **keys: Any) -> dict[str, np.ndarray]:
    """An adapter to GPT-2 as PEFT writes it, of these ranks; returns the tensors after it."""
    before, rng, found = tensors("gpt2"), np.random.default_rng(1), {}
    for end, rank in ranks.items():
        for layer in range(2):
            into, out = before[f"transformer.h.{layer}.{end}.weight"].shape
            stem = f"base_model.model.transformer.h.{layer}.{end}.lora"
            found[f"{stem}_A.weight"] = rng.normal(size=(rank, into)).astype(np.float32)
            found[f"{stem}_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    save_file(found, folder / TENSORS)
    first = next(iter(ranks.values()))
    others = {end: rank for end, rank in ranks.items() if rank != first}
    said = {"peft_type": "LORA", "r": first, "lora_alpha": 4, "target_modules": [*ranks]}
    said |= {"rank_pattern": others, "alpha_pattern": {}, "fan_in_fan_out": True, "bias": "none"}
    said |= {"lora_dropout": 0.1, "modules_to_save": None, "init_lora_weights": True}
    (folder / CONFIG).write_text(json.dumps(said | keys))
    return added(folder, before)


def test_an_adapter_to_a_fused_module_becomes_one_to_each_matrix(tmp_path):
    _, params, config = hf.load(write(tmp_path, "gpt2"))
    theirs = foreign(tmp_path, {"attn.c_attn": 2, "mlp.c_proj": 2})
    lora, own = load_adapter(tmp_path, config)
    assert lora == Lora(2, 4.0, ("q", "k", "v", "down"))
    hf.save(tmp_path / "merged", config, merged({"base": params, "lora": own}, lora))
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5)


def test_rslora_is_another_alpha(tmp_path):
    config = architecture(tmp_path, "gpt2")
    foreign(tmp_path, {"mlp.c_fc": 4}, use_rslora=True)
    assert load_adapter(tmp_path, config)[0] == Lora(4, 8.0, ("up",))  # 4 / sqrt(4) = 8 / 4


REFUSED = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "layers_to_transform": [0],
    "rank_pattern": {"c_fc|c_proj": 8},
    "peft_type": "VERA",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_implemented_is_refused_by_its_key(key, tmp_path):
    config = architecture(tmp_path, "gpt2")
    foreign(tmp_path, {"mlp.c_fc": 4})
    said = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(said | {key: REFUSED[key]}))
    with pytest.raises(BadInput, match=f"{CONFIG}: {key}="):
        load_adapter(tmp_path, config)


def test_ranks_that_differ_are_refused(tmp_path):
    config = architecture(tmp_path, "gpt2")
    foreign(tmp_path, {"mlp.c_fc": 4, "mlp.c_proj": 2})
    with pytest.raises(BadInput, match="rank_pattern="):
        load_adapter(tmp_path, config)
    foreign(tmp_path, {"mlp.c_fc": 2, "attn.c_attn": 6}, alpha_pattern={"attn.c_attn": 12})
    with pytest.raises(BadInput, match="rank_pattern: q reads what is another's"):
        load_adapter(tmp_path, config)


def _drop(found: dict[str, np.ndarray], stem: str) -> None:
    del found[f"{stem}_B.weight"]


def _reshape(found: dict[str, np.ndarray], stem: str) -> None:
    found[f"{stem}_B.weight"] = found[f"{stem}_B.weight"].T.copy()


def _add(found: dict[str, np.ndarray], stem: str) -> None:
    found["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 24), np.float32)


@pytest.mark.parametrize(
    "change, words",
    [
        (_drop, r"h\.1\.mlp\.c_fc\.lora_B\.weight: missing"),
        (_reshape, r"h\.1\.mlp\.c_fc\.lora_B\.weight: \[4, 96\], wanted \[96, 4\]"),
        (_add, r"not implemented, 1 tensors \(base_model.model.lm_head.lora_A.weight\)"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused(
    change: Callable[..., None], words, tmp_path
):
    config = architecture(tmp_path, "gpt2")
    foreign(tmp_path, {"mlp.c_fc": 4})
    found = load_file(tmp_path / TENSORS)
    change(found, "base_model.model.transformer.h.1.mlp.c_fc.lora")
    save_file(found, tmp_path / TENSORS)
    with pytest.raises(BadInput, match=words):
        load_adapter(tmp_path, config)


def test_the_base_of_an_adapter_is_named(tmp_path):
    folder = epath.Path(tmp_path / "adapter")
    config = architecture(tmp_path / "base", "gpt2")
    assert base_of(epath.Path(tmp_path / "base")) is None and base_of(epath.Path(tmp_path)) is None
    save_adapter(folder, config, Lora(), drawn(config, Lora()), base="owner/name")
    assert base_of(folder) == "owner/name"
    save_adapter(folder, config, Lora(), drawn(config, Lora()))
    with pytest.raises(BadInput, match="base_model_name_or_path is missing"):
        base_of(folder)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    config = architecture(tmp_path, "gpt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="the adapter cannot be written"):
        save_adapter(tmp_path / "file", config, Lora(), drawn(config, Lora()))
