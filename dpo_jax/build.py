"""What the values of an experiment become: groups, sampled pairs, all that the loop needs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import parallel, parts, rundir
from dpo_jax.data import sources, template
from dpo_jax.data.faults import listed
from dpo_jax.data.layouts import CONTEXT
from dpo_jax.data.loader import Loader, sequential
from dpo_jax.evaluate import Completions, completions
from dpo_jax.experiment import Data, Experiment, Sampled, digest, with_numbers
from dpo_jax.metrics import flops_per_token, progress
from dpo_jax.structs import Algorithm, BadInput, Batch, Group, Model, Params, parted
from dpo_jax.values import show
from dpo_jax.worlds.annotators import Label

SAMPLED_AT_ONCE = 256  # prompts
HELD_OUT_GROUPS = 128  # groups of one evaluation batch
Records = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Materials:
    """What an experiment starts from: its parent's weights and its records."""

    params: Params | None  # None = drawn from run.seed; {"base"} of a run with lora
    data: Records
    held_out: Records
    prompts: Records


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything the loop needs, on the mesh."""

    mesh: jax.sharding.Mesh
    model: Model
    bind: Callable[[dict[str, Any]], Algorithm]  # the algorithm with other numbers, by dotted path
    algorithm: Algorithm
    params: Params  # the weights it starts from and trains
    frozen: dict[str, Params]  # base of a run with lora; reference
    start: Params | None  # the parent's weights (or adapters), where the KL to them is measured
    tokenizer: Any
    loader: Loader
    held_out: list[Batch]
    prompts: Records
    flops_per_token: float


def materials(experiment: Experiment, run: Callable[[Experiment], Any]) -> Materials:
    """Parent and records; `run` trains what is missing among parents and sampled data."""
    wanted = experiment.evaluation
    roles = {
        "data.source": experiment.data.source,
        "evaluation.source": wanted.source,
        "evaluation.prompts": wanted.prompts,
    }
    # what has only to be read comes first: its faults show before a parent is trained
    found = {
        role: read_records(role, source, run, experiment.data)
        for role, source in sorted(roles.items(), key=lambda item: isinstance(item[1], Sampled))
    }
    parent, weights = experiment.parent, None
    if isinstance(parent, Experiment):
        weights = parts.Weights(run(parent).params, parent.lora)
    elif parent is not None:
        weights = parts.stored(experiment, parent)
    return Materials(
        params=None if weights is None else parts.inherited(experiment, weights),
        data=found["data.source"],
        held_out=found["evaluation.source"],
        prompts=found["evaluation.prompts"],
    )


def setup(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Setup:
    """Model, weights, algorithm and batches, on the mesh."""
    made, decoder_model = parts.tokenizer(experiment), parts.model(experiment)
    architecture = parts.config(experiment)
    if len(made) > architecture.V:
        raise BadInput(f"model.V={architecture.V} is less than the tokenizer's {len(made)} tokens")

    def bind(numbers: dict[str, Any]) -> Algorithm:
        return with_numbers(experiment, numbers).algorithm(decoder_model)

    algorithm = bind({})
    _check_algorithm(experiment, algorithm)
    rows = parallel.row_multiple(mesh)
    size = {"row_tokens": experiment.data.row_tokens}
    loader = _loader(
        experiment, _groups(experiment, "data.source", given.data, made, algorithm), mesh
    )
    held_out: list[Batch] = []
    if given.held_out:
        groups = _groups(experiment, "evaluation.source", given.held_out, made, algorithm)
        held_out = list(sequential(groups, step_groups=HELD_OUT_GROUPS, rows_multiple=rows, **size))
    shapes = jax.eval_shape(decoder_model.init, jax.random.key(0))
    params, frozen = parted(_params(experiment, mesh, given))
    # copies: the loop donates the policy's arrays. Adapters that are new say nothing yet
    new = {"lora"} - (given.params or {}).keys()
    began = {name: leaf for name, leaf in params.items() if name not in new}
    frozen |= {name: jax.tree.map(jnp.copy, began) for name in algorithm.frozen}
    start = None
    if given.prompts and experiment.parent is not None:
        start = frozen["reference"] if algorithm.frozen else jax.tree.map(jnp.copy, began)
    return Setup(
        mesh=mesh,
        model=decoder_model,
        bind=bind,
        algorithm=algorithm,
        params=params,
        frozen=frozen,
        start=start,
        tokenizer=made,
        loader=loader,
        held_out=held_out,
        prompts=given.prompts,
        flops_per_token=_flops(shapes, references=len(algorithm.frozen)),
    )


def _flops(shapes: Params, references: int) -> float:
    """Flops a token costs: forward, backward twice as much, but once where weights are frozen, and
    a forward pass for every reference."""
    trained, frozen = parted(shapes)
    backward = {2: trained, 1: frozen}
    return sum(
        flops_per_token(tree, passes=1 + times + references) for times, tree in backward.items()
    )


def reseeded(
    setup: Setup, experiment: Experiment, given: Materials, numbers: dict[str, Any]
) -> Setup:
    """The setup of an experiment that differs in run.seed and in `numbers`; the rest is shared."""
    return replace(
        setup,
        algorithm=setup.bind(numbers),
        params=parted(_params(experiment, setup.mesh, given))[0],
        loader=_loader(experiment, setup.loader.groups, setup.mesh),
    )


def _params(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Params:
    """The parent's weights, or those that run.seed draws, new adapters among them, on the mesh."""
    shapes = jax.eval_shape(parts.model(experiment).init, jax.random.key(0))
    found = given.params or {}
    found = jax.device_put(found, parallel.shardings(mesh, found))
    missing = [name for name in shapes if name not in found]
    if not missing:
        return found

    def drawn(key: jax.Array) -> Params:
        whole = parts.model(experiment).init(key)
        return {name: whole[name] for name in missing}

    places = parallel.shardings(mesh, {name: shapes[name] for name in missing})
    return found | jax.jit(drawn, out_shardings=places)(jax.random.key(experiment.run.seed))


