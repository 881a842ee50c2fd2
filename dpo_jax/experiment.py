"""An experiment is a value: frozen dataclasses that hold numbers, text and functions.

Two of these values are equal when their descriptions are, because `functools.partial`, which holds
the hyperparameters of a function, has no equality of its own.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

from dpo_jax import functions, optim
from dpo_jax.description import canonical, code_digest, describe, sha8
from dpo_jax.models.lora import Lora
from dpo_jax.override import (
    Spot,
    check_field,
    options,
    override,
    spots,
    variations,
    with_numbers,
)
from dpo_jax.structs import BadInput
from dpo_jax.values import show

__all__ = [
    "COSMETIC",
    "Data",
    "Evaluation",
    "Experiment",
    "Learned",
    "Lora",
    "Mesh",
    "Optim",
    "Run",
    "Sampled",
    "Sweep",
    "canonical",
    "code_digest",
    "describe",
    "digest",
    "distinctions",
    "each",
    "load",
    "options",
    "override",
    "sha8",
    "variations",
    "with_numbers",
]

# What changes no parameter of a finished run, and so no digest.
NAMED = "dir mesh microbatches remat reference offload save_every eval_every log_every keep profile"
COSMETIC = tuple(f"run.{name}" for name in NAMED.split())

# Types of fields; what the additions mean stands at the head of override.py.
Count = Annotated[int, {"least": 1}]
Every = Annotated[int, {"least": 0}]
Amount = Annotated[float, {"least": 0}]
Seed = Annotated[int, {"least": 0}]
Records = Callable[[], Any]  # () -> records
Reward = Callable[..., Any]  # (records, responses) -> score_B
INPUTS_0, INPUTS_1, INPUTS_2 = {"inputs": 0}, {"inputs": 1}, {"inputs": 2}
FOR_PROMPTS = {"needs": "prompts"}


@dataclass(frozen=True, eq=False)
class Value:
    """Base of the parts: fields are checked against their types, equality is by description."""

    def __post_init__(self) -> None:
        for name, spot in spots(self, Spot(type(self).__name__)).items():
            object.__setattr__(self, name, check_field(getattr(self, name), spot))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _text(self) == _text(other)

    def __hash__(self) -> int:
        return hash(_text(self))


def _check_names(owner: str, rewards: tuple[Reward, ...]) -> None:
    names = [getattr(reward, "__name__", None) for reward in rewards]
    if None in names or len(set(names)) < len(names):
        what = f"{owner}.rewards={show(rewards)}: give functions"
        raise BadInput(f"{what}, each with a name of its own (def, not partial)")


@dataclass(frozen=True, eq=False)
class Learned(Value):
    """A reward model as a reward, wherever a function (records, responses) -> score_B may stand.

    parent: the run of `algorithms.reward`, trained when missing, or its path. normalised: less the
    mean of its held-out rewards, over their standard deviation. Its name is that of the run.
    """

    parent: Annotated["Experiment | str", {"parent": True}]
    normalised: bool = True

    @property
    def __name__(self) -> str:
        return parent_name(self.parent)

    def __call__(self, records: Any, responses: Any) -> Any:
        raise BadInput(f"Learned {self.__name__} scores nothing by itself: a run loads the model")


@dataclass(frozen=True, eq=False)
class Sampled(Value):
    """Data made when missing: n responses of the parent to every prompt, labelled.

    parent: the run that is sampled. prompts: a source of records with a prompt.
    rewards: functions (records, responses) -> score_B, whose names are the criteria; the true one
    first. annotator: (score_KC of one prompt, rng) -> labels, as in worlds.annotators.
    """

    parent: Annotated["Experiment | str", {"parent": True}]
    prompts: Annotated[str | Records, INPUTS_0]
    rewards: tuple[Reward, ...]
    annotator: Annotated[Callable[..., Any], INPUTS_2]
    n: Count = 4
    max_tokens: Count = 64
    temperature: Amount = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names("Sampled", self.rewards)
        if not self.rewards:
            raise BadInput("Sampled.rewards=(): give one or more functions")


@dataclass(frozen=True, eq=False)
class Data(Value):
    """What is trained on: groups a step (over the whole mesh), packed in rows of row_tokens.

    source: a file (.jsonl, .json, .parquet, .gz, .zst), a data set (hub:owner/name:split,
    tfds:name:split), a function that returns or yields records, or `Sampled`.
    tokenizer: a folder or name for transformers, or a function () -> tokenizer.
    template: how conversations are written; None = by the tokenizer's own chat template, else a
    Jinja text, a file of it, or a function () -> text.
    layout: raw row -> row of a layout that is known, or several: data.layouts.fields renames.
    truncation: what is done to a group longer than a row: dropped, or its prompt or responses cut.
    on_bad: what a record without the fields it needs does: stop the run, or be skipped and counted.
    arrange: groups -> groups on the host, or several in turn: the views and criterion weightings
    of data/.
    """

    source: Annotated[str | Records | Sampled, INPUTS_0]
    tokenizer: Annotated[str | Callable[[], Any], INPUTS_0]
    template: Annotated[str | Callable[[], str] | None, INPUTS_0 | {"later": True}] = None
    layout: Annotated[Callable[..., Any] | None, INPUTS_1 | {"later": True}] = None
    groups: Count = 64
    row_tokens: Annotated[int, {"least": 2}] = 512
    truncation: Literal["drop", "prompt", "response"] = "drop"
    on_bad: Literal["stop", "skip"] = "stop"
    arrange: Annotated[Callable[..., Any] | tuple[Callable[..., Any], ...] | None, INPUTS_1] = None


@dataclass(frozen=True, eq=False)
class Optim(Value):
    """optimizer(learning_rate, ...), schedule(learning_rate, steps, ...), warm-up in steps.

    clip: largest global gradient norm, None = off. ema: decay of the policy's moving average,
    None = off.
    """

    learning_rate: Amount
    optimizer: Annotated[Callable[..., Any], INPUTS_1] = optim.adamw
    schedule: Annotated[Callable[..., Any], INPUTS_2 | {"given": {"warmup": "optim.warmup"}}] = (
        optim.constant
    )
    warmup: Every = 0
    clip: Annotated[float | None, {"least": 0}] = 1.0
    ema: Annotated[float | None, {"least": 0}] = None


@dataclass(frozen=True, eq=False)
class Mesh(Value):
    """Devices along each axis; -1 for one of them means all that are left."""

    data: Annotated[int, {"least": -1}] = -1
    fsdp: Annotated[int, {"least": -1}] = 1
    tensor: Annotated[int, {"least": -1}] = 1


@dataclass(frozen=True, eq=False)
class Run(Value):
    """How long, where and how often; `every` counts steps, 0 = only at the end.

    dir: None = runs/<name>-<digest>. dtype: of the computation; parameters are
    float32, or float64 as it (which wants JAX_ENABLE_X64=1).
    remat: what of a layer is kept for the backward pass: everything, matrix products, its input.
    reference: its log-probs are found in every step (live), or once, on disk (cached); auto:
    live where its weights fit the device. offload: what lies in the memory of the host and is
    fetched in every step: the frozen reference, what the optimizer keeps, or both.
    keep: checkpoints kept. profile: `100:105` traces the
    steps from 100 up to 105.
    """

    steps: Count
    seed: Seed = 0
    dir: str | None = None
    mesh: Mesh = Mesh()
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    reference: Literal["auto", "live", "cached"] = "auto"
    offload: Annotated[Literal["none", "reference", "optimizer", "both"], {"later": True}] = "none"
    microbatches: Count = 1
    save_every: Every = 0
    eval_every: Every = 0
    log_every: Count = 1
    keep: Count = 2
    profile: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        window = re.fullmatch(r"(\d+):(\d+)", self.profile or "0:1")
        if not window or not int(window[1]) < int(window[2]):
            raise BadInput(f"run.profile={self.profile}: write FIRST:END in steps, as 100:105")
        if self.profile and int(window[2]) >= self.steps:
            raise BadInput(f"run.profile={self.profile} does not end within {self.steps} steps")


@dataclass(frozen=True, eq=False)
class Evaluation(Value):
    """What is measured beside training: pairs held out, and responses sampled to prompts.

    rewards: functions (records, responses) -> score_B, reported on the samples; the true one first.
    temperature: 0 takes the likeliest token. top_k, top_p: 0 and 1 are off.
    """

    source: Annotated[str | Records | Sampled | None, INPUTS_0] = None
    prompts: Annotated[str | Records | None, INPUTS_0] = None
    rewards: Annotated[tuple[Reward, ...], FOR_PROMPTS] = ()
    samples: Annotated[Count, FOR_PROMPTS] = 1
    max_tokens: Annotated[Count, FOR_PROMPTS] = 64
    temperature: Annotated[Amount, FOR_PROMPTS] = 1.0
    top_k: Annotated[Every, FOR_PROMPTS | {"later": True}] = 0
    top_p: Annotated[Amount, FOR_PROMPTS | {"later": True}] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise BadInput(f"evaluation.top_p={self.top_p}: it must be above 0 and at most 1")
        _check_names("evaluation", self.rewards)

    @property
    def drawing(self) -> dict[str, Any]:
        """The keywords of `evaluate.completions` that say how responses are drawn."""
        names = ("max_tokens", "temperature", "top_k", "top_p")
        return {"n": self.samples} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class Experiment(Value):
    """One training run. algorithm: called with the model, as `partial(preference, loss=...)`.

    model: a configuration such as `models.transformer.Config`; None = the parent's.
    parent: the run whose final weights it starts from, or the path of one, or a model of Hugging
    Face: a folder with config.json and safetensors, or owner/name (@revision) of the hub; or an
    adapter of PEFT's, which names its model.
    lora: train adapters of low rank instead of all weights. Adapters of the parent go on where its
    lora is the same; else they are merged into the base, and new ones start.
    """

    name: str
    data: Data
    algorithm: Annotated[Callable[..., Any], INPUTS_1]
    optim: Optim
    run: Run
    model: Annotated[Any, {"inherited": "parent"}] = None
    parent: Annotated["Experiment | str | None", {"parent": True}] = None
    evaluation: Evaluation = Evaluation()
    lora: Annotated[Lora | None, {"later": True}] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise BadInput(
                f"name={self.name}: use letters, digits, '_', '-' and '.', as a folder's"
            )
        if self.model is None and self.parent is None:
            raise BadInput(f"experiment {self.name} has neither a model nor a parent to start from")
        if self.model is not None and self.parent is not None:
            whose = self.parent.name if isinstance(self.parent, Experiment) else self.parent
            raise BadInput(
                f"experiment {self.name} has a model beside its parent: leave model out, "
                f"it comes from {whose}"
            )


@dataclass(frozen=True, eq=False)
class Sweep(Value):
    """Runs to be compared in one figure and one table, seeds averaged; those that differ only in
    numbers train together.

    x, y: metrics of the last evaluation (`eval_samples/kl`), or the path of an option that the
    members differ in (`data.source.annotator.rate`). Members of one name make a line.
    """

    name: str
    members: tuple[Experiment, ...]
    x: str = "eval_samples/kl"
    y: str = "eval_samples/reward"


def parent_name(parent: Experiment | str) -> str:
    """What a parent is called: the name of the run, or the last part of a path."""
    return parent.name if isinstance(parent, Experiment) else parent.rstrip("/").split("/")[-1]


def each(
    base: Experiment, path: str, named: Mapping[str, Any], seeds: int = 3
) -> tuple[Experiment, ...]:
    """`base` with every value as the option `path`, under its name, for run.seed below `seeds`.

    The members of a sweep: each(base, "algorithm.loss", {"dpo": ..., "ipo": ...}).
    """
    return tuple(
        override(base, {"name": name, path: value, "run.seed": seed})
        for name, value in named.items()
        for seed in range(seeds)
    )


def distinctions(members: Sequence["Experiment"]) -> list[dict[str, str]]:
    """The options of each member that are not the same in all of them, as text by dotted path."""
    # a function's keywords have paths of their own
    listed = [{x: show(getattr(v, "func", v)) for x, v in options(each)} for each in members]
    paths = dict.fromkeys(path for found in listed for path in found)
    differing = [path for path in paths if len({found.get(path) for found in listed}) > 1]
    return [{path: found[path] for path in differing if path in found} for found in listed]


def load(name: str) -> ModuleType:
    """The experiment module at a path (experiments/x.py) or of a name (experiments.x).

    It holds EXPERIMENT, an `Experiment`, and may hold FRONTIER, a tuple of them, and SWEEP, a
    `Sweep`. `experiments/x.py:SMOKE` takes another Experiment of the module in place of EXPERIMENT.
    BadInput where it is missing, fails to import or holds something else.
    """
    name, colon, other = name.partition(":")
    by_path = name.endswith(".py") or os.sep in name
    module = functions.import_file(name) if by_path else functions.import_named(name)
    if colon:
        if not isinstance(getattr(module, other, None), Experiment):
            known = [key for key, x in vars(module).items() if isinstance(x, Experiment)]
            raise BadInput(f"{name} defines no Experiment {other}: there are {', '.join(known)}")
        module, chosen = ModuleType(module.__name__, module.__doc__), getattr(module, other)
        vars(module)["EXPERIMENT"] = chosen
        return module
    if not isinstance(getattr(module, "EXPERIMENT", None), Experiment):
        raise BadInput(
            f"{name} defines no EXPERIMENT: give the module EXPERIMENT = Experiment(...)"
        )
    members = getattr(module, "FRONTIER", ())
    if not isinstance(members, tuple) or not all(isinstance(each, Experiment) for each in members):
        raise BadInput(f"{name}: FRONTIER must be a tuple of Experiments")
    if not isinstance(getattr(module, "SWEEP", None), Sweep | None):
        raise BadInput(f"{name}: SWEEP must be a Sweep")
    return module


def digest(value: Value, without: tuple[str, ...] = ()) -> str:
    """8 hex digits of the sha256 of an experiment's (or a part's) description, in every process.

    Left out are the options of `COSMETIC` and the dotted paths of `without`, in the experiment
    and in every one inside it.
    """
    description = _without(describe(value), (*COSMETIC, *without))
    return sha8(canonical(description).encode())


def _text(value: Value) -> str:
    return canonical(describe(value))


def _without(description: Any, paths: tuple[str, ...]) -> Any:
    """A description without some options of its experiments."""
    if isinstance(description, list):
        return [_without(item, paths) for item in description]
    if not isinstance(description, dict):
        return description
    kept = dict(description)
    if kept.get("class") == ":".join(functions.function_id(Experiment)):
        heads = {path.partition(".")[0] for path in paths if "." in path}
        kept = {name: item for name, item in kept.items() if name not in paths}
        for head in heads & kept.keys():
            inner = {path.partition(".")[2] for path in paths if path.startswith(f"{head}.")}
            kept[head] = {name: item for name, item in kept[head].items() if name not in inner}
    return {name: _without(item, paths) for name, item in kept.items()}
