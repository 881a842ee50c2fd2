"""Records that the samples of a run and an annotator's labels of them make."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import learned, parts, rundir
from dpo_jax.data import sources
from dpo_jax.data.faults import listed
from dpo_jax.data.layouts import CONTEXT
from dpo_jax.evaluate import Completions, completions
from dpo_jax.experiment import Experiment, Sampled, digest, parent_name
from dpo_jax.metrics import progress
from dpo_jax.structs import BadInput
from dpo_jax.worlds.annotators import Label

AT_ONCE = 256  # prompts
Records = list[dict[str, Any]]


def place(wanted: Sampled) -> epath.Path:
    """Where the records of a `Sampled` source lie, or will."""
    return (
        epath.Path(rundir.RUNS)
        / f"{parent_name(wanted.parent)}-pairs-{digest(wanted)}"
        / "pairs.jsonl"
    )


def sampled_pairs(wanted: Sampled, run: Callable[..., Any]) -> epath.Path:
    """The file of a `Sampled` source; sampling, and training its parent, only when missing."""
    parent, file, name = wanted.parent, place(wanted), parent_name(wanted.parent)
    if file.exists():
        rundir.say(f"{file}: finished before, reused")
        return file
    result = run(parent) if isinstance(parent, Experiment) else parts.from_folder(parent)
    prompts, skipped = sources.read(wanted.prompts)
    if skipped:
        rundir.say(f"prompts: skipped {listed(skipped)}")
    rewards = learned.plugged(wanted.rewards, learned.rewards(wanted.rewards, run))
    key, rng = jax.random.key(wanted.seed), np.random.default_rng(wanted.seed)
    rows: Records = []
    for start in progress(range(0, len(prompts), AT_ONCE), f"sample {name}"):
        drawn = completions(
            result.model,
            result.params,
            {},
            prompts[start : start + AT_ONCE],
            result.tokenizer,
            rewards=rewards,
            key=jax.random.fold_in(key, start),
            n=wanted.n,
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
        )
        rows += labelled(drawn, wanted.annotator, rng)
    if not rows:
        raise BadInput(
            f"{name} gave no label of different, finished responses: train it longer or raise n"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    rundir.write(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def labelled(
    drawn: Completions, annotator: Callable[..., Any], rng: np.random.Generator
) -> Records:
    """Every label of the annotator as a record, with all scores and the probability it had.

    Of equal texts the best placed stays; a response cut before its end is left out, for it has no
    EOS to learn. A pair or a ranking of which less than two are left is none.
    """
    score_BKC = np.stack([*drawn.rewards.values()], axis=-1)
    rows = []
    for i, (record, texts) in enumerate(zip(drawn.records, drawn.texts, strict=True)):
        for label in annotator(score_BKC[i], rng):
            whole = {k: texts[k] for k in label.order if drawn.finished[i, k]}
            kept = [k for k in whole if k == next(j for j in whole if whole[j] == whole[k])]
            if len(kept) < min(2, len(label.order)):
                continue
            scores = {name: score_BK[i, kept].tolist() for name, score_BK in drawn.rewards.items()}
            row = {name: record[name] for name in ("prompt", *CONTEXT) if name in record}
            row |= _form(label, [texts[k] for k in kept])
            rows.append(row | {"scores": scores} | _said(label, len(kept)))
    return rows


def _form(label: Label, responses: list[str]) -> dict[str, Any]:
    """Responses best to worst under the fields of a judgement, a pair or a ranking."""
    names = {1: ("completion",), 2: ("chosen", "rejected")}.get(len(label.order))
    return dict(zip(names, responses, strict=True)) if names else {"responses": responses}


def _said(label: Label, kept: int) -> dict[str, Any]:
    """The other fields of a label; of what is left of a ranking the probability is not known."""
    said = {"p": float(label.p), "soft_label": label.soft_label, "label": label.label}
    if kept < len(label.order):
        del said["p"]
    return {name: value for name, value in said.items() if value is not None}
