"""How much faster runs are that train together than one after the other.

    python scripts/bench_sweep.py [EXPERIMENT] [option=values ...] [--json OUT]

Default: experiments/sentiment_pairs.py with four betas and three seeds, 20 steps and no
evaluation. Every way starts without compiled programs; parents and data are made before the clock
starts. Ways: alone; together with one member an operation (the default on a CPU); together with
all members in one operation (vmap).
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax

from dpo_jax import build, experiment, heap, together, train
from dpo_jax.cli import parse_overrides, sweep_of

DEFAULT = {"algorithm.loss.beta": ".1,.25,.5,1.0", "run.seed": "0,1,2", "run.steps": "20"}


def seconds(members, at_once: int | None, alone: bool) -> float:
    """Wall time of training all members anew."""
    jax.clear_caches()
    together.AT_ONCE = {} if at_once is None else {jax.default_backend(): at_once}
    with tempfile.TemporaryDirectory() as folder:
        homes = [f"{folder}/{i}" for i in range(len(members))]
        start = time.perf_counter()
        if alone:
            for member, home in zip(members, homes, strict=True):
                train.run(member, directory=home)
                jax.clear_caches()  # as separate commands, which share nothing
        else:
            together.run_all(members, homes)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiment", nargs="?", default="experiments/sentiment_pairs.py")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    module = experiment.load(arguments.experiment)
    chosen = sweep_of(module, parse_overrides(arguments.overrides) or dict(DEFAULT)).members
    members = [replace(each, evaluation=experiment.Evaluation()) for each in chosen]
    build.materials(members[0], train.run)
    ways = {"alone": (1, True), "together": (1, False), "together, vmap": (None, False)}
    found = {way: round(seconds(members, *how), 1) for way, how in ways.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "runs": len(members),
        "steps": members[0].run.steps,
        "seconds": found,
        "speed_up": {way: round(found["alone"] / value, 2) for way, value in found.items()},
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "commit": commit,
    }
    print(json.dumps(record, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    heap.tuned()
    main()
