"""What the values of an experiment become: groups, and all that the loop needs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import learned, offload, parallel, parts, refcache, rundir, sampling
from dpo_jax.data import sources, template
from dpo_jax.data.faults import listed
from dpo_jax.data.loader import Loader, sequential
from dpo_jax.experiment import Data, Experiment, Reward, Sampled, with_numbers
from dpo_jax.labelling import Records, sampled_pairs
from dpo_jax.metrics import flops_per_token, local_memory
from dpo_jax.structs import Algorithm, BadInput, Batch, Context, Group, Model, Params, join, parted
from dpo_jax.values import show

HELD_OUT_GROUPS = 128  # groups of one evaluation batch


@dataclass(frozen=True, eq=False)
class Materials:
    """What an experiment starts from: its parent's weights, its records, its reward models."""

    params: Params | None  # None = drawn from run.seed; {"base"} of a run with lora
    data: Records
    held_out: Records
    prompts: Records
    rewards: learned.Rewards = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Grouped:
    """The groups of one role as its algorithm takes them, and what became of the other records.

    counts: by reason, those that `template.tokenize` dropped or kept cut.
    arranged: per function of data.arrange, and the algorithm where it dropped some, its name, and
    how many records it left of how many.
    """

    groups: list[Group]
    counts: Mapping[str, int]
    arranged: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything the loop needs, on the mesh."""

    mesh: jax.sharding.Mesh
    model: Model
    bind: Callable[[dict[str, Any]], Algorithm]  # the algorithm with other numbers, by dotted path
    algorithm: Algorithm
    params: Params  # the weights it starts from and trains
    frozen: dict[str, Params]  # base of a run with lora; reference
    host: tuple[str, ...]  # names below which arrays lie in the memory of the host
    start: Params | None  # the parent's weights (or adapters), where the KL to them is measured
    tokenizer: Any
    loader: Loader
    held_out: list[Batch]
    prompts: Records
    rewards: tuple[Reward, ...]  # of the samples, reward models loaded
    judges: Params  # weights of the reward models that the algorithm asks
    flops_per_token: float


def materials(experiment: Experiment, run: Callable[[Experiment], Any]) -> Materials:
    """Parent, records and reward models; `run` trains what is missing among them."""
    wanted = experiment.evaluation
    learned.check(experiment)
    offload.check(experiment.run, jax.local_devices()[0])
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
    return Materials(
        params=_parents(experiment, run),
        data=found["data.source"],
        held_out=found["evaluation.source"],
        prompts=found["evaluation.prompts"],
        rewards=learned.rewards(experiment, run),
    )


def start(experiment: Experiment, mesh: jax.sharding.Mesh, run: Callable[..., Any]) -> Params:
    """The weights before the first step, which a reference keeps, as the Model takes them, on the
    mesh."""
    return _params(experiment, mesh, Materials(_parents(experiment, run), [], [], []))


def _parents(experiment: Experiment, run: Callable[..., Any]) -> Params | None:
    """The weights of the parent as this run takes them up; None where there is none."""
    parent = experiment.parent
    if parent is None:
        return None
    if isinstance(parent, Experiment):
        given = parts.Weights(run(parent).params, parent.lora)
    else:
        given = parts.stored(experiment, parent)
    return parts.inherited(experiment, given)


def setup(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Setup:
    """Model, weights, algorithm and batches, on the mesh."""
    judges = [given.rewards[each].params for each in learned.named(experiment.algorithm)]
    experiment = learned.plugged(experiment, given.rewards)
    decoder_model = parts.model(experiment)

    def bind(numbers: dict[str, Any]) -> Algorithm:
        return with_numbers(experiment, numbers).algorithm(decoder_model)

    made, algorithm = readers(experiment)
    rows = parallel.row_multiple(mesh)
    shapes = parts.of_decoder(decoder_model)
    params, frozen = parted(_params(experiment, mesh, given))
    # adapters that are new say nothing yet
    new = {"lora"} - (given.params or {}).keys()
    began = {name: leaf for name, leaf in params.items() if name not in new}
    asked = _asked(experiment, algorithm, join(began, frozen), mesh)
    groups = asked(read_groups(experiment, "data.source", given.data, made, algorithm))
    batches = loader(experiment, groups, rows)
    kept = () if batches.groups[0].ref_logps else algorithm.frozen
    flops = _flops(shapes, algorithm, references=len(kept))
    if algorithm.online is not None:
        algorithm = algorithm.online(
            Context(
                tokenizer=made,
                records=given.data,
                prompts=groups,
                step_groups=experiment.data.groups,
                row_tokens=experiment.data.row_tokens,
                rows_multiple=rows * experiment.run.microbatches,
                mesh=mesh,
            )
        )
    held_out: list[Batch] = []
    if given.held_out:
        groups = read_groups(experiment, "evaluation.source", given.held_out, made, algorithm)
        groups = asked(groups)
        held_out = list(held_out_batches(experiment, groups, rows))
    _check_prompts(experiment, decoder_model, given.prompts, made)
    frozen, host = offload.placed(experiment, mesh, frozen, dict.fromkeys(kept, began))
    start = None
    if given.prompts and experiment.parent is not None:
        start = frozen["reference"] if kept else parallel.copies(began)
    return Setup(
        mesh=mesh,
        model=decoder_model,
        bind=bind,
        algorithm=algorithm,
        params=params,
        frozen=frozen,
        host=host,
        start=start,
        tokenizer=made,
        loader=batches,
        held_out=held_out,
        prompts=given.prompts,
        rewards=experiment.evaluation.rewards,
        judges=judges,
        flops_per_token=flops,
    )


def _check_prompts(experiment: Experiment, model: Model, found: Records, made: Any) -> None:
    """BadInput where a model with few positions cannot answer the prompts of the evaluation."""
    if found and model.places is not None:
        prompts = template.encode_prompts(found, made)
        sampling.check_places(model, prompts, experiment.evaluation.max_tokens)


def _asked(
    experiment: Experiment, algorithm: Algorithm, reference: Params, mesh: jax.sharding.Mesh
) -> Callable[[list[Group]], list[Group]]:
    """What adds the reference's log-probs to groups, as run.reference says; nothing where they are
    found in every step."""
    options, named = experiment.run, show(experiment.algorithm)
    wanted = offload.reference(options)
    if not refcache.chosen(wanted, algorithm, named, reference, local_memory()):
        return lambda groups: groups
    return partial(
        refcache.filled,
        model=parts.model(experiment),
        reference=reference,
        dtype=options.dtype,
        home=epath.Path(rundir.RUNS),
        mesh=mesh,
    )


def _flops(shapes: Params, algorithm: Algorithm, references: int) -> float:
    """Flops a token costs in the decoder: in every pass forward, and backward twice as much, but
    once where weights are frozen; once forward for every reference; and where it was sampled in
    the loop forward to draw it and again for its log-prob."""
    trained, frozen = parted(shapes)
    backward = {2: trained, 1: frozen}
    once = references + (0 if algorithm.online is None else 2)
    return sum(
        flops_per_token(tree, passes=algorithm.passes * (1 + times) + once)
        for times, tree in backward.items()
    )


def reseeded(
    setup: Setup, experiment: Experiment, given: Materials, numbers: dict[str, Any]
) -> Setup:
    """The setup of an experiment that differs in run.seed and in `numbers`; the rest is shared."""
    return replace(
        setup,
        algorithm=setup.bind(numbers),
        params=parted(_params(experiment, setup.mesh, given))[0],
        loader=loader(experiment, setup.loader.groups, parallel.row_multiple(setup.mesh)),
    )


def _params(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Params:
    """The parent's weights, or those that run.seed draws, new adapters among them, on the mesh."""
    shapes = parts.of_decoder(parts.model(experiment))
    found = given.params or {}
    found = jax.device_put(found, parallel.shardings(mesh, found))
    missing = shapes.keys() if given.params is None else {"lora"} & shapes.keys() - found.keys()
    if not missing:
        return found

    def drawn(key: jax.Array) -> Params:
        whole = parts.model(experiment).init(key)
        return {name: whole[name] for name in missing}

    places = parallel.shardings(mesh, {name: shapes[name] for name in missing})
    return found | jax.jit(drawn, out_shardings=places)(jax.random.key(experiment.run.seed))


