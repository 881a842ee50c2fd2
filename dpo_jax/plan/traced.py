"""The train step of an experiment as shapes on a mesh: the pieces that `train` runs, no weights."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import (
    build,
    functions,
    labelling,
    learned,
    member,
    offload,
    optim,
    parallel,
    parts,
    refcache,
    rundir,
)
from dpo_jax.data.packing import Shape, lay_out
from dpo_jax.experiment import Experiment, Lora, Sampled
from dpo_jax.models.lora import alike
from dpo_jax.structs import Algorithm, BadInput, Batch, Group, Params, TrainState, join
from dpo_jax.train import jit_update, with_columns
from dpo_jax.values import show


class Data(NamedTuple):
    """What is known of the data before there is a mesh: its groups, or why there are none."""

    groups: Sequence[Group] | None
    why: str = ""


class Step(NamedTuple):
    """One update, traced. held: bytes on one device by role, hosted: those that the host holds for
    it. moved: bytes there that the optimizer reads and writes. of_batch: which inputs of the
    program are of the batch. rows: on all devices. notes: what stands behind the shapes, for
    people."""

    traced: Any
    held: dict[str, int]
    hosted: dict[str, int]
    moved: int
    of_batch: list[bool]
    rows: int
    row_tokens: int
    notes: list[str]


def read(experiment: Experiment, rows: int | None) -> Data:
    """The groups of data.source as training has them; none where `rows` stands for them, or where
    they cannot be had here."""
    source = experiment.data.source
    if rows is not None:
        return Data(None, f"--rows {rows}")
    try:
        if isinstance(source, Sampled) and not labelling.place(source).exists():
            raise BadInput(f"data.source is sampled, {labelling.place(source)} is not made yet")
        found = build.read_records("data.source", source, _never, experiment.data)
        tokenizer, algorithm = build.readers(experiment)
        groups = build.read_groups(experiment, "data.source", found, tokenizer, algorithm)
    except BadInput as error:
        return Data(None, " ".join(str(error).split()))
    return Data(groups)


def _never(parent: Any) -> Any:
    raise BadInput(f"{parent} is not trained yet")


def step(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    data: Data,
    *,
    rows: int | None = None,
    memory: int | None = None,
) -> Step:
    """The update of `train.run` for the largest batch, traced on the mesh.

    memory: bytes of a device, by which run.reference=auto decides. Raises: BadInput as the run.
    """
    offload.check(experiment.run, mesh.devices.flat[0])
    model, notes = parts.model(experiment), []
    algorithm = experiment.algorithm(model)
    tx = optim.transformation(experiment.optim, experiment.run.steps)
    state, frozen = _start(experiment, algorithm, tx, mesh)
    reference = join(frozen.get("reference", state.params), frozen)
    named, wanted = show(experiment.algorithm), offload.reference(experiment.run)
    cached = refcache.chosen(wanted, algorithm, named, reference, memory)
    if cached:
        frozen = {name: tree for name, tree in frozen.items() if name != "reference"}
        notes.append("the reference's log-probs are cached, its weights are not held")
    host = offload.names(experiment, frozen)
    state, frozen = (parallel.abstract(mesh, tree, host) for tree in (state, frozen))
    shape, example, said = _batch(experiment, algorithm, mesh, data, rows)
    notes.append(said)
    batch = parallel.abstract(mesh, _completed(algorithm, example, cached))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct((), key.dtype, sharding=parallel.shardings(mesh, key))
    judges = [_judge(each.parent, mesh, notes) for each in learned.named(experiment.algorithm)]
    places = parallel.shardings(mesh, state, host)
    update = jit_update(algorithm, tx, places, experiment.run.microbatches)
    roles = member.roles(model, state, frozen, judges)
    held = {role: parallel.own_bytes(tree) for role, tree in roles.items()}
    hosted = {role: parallel.own_bytes(tree, host=True) for role, tree in roles.items()}
    arguments = (state, frozen, batch, key)
    with jax.set_mesh(mesh):  # its devices may not be here: nothing may run below it
        traced = update.trace(*arguments)
    return Step(
        traced,
        held | {"batch": parallel.own_bytes(batch)},
        hosted,
        # weights and moments come and go, gradients come
        3 * parallel.own_bytes(state.params) + 2 * (held["optimizer"] + hosted["optimizer"]),
        [i == 2 for i, tree in enumerate(arguments) for _ in jax.tree.leaves(tree)],
        shape.rows // algorithm.minibatches,
        shape.tokens,
        notes,
    )


def _start(
    experiment: Experiment, algorithm: Algorithm, tx: Any, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, Params]]:
    """(state, frozen) before the first step, as shapes on the mesh."""
    model = parts.model(experiment)

    def begun(key: jax.Array) -> tuple[TrainState, dict[str, Params]]:
        trained, memory, frozen = parts.begun(algorithm, model.init(key), key)
        state = TrainState(jnp.int32(0), trained, tx.init(trained), memory, jnp.int32(0))
        if "reference" in frozen and "base" in frozen and not _go_on(experiment):
            frozen["reference"] = {}  # new adapters say nothing, the base is the reference
        return state, frozen

    return parallel.abstract(mesh, jax.eval_shape(begun, jax.random.key(0)))


def _judge(parent: Experiment | str, mesh: jax.sharding.Mesh, notes: list[str]) -> Params:
    """The weights of a reward model on the mesh of its run."""
    if not isinstance(parent, Experiment):
        notes.append(f"the weights of the reward model {parent} are not counted")
        return {}
    own = parallel.make_mesh(**asdict(parent.run.mesh), devices=list(mesh.devices.flat))
    return parallel.abstract(own, parts.shapes(parent))


def _go_on(experiment: Experiment) -> bool:
    """Whether the adapters of a run are its parent's."""
    parent, before = experiment.parent, None
    if isinstance(parent, Experiment):
        before = parent.lora
    elif parent is not None and rundir.is_run(epath.Path(parent)):
        record = rundir.read(epath.Path(parent))
        before = Lora(**record["lora"]) if "lora" in record else None
    own = experiment.lora
    return before is not None and own is not None and alike(before, own, parts.config(experiment))


