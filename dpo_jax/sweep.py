"""Many small runs, one figure and one table: what `dpo-jax sweep` does with a `Sweep`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
from etils import epath

from dpo_jax import build, learned, rundir
from dpo_jax.evaluate import completions
from dpo_jax.experiment import (
    Experiment,
    Sweep,
    canonical,
    code_digest,
    describe,
    distinctions,
    options,
    with_numbers,
)
from dpo_jax.member import Result
from dpo_jax.structs import BadInput
from dpo_jax.together import programs, run_all
from dpo_jax.train import run

FEW_LINES = 10  # that ten colours tell apart
MARKERS = "osD^v<>PX*"
KL = "eval_samples/kl"
AXES = {
    KL: "KL(policy, reference) in nats a response",
    "eval_samples/reward": "true reward",
    "eval_criteria/reward/correlation": "correlation with the true reward, within prompts",
    "data.source.n": "prompts",
}
REPORTED = ("eval_rewards/accuracies", "eval_samples/length", "eval_samples/finished")


@dataclass(frozen=True)
class Mean:
    """A value over the seeds of a point: mean, standard error of the mean, and how many."""

    mean: float
    error: float
    count: int


@dataclass(frozen=True)
class Point:
    """One setting of the options: where it lies in the figure, and every metric over its seeds."""

    line: str
    label: str
    x: Mean
    y: Mean
    metrics: dict[str, Mean]


def sweep(chosen: Sweep, *, directory: str) -> epath.Path:
    """Train the members, write sweep.json and sweep.png to directory, print the table.

    Returns the path of the figure. Raises: BadInput for a metric that no evaluation has, and as
    `together.run_all`.
    """
    home, began = epath.Path(directory), time.monotonic()
    results = run_all(chosen.members)
    seconds = time.monotonic() - began
    points = summary(chosen, results)
    start = start_value(chosen)
    record = {
        "name": chosen.name,
        "x": chosen.x,
        "y": chosen.y,
        "runs": len(chosen.members),
        "programs": len(programs(chosen.members)),
        "seconds": round(seconds, 1),
        "code": code_digest(),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "start": start,
        "points": [asdict(point) for point in points],
        "directories": [str(result.directory) for result in results],
    }
    home.mkdir(parents=True, exist_ok=True)
    rundir.write(home / "sweep.json", json.dumps(record, indent=1) + "\n")
    figure = home / "sweep.png"
    draw(figure, chosen, points, start)
    show(chosen, points)
    rundir.say(f"{len(results)} runs in {record['programs']} programs, {seconds:.0f} s")
    print(f"figure: {figure}")
    return figure


def summary(chosen: Sweep, results: Sequence[Result]) -> list[Point]:
    """The points of a sweep: runs that differ in the seed alone are one."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        group = with_numbers(result.experiment, {"run.seed": 0, "run.dir": None})
        groups.setdefault(canonical(describe(group)), []).append(result)
    firsts = [group[0].experiment for group in groups.values()]
    labels = point_labels(firsts, chosen.x)
    points = []
    for label, group in zip(labels, groups.values(), strict=True):
        names = sorted(set.intersection(*(set(result.metrics) for result in group)))
        found = {name: _mean(group, name) for name in names if not name.endswith("_se")}
        x, y = (_coordinate(chosen, axis, group, found) for axis in (chosen.x, chosen.y))
        points.append(Point(group[0].experiment.name, label, x, y, found))
    return points


def _mean(group: Sequence[Result], name: str) -> Mean:
    """A metric over the seeds; of one seed alone the error is that of its own evaluation."""
    values = np.array([result.metrics[name] for result in group])
    own = group[0].metrics.get(f"{name}_se", 0.0)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else own
    return Mean(float(values.mean()), float(error), len(values))


def _coordinate(chosen: Sweep, axis: str, group: Sequence[Result], found: dict[str, Mean]) -> Mean:
    if axis in found:
        return found[axis]
    value = dict(options(group[0].experiment)).get(axis)
    if not isinstance(value, int | float):
        names = ", ".join(sorted(found)) or "none: give it evaluation.source or .prompts"
        raise BadInput(
            f"sweep {chosen.name}: {axis} is no metric of {group[0].experiment.name}'s evaluation "
            f"and no number among its options; metrics: {names}"
        )
    return Mean(float(value), 0.0, len(group))


