"""What devices send each other in a step, read off the compiled program's text."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
_BEGINS = re.compile(r"(ENTRY )?%?([\w.\-]+) (\(.*\) -> .*)?\{$")
_SENDS = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLS = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r" s(?:32|64)\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:[a-z]\w*)?)\[([\d,]*)\]")


class Sent(NamedTuple):
    """Of one kind in a step: how many, and the bytes of their results on a device."""

    count: int = 0
    bytes: int = 0


class _Line(NamedTuple):
    """A collective where it stands."""

    kind: str
    bytes: int
    channel: str | None


class _Part(NamedTuple):
    """One computation: its collectives, and (name, turns) of the computations it runs."""

    sends: list[_Line]
    runs: list[tuple[str, int]]


def collectives(text: str) -> dict[str, Sent]:
    """Collectives by kind in the text of a compiled program, in loops once a turn.

    A loop counts from 0 to a constant of its condition, beside which data may end it, or as often
    as XLA notes; one whose length data alone decide counts once. What an asynchronous collective is
    split into counts once.
    """
    parts, first = _parts(text)
    found: dict[str, Sent] = {}
    for kind, size, turns in _sent(parts, first):
        before = found.get(kind, Sent())
        found[kind] = Sent(before.count + turns, before.bytes + turns * size)
    return dict(sorted(found.items()))


def _sent(parts: dict[str, _Part], first: str) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes, turns) of every collective that the computation `first` comes to."""
    seen = set()
    waiting = [(first, 1)]
    while waiting:
        name, turns = waiting.pop()
        for line in parts[name].sends:
            # fusions that start, carry on and end one transfer name its channel
            key = (line.kind, line.channel, turns)
            if line.channel is None or key not in seen:
                yield line.kind, line.bytes, turns
            seen.add(key)
        waiting += [(inner, turns * more) for inner, more in parts[name].runs if inner in parts]


def _parts(text: str) -> tuple[dict[str, _Part], str]:
    """The computations of a program by name, and the name of the one it begins with."""
    lines: dict[str, list[str]] = defaultdict(list)
    name = first = ""
    for line in text.splitlines():
        begins = _BEGINS.match(line)
        if begins:
            name = begins[2]
            first = name if begins[1] else first
        elif line.startswith("  "):
            lines[name].append(line)
    turns = {name: _limit(name, lines) for name in _CONDITION.findall(text)}
    return {name: _part(body, turns) for name, body in lines.items()}, first


def _part(lines: list[str], limits: dict[str, int | None]) -> _Part:
    sends, runs = [], []
    for line in lines:
        sent = _SENDS.search(line)
        if sent:
            channel = _CHANNEL.search(line)
            size = _bytes(sent[1], started=bool(sent[3]) and sent[2] != "all-reduce")
            sends.append(_Line(sent[2], size, channel and channel[1]))
            continue
        called = dict(_CALLS.findall(line))
        for branches in _BRANCHES.findall(line):
            runs += [(each.strip(" %"), 1) for each in branches.split(",")]
        if "body" in called:
            known = _TURNS.search(line)
            turns = int(known[1]) if known else limits.get(called["condition"]) or 1
            runs.append((called["body"], turns))
        else:
            runs += [(inner, 1) for way, inner in called.items() if way != "condition"]
    return _Part(sends, runs)


def _limit(condition: str, lines: dict[str, list[str]]) -> int | None:
    """What a condition, with what is fused of it, compares with, where that is one constant."""
    own = lines.get(condition, [])
    fused = [inner for line in own for _, inner in _CALLS.findall(line)]
    own = own + [line for inner in fused for line in lines.get(inner, [])]
    found = [int(constant) for line in own for constant in _CONSTANT.findall(line)]
    return found[0] if len(found) == 1 else None


def _bytes(kind: str, *, started: bool) -> int:
    """Bytes of a type as XLA writes it; what starts has its operands before its results."""
    sizes = []
    for name, shape in _ARRAY.findall(kind):
        size = _itemsize(name)
        for axis in shape.split(",") if shape else ():
            size *= int(axis)
        if shape or not started:  # what starts keeps scalars of its own
            sizes.append(size)
    return sum(sizes[len(sizes) // 2 :] if started else sizes)


def _itemsize(name: str) -> int:
    bits = re.fullmatch(r"(?:bf|f|s|u|c)(\d+)", name)
    return max(1, int(bits[1]) // 8) if bits else 1  # pred, and float8 in its forms
