"""The commands that read a finished run: eval, sample, score, export.

A model of Hugging Face, a folder or hub name, may stand where `sample` and `score` take an
experiment: it becomes one that starts from it, with its own tokenizer, and trains nothing, so that
options such as run.dtype, run.mesh.fsdp or evaluation.temperature mean what they always mean.
"""

import json
import re
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
from etils import epath

from dpo_jax import agreement, build, evaluate, learned, losses, parts, reliability, rundir, train
from dpo_jax import export as exporting
from dpo_jax import score as scoring
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reward import reward
from dpo_jax.algorithms.sft import sft
from dpo_jax.data import records, sources
from dpo_jax.data.layouts import is_conversation
from dpo_jax.experiment import (
    Data,
    Evaluation,
    Experiment,
    Optim,
    Run,
    Sampled,
    load,
    override,
)
from dpo_jax.losses.needs import parts_of
from dpo_jax.member import Result
from dpo_jax.models import hf
from dpo_jax.structs import BadInput

STDIN = "-"
HELD_OUT = "evaluation.source"
ENDLESS = 1 << 30  # tokens of a row, where nothing is to be dropped or cut

Overrides = dict[str, str]


def eval(arguments: Namespace, overrides: Overrides, others: list[str]) -> None:
    """Print the last evaluation of a finished run."""
    metrics = finished(override(load(arguments.experiment).EXPERIMENT, overrides)).metrics
    if not metrics:
        raise BadInput("nothing was evaluated: the experiment has no evaluation.source or .prompts")
    for name, value in sorted(metrics.items()):
        print(f"{name} = {value:.6g}")


def finished(experiment: Experiment) -> Result:
    """The result of a run that is there already. Raises BadInput where it has not finished."""
    home = rundir.place(experiment)
    rundir.check(experiment, home)
    if rundir.result(experiment, home) is None:
        raise BadInput(
            f"{home} holds no finished run of {experiment.name}: `dpo-jax train` it first"
        )
    return train.run(experiment)


# Models of Hugging Face in place of runs


def names_model(where: str) -> bool:
    """Whether a word names a model of Hugging Face: a folder, or owner/name of the hub."""
    if re.search(r"\.py(:\w+)?$", where) or Path(f"{where}.py").exists():
        return False
    return "/" in where or epath.Path(where).is_dir()


def untrained(
    where: str, overrides: Overrides, *, compared: bool = False, like: Run | None = None
) -> Result:
    """A model of Hugging Face as a run that trained nothing.

    compared: it scores as DPO does, beside a reference. like: a run on whose mesh it is placed, in
    its dtype. Raises: BadInput where there is none.
    """
    if rundir.is_run(epath.Path(where)):
        raise BadInput(f"{where} is a run: name its experiment, or `dpo-jax export` it to a folder")
    home = str(hf.folder(where))
    plain = Experiment(
        name=re.sub(r"\W+", "-", where).strip("-") or "model",
        parent=home,
        data=Data(source=STDIN, tokenizer=home, row_tokens=ENDLESS),
        algorithm=partial(preference, loss=partial(losses.dpo, beta=1.0)) if compared else sft,
        optim=Optim(learning_rate=0.0),
        run=Run(steps=1) if like is None else Run(steps=1, mesh=like.mesh, dtype=like.dtype),
        evaluation=Evaluation(prompts=STDIN),
    )
    experiment = override(plain, overrides)
    model, made = parts.model(experiment), parts.tokenizer(experiment)
    params = build.start(experiment, parts.mesh(experiment), train.run)
    return Result(epath.Path(home), experiment, model, params, made, {})


# sample


def sample(arguments: Namespace, overrides: Overrides, others: list[str]) -> None:
    """Print responses; the run is the one without the overrides of `evaluation`, for any prompts
    will do."""
    if arguments.chat and arguments.text:
        raise BadInput("--chat and --text: give one of them")
    where, model = arguments.experiment, names_model(arguments.experiment)
    if model:
        result = untrained(where, overrides)
        whole = result.experiment
    else:
        base = load(where).EXPERIMENT
        if base.evaluation.prompts is None:
            overrides = {"evaluation.prompts": STDIN} | overrides
        whole = override(base, overrides)
        if parts_of(whole.algorithm)[0] is reward:
            raise BadInput(f"{whole.name} is a reward model: it has no policy to sample from")
        own = {path: new for path, new in overrides.items() if not path.startswith("evaluation.")}
        result = finished(override(base, own))
    wanted, best_of = whole.evaluation, _best_of(arguments.best_of, whole.evaluation)
    if wanted.prompts != STDIN:
        if arguments.chat or arguments.text:
            raise BadInput("--chat and --text are for prompts from the terminal or a pipe")
        role = "evaluation.prompts"
        asked = build.read_records(role, wanted.prompts, train.run, whole.data)
        known = learned.rewards(wanted.rewards, train.run)
        _print(result, wanted, asked, learned.plugged(wanted.rewards, known), best_of)
        return
    if best_of > 1:
        raise BadInput(f"--best-of {best_of}: rewards read records, give evaluation.prompts")
    chat = arguments.chat or (not arguments.text and _converses(result, model))
    if sys.stdin.isatty():
        _converse(result, wanted, chat)
        return
    asked = [_asked(line, n, chat) for n, line in enumerate(sys.stdin, 1) if line.strip()]
    if not asked:
        raise BadInput("no prompts: give evaluation.prompts=FILE.jsonl, or a prompt a line")
    _print(result, wanted, asked, (), 1)


def _best_of(count: int, wanted: Evaluation) -> int:
    """The number behind --best-of. Raises BadInput where nothing could choose."""
    if count < 1 or (count > 1 and not wanted.rewards):
        raise BadInput(f"--best-of {count}: give 1 or more, and evaluation.rewards to choose by")
    return count


