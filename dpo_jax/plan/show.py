"""Plans as a table, a column each, and as JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from dpo_jax.plan import Plan, smallest

WIDTH = 120  # where stdout is no terminal
UNKNOWN = "unknown"
BOUNDS = ("compute", "memory")
SPANS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def table(name: str, found: Sequence[Plan]) -> None:
    """Print the plans side by side, and which is the smallest that fits."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    shown = Table(title=f"{name}, one device", title_justify="left", box=SIMPLE)
    shown.add_column("", overflow="fold")
    for plan in found:
        shown.add_column(plan.name, justify="right", overflow="fold")
    for group in _groups(found):
        for label, cell in group:
            shown.add_row(label, *(cell(plan) for plan in found))
        shown.add_section()
    console.print(shown)
    for note in dict.fromkeys(note for plan in found for note in plan.notes):
        names = [plan.name for plan in found if note in plan.notes]
        console.print(note if len(names) == len(found) else f"{', '.join(names)}: {note}")
    console.print(f"compiled by {versions()}")
    if len(found) > 1:
        best = smallest(found)
        console.print("none of them fits" if best is None else f"smallest that fits: {best.name}")


Row = tuple[str, Callable[[Plan], str]]


def _groups(found: Sequence[Plan]) -> list[list[Row]]:
    """The rows of the table, those that belong together in one group."""
    roles = dict.fromkeys(role for plan in found for role, size in plan.held.items() if size)
    kinds = sorted({kind for plan in found for kind in plan.sent or ()})
    of_role: list[Row] = [(role, lambda p, role=role: size(p.held[role])) for role in roles]
    away = dict.fromkeys(role for plan in found for role, size in plan.hosted.items() if size)
    of_host: list[Row] = [
        (f"{role} on the host", lambda p, role=role: size(p.hosted[role])) for role in away
    ]
    of_kind: list[Row] = [(kind, lambda p, kind=kind: _sent(p, kind)) for kind in kinds]
    return [
        [
            ("devices", lambda p: f"{p.devices} x {p.kind}"),
            ("mesh", lambda p: " ".join(f"{k}={n}" for k, n in p.mesh.items() if n > 1) or "1"),
            ("rows x tokens of an update", lambda p: f"{p.rows} x {p.row_tokens}"),
        ],
        [
            *of_role,
            ("activations and temporaries", lambda p: size(p.temporaries)),
            ("all", lambda p: size(p.needed)),
            ("memory", lambda p: size(p.memory)),
            ("fits", _fits),
            *of_host,
        ],
        [
            ("flops", lambda p: _scaled(p.work.flops, "")),
            ("bytes moved", lambda p: size(p.work.bytes)),
            ("bound", lambda p: max(p.seconds, key=lambda b: p.seconds[b], default=UNKNOWN)),
            ("time at the least", lambda p: _span(max(p.seconds.values(), default=None))),
            *((f"  {bound}", lambda p, b=bound: _span(p.seconds.get(b))) for bound in BOUNDS),
        ],
        of_kind or [("collectives", lambda p: "none")],
    ]


def record(name: str, found: Sequence[Plan]) -> str:
    """The plans as JSON."""
    best = smallest(found)
    whole: dict[str, Any] = {"name": name, "versions": versions()}
    whole |= {"plans": [plan.record() for plan in found]}
    return json.dumps(whole | {"smallest": best and best.name}, indent=1) + "\n"


def versions() -> str:
    """Of what compiled."""
    try:
        return f"jax {jax.__version__}, libtpu {version('libtpu')}"
    except PackageNotFoundError:
        return f"jax {jax.__version__}"


def size(count: float | None) -> str:
    """Bytes with a binary unit; the word for what is not known."""
    if count is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _fits(plan: Plan) -> str:
    if plan.fits:
        return "yes" if plan.memory is not None else UNKNOWN
    if plan.needed is None:
        return "no"
    return f"no: needs {size(plan.needed)} of {size(plan.memory)}"


def _sent(plan: Plan, kind: str) -> str:
    if plan.sent is None:
        return UNKNOWN
    if kind not in plan.sent:
        return "none"
    return f"{plan.sent[kind].count} x, {size(plan.sent[kind].bytes)}"


def _scaled(count: float, unit: str) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= factor:
            return f"{count / factor:.3g} {letter}{unit}"
    return f"{count:.3g}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    factor, unit = next((each for each in SPANS if seconds >= each[0]), SPANS[-1])
    return f"{seconds / factor:.3g} {unit}"
