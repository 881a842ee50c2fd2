"""A finished run as a folder of Hugging Face.

    export(dpo_jax.run(EXPERIMENT), "folder")     # AutoModelForCausalLM.from_pretrained("folder")

It holds the weights that count, config.json, the tokenizer with its chat template,
generation_config.json and a README.md of what the run was. A reward model becomes one of
AutoModelForSequenceClassification.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
from etils import epath

from dpo_jax import functions, parts, rundir
from dpo_jax.algorithms.reward import HEAD
from dpo_jax.data import template
from dpo_jax.experiment import Evaluation, Experiment
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.member import Result
from dpo_jax.models import families, hf
from dpo_jax.models.hf_adapter import save_adapter
from dpo_jax.models.lora import merged
from dpo_jax.structs import BadInput, Params
from dpo_jax.values import show

CARD = "README.md"


def export(
    run: Result,
    folder: epath.PathLike,
    *,
    dtype: str = "float32",
    chat: bool = False,
    adapter: bool = False,
) -> None:
    """Write the folder, which is new or empty.

    dtype: of the weights, float32 or bfloat16. chat: the run's data were conversations, so that
    the token that ends a turn ends a generation too. adapter: of a run with lora, what it trained
    alone, as peft loads it; else adapters are merged.
    Errors: BadInput for a folder that holds something, for an architecture or a tokenizer that
    cannot be written, and for an adapter of a run that has none, or a head beside.
    """
    home, config = epath.Path(folder).expanduser(), parts.config(run.experiment)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise BadInput(f"{folder} holds something already: give a new folder, or empty this one")
    families.write(config)  # refuses before anything is written
    lora = run.experiment.lora
    if adapter and (lora is None or HEAD in run.params):
        what = "trains all weights" if lora is None else "has a head, which is no adapter"
        raise BadInput(f"--adapter: {run.experiment.name} {what}; leave it out")
    params = run.params if adapter else plain(run)
    ends = _ends(run.tokenizer, chat)
    ids = {
        "bos_token_id": run.tokenizer.bos_token_id,
        "eos_token_id": ends[0],
        "pad_token_id": run.tokenizer.pad_token_id,
    }
    head = params.get(HEAD)
    if head is not None and ids["pad_token_id"] in ends:
        # a classifier reads the last token that is no padding, and the reward stands on EOS
        ids["pad_token_id"] = None
    if jax.process_index() == 0:
        with TemporaryDirectory() as beside:
            _write_tokenizer(run, beside)
            if head is None:
                _generation(run.experiment.evaluation, ids | {"eos_token_id": ends}, beside)
            (Path(beside) / CARD).write_text(card(run))
            home.mkdir(parents=True, exist_ok=True)
            _copied(Path(beside), home)
    if adapter and lora is not None:
        save_adapter(home, config, lora, params, base=_base(run.experiment), dtype=dtype)
    else:
        hf.save(home, config, params, extra=ids, score=head, dtype=dtype)


def plain(run: Result) -> Params:
    """The weights of a run as one tree of a decoder's (and its head's)."""
    lora = run.experiment.lora
    return run.params if lora is None else merged(run.params, lora)


def _base(experiment: Experiment) -> str | None:
    """The folder or hub name of the model that the adapters of a run are added to; None where it is
    a run, which has to be exported too."""
    parent = experiment.parent
    if isinstance(parent, Experiment):
        return _base(parent) if parent.lora == experiment.lora else None
    return None if parent is None or rundir.is_run(epath.Path(parent)) else parent


def _ends(tokenizer: Any, chat: bool) -> list[int]:
    """What ends a generation: the end of a turn where there are turns, and EOS."""
    asked = [{"role": "user", "content": "a"}] if chat else "a"
    ends = dict.fromkeys([template.response_end([asked], tokenizer), tokenizer.eos_token_id])
    return [token for token in ends if token is not None]


def _write_tokenizer(run: Result, folder: str) -> None:
    try:
        run.tokenizer.save_pretrained(folder)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise BadInput(
            f"{run.experiment.name}: its tokenizer, {type(run.tokenizer).__name__}, cannot be "
            f"written ({error}): train with one of transformers"
        ) from None


def _generation(wanted: Evaluation, ids: dict[str, Any], folder: str) -> None:
    """Sampling as the run's evaluations did it; transformers' own default is not the policy."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": wanted.temperature > 0, "top_k": 0}
    if wanted.temperature > 0:
        sampling |= {name: getattr(wanted, name) for name in ("temperature", "top_k", "top_p")}
    GenerationConfig(**ids, **sampling).save_pretrained(folder)


def _copied(source: Path, home: epath.Path) -> None:
    """The files of a folder in another, which may be gs://."""
    for file in source.iterdir():
        with file.open("rb") as read, (home / file.name).open("wb") as write:
            shutil.copyfileobj(read, write)


# The model card


def card(run: Result) -> str:
    """README.md: what the run's experiment.json says, for people and for the hub."""
    said, experiment = rundir.read(run.directory), run.experiment
    function, keywords = parts_of(experiment.algorithm)
    loss, parent, optim = keywords.get("loss"), experiment.parent, experiment.optim
    drawn = f"weights drawn from seed {experiment.run.seed}"
    rows = {
        "starts from": drawn if parent is None else getattr(parent, "name", parent),
        "algorithm": functions.name(function),
        "loss": None if loss is None else show(loss),
        "optimizer": f"{functions.name(optim.optimizer)}, learning rate {optim.learning_rate:g}, "
        f"schedule {functions.name(optim.schedule)}",
        "steps": f"{experiment.run.steps} of {experiment.data.groups} prompts each, "
        f"seed {experiment.run.seed}",
        "data": f"{show(experiment.data.source)}, digest {said['data']}",
        "experiment": f"digest {said['digest']}, code {said['code']}",
    }
    table = [f"| {name} | {text} |" for name, text in rows.items() if text is not None]
    tags = ["dpo_jax", function.__name__, *([] if loss is None else [name_of(loss)])]
    front = ["library_name: transformers", "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))]
    if isinstance(parent, str) and parent.count("/") == 1 and not epath.Path(parent).exists():
        front.append(f"base_model: {parent.partition('@')[0]}")
    lines = ["---", *front, "---", f"# {said['name']}", "", "| | |", "|---|---|", *table]
    return "\n".join([*lines, CLASSIFIER if HEAD in run.params else POLICY])


POLICY = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
"""
CLASSIFIER = """
A reward model: one number for a prompt and its response, read from the last token, which in
training was the one that ends the response.

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
reward = model(input_ids).logits[0, 0]
```
"""
