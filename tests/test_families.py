"""Every family against logits that transformers recorded, and its files both ways."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded_models
from hub_configs import HUB
from recorded_models import CASES, LENGTHS
from safetensors.numpy import load_file, save_file

from dpo_jax.data.packing import pack
from dpo_jax.models import families, hf, layout
from dpo_jax.models.transformer import Config, Scaling, decoder
from dpo_jax.parallel import make_mesh, shardings
from dpo_jax.structs import BadInput

RECORDED = Path(__file__).parent / "recorded"
MODELS: dict[str, dict[str, Any]] = json.loads((RECORDED / "families.json").read_text())
LLAMA = MODELS["llama"]["config"]


def tensors(case: str) -> dict[str, np.ndarray]:
    return recorded_models.weights(case, MODELS[case]["tensors"])


def write(folder: Path, case: str, found: dict[str, np.ndarray] | None = None, **keys: Any) -> Path:
    """The folder of a case as transformers writes it, with other tensors or keys where given."""
    folder.mkdir(exist_ok=True)
    save_file(tensors(case) if found is None else found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MODELS[case]["config"] | keys))
    return folder


@pytest.fixture(scope="module")
def logits() -> dict[str, np.ndarray]:
    with np.load(RECORDED / "families.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, logits, tmp_path):
    """Both texts in one packed row with padding behind them, where transformers read each alone."""
    model, params, _ = hf.load(write(tmp_path / "a", case))
    ids = recorded_models.tokens(case)
    texts = [ids[k, :length] for k, length in enumerate(LENGTHS)]
    batch = pack([(text[:2], [text[2:]]) for text in texts], row_tokens=24, rows=1)

    @jax.jit
    def of_row(params):
        hidden, _ = model.hidden(params, batch.tokens_RT, batch.positions_RT, batch.until_RT)
        return model.unembed(params, hidden)[0]

    row_TV, start = np.asarray(of_row(params)), 0
    for k in batch.record_RG[0]:
        found = row_TV[start : start + LENGTHS[k]]
        np.testing.assert_allclose(found, logits[case][k, : LENGTHS[k]], rtol=0, atol=2e-4)
        start += LENGTHS[k]


@pytest.mark.parametrize(
    "case",
    [
        "gpt2",
        "mistral",
        "gemma3_text",
        "smollm3 untied, window without rope",
        "phi3 tied, longrope",
    ],
)
def test_a_cache_reads_what_the_whole_text_reads(case, logits, tmp_path):
    """Windows, ropes and learned positions, with the first tokens at once and then one by one."""
    model, params, _ = hf.load(write(tmp_path / "a", case))
    T = 9  # longrope turns all by its short factors up to 10
    ids_RT = jnp.asarray(recorded_models.tokens(case)[1:, :T])
    positions_RT, until_RT = jnp.arange(T)[None], jnp.full((1, T), T)

    @jax.jit
    def step(ids, positions, until, cache):
        hidden, cache = model.hidden(params, ids, positions, until, cache)
        return model.unembed(params, hidden), cache

    hidden, cache = model.hidden(
        params, *(x[:, :6] for x in (ids_RT, positions_RT, until_RT)), cache=T
    )
    found = [model.unembed(params, hidden)]
    for t in range(6, T):
        one, cache = step(*(x[:, t : t + 1] for x in (ids_RT, positions_RT, until_RT)), cache)
        found.append(one)
    np.testing.assert_allclose(jnp.concatenate(found, 1)[0], logits[case][1, :T], atol=2e-4)


# Files, both ways


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_loaded(case, tmp_path):
    folder = write(tmp_path / "a", case)
    _, params, config = hf.load(folder)
    hf.save(tmp_path / "b", config, params, extra={"eos_token_id": 3})
    _, again, same = hf.load(tmp_path / "b")
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    written, drawn = load_file(tmp_path / "b" / "model.safetensors"), tensors(case)
    assert written.keys() == drawn.keys()
    for name, array in drawn.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    keys = json.loads((tmp_path / "b" / "config.json").read_text())
    assert keys["architectures"] == MODELS[case]["config"]["architectures"]
    assert (keys["eos_token_id"], keys["bos_token_id"], keys["dtype"]) == (3, None, "float32")


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_mean_what_they_mean(name):
    keys, config = HUB[name]
    assert families.read(keys) == config
    written = families.write(config)
    assert families.read(json.loads(json.dumps(written))) == config
    spelt = {"architectures", "rope_scaling", "sliding_window", "max_window_layers", "hidden_act"}
    for key in written.keys() & keys.keys() - spelt - {"eos_token_id", "bos_token_id"}:
        assert keys[key] in (written[key], None), key


def test_a_config_survives_json():
    """As experiment.json holds it."""
    for _, config in HUB.values():
        again = Config(**json.loads(json.dumps(asdict(config))))
        assert again == config and hash(again) == hash(config)


def test_every_parameter_is_a_view_of_its_tensor():
    """So that a shard can be read alone; together they cover the tensor."""
    for case in CASES:
        config = families.read(MODELS[case]["config"])
        for at in families.rows(config):
            whole = np.zeros(layout.shape(at, config), np.int8)
            for leaf in at.leaves:
                part = layout.cut(at, leaf, config)(whole)
                assert np.shares_memory(part, whole), (case, at.name, leaf)
                part += 1
            assert (whole == 1).all(), (case, at.name)


@pytest.mark.parametrize("case", ["gpt_neox", "phi3", "gemma3_text"])
def test_shards_are_those_of_the_whole(case, tmp_path):
    folder = write(tmp_path / "a", case)
    _, whole, config = hf.load(folder)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, params, _ = hf.load(folder, sharding=mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings(mesh, whole)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(whole))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, copies, _ = hf.load(folder, sharding=replicated)
    assert {x.sharding for x in jax.tree.leaves(copies)} == {replicated}
    hf.save(tmp_path / "b", config, params)
    for name, array in load_file(tmp_path / "b" / "model.safetensors").items():
        np.testing.assert_array_equal(array, tensors(case)[name], err_msg=name)


def test_half_precision_in_and_out(tmp_path):
    import ml_dtypes

    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors("qwen3").items()}
    model, params, config = hf.load(write(tmp_path / "a", "qwen3", half), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ids = jnp.ones((1, 3), jnp.int32)
    hidden, _ = model.hidden(params, ids, jnp.arange(3)[None], jnp.full((1, 3), 3))
    assert hidden.dtype == jnp.bfloat16
    hf.save(tmp_path / "b", config, params, dtype=ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, array in load_file(tmp_path / "b" / "model.safetensors").items():
        np.testing.assert_array_equal(array, half[name], err_msg=name)


# Names that vary, and names that are wrong


@pytest.mark.parametrize(
    ("case", "buffers"),
    [
        ("gpt2", ("transformer.h.1.attn.bias", "transformer.h.0.attn.masked_bias")),
        ("gpt_neox", ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.masked_bias",
                      "gpt_neox.layers.1.attention.rotary_emb.inv_freq")),
        ("llama", ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")),
    ],
)  # fmt: skip
def test_buffers_and_a_missing_prefix_change_nothing(case, buffers, tmp_path):
    _, params, config = hf.load(write(tmp_path / "a", case))
    found = tensors(case) | {name: np.ones((1, 2), np.float32) for name in buffers}
    prefix = families.NAMES[config.family].prefix
    bare = {name.removeprefix(prefix): array for name, array in found.items()}
    for names in (found, bare):
        _, again, _ = hf.load(write(tmp_path / "b", case, names))
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_head_of_neox_has_two_names(tmp_path):
    found = tensors("gpt_neox")
    found["lm_head.weight"] = found.pop("embed_out.weight")
    _, params, _ = hf.load(write(tmp_path / "a", "gpt_neox", found))
    np.testing.assert_array_equal(params["unembed_DV"], found["lm_head.weight"].T)


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path):
    found = tensors("qwen3")
    embedding = found["model.embed_tokens.weight"]
    _, params, _ = hf.load(write(tmp_path / "a", "qwen3", found | {"lm_head.weight": embedding}))
    assert "unembed_DV" not in params
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    _, params, _ = hf.load(write(tmp_path / "b", "qwen3", found))
    np.testing.assert_array_equal(params["embed_VD"], embedding)
    for other in (embedding + 1e-3, embedding[:30]):
        found = tensors("qwen3") | {"lm_head.weight": other}
        with pytest.raises(BadInput, match=r"lm_head.weight is not model.embed_tokens.weight"):
            hf.load(write(tmp_path / "c", "qwen3", found))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    found = tensors("llama")
    del found["model.layers.1.self_attn.k_proj.weight"]
    found["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
    found["model.norm.weight"] = np.ones(23, np.float32)
    with pytest.raises(BadInput) as error:
        hf.load(write(tmp_path / "a", "llama", found))
    for words in (
        "1 missing (model.layers.1.self_attn.k_proj.weight)",
        "1 unexpected (model.layers.2.mlp.up_proj.weight)",
        "1 misshaped (model.norm.weight [23], by config.json [24])",
    ):
        assert words in str(error.value)


def test_no_folder_and_no_hub(tmp_path):
    with pytest.raises(BadInput, match=r"nobody/nothing: no such folder, and not to be had"):
        hf.load("nobody/nothing")
    with pytest.raises(BadInput, match=r"config.json: cannot be read"):
        hf.load(tmp_path)


# Refusals


REFUSED = [
    ({"model_type": "mixtral"}, "model_type='mixtral' is not implemented, nor is any mixture"),
    ({"model_type": "gemma3"}, "model_type='gemma3' is not implemented, for it sees pictures"),
    ({"model_type": "mamba"}, r"model_type='mamba' is not implemented \(gpt2, gpt_neox, llama"),
    ({"model_type": None}, "model_type is missing"),
    ({"hidden_act": "quick_gelu"}, r"hidden_act='quick_gelu' is not implemented \(silu"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "24"}, "hidden_size='24' must be a whole number"),
    ({"hidden_size": 25, "head_dim": None}, "num_attention_heads=3 does not divide hidden_size=25"),
    ({"num_key_value_heads": 2}, "model.H=3 must be a multiple of model.J=2"),
    ({"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not implemented"),
    ({"residual_scale": 0.5}, "residual_scale=0.5 is not implemented for llama"),
    ({"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters say the same"),
]
ROPE = [
    ({"rope_type": "axial"}, r"rope_type='axial' is not implemented \(default, linear"),
    ({"rope_type": "linear"}, "rope_parameters: factor is missing"),
    ({"rope_type": "linear", "factor": 0.5}, "linear wants factor >= 1"),
    ({"rope_type": "linear", "factor": 2.0, "offset": 1}, "offset=1 is not implemented for rope"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor is missing"),
    ({"rope_type": "default", "mrope_section": [1, 2]}, r"mrope_section=\[1, 2\] is not"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
    ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7},
     "original_max_position_embeddings=7 is not implemented"),
]  # fmt: skip
OTHERS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"activation_function": "swiglu"}, "activation_function='swiglu'"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act='silu' is not implemented for gemma"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "must list 2 values"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True is not implemented"),
    ("phi3 tied, longrope", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0],
     "long_factor": [1.0] * 4}}, "rope_scaling.short has 1 factors for 4 pairs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [("llama", change, words) for change, words in REFUSED]
    + [("llama", {"rope_parameters": {"rope_theta": 1e4} | rope}, words) for rope, words in ROPE]
    + OTHERS,
)
def test_what_is_not_implemented_is_refused_by_name(case, change, words):
    with pytest.raises(BadInput, match=words) as error:
        families.read(MODELS[case]["config"] | change, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(8, 8, 1, 2, 1, 4, 8, norm="layer"), "model.norm='layer' cannot be said"),
        (Config(8, 8, 2, 2, 1, 4, 8, windows=(4, 0)), r"model.windows=\(4, 0\) cannot be said"),
        (Config(8, 8, 1, 2, 1, 4, 8, score_cap=5.0), "model.score_cap=5.0 cannot be said"),
        (Config(8, 8, 1, 2, 1, 4, 8, family="bert"), "model.family='bert'"),
        (Config(8, 8, 1, 3, 1, 4, 8), "model.H=3 does not divide model.D=8"),
    ],
)
def test_what_a_family_has_no_words_for_is_not_written(config, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        hf.save(tmp_path / "a", config, {})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "ntk"}, "rope_scaling.kind='ntk': linear, dynamic"),
        ({"kind": "linear"}, "rope_scaling.original=8 has no effect on kind linear"),
        ({"original": 0}, "yarn wants factor >= 1 and original"),
        ({"kind": "llama3", "low": 4.0}, r"rope_scaling.low=4.0 must be less"),
    ],
)
def test_impossible_scalings_are_named(change, words):
    scaling = replace(Scaling("yarn", 2.0, 8), **change)
    with pytest.raises(BadInput, match=words):
        decoder(Config(8, 8, 1, 2, 1, 4, 8, rope_scaling=scaling))
