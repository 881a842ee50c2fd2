"""Rollouts: responses drawn from the policy, what rewards say of their texts, and the rows they
are trained in.

A reward is a plain function (records, responses) -> score_B of raw records and texts. Sample k of
record r has the key fold_in(fold_in(key, r), k), so mesh, packing and microbatches do not change
it. Arrays named _BK are of responses, _BKM of their tokens, M the most that a response may have.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.data.packing import Bins, Shape, arrangements, lay_out, plan
from dpo_jax.data.template import response_end
from dpo_jax.data.tokens import vocabulary
from dpo_jax.losses.needs import name_of
from dpo_jax.sampling import Samples, sample
from dpo_jax.structs import Array, BadInput, Batch, Context, Group, Model, Params

Reward = Callable[..., Any]  # (records, responses) -> score_B
QUARTERS = 4  # the row counts that a run compiles for, as shares of what the longest rollout needs


@dataclass(frozen=True)
class Draw:
    """How responses are drawn and scored: n to a prompt, of max_tokens at most.

    score = sum_i weights_i rewards_i, less missing_eos where a response was cut.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...] | None
    n: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    missing_eos: float
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = tuple(name_of(reward) for reward in self.rewards)
        object.__setattr__(self, "names", names)
        if not names or len(set(names)) < len(names):
            raise BadInput(f"algorithm.rewards={names}: give one or more, of different names")
        if self.weights is not None and len(self.weights) != len(names):
            raise BadInput(
                f"algorithm.reward_weights={self.weights}: give one for each of {', '.join(names)}"
            )
        if self.temperature <= 0:
            raise BadInput(
                f"algorithm.temperature={self.temperature}: a policy that is trained on its own "
                "samples must draw them; give more than 0"
            )
        if self.n < 1 or self.max_tokens < 1:
            raise BadInput(
                f"algorithm.n={self.n}, algorithm.max_tokens={self.max_tokens}: both are 1 or more"
            )


class Scores(NamedTuple):
    """What the rewards say of the texts."""

    named: dict[str, np.ndarray]  # name -> (B, K)
    total_BK: np.ndarray


@dataclass(frozen=True, eq=False)
class Rollout:
    """Responses in rows, on the host. response_RN: b*K + k of every scored token, -1 =
    unused; place_RN: how many tokens of its response stand before it."""

    batch: Batch
    response_RN: np.ndarray
    place_RN: np.ndarray
    scores: Scores
    finished_BK: np.ndarray
    length_BK: np.ndarray
    sampled_BKM: np.ndarray  # log-probs as the sampler found them, 0 behind a response
    groups: list[Group]  # B prompts with their K responses, as they were drawn
    texts_BK: list[list[str]]

    def by_response(self, x_RN: Array | None) -> np.ndarray:
        """A value of every token as x_BKM, 0 behind a response."""
        assert x_RN is not None
        there_RN, (B, K, M) = self.response_RN >= 0, self.sampled_BKM.shape
        x_BM = np.zeros((B * K, M), np.float32)
        x_BM[self.response_RN[there_RN], self.place_RN[there_RN]] = np.asarray(x_RN)[there_RN]
        return x_BM.reshape(B, K, M)

    def by_token(self, x: Array) -> np.ndarray:
        """x_BK, or x_BKM, as a value of every token in its row, x_RN."""
        x = np.asarray(x)
        flat = x.reshape(-1, *x.shape[2:])
        response_RN = np.maximum(self.response_RN, 0)
        x_RN = flat[response_RN] if x.ndim == 2 else flat[response_RN, self.place_RN]
        return np.where(self.response_RN >= 0, x_RN, 0).astype(np.float32)

    @property
    def tokens(self) -> int:
        """Of prompts and responses."""
        return sum(group.tokens for group in self.groups)

    @property
    def mask_BKM(self) -> np.ndarray:
        """Which tokens are there."""
        return np.arange(self.sampled_BKM.shape[-1]) < self.length_BK[..., None]