def loader(experiment: Experiment, groups: Sequence[Group], shards: int) -> Loader:
    """The batches of training, whose rows so many devices share."""
    options = experiment.run
    return Loader(
        groups,
        step_groups=experiment.data.groups,
        row_tokens=experiment.data.row_tokens,
        seed=options.seed,
        steps=options.steps,
        rows_multiple=shards * options.microbatches,
    )


def held_out_batches(
    experiment: Experiment, groups: Sequence[Group], shards: int
) -> Iterator[Batch]:
    """The batches of an evaluation, whose rows so many devices share."""
    return sequential(
        groups,
        step_groups=HELD_OUT_GROUPS,
        row_tokens=experiment.data.row_tokens,
        rows_multiple=shards,
    )


def read_records(
    role: str, source: Any, run: Callable[..., Any], data: Data | None = None
) -> Records:
    """The records of a source (none for None); sampled ones are made when missing.

    data: whose on_bad and layout count; sampled records are in a layout of their own. What was
    skipped is said once.
    """
    found, skipped = counted_records(source, run, data)
    if skipped:
        rundir.say(f"{role}: skipped {listed(skipped)}")
    return found


def counted_records(
    source: Any, run: Callable[..., Any], data: Data | None = None
) -> tuple[Records, dict[str, int]]:
    """(records, skipped) of a source: as `read_records`, with the rows left out by reason."""
    if source is None:
        return [], {}
    options: dict[str, Any] = {} if data is None else {"on_bad": data.on_bad, "layout": data.layout}
    if isinstance(source, Sampled):
        source, options["layout"] = str(sampled_pairs(source, run)), None
    return sources.read(source, **options)


