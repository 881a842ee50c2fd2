"""The reward-KL frontier: runs along their training, best-of-n and the optimum for comparison.

A run is a curve of points (KL(policy, reference), true reward), one an evaluation. Under them lie
two curves made from samples of the reference alone: best-of-n, and the optimal policies
pi_ref exp(r / lambda) / Z by importance weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import build, learned, rundir
from dpo_jax.data.layouts import plain
from dpo_jax.evaluate import completions, mean_and_error
from dpo_jax.experiment import Experiment, code_digest, distinctions
from dpo_jax.metrics import progress
from dpo_jax.structs import BadInput
from dpo_jax.together import run_all
from dpo_jax.train import Result, run

PROMPTS, SAMPLES = 64, 256  # of the reference, for the two curves
AT_ONCE = 8  # prompts
LEAST_SAMPLES = 8.0  # effective samples below which importance weights say nothing
LAMBDAS = (8.0, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
SIDE_BY_SIDE = 8  # prompts printed before and after


@dataclass(frozen=True)
class Point:
    """Rewards and KL in nats, means over prompts with their standard errors."""

    reward: float
    reward_se: float
    kl: float
    kl_se: float
    label: str  # step, n or lambda


@dataclass(frozen=True)
class Curve:
    """One run, or one comparison."""

    name: str
    points: tuple[Point, ...]


def frontier(members: Sequence[Experiment], *, directory: str, name: str) -> epath.Path:
    """Train every member, compare them, and write frontier.json and frontier.png to directory.

    Members want the same parent, evaluation.prompts and evaluation.rewards, of which the first is
    the true reward. Prints the table and samples. Returns the path of the figure.
    Raises: BadInput for members that cannot be compared.
    """
    home, labels = epath.Path(directory), member_labels(members)
    reward = _common_reward(members)
    with_points = [replace(member, run=_with_points(member)) for member in members]
    results = run_all(with_points, [str(home / label) for label in labels])
    curves = [run_curve(x, label, reward) for x, label in zip(results, labels, strict=True)]
    start = Curve("reference (SFT)", (curves[0].points[0],))
    best, optimum = reference_curves(members[0])
    verdict = compared(curves, best)
    ceiling = annotator_accuracy(members[0])
    rows = [
        summary(label, x, curve, ceiling)
        for label, x, curve in zip(labels, results, curves, strict=True)
    ]
    record = {
        "name": name,
        "reward": reward,
        "code": code_digest(),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "annotator_accuracy": ceiling,
        "runs": rows,
        "curves": [asdict(curve) for curve in (start, *curves, best, optimum)],
        "comparison": verdict,
    }
    rundir.write(home / "frontier.json", json.dumps(record, indent=1) + "\n")
    figure = home / "frontier.png"
    draw(figure, curves, start, best, optimum, title=f"{name}: {reward} against KL", note=verdict)
    show(rows, results[len(results) // 2], labels[len(labels) // 2], reward, figure, verdict)
    return figure


def member_labels(members: Sequence[Experiment]) -> list[str]:
    """What tells the members apart, as `beta=0.1`: the options of the algorithm that differ."""
    listed = distinctions(members)
    own = [{x: now for x, now in found.items() if x.startswith("algorithm.")} for found in listed]
    labels = [
        ",".join(f"{path.rpartition('.')[2]}={now}" for path, now in found.items())
        for found in (own if any(own) else listed)
    ]
    if len(set(labels)) < len(labels):
        raise BadInput(f"the members of a frontier must differ in their options: {labels}")
    return labels


def _with_points(member: Experiment) -> Any:
    """A run that is evaluated at least eight times on its way, so that it is a curve."""
    every = member.run.eval_every or max(1, member.run.steps // 8)
    return replace(member.run, eval_every=every)


def _common_reward(members: Sequence[Experiment]) -> str:
    first = members[0].evaluation
    if not first.prompts or not first.rewards:
        raise BadInput(
            "a frontier wants evaluation.prompts and evaluation.rewards (the true one first)"
        )
    if any(m.evaluation != first or m.parent != members[0].parent for m in members):
        raise BadInput("the members of a frontier want one parent and one evaluation")
    if members[0].parent is None:
        raise BadInput("a frontier wants runs with a parent: its axis is the KL to it")
    return first.rewards[0].__name__


def run_curve(result: Result, label: str, reward: str) -> Curve:
    """The points of a run from the evaluations in its metrics.jsonl."""
    points = []
    for line in (result.directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if f"eval_samples/{reward}" in row:
            names = {"reward": reward, "reward_se": f"{reward}_se", "kl": "kl", "kl_se": "kl_se"}
            values = {field: row[f"eval_samples/{name}"] for field, name in names.items()}
            points.append(Point(**values, label=f"step {row['step']}"))
    return Curve(label, tuple(points))


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
    """Mean of the largest of n independent scores, n a power of two up to K / 4.

    KL(best-of-n, reference) <= log n - (n - 1) / n, an equality where no two samples are equal
    (Beirami et al. 2401.01879).
    """
    B, K = score_BK.shape
    points = []
    for n in (2**i for i in range(1, K.bit_length()) if 2**i <= K // 4):
        groups = score_BK[:, : K - K % n].reshape(B, -1, n)
        reward, error = mean_and_error(groups.max(axis=2))
        points.append(Point(reward, error, float(np.log(n) - (n - 1) / n), 0.0, f"n {n}"))
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


def compared(curves: Sequence[Curve], best: Curve) -> str:
    """One sentence: where the last points of the runs lie against best-of-n at equal KL."""
    kl, reward = (np.array([getattr(p, x) for p in best.points]) for x in ("kl", "reward"))
    below, above, beyond = [], [], []
    for curve in curves:
        last = curve.points[-1]
        gap = last.reward - float(
            np.interp(last.kl, [0.0, *kl], [curves[0].points[0].reward, *reward])
        )
        if last.kl > kl[-1]:
            beyond.append(curve.name)
        elif gap < 0:
            below.append(f"{curve.name} ({gap:+.2f})")
        else:
            above.append(f"{curve.name} ({gap:+.2f})")
    parts = [
        f"{words} best-of-n at equal KL: {', '.join(names)}"
        for words, names in (("below", below), ("at or above", above), ("beyond the KL of", beyond))
        if names
    ]
    return "At their last step the runs lie " + "; ".join(parts) + "."


def annotator_accuracy(member: Experiment) -> float | None:
    """E[max(p, 1 - p)] over the held-out pairs, the best accuracy their labels allow; None where
    the records do not say with which probability p one was preferred to the other."""
    found = build.read_records("evaluation.source", member.evaluation.source, run, member.data)
    pairs = [row for row in found if len(row["responses"]) == 2 and "soft_label" not in row]
    likely = [max(row["p"], 1 - row["p"]) for row in pairs if "p" in row]
    return float(np.mean(likely)) if likely else None


def summary(label: str, result: Result, curve: Curve, ceiling: float | None) -> dict[str, Any]:
    """The last point of a run with its held-out accuracy and the share of the gap it closes."""
    accuracy = result.metrics.get("eval_rewards/accuracies")
    closed = None
    if accuracy is not None and ceiling is not None and ceiling > 0.5:
        closed = (accuracy - 0.5) / (ceiling - 0.5)
    others = {
        name.removeprefix("eval_samples/"): value
        for name, value in result.metrics.items()
        if name.startswith("eval_samples/") and not name.endswith("_se")
    }
    return {
        "name": label,
        **asdict(curve.points[-1]),
        "accuracy": accuracy,
        "gap_closed": closed,
        "margin": result.metrics.get("eval_rewards/margins"),
        "samples": others,
    }


def show(rows, shown: Result, label: str, reward: str, figure: epath.Path, verdict: str) -> None:
    """The table, completions before and after side by side, and where the figure lies."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="held out and sampled, at the last step (mean +- standard error)")
    for column in ("run", f"true {reward}", "KL (nats)", "accuracy", "gap closed", "margin"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['reward']:.2f} +- {row['reward_se']:.2f}",
            f"{row['kl']:.2f} +- {row['kl_se']:.2f}",
            *(
                _text(row[x], form)
                for x, form in (("accuracy", ".3f"), ("gap_closed", ".0%"), ("margin", ".2f"))
            ),
        )
    console.print(table)
    table = Table(title=f"the same prompts before and after ({label})", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column)
    for before, after in _pairs_of_samples(shown):
        cells = [f"{x['response']} [{x[reward]:+.1f}]" for x in (before, after)]
        table.add_row(*(cell.replace("[", r"\[") for cell in (plain(before["prompt"]), *cells)))
    console.print(table)
    console.print(f"{verdict}\nfigure: {figure}", markup=False, soft_wrap=True)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _pairs_of_samples(result: Result) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    lines = (result.directory / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    first, last = min(x["step"] for x in samples), max(x["step"] for x in samples)
    before = [x for x in samples if x["step"] == first]
    after = [x for x in samples if x["step"] == last]
    return list(zip(before, after, strict=True))[:SIDE_BY_SIDE]


def draw(
    path: epath.Path,
    curves: Sequence[Curve],
    start: Curve,
    best: Curve,
    optimum: Curve,
    *,
    title: str,
    note: str,
) -> None:
    """The figure: runs in colour with error bars along training, comparisons in grey."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colour = colormaps["viridis"]
    _line(axes, optimum, color="black", linestyle="--", label=optimum.name)
    _line(axes, best, color="0.5", marker="s", linestyle=":", label=best.name)
    for i, curve in enumerate(curves):
        shade = colour(i / max(len(curves) - 1, 1) * 0.85)
        _line(axes, curve, color=shade, marker="o", label=curve.name)
    _line(axes, start, color="crimson", marker="*", markersize=14, linestyle="", label=start.name)
    axes.set_xlabel("KL(policy, reference) in nats a response")
    axes.set_ylabel("true reward")
    axes.set_title(title)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"Points along training, bars of one standard error. {note}", fontsize="small", wrap=True
    )
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _line(axes: Any, curve: Curve, **style: Any) -> None:
    columns = {
        x: [getattr(p, x) for p in curve.points] for x in ("kl", "reward", "kl_se", "reward_se")
    }
    axes.errorbar(
        columns["kl"],
        columns["reward"],
        xerr=columns["kl_se"],
        yerr=columns["reward_se"],
        markersize=style.pop("markersize", 4),
        linewidth=1.2,
        capsize=2,
        **style,
    )
