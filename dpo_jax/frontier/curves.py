"""Curves of (KL to the reference in nats a response, true reward): runs, best-of-n, the optimum."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dpo_jax import build, learned
from dpo_jax.algorithms.best_of_n import expected_score, kl_bound
from dpo_jax.evaluate import completions, mean_and_error
from dpo_jax.experiment import Experiment
from dpo_jax.metrics import progress
from dpo_jax.structs import BadInput
from dpo_jax.train import Result, run

PROMPTS, SAMPLES = 64, 256  # of the reference, for the two comparisons
AT_ONCE = 8  # prompts
LEAST_SAMPLES = 8.0  # effective samples below which importance weights say nothing
LAMBDAS = (8.0, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)


@dataclass(frozen=True)
class Point:
    """Reward and KL in nats: means with their standard errors."""

    reward: float
    reward_se: float
    kl: float
    kl_se: float
    label: str  # step, n or lambda


@dataclass(frozen=True)
class Curve:
    """One setting of a run, or one comparison. line: what it has its colour with."""

    name: str
    points: tuple[Point, ...]
    line: str = ""


def run_curve(results: Sequence[Result], name: str, reward: str, line: str = "") -> Curve:
    """The points of runs that differ in their seed, from the evaluations in their metrics.jsonl:
    means over the seeds with errors of their spread; of one run, of its prompts."""
    found = [_points(result, reward) for result in results]
    if len(found) == 1:
        return Curve(name, tuple(found[0]), line)
    return Curve(name, tuple(_mean(same) for same in zip(*found, strict=True)), line)


def _points(result: Result, reward: str) -> list[Point]:
    points = []
    for text in (result.directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(text)
        if f"eval_samples/{reward}" in row:
            names = {"reward": reward, "reward_se": f"{reward}_se", "kl": "kl", "kl_se": "kl_se"}
            values = {field: row[f"eval_samples/{name}"] for field, name in names.items()}
            points.append(Point(**values, label=f"step {row['step']}"))
    return points


def _mean(points: Sequence[Point]) -> Point:
    reward, reward_se = mean_and_error(np.array([[point.reward] for point in points]))
    kl, kl_se = mean_and_error(np.array([[point.kl] for point in points]))
    return Point(reward, reward_se, kl, kl_se, points[0].label)


def reference_curves(member: Experiment) -> tuple[Curve, Curve]:
    """(best-of-n, optimum) from samples of the member's parent on the evaluation's prompts."""
    wanted = member.evaluation
    parent = run(member.parent) if isinstance(member.parent, Experiment) else None
    if parent is None:
        raise BadInput("a frontier wants a parent experiment: its samples are the comparison")
    prompts = build.read_records("evaluation.prompts", wanted.prompts, run, member.data)[:PROMPTS]
    truth = learned.plugged(wanted.rewards[:1], learned.rewards(wanted.rewards[:1], run))
    scores = []
    for start in progress(range(0, len(prompts), AT_ONCE), "sample the reference"):
        drawn = completions(
            parent.model,
            parent.params,
            {},
            prompts[start : start + AT_ONCE],
            parent.tokenizer,
            rewards=truth,
            key=jax.random.fold_in(jax.random.key(member.run.seed), start),
            **dict(wanted.drawing, n=SAMPLES),
        )
        scores += list(drawn.rewards.values())
    score_BK = np.concatenate(scores)
    return best_of_n(score_BK), optimal_tilt(score_BK)


def best_of_n(score_BK: np.ndarray) -> Curve:
    """The mean score of best-of-n without bias, n a power of two up to K / 4, and its bound on
    KL(best-of-n, reference), which is reached where no two scores are the same."""
    K = score_BK.shape[1]
    points = []
    for n in (2**i for i in range(1, K.bit_length()) if 2**i <= K // 4):
        reward, error = mean_and_error(expected_score(score_BK, n)[:, None])
        points.append(Point(reward, error, kl_bound(n), 0.0, f"n {n}"))
    return Curve("best of n (reference samples)", tuple(points))


def optimal_tilt(score_BK: np.ndarray, lambdas: Sequence[float] = LAMBDAS) -> Curve:
    """Reward and KL of pi_ref exp(r / lambda) / Z for every lambda whose weights are valid.

    Each prompt's K samples get weights w = softmax(score / lambda); its reward is sum w r, its KL
    log K - H(w). A lambda counts while nine prompts of ten keep LEAST_SAMPLES effective samples
    1 / sum w^2.
    """
    points = []
    for value in lambdas:
        logit_BK = score_BK / value
        weight_BK = np.exp(logit_BK - logit_BK.max(axis=1, keepdims=True))
        weight_BK /= weight_BK.sum(axis=1, keepdims=True)
        effective_B = 1 / np.square(weight_BK).sum(axis=1)
        if np.quantile(effective_B, 0.1) < LEAST_SAMPLES:
            continue
        log_BK = np.log(np.maximum(weight_BK, 1e-300))
        kl_B = np.log(score_BK.shape[1]) + (weight_BK * log_BK).sum(axis=1)
        reward, reward_se = mean_and_error((weight_BK * score_BK).sum(axis=1, keepdims=True))
        kl, kl_se = mean_and_error(kl_B[:, None])
        points.append(Point(reward, reward_se, kl, kl_se, f"lambda {value}"))
    return Curve("optimum (importance weights)", tuple(points))


def gap(curve: Curve, start: Point, best: Curve) -> float | None:
    """Reward of a curve's last point less that of best-of-n at equal KL, linear between its points;
    None beyond the largest n."""
    last, kl = curve.points[-1], [0.0, *(point.kl for point in best.points)]
    if last.kl > kl[-1]:
        return None
    reward = [start.reward, *(point.reward for point in best.points)]
    return last.reward - float(np.interp(last.kl, kl, reward))


def compared(curves: Sequence[Curve], best: Curve) -> str:
    """One sentence: where the last points of the runs lie against best-of-n at equal KL."""
    gaps = {curve.name: gap(curve, curves[0].points[0], best) for curve in curves}
    below = [f"{name} ({x:+.2f})" for name, x in gaps.items() if x is not None and x < 0]
    above = [f"{name} ({x:+.2f})" for name, x in gaps.items() if x is not None and x >= 0]
    beyond = [name for name, x in gaps.items() if x is None]
    parts = [
        f"{words} best-of-n at equal KL: {', '.join(names)}"
        for words, names in (("below", below), ("at or above", above), ("beyond the KL of", beyond))
        if names
    ]
    return "At their last step the runs lie " + "; ".join(parts) + "."