def readers(experiment: Experiment) -> tuple[Any, Algorithm]:
    """(tokenizer, algorithm): what makes groups of records. Raises BadInput where they do not fit
    the model and the run."""
    made, algorithm = parts.tokenizer(experiment), experiment.algorithm(parts.model(experiment))
    room = parts.config(experiment).V
    if len(made) > room:
        raise BadInput(f"model.V={room} is less than the tokenizer's {len(made)} tokens")
    _check_algorithm(experiment, algorithm)
    return made, algorithm


def _check_algorithm(experiment: Experiment, algorithm: Algorithm) -> None:
    """BadInput for an algorithm that this run cannot be right for."""
    if set(algorithm.frozen) - {"reference"}:
        raise BadInput(
            f"the algorithm wants {algorithm.frozen}; the only frozen weights are `reference`"
        )
    if algorithm.online is not None and experiment.evaluation.source is not None:
        raise BadInput(
            f"evaluation.source has no effect: {show(experiment.algorithm)} learns from its own "
            "samples; leave it out, or give evaluation.prompts and evaluation.rewards"
        )
    parts = experiment.run.microbatches
    if algorithm.coupled and parts > 1:
        raise BadInput(
            f"run.microbatches={parts} would part the groups of a step, which the loss of "
            f"{show(experiment.algorithm)} compares with each other: set run.microbatches=1, or "
            "take a loss that is not coupled"
        )


def read_groups(
    experiment: Experiment, role: str, found: Records, made: Any, algorithm: Algorithm
) -> list[Group]:
    """Groups of one role as the algorithm takes them; what was dropped is said once."""
    known = grouped(experiment, found, made, algorithm)
    if known.counts:
        kept = len(found) - sum(n for why, n in known.counts.items() if why not in template.CUT)
        rundir.say(f"{role}: {kept} of {len(found)} records kept, {listed(known.counts)}")
    for name, left, before in known.arranged:
        if left < before:
            rundir.say(f"{role}: {left} of {before} records kept by {name}")
    return known.groups


def grouped(experiment: Experiment, found: Records, made: Any, algorithm: Algorithm) -> Grouped:
    """The groups that a tokenizer and the algorithm make of records. Raises BadInput where they
    can make none."""
    data = experiment.data
    groups, counts = template.tokenize(
        found, made, row_tokens=data.row_tokens, truncation=data.truncation, on_bad=data.on_bad
    )
    arranged = []
    for arrange in data.arrange if isinstance(data.arrange, tuple) else (data.arrange,):
        if arrange is not None:
            groups, before = arrange(groups), _records(groups)
            arranged.append((show(arrange), _records(groups), before))
    groups, before = algorithm.prepare(groups, data.row_tokens), _records(groups)
    if _records(groups) < before:  # KTO's partners may not fit a row
        arranged.append((show(experiment.algorithm), _records(groups), before))
    _check_places(parts.model(experiment), groups)
    return Grouped(groups, counts, tuple(arranged))


def _records(groups: Sequence[Group]) -> int:
    """How many records the groups are of."""
    return len({group.record for group in groups})


def _check_places(model: Model, groups: Sequence[Group]) -> None:
    """BadInput where a prompt and one response need more positions than the model has: a row may
    be longer than that, for the positions of every response begin behind its prompt."""
    sizes = [len(g.prompt) + max(map(len, g.responses), default=0) for g in groups]
    if model.places is not None and max(sizes, default=0) > model.places:
        raise BadInput(
            f"data.row_tokens lets through a prompt and response of {max(sizes)} tokens (record "
            f"{groups[int(np.argmax(sizes))].record}), the model has model.P={model.places} "
            f"positions: set data.row_tokens={model.places}, and data.truncation says what becomes "
            "of longer ones"
        )


def data_digest(groups: Sequence[Group]) -> str:
    """8 hex digits over all that is learned from: token ids, which of them count, scores, labels
    and weights of all groups, in order."""
    whole = hashlib.sha256()
    for group in groups:
        for ids in (group.prompt, *group.responses):
            whole.update(np.asarray(ids, np.int32).tobytes() + b"|")
        for mask in group.scored or ():
            whole.update(mask.tobytes() + b"|")
        if group.scores is not None:
            whole.update(np.asarray(group.scores, np.float64).tobytes())
        said = (group.label, group.soft_label, group.margin, group.weight, group.criteria)
        whole.update(repr(said).encode())
    return whole.hexdigest()[:8]


def real_tokens(batch: Batch) -> int:
    """Places that hold tokens: a later place sees each but the last of a response."""
    own_T = np.arange(1, batch.until_RT.shape[1] + 1)
    return int((batch.until_RT > own_T[None, :]).sum() + (batch.end_RGK >= 0).sum())