class Rows:
    """Lays the groups of a step out, in as many rows as one of a few fixed counts.

    fullest: response tokens of each group that the longest prompt can make. responses: of a group,
    at most. groups: of a step, at most; None = any number. minibatches: the parts that the rows are
    cut in.
    """

    def __init__(
        self,
        context: Context,
        fullest: Sequence[int],
        *,
        responses: int,
        groups: int | None = None,
        minibatches: int = 1,
    ):
        T, lengths = context.row_tokens, [len(group.prompt) for group in context.prompts]
        full = [max(lengths) + size for size in fullest] * context.step_groups
        multiple = context.rows_multiple * minibatches
        self.quarter = _up(-(-len(plan(full, T)) // QUARTERS), multiple)
        slots = T // (min(lengths) + 1)
        slots = slots if groups is None else min(slots, groups)
        self.shape = Shape(self.quarter, T, T - min(lengths), slots, responses)

    def __call__(self, groups: list[Group]) -> tuple[Batch, Bins]:
        """(batch on the host, the groups that stand in each of its rows)."""
        sizes = [group.tokens for group in groups]
        rows, bins = self._fit(sizes, [sum(map(len, group.responses)) for group in groups])
        numbers = [group.record or 0 for group in groups]
        return lay_out(groups, bins, self.shape._replace(rows=rows), record_B=numbers), bins

    def _fit(self, sizes: Sequence[int], scored: Sequence[int]) -> tuple[int, Bins]:
        """The fewest quarters of rows that hold the sizes, and where each stands."""
        rows = self.quarter
        while True:
            for bins in arrangements(sizes, scored, rows, self.shape.tokens):
                return rows, bins
            rows += self.quarter


class Sampler:
    """Draws the rollouts of one run; made once, on the host.

    minibatches: the parts that the rows are cut in. Raises BadInput where a prompt and a response
    do not fit a row.
    """

    def __init__(self, model: Model, draw: Draw, context: Context, minibatches: int):
        self.model, self.draw, self.context = model, draw, context
        self.prompts = {group.record: group for group in context.prompts}
        self.longest = max(len(group.prompt) for group in context.prompts)
        self.eos = response_end([r["prompt"] for r in context.records[:1]], context.tokenizer)
        self.vocabulary = vocabulary(context.tokenizer)
        if context.step_groups < minibatches:
            raise BadInput(
                f"data.groups={context.step_groups} prompts a step do not make "
                f"algorithm.minibatches={minibatches}"
            )
        self.rows = Rows(
            context,
            self._fullest(),
            responses=draw.n,
            groups=context.step_groups * draw.n,
            minibatches=minibatches,
        )

    def _fullest(self) -> list[int]:
        """Response tokens of the pieces of a group whose prompt and responses are the longest."""
        most = [self.draw.max_tokens] * self.draw.n
        room = self.context.row_tokens - self.longest
        return [sum(most[k] for k in piece) for piece in pieces(most, room)]

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> Rollout:
        """A rollout to the prompts of a batch on the host, in the order of their records.

        params: the tree that the model is called with.
        """
        draw = self.draw
        records, first = _counted(batch, draw.n)
        groups = [self.prompts[record] for record in records]
        drawn = sample(
            self.model,
            params,
            [group.prompt for group in groups],
            key=key,
            eos=self.eos,
            n=draw.n,
            max_tokens=draw.max_tokens,
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
            vocabulary=self.vocabulary,
            records=records,
            first=first,
            width=self.longest,
            rows=min(512, len(groups) * draw.n),
        )
        return self._rollout(groups, drawn)

    def _rollout(self, groups: list[Group], drawn: Samples) -> Rollout:
        length_BK = np.array([[len(ids) for ids in ids_K] for ids_K in drawn.responses])
        answered = zip(groups, drawn.responses, strict=True)
        groups = [replace(group, responses=ids_K) for group, ids_K in answered]
        host, response_RN = self._rows(groups)
        prompt_B = np.array([len(group.prompt) for group in groups])
        behind_RN = np.repeat(prompt_B, self.draw.n)[np.maximum(response_RN, 0)]
        position_RN = np.take_along_axis(host.positions_RT, np.asarray(host.source_RN), axis=1)
        sampled_BKM = np.zeros((*length_BK.shape, self.draw.max_tokens), np.float32)
        for b, logps_K in enumerate(drawn.logps):
            for k, logp_M in enumerate(logps_K):
                sampled_BKM[b, k, : len(logp_M)] = logp_M
        flat = [ids[ids != self.eos] for ids_K in drawn.responses for ids in ids_K]
        texts = self.context.tokenizer.batch_decode(flat)
        return Rollout(
            batch=host,
            response_RN=response_RN,
            place_RN=np.where(response_RN >= 0, position_RN + 1 - behind_RN, 0),
            scores=self._scores(groups, texts, drawn.finished),
            finished_BK=drawn.finished,
            length_BK=length_BK,
            sampled_BKM=sampled_BKM,
            groups=groups,
            texts_BK=[texts[i : i + self.draw.n] for i in range(0, len(texts), self.draw.n)],
        )

    def _rows(self, groups: list[Group]) -> tuple[Batch, np.ndarray]:
        """(batch, response_RN): groups whole where they fit a row, else with their prompt said
        again."""
        n, cut, numbers = self.draw.n, [], []
        for b, group in enumerate(groups):
            room = self.context.row_tokens - len(group.prompt)
            for piece in pieces([len(ids) for ids in group.responses], room):
                cut.append(replace(group, responses=[group.responses[k] for k in piece]))
                numbers.append([b * n + k for k in piece])
        batch, bins = self.rows(cut)
        number_RGK = np.full(batch.end_RGK.shape, -1)
        for row, members in enumerate(bins):
            for slot, b in enumerate(members):
                number_RGK[row, slot, : len(numbers[b])] = numbers[b]
        slot_RN = np.maximum(batch.slot_RN, 0)
        number_RN = np.take_along_axis(number_RGK.reshape(len(slot_RN), -1), slot_RN, axis=1)
        return batch, np.where(batch.slot_RN >= 0, number_RN, -1)

    def _scores(self, groups: list[Group], texts: list[str], finished_BK: np.ndarray) -> Scores:
        draw, shape = self.draw, finished_BK.shape
        records = [self.context.records[group.record or 0] for group in groups]
        repeated = [record for record in records for _ in range(draw.n)]
        named = {
            name: _checked(name, reward(repeated, texts), len(texts)).reshape(shape)
            for name, reward in zip(draw.names, draw.rewards, strict=True)
        }
        weights = draw.weights or (1.0,) * len(named)
        total_BK = sum(w * x_BK for w, x_BK in zip(weights, named.values(), strict=True))
        return Scores(named, np.asarray(total_BK - draw.missing_eos * ~finished_BK))


def _counted(batch: Batch, n: int) -> tuple[list[int], list[int]]:
    """The records of a batch in order, and how many samples of the same one come before."""
    records = sorted(np.asarray(batch.record_RG)[batch.record_RG >= 0].tolist())
    met: Counter[int] = Counter()
    first = []
    for record in records:
        first.append(met[record])
        met[record] += n
    return records, first


def pieces(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which responses of a group share a row that has room for so many tokens behind the prompt."""
    found: list[list[int]] = [[]]
    left = room
    for k, length in enumerate(lengths):
        if length > left and found[-1]:
            found.append([])
            left = room
        found[-1].append(k)
        left -= length
    return found


def prompts_alone(
    groups: list[Group], row_tokens: int | None = None, *, max_tokens: int, together: int = 1
) -> list[Group]:
    """The `prepare` of an algorithm that samples: prompts without the responses of the data.

    together: responses that must share a row. Errors: BadInput where a prompt and so many of
    max_tokens do not fit one.
    """
    prompt = max((len(group.prompt) for group in groups), default=0)
    longest = prompt + together * max_tokens
    if row_tokens is not None and longest > row_tokens:
        responses = "a response" if together == 1 else f"{together} responses"
        raise BadInput(
            f"a prompt of {prompt} tokens and {responses} of algorithm.max_tokens={max_tokens} "
            f"take {longest}: data.row_tokens={longest} would do"
        )
    return [Group(group.prompt, [], weight=group.weight, record=group.record) for group in groups]


def summary(rollout: Rollout) -> dict[str, float]:
    """TRL's metrics of rewards and completions."""
    total_BK, length_BK = rollout.scores.total_BK, rollout.length_BK
    done = length_BK[rollout.finished_BK]
    found = {
        "reward": total_BK.mean(),
        "completions/mean_length": length_BK.mean(),
        "completions/min_length": length_BK.min(),
        "completions/max_length": length_BK.max(),
        "completions/clipped_ratio": 1 - rollout.finished_BK.mean(),
        "completions/mean_terminated_length": done.mean() if len(done) else 0.0,
        "num_tokens": rollout.tokens,
    }
    if total_BK.shape[1] > 1:
        found["reward_std"] = _spread(total_BK).mean()
        found["frac_reward_zero_std"] = equal(total_BK).mean()
    for name, x_BK in rollout.scores.named.items():
        found |= {f"rewards/{name}/mean": x_BK.mean(), f"rewards/{name}/std": _std(x_BK)}
    return {name: float(value) for name, value in found.items()}


def equal(score_BK: np.ndarray) -> np.ndarray:
    """Which groups have one score only, B."""
    return np.ptp(score_BK, axis=1) == 0


def _spread(score_BK: np.ndarray) -> np.ndarray:
    """The sample standard deviation of each group, exactly 0 where all scores are the same."""
    return np.where(equal(score_BK), 0.0, score_BK.std(axis=1, ddof=1))


def _std(x_BK: np.ndarray) -> float:
    return float(x_BK.std(ddof=1)) if x_BK.size > 1 else 0.0


def _checked(name: str, scores: Any, count: int) -> np.ndarray:
    score_B = np.asarray(scores, np.float64)
    if score_B.shape != (count,) or not np.isfinite(score_B).all():
        raise BadInput(
            f"algorithm.rewards: {name} gave an array of shape {score_B.shape} for {count} "
            "responses; a reward gives one finite number for each"
        )
    return score_B


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