def _loader(experiment: Experiment, groups: Sequence[Group], mesh: jax.sharding.Mesh) -> Loader:
    options = experiment.run
    return Loader(
        groups,
        step_groups=experiment.data.groups,
        row_tokens=experiment.data.row_tokens,
        seed=options.seed,
        steps=options.steps,
        rows_multiple=parallel.row_multiple(mesh) * options.microbatches,
    )


def read_records(
    role: str, source: Any, run: Callable[..., Any], data: Data | None = None
) -> Records:
    """The records of a source (none for None); sampled ones are made when missing.

    data: whose on_bad and layout count; sampled records are in a layout of their own.
    """
    if source is None:
        return []
    options: dict[str, Any] = {} if data is None else {"on_bad": data.on_bad, "layout": data.layout}
    if isinstance(source, Sampled):
        source, options["layout"] = str(sampled_pairs(source, run)), None
    found, skipped = sources.read(source, **options)
    if skipped:
        rundir.say(f"{role}: skipped {listed(skipped)}")
    return found


def _check_algorithm(experiment: Experiment, algorithm: Algorithm) -> None:
    """BadInput for an algorithm that this run cannot be right for."""
    if set(algorithm.frozen) - {"reference"}:
        raise BadInput(
            f"the algorithm wants {algorithm.frozen}; the only frozen weights are `reference`"
        )
    parts = experiment.run.microbatches
    if algorithm.coupled and parts > 1:
        raise BadInput(
            f"run.microbatches={parts} would part the groups of a step, which the loss of "
            f"{show(experiment.algorithm)} compares with each other: set run.microbatches=1, or "
            "take a loss that is not coupled"
        )


def _groups(
    experiment: Experiment, role: str, found: Records, made: Any, algorithm: Algorithm
) -> list[Group]:
    """Groups of one role as the algorithm takes them; what was dropped is said once."""
    data = experiment.data
    groups, counts = template.tokenize(
        found, made, row_tokens=data.row_tokens, truncation=data.truncation, on_bad=data.on_bad
    )
    if counts:
        rundir.say(f"{role}: {len(groups)} of {len(found)} records kept, {listed(counts)}")
    for arrange in data.arrange if isinstance(data.arrange, tuple) else (data.arrange,):
        if arrange is not None:
            groups, before = arrange(groups), len({group.record for group in groups})
            left = len({group.record for group in groups})
            if left < before:
                rundir.say(f"{role}: {left} of {before} records kept by {show(arrange)}")
    return algorithm.prepare(groups, data.row_tokens)


def data_digest(groups: Sequence[Group]) -> str:
    """8 hex digits over the token ids of all groups and which of them count, in order."""
    whole = hashlib.sha256()
    for group in groups:
        for ids in (group.prompt, *group.responses):
            whole.update(np.asarray(ids, np.int32).tobytes() + b"|")
        for mask in group.scored or ():
            whole.update(mask.tobytes() + b"|")
    return whole.hexdigest()[:8]


def real_tokens(batch: Batch) -> int:
    """Places that hold tokens: a later place sees each but the last of a response."""
    own_T = np.arange(1, batch.until_RT.shape[1] + 1)
    return int((batch.until_RT > own_T[None, :]).sum() + (batch.end_RGK >= 0).sum())


def sampled_pairs(wanted: Sampled, run: Callable[..., Any]) -> epath.Path:
    """The file of a `Sampled` source; sampling, and training its parent, only when missing."""
    parent = wanted.parent
    name = parent.name if isinstance(parent, Experiment) else epath.Path(parent).name
    file = epath.Path(rundir.RUNS) / f"{name}-pairs-{digest(wanted)}" / "pairs.jsonl"
    if file.exists():
        rundir.say(f"{file}: finished before, reused")
        return file
    result = run(parent) if isinstance(parent, Experiment) else parts.from_folder(parent)
    prompts = read_records("prompts", wanted.prompts, run)
    key, rng = jax.random.key(wanted.seed), np.random.default_rng(wanted.seed)
    rows: Records = []
    for start in progress(range(0, len(prompts), SAMPLED_AT_ONCE), f"sample {name}"):
        drawn = completions(
            result.model,
            result.params,
            {},
            prompts[start : start + SAMPLED_AT_ONCE],
            result.tokenizer,
            rewards=wanted.rewards,
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