def point_labels(experiments: Sequence[Experiment], x: str = "") -> list[str]:
    """What tells the points of a line apart, as `beta=0.1`: the options that differ within it."""
    labels = [""] * len(experiments)
    for name in {each.name for each in experiments}:
        line = [i for i, each in enumerate(experiments) if each.name == name]
        for i, own in zip(line, distinctions([experiments[i] for i in line]), strict=True):
            short = {p: now for p, now in own.items() if p not in ("run.seed", "run.dir", x)}
            labels[i] = ", ".join(f"{p.rpartition('.')[2]}={now}" for p, now in short.items())
    return labels


def start_value(chosen: Sweep) -> float | None:
    """y of the policy that all members start from, sampled on their prompts, where KL is 0; None
    where they have no one parent or y is no reward of samples."""
    first = chosen.members[0]
    wanted, reward = first.evaluation, chosen.y.removeprefix("eval_samples/")
    known = {function.__name__: function for function in wanted.rewards}
    same = all(m.parent == first.parent and m.evaluation == wanted for m in chosen.members)
    if (
        chosen.x != KL
        or not same
        or not isinstance(first.parent, Experiment)
        or reward not in known
    ):
        return None
    parent, measured = run(first.parent), (known[reward],)
    drawn = completions(
        parent.model,
        parent.params,
        {},
        build.read_records("evaluation.prompts", wanted.prompts, run),
        parent.tokenizer,
        rewards=learned.plugged(measured, learned.rewards(measured, run)),
        key=jax.random.key(0),
        **wanted.drawing,
    )
    return drawn.metrics()[f"samples/{reward}"]


def show(chosen: Sweep, points: Sequence[Point]) -> None:
    """The table: a row a point, its metrics with their standard errors over the seeds."""
    from rich.console import Console
    from rich.table import Table

    samples = {n for p in points for n in p.metrics if n.startswith("eval_samples/")}
    others = sorted(samples - {chosen.x, chosen.y, *REPORTED})
    present = [n for n in REPORTED if any(n in p.metrics for p in points)]
    columns = [n for n in (*others, *present) if n not in (chosen.x, chosen.y)]
    seeds = max(point.y.count for point in points)
    table = Table(title=f"{chosen.name}: last evaluation, mean +- standard error, {seeds} seed(s)")
    table.add_column("run")
    for column in (chosen.x, chosen.y, *columns):
        table.add_column(column.removeprefix("eval_").removeprefix("samples/"), justify="right")
    for p in points:
        cells = [_text(p.x), _text(p.y), *(_text(p.metrics.get(name)) for name in columns)]
        table.add_row(f"{p.line} {p.label}".strip(), *cells)
    Console().print(table)


def _text(value: Mean | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.3g}" + (f" +- {value.error:.2g}" if value.error else "")


def draw(
    path: epath.Path, chosen: Sweep, points: Sequence[Point], start: float | None = None
) -> None:
    """The figure: a line a name through its points in the order of x, with error bars.

    start: y of the policy that all began with, where KL is 0.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(point.line for point in points))
    many = len(lines) > FEW_LINES
    figure = Figure(figsize=(11, 7) if many else (8, 6), layout="constrained")
    axes = figure.subplots()
    for i, line in enumerate(lines):
        own = sorted((p for p in points if p.line == line), key=lambda p: p.x.mean)
        name = f"{i + 1} {line}" if many else line
        colour, marker = colormaps["tab10"](i % FEW_LINES), MARKERS[i // FEW_LINES % len(MARKERS)]
        x, y = [p.x.mean for p in own], [p.y.mean for p in own]
        x_error, y_error = [p.x.error for p in own], [p.y.error for p in own]
        axes.errorbar(x, y, y_error, x_error, fmt="none", ecolor=colour, linewidth=0.8, alpha=0.6)
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.2, label=name)
        for point in own:
            option = chosen.x not in point.metrics  # then the axis says what the point is
            text = str(i + 1) if many else point.label * (not option)
            place = (point.x.mean, point.y.mean)
            axes.annotate(text, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    if start is not None:
        axes.plot(0.0, start, marker="*", markersize=14, linestyle="", color="black", label="start")
    seeds = max(point.y.count for point in points)
    axes.set_xlabel(AXES.get(chosen.x, chosen.x.removeprefix("eval_samples/")))
    axes.set_ylabel(AXES.get(chosen.y, chosen.y.removeprefix("eval_samples/")))
    axes.set_title(chosen.name)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", fontsize="x-small", ncols=2)
    else:
        axes.legend(loc="upper left", fontsize="small")  # where little KL has earned little
    if not any(point.x.error or point.y.error for point in points):
        bars = "one seed, no bars"
    else:
        of = f"over {seeds} seeds" if seeds > 1 else "of the evaluation's prompts"
        bars = f"bars of one standard error {of}"
    figure.supxlabel(f"Last evaluation of every run; {bars}.", fontsize="small")
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)
