"""Every public loss as a row, read off its signature, its docstring and its declared needs."""

import inspect
import re
import sys
from functools import partial
from textwrap import dedent
from typing import NamedTuple

from dpo_jax.losses.needs import Loss, Needs, needs

# The files whose public functions are listed, in this order.
FAMILIES = (
    "pairs",
    "absolute",
    "coupled",
    "likelihood",
    "unpaired",
    "lists",
    "combine",
    "ranking",
    "policy",
    "divergence",
)
WORDS = {
    "length_BK": "lengths",
    "mask_BK": "mask",
    "score_BKC": "scores",
    "label_B": "label",
    "soft_label_B": "soft label",
    "margin_B": "margin",
    "kl_BK": "KL(reference, policy) of each response",
    "aligned_BK": "WPO's alignment",
}
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")


class Entry(NamedTuple):
    """One public loss.

    family: its file. keywords: its parameters after a `Scored`, with their defaults. summary: what
    the docstring opens with. formula: its first indented block. remarks: what follows, as it
    stands. papers: arXiv numbers. needs: None for what takes neither a `Scored` nor scores, and for
    what makes a loss of others, which has the needs of those.
    """

    name: str
    family: str
    keywords: str
    summary: str
    formula: str
    remarks: str
    papers: tuple[str, ...]
    needs: Needs | None

    @property
    def needed(self) -> str:
        """`needs` in words: "pairs, reference, lengths; coupled"."""
        return "" if self.needs is None else in_words(self.needs)


def entries() -> tuple[Entry, ...]:
    """All public losses, by family and in the order of their file."""
    public = sys.modules["dpo_jax.losses"]
    functions = [getattr(public, name) for name in public.__all__]
    listed = [each for each in functions if inspect.isfunction(each) and family(each) in FAMILIES]
    listed.sort(key=lambda loss: (FAMILIES.index(family(loss)), loss.__code__.co_firstlineno))
    return tuple(entry(loss) for loss in listed)


def table() -> str:
    """The listing that `dpo-jax losses` prints."""
    lines: list[str] = []
    for name in FAMILIES:
        lines += ["", about(name).splitlines()[0], ""]
        for each in (each for each in entries() if each.family == name):
            lines.append(f"  {each.name}({each.keywords})")
            lines += [f"      {line}" for line in (each.formula or each.summary).splitlines()]
            needed = f"needs {each.needed}" if each.needed else ""
            last = "; ".join(part for part in (", ".join(each.papers), needed) if part)
            lines += [f"      {last}"] if last else []
    return "\n".join(lines[1:])


def entry(loss: Loss) -> Entry:
    """The row of one function."""
    text = inspect.getdoc(loss) or ""
    summary, formula, remarks = paragraphs(text)
    return Entry(
        name=loss.__name__,
        family=family(loss),
        keywords=keywords(loss),
        summary=summary,
        formula=formula,
        remarks=remarks,
        papers=tuple(dict.fromkeys(ARXIV.findall(text))),
        needs=declared(loss),
    )


def family(loss: Loss) -> str:
    """The name of the file that a loss stands in."""
    return loss.__module__.rpartition(".")[2]


def about(name: str) -> str:
    """The docstring of a family's file."""
    return inspect.getdoc(sys.modules[f"dpo_jax.losses.{name}"]) or ""


def paragraphs(text: str) -> tuple[str, str, str]:
    """(what comes before the first indented block, that block without its indent, the rest)."""
    found = re.search(r"(?:^ {4}.*\n?)+", text, re.MULTILINE)
    if found is None:
        summary, _, rest = text.partition("\n\n")
        return _on_one_line(summary), "", rest.strip()
    before, after = text[: found.start()].strip(), text[found.end() :].strip()
    return _on_one_line(before), dedent(found.group()).strip(), after


def keywords(loss: Loss) -> str:
    """The parameters of a call as text; a first `scored` is understood."""
    parameters = inspect.signature(loss).parameters.values()
    words = {inspect.Parameter.VAR_POSITIONAL: "*{}", inspect.Parameter.VAR_KEYWORD: "**{}"}
    named = ((words.get(each.kind, "{}").format(each.name), each.default) for each in parameters)
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={_value(default)}"
        for name, default in named
        if name != "scored"
    )


def declared(loss: Loss) -> Needs | None:
    """The needs of a loss at its defaults; keywords without one do not change them."""
    if not hasattr(loss, "needs"):
        return None
    parameters = inspect.signature(loss).parameters.values()
    asked = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    defaults = getattr(loss, "__kwdefaults__", None) or {}
    return needs(partial(loss, **{name: 1.0 for name in asked if name not in defaults}))


def in_words(wanted: Needs) -> str:
    """Needs as a phrase."""
    count = {1: "K = 1", 2: "pairs", None: "any K"}.get(wanted.responses, f"K = {wanted.responses}")
    parts = [count, *(["reference"] if wanted.reference else [])]
    parts += [WORDS.get(name, name) for name in wanted.fields]
    extra = ["coupled"] if wanted.coupled else []
    extra += ["weighs by tokens"] if wanted.measure == "tokens" else []
    for each in wanted.statistics:
        mean = "mean of this step" if each.keep is None else "running mean"
        partner = ", of responses to other prompts" if each.partner else ""
        extra.append(f"{each.field} ({mean}{partner})")
    return "; ".join([", ".join(parts), *extra])


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _value(default: object) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return getattr(default, "__name__", repr(default))  # functions by their names
