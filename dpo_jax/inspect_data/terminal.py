"""An inspection on the terminal. Where it shows no colours, bars part the tokens and brackets hold
those of a response that do not count."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_jax.inspect_data import said
from dpo_jax.inspect_data.facts import Inspection, Lengths, Part, Role
from dpo_jax.inspect_data.packed import Batches
from dpo_jax.inspect_data.tokens_shown import Token, shortened, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

FIRST, LAST = 240, 60  # tokens shown of a part that is long
STRIP = 64  # characters that stand for a row
STRIP_ROWS = 8
BEST, WORST, CONTEXT = (0, 88, 80), (128, 56, 0), (68, 68, 68)  # red, green, blue behind white
LIGHTER = 1.4  # every second token


def show(found: Inspection, *, ids: bool = False, whole: bool = False) -> None:
    """Print an inspection. ids: with the id of every token; whole: long parts in full."""
    from rich.console import Console

    console = Console(highlight=False)
    for block in blocks(found, console, ids=ids, whole=whole):
        console.print(block)


def blocks(
    found: Inspection, console: "Console", *, ids: bool = False, whole: bool = False
) -> Iterator["RenderableType"]:
    """What is printed, piece by piece."""
    from rich.rule import Rule
    from rich.text import Text

    painter = Painter(console, ids=ids, whole=whole)
    yield Rule(f"what the model sees of {found.name}")
    yield _pairs(found.options)
    for role in found.roles:
        yield Text()
        yield Rule(Text(f"{role.name}: {role.source}"))
        yield _pairs([*said.counts(role), *said.packing(role, role.batches)])
        for doubt in role.doubts:
            yield Text(f"! {doubt}", style="bold yellow")
        yield Text()
        yield _lengths(role.lengths)
        yield Text()
        yield painter.strip(role.batches)
        if role.shown:
            legend = said.SHADED if painter.coloured else said.BARRED
            yield Text(f"\n{legend} {said.MARKED}", style="italic")
        yield from painter.groups(role)


class Painter:
    """Colours for tokens, or bars and brackets where the console has none."""

    def __init__(self, console: "Console", *, ids: bool, whole: bool):
        self.coloured = console.color_system not in (None, "standard")
        self.ids, self.whole = ids, whole

    def groups(self, role: Role) -> Iterator["Text"]:
        """The groups that are shown, part by part."""
        from rich.text import Text

        for shown in role.shown:
            yield Text(f"\n{said.heading(shown)}", style="bold")
            for part in shown.parts:
                yield Text(said.part_heading(part), style="underline")
                yield self.part(part)

    def part(self, part: Part) -> "Text":
        """The tokens of a part."""
        from rich.text import Text

        text, counts = Text(), True
        many = (len(part.tokens), 0) if self.whole else (FIRST, LAST)
        for i, token in enumerate(shortened(part.tokens, *many)):
            if isinstance(token, int):
                text.append(f"\n... {token} tokens ...\n", style="italic")
                continue
            if not self.coloured and part.scored:
                text.append("" if token.scored == counts else "]" if token.scored else "[")
                counts = token.scored
            self._token(text, token, part.rank, i)
        text.append("" if counts else "]")
        return text

    def _token(self, text: "Text", token: Token, rank: float | None, i: int) -> None:
        """Append a token, the i-th of its part."""
        ground = background(rank if rank is not None else 0.5, token.scored, bool(i % 2))
        style = f"{'bold ' * token.control}#ffffff on {ground}"
        pieces = visible(token.text)
        broken = bool(pieces) and pieces[-1][0].endswith("\n")
        for piece, marked in pieces:
            # the colour ends with the line
            for line in piece.splitlines(keepends=True):
                text.append(line.rstrip("\n"), style=f"#bbbbbb on {ground}" if marked else style)
                text.append("\n" if line.endswith("\n") else "")
        if broken:
            text.right_crop(1)  # id and bar stand before the last line end
        text.append(f"/{token.id}" if self.ids else "", style=f"italic #dddd88 on {ground}")
        text.append(("" if self.coloured else "|") + "\n" * broken)

    def strip(self, batches: Batches) -> "Text":
        """The rows of the first batch, a letter for what stands where, a point for padding."""
        from rich.text import Text

        text = Text(
            "rows of the first batch (- prompt, . padding, else the response by its initial)"
        )
        for row in batches.rows[:STRIP_ROWS]:
            text.append("\n")
            place = 0
            for i, stretch in enumerate(row):
                start, place = place, place + stretch.tokens
                width = round(place * STRIP / batches.places) - round(
                    start * STRIP / batches.places
                )
                prompt = stretch.name == "prompt"
                # of a ranking its place
                initial = next((c for c in stretch.name if c.isdigit()), stretch.name[0])
                rank = 0.5 if stretch.rank is None else stretch.rank
                ground = background(rank, not prompt, bool(i % 2))
                text.append(("-" if prompt else initial) * width, f"#ffffff on {ground}")
            text.append("." * (STRIP - round(place * STRIP / batches.places)))
        left = len(batches.rows) - STRIP_ROWS
        text.append(f"\n... {left} rows ..." if left > 0 else "")
        return text


def background(rank: float, scored: bool, second: bool) -> str:
    """The colour behind a token: between that of the best and of the worst, or that of context."""
    mixed = [rank * best + (1 - rank) * worst for best, worst in zip(BEST, WORST, strict=True)]
    colour = mixed if scored else CONTEXT
    return "#" + "".join(f"{round(channel * (LIGHTER if second else 1)):02x}" for channel in colour)


def _pairs(lines: Sequence[tuple[str, str]]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _lengths(several: tuple[Lengths, ...]) -> "RenderableType":
    """How long prompts, responses and groups are: a table of numbers and one of bars."""
    from rich.bar import Bar
    from rich.console import Group
    from rich.table import Table

    numbers = Table("tokens of", title="lengths", title_justify="left")
    for name in several[0].summary:
        numbers.add_column(name, justify="right")
    for each in several:
        numbers.add_row(*said.summary(each))
    bars = Table.grid(padding=(0, 1))
    rows = said.bins(several)
    most = [max(counts[i] for _, counts in rows) for i in range(len(several))]
    bars.add_row("tokens", *(cell for each in several for cell in (each.name, "")), style="bold")
    for name, counts in rows:
        cells = [
            cell
            for count, top in zip(counts, most, strict=True)
            for cell in (Bar(top, 0, count, width=10), f"{count or ''}")
        ]
        bars.add_row(name, *cells)
    return Group(numbers, bars)
