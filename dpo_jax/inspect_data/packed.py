"""How the groups of an experiment stand in the rows of its batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_jax import build, parallel, parts
from dpo_jax.experiment import Experiment
from dpo_jax.inspect_data.responses import places
from dpo_jax.structs import BadInput, Batch, Group


@dataclass(frozen=True)
class Stretch:
    """Places of a row that hold one prompt or response. rank: as of a response."""

    name: str
    tokens: int
    rank: float | None
    record: int | None


@dataclass(frozen=True)
class Batches:
    """The batches of one role.

    shapes: (rows, places of a row), smallest first. padding: share of the places that hold no
    token, over what `measured` says. rows: what stands in those of the first batch, which
    have `places` places each. first: indices of its groups in turn. passes: how often all batches
    together hold each group.
    """

    step_groups: int
    shapes: tuple[tuple[int, int], ...]
    padding: float
    measured: str
    rows: tuple[tuple[Stretch, ...], ...]
    places: int
    first: tuple[int, ...]
    passes: float


def shards(experiment: Experiment) -> tuple[int, str | None]:
    """(devices that share the rows of a batch, what is to be said of it): those of run.mesh; where
    it does not fit the devices here, as if it were made for the fewest that it fits."""
    mesh = experiment.run.mesh
    try:
        return parallel.row_multiple(parts.mesh(experiment)), None
    except BadInput as error:
        fewest = max(mesh.data, 1) * max(mesh.fsdp, 1)
        return fewest, f"rows are shared by {fewest} devices, not by those here ({error})"


def of_training(experiment: Experiment, groups: Sequence[Group], shards: int) -> Batches:
    """The batches of the loader, as far as it simulates them."""
    loader = build.loader(experiment, _numbered(groups), shards)
    rungs = tuple(dict.fromkeys((shape.rows, shape.tokens) for shape in loader.ladder))
    measured = f"{loader.simulated} of {experiment.run.steps} steps"
    first = loader.batch(0)
    passes = experiment.run.steps * loader.step_groups / len(groups)
    return _of(groups, first, loader.step_groups, rungs, 1 - loader.fill, measured, passes)


def of_evaluation(experiment: Experiment, groups: Sequence[Group], shards: int) -> Batches:
    """The batches of an evaluation, all of one shape."""
    batches = list(build.held_out_batches(experiment, _numbered(groups), shards))
    shape = batches[0].tokens_RT.shape
    fill = sum(group.tokens for group in groups) / (len(batches) * int(np.prod(shape)))
    rungs = ((int(shape[0]), int(shape[1])),)
    measured = f"{len(batches)} batch{'es' * (len(batches) > 1)}"
    return _of(groups, batches[0], build.HELD_OUT_GROUPS, rungs, 1 - fill, measured)


def _numbered(groups: Sequence[Group]) -> list[Group]:
    """The groups without their records: then record_RG is their index."""
    return [replace(group, record=None) for group in groups]


def _of(
    groups: Sequence[Group],
    batch: Batch,
    step_groups: int,
    rungs: tuple[tuple[int, int], ...],
    padding: float,
    measured: str,
    passes: float = 1.0,
) -> Batches:
    index_RG = np.asarray(batch.record_RG)
    rows = tuple(
        tuple(stretch for b in row if b >= 0 for stretch in _stretches(groups[b]))
        for row in index_RG.tolist()
    )
    first = tuple(dict.fromkeys(index_RG[index_RG >= 0].tolist()))
    width = int(batch.tokens_RT.shape[1])
    return Batches(step_groups, rungs, padding, measured, rows, width, first, passes)


def _stretches(group: Group) -> list[Stretch]:
    named = zip(places(group), group.responses, strict=True)
    return [
        Stretch("prompt", len(group.prompt), None, group.record),
        *(Stretch(place.name, len(ids), place.rank, group.record) for place, ids in named),
    ]
