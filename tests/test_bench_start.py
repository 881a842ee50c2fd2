"""scripts/bench_start.py on a tiny model: two real starts, input it cannot use."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import CONFIG, MODEL, groups

from dpo_jax.models import hf

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("start")
    hf.save(home / "policy", CONFIG, MODEL.init(jax.random.key(0)))
    names = ("prompt", "chosen", "rejected")
    rows = [(each.prompt + 4, *(ids + 4 for ids in each.responses)) for each in groups(9, seed=6)]
    lines = [
        json.dumps({n: (x % 13 + 4).tolist() for n, x in zip(names, row, strict=True)})
        for row in rows
    ]
    (home / "pairs.jsonl").write_text("\n".join(lines))
    return home


def test_a_start_from_nothing_and_one_that_finds_programs(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("bench_start")
    given = argparse.Namespace(
        policy=str(folder / "policy"),
        pairs=str(folder / "pairs.jsonl"),
        batch=2,
        tokenizer="ids",
    )
    experiment = script.work(given, tmp_path)
    cold, warm = (script.start(experiment, tmp_path / "cache", n, False) for n in (0, 1))
    for found in (cold, warm):
        # the phases part the time between them, and nothing compiles in no time
        assert sum(found[f"{phase}_s"] for phase in script.PHASES) == pytest.approx(
            found["first_s"], abs=1e-6
        )
        assert all(found[f"{phase}_s"] > 0 for phase in script.PHASES)
        assert found["first_cpu_s"] > 0
    assert warm["backend_compile_s"] < cold["backend_compile_s"]
    assert warm["backend_compile_count"] == cold["backend_compile_count"] > 0


def test_pairs_that_are_not_there(folder):
    words = ["--policy", "policy", "--pairs", "none.jsonl"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "bench_start.py", *words],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "none.jsonl" in done.stderr and "Traceback" not in done.stderr
