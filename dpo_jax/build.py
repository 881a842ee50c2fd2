"""What the values of an experiment become: tokenizer, model, weights, groups."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import parallel, rundir, sampling
from dpo_jax.data import conversations, sources, template
from dpo_jax.data.faults import listed
from dpo_jax.data.loader import Loader, sequential
from dpo_jax.experiment import Data, Experiment, Sampled, with_numbers
from dpo_jax.labelling import Records, sampled_pairs
from dpo_jax.metrics import flops_per_token
from dpo_jax.models import hf
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import Algorithm, BadInput, Batch, Group, Model, Params
from dpo_jax.values import show

HELD_OUT_GROUPS = 128  # groups of one evaluation batch


@dataclass(frozen=True, eq=False)
class Materials:
    """What an experiment starts from: its parent's weights and its records."""

    params: Params | None  # None = drawn from run.seed
    data: Records
    held_out: Records
    prompts: Records


@dataclass(frozen=True, eq=False)
class Grouped:
    """The groups of one role as its algorithm takes them, and what became of the other records.

    counts: by reason, those that `template.tokenize` dropped or kept cut.
    arranged: per function of data.arrange its name, and how many records it left of how many.
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
    params: Params  # the weights it starts from
    frozen: dict[str, Params]
    start: Params | None  # the parent's weights, where evaluations measure the KL to them
    tokenizer: Any
    loader: Loader
    held_out: list[Batch]
    prompts: Records
    flops_per_token: float


def mesh(experiment: Experiment) -> jax.sharding.Mesh:
    """The mesh of run.mesh over all devices."""
    return parallel.make_mesh(**asdict(experiment.run.mesh))


def config(experiment: Experiment) -> Config:
    """The architecture: the experiment's own, or that of its parents."""
    if experiment.model is not None:
        return experiment.model
    if isinstance(experiment.parent, Experiment):
        return config(experiment.parent)
    assert experiment.parent is not None, "an Experiment has a model or a parent"
    home = epath.Path(experiment.parent)
    if rundir.is_run(home):
        return Config(**rundir.read(home)["model"])
    return hf.read_config(hf.folder(experiment.parent))


def model(experiment: Experiment) -> Model:
    """The decoder in the run's dtype; equal values give the same object and its compilations."""
    return _decoder(config(experiment), experiment.run.dtype, experiment.run.remat)


@lru_cache(maxsize=16)
def _decoder(architecture: Config, dtype: str, remat: str) -> Model:
    return decoder(architecture, dtype=dtype, remat=remat)


def trained_shapes(experiment: Experiment) -> Params:
    """Shapes of what a run trains: the decoder's weights and the heads that its algorithm adds."""
    decoder_model = model(experiment)
    algorithm = experiment.algorithm(decoder_model)

    def trained(key: jax.Array) -> Params:
        params = decoder_model.init(key)
        return algorithm.init(key, params, {name: params for name in algorithm.frozen})[0]

    return jax.eval_shape(trained, jax.random.key(0))


def tokenizer(experiment: Experiment) -> Any:
    """The tokenizer of data.tokenizer, with the chat template of data.template where that says one:
    what a function makes, or read from a folder or name."""
    wanted, written = experiment.data.tokenizer, experiment.data.template
    made = wanted() if callable(wanted) else _pretrained(wanted)
    if written is not None:
        made = copy.deepcopy(made)  # a function may give the same one again
        made.chat_template = conversations.chat_template(written)
    return made


