"""The reward-KL frontier: runs along their training, best-of-n and the optimum for comparison.

A setting of a run is a curve of points (KL(policy, reference), true reward), one an evaluation,
averaged over its seeds. Under them lie two curves made from samples of the reference alone:
best-of-n, and the optimal policies pi_ref exp(r / lambda) / Z by importance weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import build, rundir
from dpo_jax.experiment import (
    Experiment,
    canonical,
    code_digest,
    describe,
    distinctions,
    with_numbers,
)
from dpo_jax.frontier import show
from dpo_jax.frontier.curves import Curve, compared, gap, reference_curves, run_curve
from dpo_jax.structs import BadInput
from dpo_jax.together import run_all
from dpo_jax.train import Result, run


@dataclass(frozen=True, eq=False)
class Setting:
    """Members that differ in their seed alone. name: the line, and what tells it apart in it."""

    line: str
    name: str
    members: tuple[Experiment, ...]

    def place(self, home: epath.Path, seed: int) -> str:
        """Where the run of a seed lies."""
        folder = home / self.name.replace(" ", ",")
        return str(folder if len(self.members) == 1 else folder / f"seed={seed}")


def frontier(members: Sequence[Experiment], *, directory: str, name: str) -> epath.Path:
    """Train every member, compare them, and write frontier.json and frontier.png to directory.

    Members want the same parent and the same samples (evaluation.prompts, evaluation.rewards, of
    which the first is the true reward, and how they are drawn). Those of one name are drawn alike.
    Prints tables and samples. Returns the path of the figure.
    Raises: BadInput for members that cannot be compared.
    """
    home, found = epath.Path(directory), settings(members)
    reward = _common_reward(members)
    every = [(each, member) for each in found for member in each.members]
    results = iter(
        run_all(
            [replace(member, run=_with_points(member)) for _, member in every],
            [each.place(home, member.run.seed) for each, member in every],
        )
    )
    grouped = [[next(results) for _ in each.members] for each in found]
    curves = [
        run_curve(own, each.name, reward, each.line)
        for each, own in zip(found, grouped, strict=True)
    ]
    start = Curve("reference (SFT)", curves[0].points[:1])
    best, optimum = reference_curves(members[0])
    ceilings = {each.line: annotator_accuracy(each.members[0]) for each in found}
    rows = [
        summary(each, own, curve, ceilings[each.line], gap(curve, start.points[0], best))
        for each, own, curve in zip(found, grouped, curves, strict=True)
    ]
    verdict = compared(curves, best)
    record = {
        "name": name,
        "reward": reward,
        "code": code_digest(),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "runs": rows,
        "curves": [asdict(curve) for curve in (start, *curves, best, optimum)],
        "comparison": verdict,
    }
    rundir.write(home / "frontier.json", json.dumps(record, indent=1) + "\n")
    figure, middle = home / "frontier.png", len(found) // 2
    seeds = len(found[0].members)
    of = f"over {seeds} seeds" if seeds > 1 else "over prompts"
    note = f"Points along training, bars of one standard error {of}."
    title = f"{name}: {reward} against KL"
    few = f"{note} {verdict}" if len(curves) <= show.FEW else note
    show.draw(figure, curves, start, (best, optimum), title=title, note=few)
    show.tables(rows, reward)
    show.samples(grouped[middle][0], found[middle].name, reward)
    rundir.say(verdict)
    print(f"figure: {figure}")
    return figure


def settings(members: Sequence[Experiment]) -> list[Setting]:
    """The members by what they are but for their seeds, in order.

    A setting is named by the line, its members' name, where there are several lines, and by the
    options of the algorithm that differ within the line, as `beta=0.1` (by all that differ, where
    none of the algorithm does). Raises BadInput where two members are the same.
    """
    groups: dict[str, list[Experiment]] = {}
    for member in members:
        same = canonical(describe(with_numbers(member, {"run.seed": 0, "run.dir": None})))
        groups.setdefault(same, []).append(member)
    lines: dict[str, list[list[Experiment]]] = {}
    for group in groups.values():
        lines.setdefault(group[0].name, []).append(group)
    found = []
    for line, own in lines.items():
        for label, group in zip(_labels([group[0] for group in own]), own, strict=True):
            name = " ".join(x for x in (line * (len(lines) > 1), label) if x) or line
            found.append(Setting(line, name, tuple(group)))
    if len({x.name for x in found}) < len(found) or any(_repeats(each) for each in found):
        names = [each.name for each in found]
        raise BadInput(f"the members of a frontier must differ in their options or seeds: {names}")
    return found


def _labels(experiments: Sequence[Experiment]) -> list[str]:
    listed = distinctions(experiments)
    own = [{x: now for x, now in found.items() if x.startswith("algorithm.")} for found in listed]
    return [
        ",".join(f"{path.rpartition('.')[2]}={now}" for path, now in found.items())
        for found in (own if any(own) else listed)
    ]


def _repeats(setting: Setting) -> bool:
    return len({member.run.seed for member in setting.members}) < len(setting.members)


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
    samples = replace(first, source=None)
    others = [replace(member.evaluation, source=None) for member in members]
    if any(other != samples for other in others) or any(
        member.parent != members[0].parent for member in members
    ):
        raise BadInput(
            "the members of a frontier want one parent and one evaluation of samples: "
            "evaluation.source alone may differ"
        )
    if members[0].parent is None:
        raise BadInput("a frontier wants runs with a parent: its axis is the KL to it")
    return first.rewards[0].__name__


def annotator_accuracy(member: Experiment) -> float | None:
    """E[max(p, 1 - p)] over the held-out pairs, the best accuracy their labels allow; None where
    the records do not say with which probability p one was preferred to the other."""
    found = build.read_records("evaluation.source", member.evaluation.source, run, member.data)
    pairs = [row for row in found if len(row["responses"]) == 2 and "soft_label" not in row]
    likely = [max(row["p"], 1 - row["p"]) for row in pairs if "p" in row]
    return float(np.mean(likely)) if likely else None


def summary(
    setting: Setting,
    results: Sequence[Result],
    curve: Curve,
    ceiling: float | None,
    over_best_of_n: float | None,
) -> dict[str, Any]:
    """The last point of a setting; means over its seeds of the held-out accuracy, the share of the
    gap to the annotator's, `ceiling`, that it closes, and all that was measured on the samples."""
    names = set.intersection(*(set(result.metrics) for result in results))
    mean = {name: float(np.mean([x.metrics[name] for x in results])) for name in names}
    accuracy, closed = mean.get("eval_rewards/accuracies"), None
    if accuracy is not None and ceiling is not None and ceiling > 0.5:
        closed = (accuracy - 0.5) / (ceiling - 0.5)
    sampled = {x: now for x, now in mean.items() if x.startswith("eval_samples/")}
    return {
        "name": setting.name,
        "line": setting.line,
        "seeds": len(results),
        **asdict(curve.points[-1]),
        "over_best_of_n": over_best_of_n,
        "accuracy": accuracy,
        "annotator_accuracy": ceiling,
        "gap_closed": closed,
        "margin": mean.get("eval_rewards/margins"),
        "samples": {
            x.removeprefix("eval_samples/"): now
            for x, now in sorted(sampled.items())
            if not x.endswith("_se")
        },
        "bytes": dict(results[0].held),
    }
