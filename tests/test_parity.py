"""What we write, read by transformers and peft; wants torch (the extra `parity`)."""

import numpy as np
import pytest
from recorded_models import CASES, LENGTHS, tokens
from test_families import RECORDED, write
from test_hf_adapter import drawn

from dpo_jax.models import hf
from dpo_jax.models.hf_adapter import save_adapter
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import decoder

torch = pytest.importorskip("torch", reason="needs the extra parity: pip install torch")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_write(case, tmp_path):
    from transformers import AutoModelForCausalLM

    _, params, config = hf.load(write(tmp_path / "a", case))
    hf.save(tmp_path / "b", config, params, shard_bytes=20_000)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    with np.load(RECORDED / "families.npz", allow_pickle=False) as file:
        expected = file[case]
    for text, length in sorted(enumerate(LENGTHS), key=lambda item: item[1]):
        ids = torch.tensor(tokens(case)[text, :length][None])
        with torch.no_grad():
            found = model.eval()(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(found, expected[text, :length], rtol=0, atol=1e-5)


ADAPTED = [
    ("llama", None),
    ("gpt2", None),
    ("gpt2", ("q", "v", "o")),
    ("gpt_neox", None),
    ("gpt_neox", ("k", "down")),
    ("phi3", None),
    ("phi3", ("v", "up")),
    ("gemma3_text", None),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case, targets", ADAPTED)
def test_peft_reads_what_we_write(case, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra parity: pip install peft")
    from transformers import AutoModelForCausalLM

    _, params, config = hf.load(write(tmp_path / "base", case))
    lora, ids = Lora(3, 7.0, targets), tokens(case)[:, : min(LENGTHS)]
    whole = {"base": params, **drawn(config, lora)}
    save_adapter(tmp_path / "adapter", config, lora, whole)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(eager, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    rows, length = ids.shape
    place_RT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    model = decoder(config, lora=lora)
    hidden, _ = model.hidden(whole, ids.astype(np.int32), place_RT, np.full_like(place_RT, length))
    found = np.asarray(model.unembed(whole, hidden))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
