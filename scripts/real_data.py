"""Trains experiments/real_*.py and says what came of it, with 99% intervals.

    python scripts/real_data.py [NAME ...] [option=value ...] [--json OUT]

Names: hh blimp gsm8k oasst, all of them by default. Rewards are beta (log p - log p_ref) with the
SFT run as the reference, taken anew from the weights of the finished runs. An accuracy has its
exact binomial interval; all else is bootstrapped over prompts (for oasst: trees), for what is said
to one prompt is not independent.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from dpo_jax import build, experiment, parts, train
from dpo_jax.algorithms.margins import reward_scale
from dpo_jax.cli import parse_overrides
from dpo_jax.data.layouts import is_conversation
from dpo_jax.data.loader import sequential
from dpo_jax.logprobs import response_logps
from dpo_jax.parallel import shard_batch
from dpo_jax.structs import Batch

LEVEL = 0.99
AT_ONCE = 64  # groups


class Judged(NamedTuple):
    """The implicit rewards of one group's responses, best to worst; what it was said to."""

    prompt: str
    label: float | None
    reward_K: np.ndarray


def judged(result: train.Result) -> tuple[list[Judged], list[Judged]]:
    """The groups that were trained on and those held out, as the finished run rewards them."""
    wanted = result.experiment
    mesh = parts.mesh(wanted)
    given = build.materials(wanted, train.run)
    with jax.set_mesh(mesh):
        setup = build.setup(wanted, mesh, given)
        size = {"step_groups": AT_ONCE, "row_tokens": wanted.data.row_tokens}
        trained = list(sequential(setup.loader.groups, **size))
        beta = float(reward_scale(wanted.algorithm.keywords["loss"]))  # type: ignore[attr-defined]

        @jax.jit
        def rewards(policy, reference, batch: Batch) -> jax.Array:
            logp_RGK, ref_RGK = (
                response_logps(setup.model, params, batch) for params in (policy, reference)
            )
            return beta * (logp_RGK - ref_RGK)

        def of(batches: Sequence[Batch], records: list[dict[str, Any]]) -> Iterator[Judged]:
            for batch in batches:
                reward_RGK = rewards(result.params, setup.params, shard_batch(mesh, batch))
                yield from _groups(batch, np.asarray(reward_RGK), records)

        return list(of(trained, given.data)), list(of(setup.held_out, given.held_out))


def _groups(batch: Batch, reward_RGK: np.ndarray, records: list) -> Iterator[Judged]:
    for place in np.argwhere(batch.record_RG >= 0):
        r, g = place
        prompt = records[batch.record_RG[r, g]]["prompt"]
        said = prompt[0]["content"] if is_conversation(prompt) else prompt
        label = None if batch.label_RG is None else float(batch.label_RG[r, g])
        yield Judged(said, label, reward_RGK[r, g][batch.end_RGK[r, g] >= 0])


# Numbers with intervals


class Estimate(NamedTuple):
    """A number, its interval, and of how many things it is."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def accuracy(groups: Sequence[Judged]) -> Estimate:
    """How often the chosen response has the larger reward; a tie counts against it."""
    right = sum(bool(each.reward_K[0] > each.reward_K[1]) for each in groups)
    interval = stats.binomtest(right, len(groups)).proportion_ci(LEVEL, "exact")
    return Estimate(right / len(groups), interval.low, interval.high, len(groups))


def clustered(prompts: Sequence[str], sums_BX: np.ndarray, value: Callable) -> Estimate:
    """value(*sums of the columns), its interval bootstrapped over prompts."""
    _, cluster_B = np.unique(prompts, return_inverse=True)
    sums_CX = np.zeros((cluster_B.max() + 1, sums_BX.shape[1]))
    np.add.at(sums_CX, cluster_B, sums_BX)

    def statistic(*columns: np.ndarray, axis: int = -1) -> Any:
        return value(*(column.sum(axis=axis) for column in columns))

    columns = tuple(sums_CX.T)
    found = stats.bootstrap(
        columns, statistic, paired=True, confidence_level=LEVEL, rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(float(statistic(*columns)), float(found.low), float(found.high), len(prompts))


def mean(groups: Sequence[Judged], of: Callable[[np.ndarray], float]) -> Estimate:
    """The mean over groups of what `of` says of their rewards."""
    sums_BX = np.array([(of(each.reward_K), 1.0) for each in groups])
    return clustered([each.prompt for each in groups], sums_BX, lambda total, n: total / n)


def margin(groups: Sequence[Judged]) -> Estimate:
    return mean(groups, lambda reward_K: reward_K[0] - reward_K[1])


def unpaired_margin(groups: Sequence[Judged]) -> Estimate:
    """The mean reward of the desirable less that of the others."""
    rows = [
        (y * each.reward_K[0], y, (1 - y) * each.reward_K[0], 1 - y)
        for each, y in ((each, float(each.label or 0.0)) for each in groups)
    ]
    return clustered(
        [each.prompt for each in groups], np.array(rows), lambda a, m, b, n: a / m - b / n
    )


def tau(groups: Sequence[Judged]) -> Estimate:
    """Kendall's tau between the human order and the rewards, a list at a time."""
    return mean(groups, lambda x_K: stats.kendalltau(np.arange(len(x_K)), -x_K).statistic)


PAIRED = {"margin": margin, "accuracy": accuracy}
MEASURES: dict[str, dict[str, Callable[[Sequence[Judged]], Estimate]]] = {
    "hh": PAIRED,
    "blimp": PAIRED,
    "gsm8k": {"margin": unpaired_margin},
    "oasst": {"Kendall tau": tau},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    names = [word for word in arguments.words if "=" not in word] or [*MEASURES]
    changes = parse_overrides([word for word in arguments.words if "=" in word])
    found = {}
    for name in names:
        module, start = experiment.load(f"experiments/real_{name}.py"), time.perf_counter()
        result = train.run(experiment.override(module.EXPERIMENT, changes))
        sides = dict(zip(("training", "held out"), judged(result), strict=True))
        seconds = round(time.perf_counter() - start)
        for side, groups in sides.items():
            for what, measure in MEASURES[name].items() if groups else ():
                found[f"{name}, {side}, {what}"] = measure(groups)
                print(f"{name} | {side} | {what} | {measure(groups)} | {len(groups)}", flush=True)
        print(f"{name}: {seconds} s, {result.directory}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if arguments.json:
        rows = {name: each._asdict() for name, each in found.items()}
        Path(arguments.json).write_text(json.dumps(rows | {"commit": commit}, indent=1) + "\n")


if __name__ == "__main__":
    main()