def _converses(result: Result, model: bool) -> bool:
    """Whether a line is a message: there is a chat template, and the run's data hold messages."""
    if not result.tokenizer.chat_template:
        return False
    source, layout = result.experiment.data.source, result.experiment.data.layout
    while isinstance(source, Sampled):
        source, layout = source.prompts, None
    return model or is_conversation(sources.first(source, layout=layout)["prompt"])


def _asked(line: str, number: int, chat: bool) -> dict[str, Any]:
    """The record of a line."""
    text = line.rstrip("\r\n")
    prompt = [{"role": "user", "content": text}] if chat else text
    return records.canonical({"prompt": prompt}, f"stdin:{number}")


def _print(
    result: Result, wanted: Evaluation, asked: list[dict[str, Any]], rewards: Any, best_of: int
) -> None:
    """A JSON line a response: of every best_of that are drawn the one of the highest reward."""
    several = replace(wanted, samples=wanted.samples * best_of)
    drawn = _drawn(result, several, asked, rewards, jax.random.key(result.experiment.run.seed))
    rows = list(drawn.rows(result.experiment.run.steps))
    for start in range(0, len(rows), best_of):
        some = rows[start : start + best_of]
        best = max(some, key=lambda row: row[rewards[0].__name__]) if best_of > 1 else some[0]
        print(json.dumps(best))


def _converse(result: Result, wanted: Evaluation, chat: bool) -> None:
    """Answer line by line what is typed; a line knows nothing of those before."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing)
    kind = "a message of a user" if chat else "text to go on from"
    rundir.say(f"each line is {kind}; Ctrl-D ends")
    key = jax.random.key(result.experiment.run.seed)
    for number in count(1):
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        try:
            asked = [_asked(line, number, chat)]
            drawn = _drawn(result, wanted, asked, (), jax.random.fold_in(key, number))
        except BadInput as error:  # of this line; there will be others
            rundir.say(str(error))
        else:
            print(*drawn.texts[0], sep="\n")


def _drawn(
    result: Result, wanted: Evaluation, asked: list[dict[str, Any]], rewards: Any, key: jax.Array
) -> evaluate.Completions:
    given = result.model, result.params, {}, asked, result.tokenizer
    return evaluate.completions(*given, rewards=rewards, key=key, **wanted.drawing)


# score


def score(arguments: Namespace, overrides: Overrides, others: list[str]) -> None:
    """Print the table of a judge over files, and write what is asked for."""
    written = (arguments.out, arguments.json, arguments.figure)
    out, table, figure = (rundir.new_file(path) for path in written)
    compared = arguments.reference is not None
    if names_model(arguments.experiment):
        result = untrained(arguments.experiment, overrides, compared=compared)
        if arguments.reference_free and not compared:
            raise BadInput("--reference-free: a model folder has no reference of its own")
    else:
        result = finished(override(load(arguments.experiment).EXPERIMENT, overrides))
    held_out = result.experiment.evaluation.source
    if not others and held_out is None:
        raise BadInput("score: name a file of records, as dpo-jax score EXPERIMENT FILE.jsonl")
    judge = scoring.judge(
        result,
        reference_free=arguments.reference_free,
        per_token=arguments.per_token,
        reference=untrained(arguments.reference, {}, like=result.experiment.run)
        if compared
        else None,
    )
    options = {"plain": arguments.plain, "row_tokens": arguments.row_tokens}
    options["subset"] = arguments.subset or scoring.SUBSET
    sources, rows = {name: name for name in others} or {HELD_OUT: held_out}, []
    for name, source in sources.items():
        rows += [{"source": name, **row} for row in scoring.scores(judge, source, **options)]
    rows = _with_subsets(rows, arguments.subset, [*sources])
    judged = [scoring.judged(row) for row in rows]
    found = agreement.rows(judged)
    ties = sum(len(each.scores) > 1 and not each.decided for each in judged)
    if ties:
        rundir.say(f"{ties} of {len(rows)} records are ties in the data and do not count")
    name, gap_B = result.experiment.name, agreement.gaps(judged)
    if figure is not None:
        if not gap_B.any():
            raise BadInput(f"--figure {figure}: no pair of different scores to draw; leave it out")
        reliability.draw(figure, gap_B, f"{name}: {judge.says}")
    if out is not None:
        lines = ({k: x for k, x in row.items() if k != "levels"} for row in rows)
        rundir.write(out, "".join(json.dumps(line) + "\n" for line in lines))
    if table is not None:
        whole = {"name": name, "score": judge.says, "sources": [*sources], "rows": found}
        whole["reliability"] = [each._asdict() for each in agreement.reliability(gap_B)]
        rundir.write(table, json.dumps(whole, indent=1) + "\n")
    agreement.show(found, f"{name}: {judge.says}")


def _with_subsets(
    rows: list[dict[str, Any]], field: str | None, others: list[str]
) -> list[dict[str, Any]]:
    """The rows, of several files without a field of subsets each its file."""
    if any(row["subset"] is not None for row in rows):
        return rows
    if field is not None:
        raise BadInput(f"--subset {field}: no record of {', '.join(others)} has such a field")
    return rows if len(others) == 1 else [row | {"subset": row["source"]} for row in rows]


# export


def export(arguments: Namespace, overrides: Overrides, others: list[str]) -> None:
    """Write a finished run as a folder of Hugging Face."""
    if len(others) != 1:
        raise BadInput("export: name one folder, as dpo-jax export EXPERIMENT FOLDER")
    result = finished(override(load(arguments.experiment).EXPERIMENT, overrides))
    chat = _converses(result, False)
    exporting.export(result, others[0], dtype=arguments.dtype, chat=chat, adapter=arguments.adapter)
    print(others[0])