def _completed(algorithm: Algorithm, batch: Batch, cached: bool) -> Any:
    """The batch as an update takes it, with what was found before."""
    if cached:
        batch = replace(batch, ref_logp_RN=np.zeros_like(batch.weight_RN))
    if algorithm.fused:
        return batch
    part = jax.tree.map(lambda x: x[: len(x) // algorithm.minibatches], batch)
    return jax.eval_shape(algorithm.measure, with_columns(part))


def _batch(
    experiment: Experiment,
    algorithm: Algorithm,
    mesh: jax.sharding.Mesh,
    data: Data,
    rows: int | None,
) -> tuple[Shape, Batch, str]:
    """The largest batch of a step on the host, and where its shape comes from."""
    wanted, shards = experiment.data, parallel.row_multiple(mesh)
    if data.groups is not None and algorithm.online is None:
        loader = build.loader(experiment, data.groups, shards)
        shape = max(loader.ladder, key=lambda each: each.rows * each.tokens)
        said = f"the largest of the {len(loader.ladder)} shapes of {len(data.groups)} groups"
        return shape, loader.example(shape), said
    if algorithm.online is not None:
        count, said = _rollout(experiment, data)
    else:
        count, said = wanted.groups, f"assumed, a row for every group of data.groups ({data.why})"
    if rows is not None:
        count, said = rows, "as --rows says"
    multiple = shards * experiment.run.microbatches * algorithm.minibatches
    count = -(-count // multiple) * multiple
    responses = functions.keywords(experiment.algorithm).get("n", 2)
    slots = -(-wanted.groups // count)
    shape = Shape(count, wanted.row_tokens, wanted.row_tokens, slots, max(2, responses))
    ids = np.ones(1, np.int32)
    columns: dict[str, Any] = {"label": 1.0, "soft_label": 1.0, "margin": 0.0}
    columns |= {"scores": np.zeros((2, 1)), "criteria": ("score",)}
    batch = lay_out([Group(ids, [ids, ids], **columns)], [[0]], shape, record_B=[0])
    if algorithm.online is not None:
        updates = algorithm.passes * algorithm.minibatches
        said += f"; drawing it is not part of the plan, a step updates {updates} times"
    return shape, batch, f"{said}; every token is scored"


def _rollout(experiment: Experiment, data: Data) -> tuple[int, str]:
    """How many rows the longest rollout takes, and in words."""
    options, wanted = functions.keywords(experiment.algorithm), experiment.data
    T = wanted.row_tokens
    n, most = options.get("n", 1), options.get("max_tokens", T)
    longest = max((len(group.prompt) for group in data.groups or ()), default=max(1, T - n * most))
    behind = max(1, min(n, (T - longest) // most))  # responses that share a row with a prompt
    pieces = wanted.groups * -(-n // behind)
    rows = -(-pieces // max(1, T // (longest + behind * most)))
    return rows, f"a rollout of {wanted.groups} x {n} responses of {most} tokens"
