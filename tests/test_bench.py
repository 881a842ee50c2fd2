"""scripts/bench.py on a tiny model: the record, the loss it starts from, input it cannot use."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import CONFIG, MODEL, groups

from dpo_jax import losses
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import response_logps
from dpo_jax.models import hf
from dpo_jax.structs import Scored

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench.py"
PAIRS = groups(9, seed=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("bench")
    for seed, name in enumerate(("policy", "reference")):
        hf.save(home / name, CONFIG, MODEL.init(jax.random.key(seed)))
    names = ("prompt", "chosen", "rejected")
    rows = [(pair.prompt, *pair.responses) for pair in PAIRS]
    lines = [json.dumps({n: x.tolist() for n, x in zip(names, row, strict=True)}) for row in rows]
    (home / "pairs.jsonl").write_text("\n".join(lines))
    return home


def bench(folder: Path, pairs: str, *flags: str) -> subprocess.CompletedProcess[str]:
    options = {"--policy": "policy", "--reference": "reference", "--pairs": pairs}
    options |= {"--batch": "2", "--json": "out.json"}
    words = [word for option in options.items() for word in option]
    return subprocess.run(
        [sys.executable, SCRIPT, *words, *flags], cwd=folder, capture_output=True, text=True
    )


def recorded(folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """The record of a run over the pairs, and what it printed."""
    done = bench(folder, "pairs.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def live(folder) -> tuple[dict[str, Any], str]:
    return recorded(folder)


def test_the_record_of_a_run(live):
    """Nine pairs, two a step: four steps, of which two count."""
    found, printed = live
    assert found["steps"] == 2 and found["reference"] == "live"
    batch = pack(PAIRS[:2], row_tokens=64, rows=1)
    policy, reference = (
        response_logps(MODEL, MODEL.init(jax.random.key(seed)), batch)[0] for seed in (0, 1)
    )
    scored = Scored(logp_BK=policy, ref_logp_BK=reference)
    expected = np.mean(partial(losses.dpo, beta=0.1)(scored))
    assert found["loss_first"] == pytest.approx(float(expected), abs=1e-6)
    assert found["batch_s"] > 0 and 0 <= found["data_wait_share"] <= 1
    assert found["step_s"] > 0 and found["compile_s"] > 0 and found["peak_rss_mb"] > 0
    tokens = [sum(len(p.prompt) + p.tokens for p in PAIRS[i : i + 2]) for i in (4, 6)]
    # of two steps the mean of the rates is no less than the least count by the mean of the times
    assert found["tokens_per_second"] * found["step_s"] > 0.999 * min(tokens)
    assert found["programs"] == found["programs_at_start"]  # none was compiled in between
    assert {"hardware", "commit"} <= found.keys() and "tokens_per_second" in printed


def test_parts_and_a_cached_reference_change_no_loss(folder, live):
    """What lies in memory between steps is less by the weights of a cached reference."""
    live, cached = live[0], recorded(folder, "--cached-reference")[0]
    parts = recorded(folder, "--microbatches", "2")[0]
    assert cached["reference"] == "cached"
    for loss in ("loss_first", "loss_last"):
        assert cached[loss] == pytest.approx(live[loss], abs=1e-6)
        assert parts[loss] == pytest.approx(live[loss], abs=1e-6)
    weights = sum(x.nbytes for x in jax.tree.leaves(MODEL.init(jax.random.key(0)))) / 2**20
    # a batch of 64 places carry their log-probs instead
    assert live["arrays_mb"] - cached["arrays_mb"] == pytest.approx(weights, rel=0.1)
    assert cached["reference_s"] > 0 and live["reference_s"] == 0


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"prompt": [1], "chosen": [2]}', "pairs line 1: KeyError('rejected')"),
        ("\n[1", "line 1"),
        ('{"prompt": [1], "chosen": [2], "rejected": 3}', "pairs line 1"),
        ("", "no lines"),
    ],
)
def test_pairs_that_cannot_be_used(folder, text, said):
    (folder / "bad pairs").write_text(text)
    done = bench(folder, "bad pairs")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_file_that_is_not_there(folder):
    done = bench(folder, "none.jsonl")
    assert done.returncode == 2 and "none.jsonl" in done.stderr
