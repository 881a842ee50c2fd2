"""What we write, read by transformers itself; wants torch (the extra `parity`)."""

import numpy as np
import pytest
from recorded_models import CASES, LENGTHS, tokens
from test_families import RECORDED, write

from dpo_jax.models import hf

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
