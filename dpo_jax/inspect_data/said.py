"""The lines of an inspection that terminal and page have in common."""

import numpy as np

from dpo_jax.inspect_data.facts import TRAINING, Lengths, Part, Role, Shown
from dpo_jax.inspect_data.packed import Batches

SHADED = (
    "Tokens are shaded by turns. Coloured ones are scored, grey ones are context; control tokens "
    "are bold."
)
BARRED = "Bars part the tokens, brackets hold those of a response that are not scored."
MARKED = "· is a blank, ↵ a line end, ⟨200B⟩ a character that would not be seen."


def counts(role: Role) -> list[tuple[str, str]]:
    """What was read and what became of it."""
    lines = [("rows read", f"{role.rows}")]
    for what, found in (
        ("skipped", role.skipped),
        ("dropped", role.dropped),
        ("kept", role.repaired),
    ):
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        lines += [(f"{what}: {reason}", f"{count}") for reason, count in ranked]
    lines += [(f"left by {name}", f"{left} of {all_}") for name, left, all_ in role.arranged]
    lines.append(("records, groups, responses", f"{role.records}, {role.groups}, {role.responses}"))
    lines.append((f"responses without {' or '.join(role.ends)} at their end", f"{role.unended}"))
    if role.longer is not None:
        longer, equal, count = role.longer
        lines.append(
            (
                "better response longer than the worse",
                f"{longer:.1%} of {count}, equal {equal:.1%}",
            )
        )
    return lines


def packing(role: Role, batches: Batches) -> list[tuple[str, str]]:
    """How the groups stand in batches."""
    shapes = ", ".join(f"{rows}x{tokens}" for rows, tokens in batches.shapes)
    unit = "a step" if role.name == TRAINING else "a batch"
    return [
        (f"groups {unit}", f"{batches.step_groups}, {batches.passes:.3g} passes over the data"),
        ("rows x places", shapes),
        ("padding", f"{batches.padding:.1%} of the places ({batches.measured})"),
    ]


def heading(shown: Shown) -> str:
    """Which group it is."""
    return ", ".join((f"record {shown.record}", shown.where, *shown.said))


def part_heading(part: Part) -> str:
    """What a part is, and how many of its tokens count."""
    scored = "" if part.rank is None and not part.scored else f", {part.scored} scored"
    return ", ".join((f"{part.name}: {len(part.tokens)} tokens{scored}", *part.notes))


def summary(lengths: Lengths) -> list[str]:
    """The name of the lengths and the numbers that sum them up."""
    values = lengths.summary.values()
    return [lengths.name, *(f"{v:.0f}" if v == int(v) else f"{v:.1f}" for v in values)]


def bins(several: tuple[Lengths, ...], count: int = 10) -> list[tuple[str, list[int]]]:
    """(tokens, how many of each) by length; the last bin holds all that is far longer."""
    every = np.concatenate([each.tokens for each in several])
    high = int(np.percentile(every, 98)) + 1
    edges = np.unique(np.linspace(int(every.min()), high, count + 1).astype(int))
    edges = np.append(edges, int(every.max()) + 1) if every.max() >= high else edges
    tables = [np.histogram(each.tokens, edges)[0].tolist() for each in several]
    names = [
        f"{low}-{end - 1}" if end - 1 > low else f"{low}"
        for low, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return [(name, [table[i] for table in tables]) for i, name in enumerate(names)]
