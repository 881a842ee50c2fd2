"""Scores of every response in a file by a finished run, and how often they agree with its order.

    judge = score.judge(dpo_jax.run(EXPERIMENT))
    scored = score.scores(judge, "rewardbench.jsonl")
    rows = agreement.rows([score.judged(each) for each in scored])

A preference run scores by its implicit rewards, beta (log p - log p_ref), as its metrics do, a
reward run by its head, any other by log p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import build, losses, optim, parts, train
from dpo_jax.agreement import Judged, Row
from dpo_jax.algorithms import margins
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reward import reward, reward_scores
from dpo_jax.algorithms.scores import length_normalized
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data.criteria import TOTAL
from dpo_jax.data.loader import sequential
from dpo_jax.data.packing import taken
from dpo_jax.logprobs import ROUNDED, per_response, response_lengths, token_logps
from dpo_jax.losses.needs import name_of, parts_of
from dpo_jax.member import Result
from dpo_jax.parallel import abstract, on_host, row_multiple, shard_batch
from dpo_jax.structs import (
    BadInput,
    Batch,
    Group,
    Model,
    Params,
    Scored,
    TrainState,
    join,
    parted,
    unchanged,
)

ROW_TOKENS = 2048  # of a row, where no response needs more
TOKENS = 2**15  # scored in one call, about
GROUPS = 128  # scored in one call, at most
SUBSET = "subset"  # the field of a record that names its subset

Columns = dict[str, jax.Array]  # name -> x_RGK
Frozen = tuple[Model, Params]  # a reference


@dataclass(frozen=True, eq=False)
class Judge:
    """What scores responses: a run, in one of its ways.

    columns: (params, reference's params, batch) -> `scores` and what they are made of, traced.
    says: the formula of a score.
    """

    run: Result
    reference: Frozen | None
    columns: Callable[[Params, Params, Batch], Columns]
    says: str


def judge(
    run: Result,
    *,
    reference_free: bool = False,
    per_token: bool = False,
    reference: Result | None = None,
) -> Judge:
    """The judge that a finished run is.

    reference_free: leave the reference out. per_token: divide by the number of tokens.
    reference: compare with this one in place of the run's own.
    Errors: BadInput for what the run does not have, or does already.
    """
    algorithm, keywords = parts_of(run.experiment.algorithm)
    if algorithm is reward:
        if reference_free or per_token or reference is not None:
            raise BadInput(
                f"{run.experiment.name} scores by its reward head: it compares with no reference "
                "and divides by no length"
            )
        return Judge(run, None, partial(_rewards, run.model), "the reward of the last token")
    known = algorithm is preference
    loss = keywords["loss"] if known else partial(losses.dpo, beta=1.0)
    score = keywords["score"] if known else per_response
    compares = known and losses.needs(margins.leading(loss)).reference
    if reference is not None:
        _check_reference(run, reference)
    if reference_free and (reference is not None or not compares):
        why = "is given a reference" if reference is not None else "compares with no reference"
        raise BadInput(f"--reference-free: {run.experiment.name} {why}")
    if per_token:
        score = _normalized(loss, score)
    if reference is not None:
        anchor = (reference.model, reference.params)
        loss = loss if compares else partial(losses.dpo, beta=margins.reward_scale(loss))
    else:
        anchor = (run.model, _own_reference(run)) if compares and not reference_free else None
    columns = partial(_implicit, run.model, anchor and anchor[0], loss, score)
    return Judge(run, anchor, columns, _formula(loss, score, anchor is not None))


def scores(
    judge: Judge,
    source: Any,
    *,
    subset: str = SUBSET,
    plain: bool = False,
    row_tokens: int | None = None,
) -> list[Row]:
    """One row a record of the source: its index, `where` it stands, its subset, and lists over its
    responses, best to worst: scores, lengths in tokens, logps and ref_logps summed over them;
    `levels` and `label` are what the data says.

    The source is read as the run's data are; plain: with neither data.layout nor data.arrange.
    row_tokens: in place of data.row_tokens. Errors: BadInput.
    """
    data = judge.run.experiment.data
    if plain:
        data = replace(data, layout=None, arrange=None)
    if row_tokens is not None:
        data = replace(data, row_tokens=row_tokens)
    name = source if isinstance(source, str) else "evaluation.source"
    records = build.read_records(name, source, train.run, data)
    experiment = replace(judge.run.experiment, data=data)
    algorithm = experiment.algorithm(judge.run.model)._replace(prepare=unchanged)
    groups = build.read_groups(experiment, name, records, judge.run.tokenizer, algorithm)
    empty = next((group for group in groups if not group.responses), None)
    if empty is not None:
        where = records[empty.record or 0]["where"]
        raise BadInput(f"{where}: the record has no response to score")
    columns = _columns(judge, groups)
    found = []
    for b, group in enumerate(groups):
        record = records[group.record or 0]
        row = {"record": group.record, "where": record["where"], "subset": record.get(subset)}
        lists = {key: [float(x) for x in x_BK[b]] for key, x_BK in columns.items()}
        found.append(row | lists | {"levels": levels(group), "label": group.label})
    return found


def judged(row: Row) -> Judged:
    """What `agreement` reads of a row of `scores`."""
    subset = None if row["subset"] is None else str(row["subset"])
    return Judged(np.array(row["scores"]), np.array(row["levels"]), row["label"], subset)


def levels(group: Group) -> list[float]:
    """What the data says of every response, higher is better: their order, but for a tie of two
    (soft_label 1/2) and for equal scores in a list."""
    count = len(group.responses)
    if count == 2 and group.soft_label == 0.5:
        return [0.0, 0.0]
    one = group.scores is not None and (group.scores.shape[1] == 1 or TOTAL in group.criteria)
    if count > 2 and one:
        assert group.scores is not None
        score_K = group.scores[:, 0].astype(float)
        if (np.diff(score_K) <= 0).all():
            return score_K.tolist()
    return [float(count - k) for k in range(count)]


# The scores of a batch


def _rewards(model: Model, params: Params, reference: Params, batch: Batch) -> Columns:
    return {"scores": reward_scores(model, params, batch), "lengths": response_lengths(batch)}


def _implicit(
    model: Model,
    other: Model | None,
    loss: Callable,
    score: Callable,
    params: Params,
    reference: Params,
    batch: Batch,
) -> Columns:
    """`margins.implicit_rewards`, or the same without a reference where `other` is None."""
    logp_RN = token_logps(model, params, batch)
    ref_RN = None if other is None else token_logps(other, reference, batch)
    length_RGK = response_lengths(batch)
    free = not losses.needs(margins.leading(loss)).reference
    groups = Scored(
        logp_BK=margins.flat(score(logp_RN, batch)),
        ref_logp_BK=None if ref_RN is None else margins.flat(score(ref_RN, batch)),
        length_BK=margins.flat(length_RGK) if free else None,
    )
    found = {
        "scores": jnp.reshape(margins.implicit_rewards(groups, loss), length_RGK.shape),
        "lengths": length_RGK,
        "logps": per_response(logp_RN, batch),
    }
    return found | ({} if ref_RN is None else {"ref_logps": per_response(ref_RN, batch)})


def _columns(judge: Judge, groups: Sequence[Group]) -> dict[str, list[np.ndarray]]:
    """Every column as a list of x_K, in the order of the groups."""
    mesh = parts.mesh(judge.run.experiment)
    reference = None if judge.reference is None else judge.reference[1]
    longest = max(group.tokens for group in groups)
    alone = [replace(group, record=b) for b, group in enumerate(groups)]  # a record may make many
    found: dict[str, list[Any]] = {}
    with jax.set_mesh(mesh):
        columns = jax.jit(judge.columns, compiler_options=ROUNDED)
        batches = sequential(
            alone,
            step_groups=max(1, min(GROUPS, TOKENS // longest)),
            row_tokens=max(longest, ROW_TOKENS),
            rows_multiple=row_multiple(mesh),
        )
        for batch in batches:
            values = on_host(columns(judge.run.params, reference, shard_batch(mesh, batch)))
            for name, x_RGK in values.items():
                rows = found.setdefault(name, [None] * len(groups))
                for b, x_K in taken(x_RGK, batch):
                    rows[b] = x_K
    return found


# What a run compares with, and how it says so


def _own_reference(run: Result) -> Params:
    """The weights that the run compared with at its end."""
    experiment = run.experiment
    if parts_of(experiment.algorithm)[1]["reference"] is None:
        return build.start(experiment, parts.mesh(experiment), train.run)
    return _moved_reference(run)


def _moved_reference(run: Result) -> Params:
    """The reference of the last checkpoint, moved once more if that is due, as for evaluations."""
    experiment, init = run.experiment, run.model.init
    move = parts_of(experiment.algorithm)[1]["reference"]
    algorithm = experiment.algorithm(run.model)
    steps = experiment.run.steps * algorithm.passes * algorithm.minibatches
    tx = optim.transformation(experiment.optim, steps)

    def state(key: jax.Array) -> TrainState:
        params, memory, _ = parts.begun(algorithm, init(key), key)
        return TrainState(jnp.int32(0), params, tx.init(params), memory, jnp.int32(0))

    mesh = parts.mesh(experiment)
    wanted = abstract(mesh, jax.eval_shape(state, jax.random.key(0)))
    found, _ = Checkpoints(run.directory / "checkpoints").restore(wanted, experiment.run.steps)
    trained, frozen = parted(run.params)
    return join(move(found.step, trained, found.memory["reference"]), frozen)


def _check_reference(run: Result, reference: Result) -> None:
    if run.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise BadInput(
            f"{reference.experiment.name} has another vocabulary than {run.experiment.name}: their "
            "log-probs are not of the same tokens; give a reference with the same tokenizer"
        )


def _normalized(loss: Callable, score: Callable) -> Callable:
    """The score per token. BadInput where loss or score have a normalisation of their own."""
    needs = losses.needs(margins.leading(loss))
    if score is not per_response or (not needs.reference and "length_BK" in needs.fields):
        own = name_of(loss if score is per_response else score)
        raise BadInput(f"--per-token: {own} weighs lengths already, leave it out")
    return length_normalized


def _formula(loss: Callable, score: Callable, compared: bool) -> str:
    scale = margins.reward_scale(loss)
    needs = losses.needs(margins.leading(loss))
    divided = score is length_normalized or (not needs.reference and "length_BK" in needs.fields)
    inner = "(log p - log p_ref)" if compared else "log p"
    other = "" if score in (per_response, length_normalized) else f", {name_of(score)}"
    factor = "" if scale == 1 else f"{scale:g} "
    return f"{factor}{inner}{' / tokens' if divided else ''}{other}"
