"""scripts/bench_sampling.py on a tiny model: every response has its full length, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import CONFIG, MODEL, groups

from dpo_jax.models import hf

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_sampling.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("bench")
    hf.save(home / "policy", CONFIG, MODEL.init(jax.random.key(0)))
    lines = [json.dumps({"prompt": each.prompt.tolist()}) for each in groups(3, seed=6)]
    (home / "prompts.jsonl").write_text("\n".join(lines))
    return home


def bench(folder: Path, prompts: str, **options: int) -> subprocess.CompletedProcess[str]:
    given = {"policy": "policy", "prompts": prompts, "max-tokens": 40, "repeats": 3, "json": "out"}
    words = [word for name, value in (given | options).items() for word in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], cwd=folder, capture_output=True, text=True
    )


def test_the_record_of_responses_that_share_their_prompts(folder):
    """40 tokens of 17 would meet an EOS of the vocabulary: 12 responses of 12 did not."""
    done = bench(folder, "prompts.jsonl", batch=3, n=4)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out").read_text())
    assert found["new_tokens"] == 3 * 4 * 40
    assert found["new_tokens_per_second"] == pytest.approx(found["new_tokens"] / found["call_s"])
    assert found["step_s"] == pytest.approx(found["call_s"] / 40)
    assert found["new_tokens_per_second_best"] >= found["new_tokens_per_second"] > 0
    assert found["compile_s"] > 0 and found["peak_rss_mb"] > 0
    assert {"hardware", "commit"} <= found.keys() and "new_tokens_per_second" in done.stdout


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"prompt": [1]}\n{"chosen": [2]}', "line 2: KeyError('prompt')"),
        ('{"prompt": 5}', "line 1"),
        ('{"prompt": [1]}', "1 prompts, --batch 2"),
        ('{"prompt": [1]}\n{"prompt": [17]}', "id 17"),
        ("", "no lines"),
    ],
)
def test_prompts_that_cannot_be_used(folder, text, said):
    (folder / "bad prompts").write_text(text)
    done = bench(folder, "bad prompts", batch=2)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
