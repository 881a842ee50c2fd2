"""Record what transformers makes of the tiny models of tests/recorded_models.py.

Run it where torch and transformers are installed (the extra `parity`), when a model is added:

    python tests/record_logits.py

It writes tests/recorded/families.npz (float32 logits) and families.json (each config.json and the
names and shapes of the tensors, as transformers writes them).
"""

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import recorded_models

FOLDER = Path(__file__).resolve().parent / "recorded"


def main() -> None:
    logits, models = {}, {}
    for case in recorded_models.CASES:
        logits[case], models[case] = record(case)
        print(f"{case}: largest logit {np.abs(logits[case]).max():.1f}")
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "families.npz", **logits)
    lines = [f"{json.dumps(case)}: {json.dumps(model)}" for case, model in models.items()]
    (FOLDER / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def record(case: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of a case, and the files that its model was read from."""
    torch: Any = importlib.import_module("torch")
    from safetensors.numpy import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = recorded_models.config(case)
    config = AutoConfig.for_model(**keys)
    eager: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, **eager).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {name: list(array.shape) for name, array in sorted(load_file(file).items())}
        save_file(recorded_models.weights(case, shapes), file, metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **eager
        )
        assert not any(report.values()), (case, report)
        written = json.loads((Path(folder) / "config.json").read_text())
    found = np.zeros((*recorded_models.tokens(case).shape, config.vocab_size), np.float32)
    # alone and the shorter first: dynamic rope remembers the longest text that it has seen
    for text, length in sorted(enumerate(recorded_models.LENGTHS), key=lambda item: item[1]):
        ids = torch.tensor(recorded_models.tokens(case)[text, :length][None])
        with torch.no_grad():
            found[text, :length] = model.eval()(input_ids=ids).logits[0].numpy()
    return found, {"config": written, "tensors": shapes}


if __name__ == "__main__":
    main()
