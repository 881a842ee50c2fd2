"""scripts/bench_peers.py with a tiny model as item S; stand-ins print the records of the peers."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import CONFIG, MODEL, groups

from dpo_jax.models import hf

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_peers.py"
COPIED = ("bench_trl.py", "bench_gen.py", "quiet.py", "make_data.py")
# An interpreter that has TRL: its nth run of transformers says RATES[n], the static cache breaks.
RATES = (100.0, 400.0, 250.0)
STAND_IN = f"""#!{sys.executable}
import json, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == "-c":
    print(json.dumps(dict.fromkeys(words[2:], "1.0")))
    raise SystemExit
calls = Path(__file__).with_name("calls")
with calls.open("a") as file:
    print(*words, file=file)
before = calls.read_text().splitlines().count(" ".join(words)) - 1
if words[-1] == "static" and before == 1:
    raise SystemExit("no cache today")
rate = {RATES}[before]
print("loading")
print(json.dumps(dict(new_tok_s=rate, step_s=1024 / rate, rss_mb=500.0)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("peers")
    for seed, name in enumerate(("model_S", "ref_S")):
        hf.save(home / "work" / name, CONFIG, MODEL.init(jax.random.key(seed)))
    names = ("prompt", "chosen", "rejected")
    rows = [(pair.prompt, *pair.responses) for pair in groups(24, seed=6)]
    lines = [json.dumps({n: x.tolist() for n, x in zip(names, row, strict=True)}) for row in rows]
    (home / "work" / "data").mkdir()
    (home / "work" / "data" / "S.jsonl").write_text("\n".join(lines))
    (home / "shared" / "bench").mkdir(parents=True)
    for name in COPIED:
        (home / "shared" / "bench" / name).write_text(f"# {name}\n")
    (home / "python").write_text(STAND_IN)
    (home / "python").chmod(0o755)
    return home


def peers(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--json", "out.json", "--work", "work", *words],
        cwd=folder,
        env={**os.environ, "DPO_JAX_SHARED": str(folder / "shared"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_without_peers_ours_runs_alone_and_the_reasons_are_said(folder):
    words = ("--what", "live", "--rounds", "1", "--steps", "1", "--tunix-python", sys.executable)
    done = peers(folder, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out.json").read_text())
    assert [line["system"] for line in found["systems"]] == ["dpo_jax"]
    assert found["systems"][0]["speed_ratios"] == [1.0]
    assert 0 < found["systems"][0]["loss_first"] < 1
    reasons = {line["system"]: line["reason"] for line in found["skipped"]}
    assert reasons["trl"] == "no --trl-python" and "google-tunix" in reasons["tunix"]
    assert reasons["tunix"] in done.stdout


def test_medians_and_ratios_of_systems_that_run_alternately(folder):
    words = ("--what", "sampling", "--rounds", "3", "--trl-python", "python")
    done = peers(folder, *words, "--tunix-python", "nowhere/python")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out.json").read_text())
    plain, static = "bench_gen.py hf S", "bench_gen.py hf S static"
    assert (folder / "calls").read_text().splitlines() == [plain, static, plain, static, plain]
    ours, theirs, broken = found["systems"]
    assert [ours["system"], theirs["system"]] == ["dpo_jax", "transformers"]
    assert theirs["tokens_per_second"] == 250 and theirs["peak_rss_mb"] == 500
    assert theirs["step_s"] == pytest.approx(1024 / 250 / 64)  # of a call over its 64 tokens
    ratios = [run["tokens_per_second"] / r for run, r in zip(ours["runs"], RATES, strict=True)]
    assert theirs["speed_ratios"] == pytest.approx(ratios)
    assert theirs["speed_ratio"] == pytest.approx(statistics.median(ratios))
    assert len(broken["runs"]) == 1
    reasons = {line["system"]: line["reason"] for line in found["skipped"]}
    assert reasons[broken["system"]] == "exit 1: no cache today"
    assert "nowhere/python: No such file" in reasons["tunix"]
    assert found["versions"]["trl"]["torch"] == "1.0"
    assert (folder / "work" / "quiet.py").read_text() == "# quiet.py\n"


def test_models_that_nobody_can_make(folder):
    done = peers(folder, "--size", "M")
    assert done.returncode == 2 and "model_M" in done.stderr and "--trl-python" in done.stderr
    assert "Traceback" not in done.stderr