def _pretrained(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{name}: no tokenizer there ({reason})") from None


class Policy(NamedTuple):
    """What can be sampled from."""

    model: Model
    params: Params
    tokenizer: Any


def from_folder(name: str) -> Policy:
    """A model of Hugging Face, a folder or hub name, with its own tokenizer, on the first device.

    Raises: BadInput where there is none, or a run directory, which does not hold its tokenizer.
    """
    if rundir.is_run(epath.Path(name)):
        raise BadInput(f"{name} is a run: name its experiment, or `dpo-jax export` it to a folder")
    home = hf.folder(name)
    decoder_model, params, _ = hf.load(home)
    return Policy(decoder_model, params, _pretrained(str(home)))


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
    return Materials(
        params=_parents(experiment, run),
        data=found["data.source"],
        held_out=found["evaluation.source"],
        prompts=found["evaluation.prompts"],
    )


def start(experiment: Experiment, mesh: jax.sharding.Mesh, run: Callable[..., Any]) -> Params:
    """The weights before the first step, which a reference keeps, on the mesh."""
    return _params(experiment, mesh, Materials(_parents(experiment, run), [], [], []))


def _parents(experiment: Experiment, run: Callable[..., Any]) -> Params | None:
    """The weights of the parent as this run stores them; None where there is none."""
    parent = experiment.parent
    if parent is None:
        return None
    made = isinstance(parent, Experiment)
    return _inherited(experiment, run(parent).params if made else _stored(experiment, parent))


def _stored(experiment: Experiment, parent: str) -> Params:
    """The weights of a parent that is a path: those of a run, heads too, or of a model folder."""
    home, places = epath.Path(parent), mesh(experiment)
    if not rundir.is_run(home):
        rundir.say(f"{experiment.name}: starts from the weights of {parent}")
        return hf.load(parent, sharding=places, dtype=experiment.run.dtype)[1]
    shapes = jax.eval_shape(model(experiment).init, jax.random.key(0))
    return rundir.load_weights(home, {**shapes, **rundir.heads(home, shapes)}, places)


def _inherited(experiment: Experiment, params: Params) -> Params:
    """A parent's weights as this run stores them, without the heads that it does not train."""
    wanted = trained_shapes(experiment)
    others = sorted(params.keys() - wanted.keys())
    if others:
        rundir.say(
            f"{experiment.name}: starts without {', '.join(others)} of its parent, which "
            f"{show(experiment.algorithm)} does not train"
        )
    kept = {name: params[name] for name in wanted if name in params}
    shapes = {name: wanted[name] for name in kept}
    # the dtype of a parent may be another
    return jax.tree.map(lambda x, like: x.astype(like.dtype), kept, shapes)


def setup(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Setup:
    """Model, weights, algorithm and batches, on the mesh."""
    decoder_model = model(experiment)

    def bind(numbers: dict[str, Any]) -> Algorithm:
        return with_numbers(experiment, numbers).algorithm(decoder_model)

    made, algorithm = readers(experiment)
    rows = parallel.row_multiple(mesh)
    groups = read_groups(experiment, "data.source", given.data, made, algorithm)
    batches = loader(experiment, groups, rows)
    held_out: list[Batch] = []
    if given.held_out:
        groups = read_groups(experiment, "evaluation.source", given.held_out, made, algorithm)
        held_out = list(held_out_batches(experiment, groups, rows))
    if given.prompts and decoder_model.places is not None:
        prompts = template.encode_prompts(given.prompts, made)
        sampling.check_places(decoder_model, prompts, experiment.evaluation.max_tokens)
    shapes = jax.eval_shape(decoder_model.init, jax.random.key(0))
    params = _params(experiment, mesh, given)
    passes = 3 + len(algorithm.frozen)  # forward, backward twice as much, a forward per reference
    # copies: the loop donates the policy's arrays
    frozen = {name: jax.tree.map(jnp.copy, params) for name in algorithm.frozen}
    start = None
    if given.prompts and experiment.parent is not None:
        start = frozen.get("reference") or jax.tree.map(jnp.copy, params)
    return Setup(
        mesh=mesh,
        model=decoder_model,
        bind=bind,
        algorithm=algorithm,
        params=params,
        frozen=frozen,
        start=start,
        tokenizer=made,
        loader=batches,
        held_out=held_out,
        prompts=given.prompts,
        flops_per_token=flops_per_token(shapes, passes=passes),
    )


def reseeded(
    setup: Setup, experiment: Experiment, given: Materials, numbers: dict[str, Any]
) -> Setup:
    """The setup of an experiment that differs in run.seed and in `numbers`; the rest is shared."""
    return replace(
        setup,
        algorithm=setup.bind(numbers),
        params=_params(experiment, setup.mesh, given),
        loader=loader(experiment, setup.loader.groups, parallel.row_multiple(setup.mesh)),
    )


def _params(experiment: Experiment, mesh: jax.sharding.Mesh, given: Materials) -> Params:
    """The parent's weights, or those that run.seed draws, on the mesh."""
    if given.params is not None:
        return jax.device_put(given.params, parallel.shardings(mesh, given.params))
    init = model(experiment).init
    places = parallel.shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=places)(jax.random.key(experiment.run.seed))


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

        def policy(parent: Experiment | str) -> Any:
            return run(parent) if isinstance(parent, Experiment) else from_folder(parent)

        source, options["layout"] = str(sampled_pairs(source, policy)), None
    return sources.read(source, **options)


def readers(experiment: Experiment) -> tuple[Any, Algorithm]:
    """(tokenizer, algorithm): what makes groups of records. Raises BadInput where they do not fit
    the model and the run."""
    made, algorithm = tokenizer(experiment), experiment.algorithm(model(experiment))
    room = config(experiment).V
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
            groups, before = arrange(groups), len({group.record for group in groups})
            arranged.append((show(arrange), len({group.record for group in groups}), before))
    groups = algorithm.prepare(groups, data.row_tokens)
    _check_places(model(experiment), groups)
    return Grouped(groups, counts, tuple(arranged))


def _check_places(model: Model, groups: Sequence[Group]) -> None:
    """BadInput where a prompt and one response need more positions than the model has: a row may
    be longer than that, for the positions of every response begin behind its prompt."""
    sizes = [len(g.prompt) + max(map(len, g.responses), default=0) for g in groups]
    if model.places is not None and max(sizes) > model.places:
        raise BadInput(
            f"data.row_tokens lets through a prompt and response of {max(sizes)} tokens (record "
            f"{groups[int(np.argmax(sizes))].record}), the model has model.P={model.places} "
            f"positions: set data.row_tokens={model.places}, and data.truncation says what becomes "
            "of longer ones"
        )
