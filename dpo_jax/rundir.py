"""Run directories: whose they are, and the sealed result of a finished run.

experiment.json   the resolved options, digests of code, data and parent
metrics.jsonl  samples.jsonl  tensorboard/  profile/
checkpoints/      states to resume from
weights/          the final weights, written once
result.json       the last evaluation; written last, so its presence means finished
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import jax
from etils import epath

from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import COSMETIC, Experiment, code_digest, describe, digest, options
from dpo_jax.models.transformer import Config
from dpo_jax.parallel import abstract
from dpo_jax.structs import BadInput, Model, Params

RUNS = "runs"  # where runs without a run.dir, parents and sampled data lie
UNCOMPARED = (*COSMETIC, "run.steps")  # a run may be resumed with more steps


def place(experiment: Experiment, directory: str | None = None) -> epath.Path:
    """Where a run lies: `directory`, else run.dir, else runs/<name>-<digest>."""
    default = f"{RUNS}/{experiment.name}-{digest(experiment)}"
    return epath.Path(directory or experiment.run.dir or default)


def check(experiment: Experiment, home: epath.Path) -> None:
    """Raises BadInput when the directory holds another experiment or something else."""
    if not home.exists() or not any(home.iterdir()):
        return
    stored = read(home)
    if stored["digest"] == digest(experiment, without=UNCOMPARED):
        return
    before, now = stored["options"], compared_options(experiment)
    changed = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    change = (
        f"{changed[0]} was {before.get(changed[0])}, is {now.get(changed[0])}"
        if changed
        else "its code"
    )
    raise BadInput(f"{home} holds another experiment ({change}): give another run.dir or remove it")


def claim(experiment: Experiment, home: epath.Path, config: Config, data: str) -> None:
    """Write experiment.json; a resumed run must be on the same data, new code is announced."""
    record = {
        "name": experiment.name,
        "digest": digest(experiment, without=UNCOMPARED),
        "code": code_digest(),
        "data": data,
        "parent": parent_digest(experiment),
        "model": asdict(config),
        "options": compared_options(experiment),
        "experiment": describe(experiment),
    }
    if (home / "experiment.json").exists():
        stored = read(home)
        if stored["data"] != data:
            raise BadInput(
                f"{home} was started on other data (digest {stored['data']}, now {data}): "
                "give another run.dir or remove it"
            )
        if stored["code"] != record["code"]:
            say(f"{home}: started with code {stored['code']}, goes on with {record['code']}")
    home.mkdir(parents=True, exist_ok=True)
    write(home / "experiment.json", json.dumps(record, indent=1) + "\n")


def read(home: epath.Path) -> dict[str, Any]:
    """The record in experiment.json. Raises BadInput where there is none."""
    try:
        return json.loads((home / "experiment.json").read_text())
    except (OSError, ValueError):
        raise BadInput(
            f"{home} holds no readable experiment.json, so it is no run directory: "
            "give another one or remove it"
        ) from None


def compared_options(experiment: Experiment) -> dict[str, str]:
    """Every option that makes another run of it, as text."""
    return {
        path: json.dumps(describe(value))
        for path, value in options(experiment)
        if path not in UNCOMPARED
    }


def parent_digest(experiment: Experiment) -> str | None:
    """The digest of the parent, or its path."""
    parent = experiment.parent
    return digest(parent) if isinstance(parent, Experiment) else parent


def seal(home: epath.Path, steps: int, params: Params, metrics: dict[str, float]) -> None:
    """Finish a run: final weights, then result.json."""
    weights = Checkpoints(home / "weights", keep=1)
    weights.save(steps, params)
    weights.wait()
    write(home / "result.json", json.dumps({"steps": steps, "metrics": metrics}, indent=1) + "\n")


def result(experiment: Experiment, home: epath.Path) -> dict[str, float] | None:
    """The last evaluation of a run that reached run.steps, or None where it did not."""
    if not (home / "result.json").exists():
        return None
    stored = json.loads((home / "result.json").read_text())
    return stored["metrics"] if stored["steps"] == experiment.run.steps else None


def load_weights(home: epath.Path, model: Model, mesh: jax.sharding.Mesh) -> Params:
    """The final weights of the run in `home`, on the mesh.

    Raises: BadInput where there are none or they are those of another model.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params, _ = Checkpoints(home / "weights").restore(abstract(mesh, shapes))
    return params


def write(path: epath.Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def say(message: str) -> None:
    """One line on stderr, from the first process."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
