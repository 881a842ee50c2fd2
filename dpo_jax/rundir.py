"""Run directories: whose they are, and the sealed result of a finished run.

experiment.json   the resolved options, digests of code, data and parent
metrics.jsonl  samples.jsonl  tensorboard/  profile/
checkpoints/      states to resume from
weights/          the final weights, written once; of a run with lora what it trained, for the base
                  lies with its parent
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
from dpo_jax.structs import BadInput, Params

RUNS = "runs"  # where runs without a run.dir, parents and sampled data lie
MORE = "run.steps"  # a run may be resumed with more steps


def place(experiment: Experiment, directory: str | None = None) -> epath.Path:
    """Where a run lies: `directory`, else run.dir, else runs/<name>-<digest>."""
    default = f"{RUNS}/{experiment.name}-{digest(experiment)}"
    return epath.Path(directory or experiment.run.dir or default)


def check(experiment: Experiment, home: epath.Path) -> None:
    """Raises BadInput when the directory holds another experiment, more steps or something else."""
    if not home.exists() or not any(home.iterdir()):
        return
    remedy = "give another run.dir or remove it"
    stored = read(home)
    change = _change(stored["options"], compared_options(experiment))
    if change or stored["digest"] != digest(experiment, without=(MORE,)):
        raise BadInput(f"{home} holds another experiment ({change or 'its code'}): {remedy}")
    done = max(Checkpoints(home / "checkpoints").steps(), default=0)
    if done > experiment.run.steps:
        raise BadInput(f"{home} has done {done} steps, run.steps={experiment.run.steps}: {remedy}")


def _change(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first option that differs, in words."""
    for path in filter(_compared, sorted(before.keys() | now.keys())):
        was, is_ = _own(before.get(path)), _own(now.get(path))
        if was != is_:
            return f"{path} was {json.dumps(was)}, is {json.dumps(is_)}"
    return None


def _compared(path: str) -> bool:
    """Whether an option makes another run of it. A parent's steps do."""
    within = path.rpartition("parent.")[2]
    cosmetic = any(within == name or within.startswith(f"{name}.") for name in COSMETIC)
    return path != MORE and not cosmetic


def _own(text: str | None) -> Any:
    """An option without the options inside it, which have paths of their own."""
    value = None if text is None else json.loads(text)
    return value.get("function", value.get("class")) if isinstance(value, dict) else value


def claim(experiment: Experiment, home: epath.Path, config: Config, data: str) -> None:
    """Write experiment.json; a resumed run must be on the same data, new code is announced."""
    record = {
        "name": experiment.name,
        "digest": digest(experiment, without=(MORE,)),
        "code": code_digest(),
        "data": data,
        "parent": parent_digest(experiment),
        "model": asdict(config),
        "options": compared_options(experiment),
        "experiment": describe(experiment),
    }
    if experiment.lora is not None:
        record |= {"lora": asdict(experiment.lora), "base": base(experiment)}
    if is_run(home):
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


def is_run(home: epath.Path) -> bool:
    """Whether a run has been here."""
    return (home / "experiment.json").exists()


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
    found = options(experiment, described=True)
    return {path: json.dumps(describe(value)) for path, value in found if _compared(path)}


def parent_digest(experiment: Experiment) -> str | None:
    """The digest of the parent, or its path."""
    parent = experiment.parent
    return digest(parent) if isinstance(parent, Experiment) else parent


def base(experiment: Experiment) -> str | None:
    """Where the weights lie that adapters are added to: the parent's directory, or its path; None
    where there is no parent, and they lie with the adapters."""
    parent = experiment.parent
    return str(place(parent)) if isinstance(parent, Experiment) else parent


def seal(home: epath.Path, steps: int, params: Params, said: dict[str, Any]) -> None:
    """Finish a run: the final weights that no parent has, then result.json with what else there is
    to say."""
    weights = Checkpoints(home / "weights", keep=1)
    weights.save(steps, params)
    weights.wait()
    write(home / "result.json", json.dumps({"steps": steps, **said}, indent=1) + "\n")


def result(experiment: Experiment, home: epath.Path) -> dict[str, Any] | None:
    """What result.json says of a run that reached run.steps, or None where it did not."""
    if not (home / "result.json").exists():
        return None
    stored = json.loads((home / "result.json").read_text())
    return stored if stored["steps"] == experiment.run.steps else None


def metrics(home: epath.Path) -> dict[str, float]:
    """The last evaluation of the finished run in `home`. Raises BadInput where there is none."""
    try:
        return json.loads((home / "result.json").read_text())["metrics"]
    except OSError:
        raise BadInput(f"{home} holds no finished run: `dpo-jax train` it first") from None


def load_weights(home: epath.Path, shapes: Params, mesh: jax.sharding.Mesh) -> Params:
    """The final weights of the run in `home`, which have these shapes, on the mesh.

    Raises: BadInput where there are none or they are those of another model.
    """
    params, _ = Checkpoints(home / "weights").restore(abstract(mesh, shapes))
    return params


def heads(home: epath.Path, shapes: Params) -> Params:
    """Shapes of what the weights of a run hold beside those of its decoder, which has `shapes`."""
    found: Params = {}
    for path, text in Checkpoints(home / "weights").leaves().items():
        *bodies, name = path.split("/")  # a critic is a body with a head of its own
        if path.partition("/")[0] in shapes:
            continue
        kind, _, sizes = text.rstrip("]").partition("[")
        tree = found
        for body in bodies:
            tree = tree.setdefault(body, {})
        tree[name] = jax.ShapeDtypeStruct([int(size) for size in sizes.split(",") if size], kind)
    return found


def precision(home: epath.Path) -> str:
    """The dtype of the final weights of a run."""
    texts = Checkpoints(home / "weights").leaves().values()
    return next((text.partition("[")[0] for text in texts), "float32")


def new_file(path: str | None) -> epath.Path | None:
    """Where to write a file, its folder made. Raises BadInput where that cannot be."""
    if path is None:
        return None
    file = epath.Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_dir():
            return file
        reason = "a folder"
    except OSError as error:
        reason = error.strerror or str(error)
    raise BadInput(f"{path}: cannot be written ({reason}): give another file")


def write(path: epath.Path, text: str) -> None:
    """Write a text file whole or not at all; the first process does."""
    if jax.process_index():
        return
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def say(message: str) -> None:
    """One line on stderr, from the first process."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
