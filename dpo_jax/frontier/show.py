"""What a frontier looks like: tables, samples side by side, and the figure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dpo_jax.data.layouts import plain
from dpo_jax.frontier.curves import Curve
from dpo_jax.train import Result

SIDE_BY_SIDE = 8  # prompts printed before and after
FEW = 6  # settings that are told apart by their colour; of more, the methods are
MARKERS = "osD^v<>PX"
# columns of the table that a setting may lack, and how they are written
FORMS = {"accuracy": ".3f", "gap_closed": ".0%", "margin": ".2f", "over_best_of_n": "+.2f"}
ROLES = ("policy", "reference", "heads", "rewards", "optimizer", "memory")

Row = Mapping[str, Any]


def tables(rows: Sequence[Row], reward: str) -> None:
    """Print what every setting is worth, and what every method held while it trained."""
    from rich.console import Console
    from rich.table import Table

    seeds = max(row["seeds"] for row in rows)
    errors = f"standard error over {seeds} seeds" if seeds > 1 else "standard error"
    worth = Table(title=f"held out and sampled, at the last step (mean +- {errors})")
    present = [name for name in FORMS if any(row[name] is not None for row in rows)]
    worth.add_column("run", overflow="fold")  # no name is cut short
    for column in (f"true {reward}", "KL (nats)", *(x.replace("_", " ") for x in present)):
        worth.add_column(column, justify="right")
    for row in rows:
        worth.add_row(
            row["name"],
            f"{row['reward']:.2f} +- {row['reward_se']:.2f}",
            f"{row['kl']:.2f} +- {row['kl_se']:.2f}",
            *("-" if row[name] is None else format(row[name], FORMS[name]) for name in present),
        )
    Console().print(worth)
    memory = Table(title="arrays held from step to step, MB")
    roles = [role for role in ROLES if any(row["bytes"].get(role) for row in rows)]
    memory.add_column("run", overflow="fold")
    for column in (*roles, "all"):
        memory.add_column(column, justify="right")
    for name, held in {row["line"]: row["bytes"] for row in rows}.items():
        counts = [*(held.get(role, 0) for role in roles), sum(held.values())]
        memory.add_row(name, *(f"{count / 1e6:.2f}" if count else "-" for count in counts))
    Console().print(memory)


def samples(result: Result, label: str, reward: str) -> None:
    """Print the completions of the same prompts before and after a run."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"the same prompts before and after ({label})", show_lines=True)
    for column in ("prompt", "before", "after"):
        shown.add_column(column)
    for before, after in _first_and_last(result):
        cells = [f"{x['response']} [{x[reward]:+.1f}]" for x in (before, after)]
        shown.add_row(*(cell.replace("[", r"\[") for cell in (plain(before["prompt"]), *cells)))
    Console().print(shown)


def _first_and_last(result: Result) -> list[tuple[Row, Row]]:
    lines = (result.directory / "samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    first, last = min(x["step"] for x in found), max(x["step"] for x in found)
    before = [x for x in found if x["step"] == first]
    after = [x for x in found if x["step"] == last]
    return list(zip(before, after, strict=True))[:SIDE_BY_SIDE]


def draw(
    path: epath.Path,
    curves: Sequence[Curve],
    start: Curve,
    comparisons: Sequence[Curve],
    *,
    title: str,
    note: str,
) -> None:
    """The figure: runs in colour with error bars along training, comparisons in grey.

    note: what stands below it.
    """
    from matplotlib.figure import Figure

    many = len(curves) > FEW
    figure = Figure(figsize=(11, 7.5) if many else (8, 6), layout="constrained")
    axes = figure.subplots()
    for curve, style in zip(comparisons, ({"linestyle": ":", "marker": "s"}, {}), strict=True):
        _line(axes, curve, label=curve.name, color="0.4", zorder=1, **style)
    for curve, style in _styles(curves, many):
        _line(axes, curve, **style)
    _line(axes, start, color="crimson", marker="*", markersize=14, linestyle="", label=start.name)
    axes.set_xlabel("KL(policy, reference) in nats a response")
    axes.set_ylabel("true reward")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", fontsize="x-small")
    else:
        axes.legend(fontsize="small")
    figure.supxlabel(note, fontsize="small", wrap=True)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def _styles(curves: Sequence[Curve], many: bool) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """Few curves have a shade each; of many, a method has a colour and its settings markers."""
    from matplotlib import colormaps

    lines = list(dict.fromkeys(curve.line for curve in curves))
    met: dict[str, int] = {}
    for i, curve in enumerate(curves):
        number = met[curve.line] = met.get(curve.line, -1) + 1
        shade = colormaps["viridis"](i / max(len(curves) - 1, 1) * 0.85)
        colour = colormaps["tab10"](lines.index(curve.line) % 10) if many else shade
        marker = MARKERS[number % len(MARKERS)] if many else "o"
        yield curve, {"color": colour, "marker": marker, "label": curve.name, "alpha": 0.85}


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
        elinewidth=0.7,
        capsize=2,
        **style,
    )
