"""Reward models as rewards: what the `Learned` of an experiment stand for while it runs.

    known = learned.rewards(experiment, run)      # loaded, and trained when missing
    experiment = learned.plugged(experiment, known)

A `RewardModel` is a plain function (records, texts) -> score_B. It reads texts with its own
tokenizer and packs the responses of a prompt behind it. Rows are as long as those it was trained
in and their counts come from a short ladder, so that a policy whose responses grow or shrink meets
few shapes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import parallel, parts, rundir
from dpo_jax.algorithms.reward import HEAD, reward_scores
from dpo_jax.algorithms.rollout import pieces
from dpo_jax.data.packing import Shape, lay_out, plan, taken
from dpo_jax.data.template import encode_texts
from dpo_jax.experiment import Experiment, Learned
from dpo_jax.logprobs import ROUNDED
from dpo_jax.structs import BadInput, Batch, Group, Model, Params

TOKENS = 2**15  # scored in one call, about
MEAN, STD = "eval_rewards/mean", "eval_rewards/std"  # of held-out rewards, in result.json

Run = Callable[..., Any]
Rewards = Mapping[Learned, "RewardModel"]


class RewardModel:
    """A reward: (records, texts) -> score_B, (score of the last token - mean) / std.

    params: the weights, head among them, on `mesh`. row_tokens: of a row, unless a prompt and its
    response take more. Raises: BadInput for a prompt and response that the model has no positions
    for.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        mesh: jax.sharding.Mesh,
        row_tokens: int,
        mean: float = 0.0,
        std: float = 1.0,
    ):
        self.__name__ = name
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.mesh, self.row_tokens, self.mean, self.std = mesh, row_tokens, mean, std
        self._scores = jax.jit(partial(reward_scores, model), compiler_options=ROUNDED)

    def __call__(self, records: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> np.ndarray:
        pairs = zip(records, texts, strict=True)
        asked = [[*same] for _, same in groupby(pairs, key=lambda pair: id(pair[0]))]
        prompts = [same[0][0] for same in asked]
        answers = [[text for _, text in same] for same in asked]
        if not prompts:
            return np.zeros(0)
        groups = encode_texts(prompts, answers, self.tokenizer)
        longest = max(len(g.prompt) + max(map(len, g.responses)) for g in groups)
        if self.model.places is not None and longest > self.model.places:
            raise BadInput(
                f"a prompt and response of {longest} tokens do not fit the {self.model.places} "
                f"positions of the reward model {self.__name__}: lower max_tokens"
            )
        tokens = _rung(-(-longest // self.row_tokens)) * self.row_tokens
        pieces = [piece for group in groups for piece in _pieces(group, tokens)]
        score_B = np.concatenate(self._scored(pieces, tokens))
        return (score_B - self.mean) / self.std

    def _scored(self, groups: Sequence[Group], row_tokens: int) -> list[np.ndarray]:
        """score_K of every group."""
        found: list[np.ndarray] = [np.zeros(0)] * len(groups)
        with jax.set_mesh(self.mesh):
            for batch in self._batches(groups, row_tokens):
                placed = parallel.shard_batch(self.mesh, batch)
                score_RGK = jax.device_get(self._scores(self.params, placed))
                for b, score_K in taken(score_RGK, batch):
                    found[b] = score_K.astype(np.float64)
        return found

    def _batches(self, groups: Sequence[Group], row_tokens: int) -> Iterator[Batch]:
        """The groups in batches whose shape depends on nothing but K and the rung of their rows."""
        K = max(len(group.responses) for group in groups)
        least = min(1 + K, *(group.tokens for group in groups))
        multiple = parallel.row_multiple(self.mesh)
        most = _up(max(1, TOKENS // row_tokens), multiple)
        bins = plan([group.tokens for group in groups], row_tokens)
        for start in range(0, len(bins), most):
            part = bins[start : start + most]
            rows = _rung(-(-len(part) // multiple)) * multiple
            shape = Shape(min(most, rows), row_tokens, row_tokens - 1, row_tokens // least, K)
            yield lay_out(groups, part, shape, record_B=range(len(groups)))


def _pieces(group: Group, row_tokens: int) -> Iterator[Group]:
    """The group, its responses over several where they do not fit a row with their prompt."""
    room = row_tokens - len(group.prompt)
    for piece in pieces([len(ids) for ids in group.responses], room):
        yield Group(group.prompt, [group.responses[k] for k in piece])


def _rung(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: a third is wasted at most."""
    power = 1 << max(0, (count - 1).bit_length() - 1)  # the largest that is below the count
    return next(rung for rung in (power, 3 * power // 2, 2 * power) if rung >= count)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# What an experiment names


def rewards(value: Any, run: Run) -> Rewards:
    """The models of every `Learned` in an experiment's algorithm and evaluation, or in a tuple of
    rewards; `run` trains what is missing.

    Raises: BadInput for a run that trains no reward, before one is trained, and for one without
    held-out rewards to normalise by.
    """
    wanted = named(value)
    for each in wanted:
        _check(each)
    return {each: _loaded(each, run) for each in wanted}


def plugged(value: Any, known: Rewards) -> Any:
    """The value with models in place of every `Learned`."""
    if not known:
        return value
    if isinstance(value, Learned):
        return known[value]
    if isinstance(value, Experiment):
        evaluation = value.evaluation
        return replace(
            value,
            algorithm=plugged(value.algorithm, known),
            evaluation=replace(evaluation, rewards=plugged(evaluation.rewards, known)),
        )
    if isinstance(value, partial):
        keywords = {name: plugged(item, known) for name, item in value.keywords.items()}
        return partial(value.func, *value.args, **keywords)
    return tuple(plugged(item, known) for item in value) if type(value) is tuple else value


def check(experiment: Experiment) -> None:
    """Raises BadInput for a `Learned` whose run trains no reward."""
    for each in named(experiment):
        _check(each)


def named(value: Any) -> list[Learned]:
    """Every `Learned` in an experiment's algorithm and evaluation, or in one of the two, once."""
    return list(dict.fromkeys(_named(value)))


def _named(value: Any) -> Iterator[Learned]:
    if isinstance(value, Learned):
        yield value
    elif isinstance(value, Experiment):
        yield from _named((value.algorithm, value.evaluation.rewards))
    elif isinstance(value, partial):
        yield from _named(tuple(value.keywords.values()))
    elif type(value) is tuple:
        for item in value:
            yield from _named(item)


def _check(wanted: Learned) -> None:
    parent, name = wanted.parent, wanted.__name__
    if isinstance(parent, Experiment):
        heads = parts.shapes(parent)
    elif rundir.is_run(epath.Path(parent)):
        heads = rundir.heads(epath.Path(parent), {})
    else:
        raise BadInput(f"Learned.parent={parent} is no run: give a reward model's experiment")
    if HEAD not in heads:
        raise BadInput(
            f"Learned {name} is no reward model: give a run whose algorithm is algorithms.reward"
        )


def _loaded(wanted: Learned, run: Run) -> RewardModel:
    parent = wanted.parent
    if isinstance(parent, Experiment):
        found = run(parent)
        options = {"mesh": parts.mesh(parent), "row_tokens": parent.data.row_tokens}
        metrics = found.metrics
    else:
        home, mesh = epath.Path(parent), parallel.make_mesh()
        metrics, found = rundir.metrics(home), parts.from_run(home, mesh)
        row_tokens = rundir.read(home)["experiment"]["data"]["row_tokens"]
        options = {"mesh": mesh, "row_tokens": row_tokens}
    if wanted.normalised:
        options |= _moments(wanted.__name__, metrics)
    return RewardModel(wanted.__name__, found.model, found.params, found.tokenizer, **options)


def _moments(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean and standard deviation of the held-out rewards of a run."""
    if not metrics.get(STD):
        raise BadInput(
            f"Learned {name} has no held-out rewards to be normalised by: give its run an "
            "evaluation.source, or normalised=False"
        )
    return {"mean": metrics[MEAN], "std": metrics[STD]}
