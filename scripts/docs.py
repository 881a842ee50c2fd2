"""Writes docs/losses.md from the losses and from what the KL estimators measure.

python scripts/docs.py
"""

from itertools import groupby
from pathlib import Path

from dpo_jax import losses
from dpo_jax.losses import catalogue
from dpo_jax.worlds import kl_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "losses.md"

INTRO = """\
# Losses

Written by `python scripts/docs.py` from the docstrings in `dpo_jax/losses/`: change those.
`dpo-jax losses` prints the short form, `dpo-jax losses kl` the table at the end.

A loss takes one `Scored` and the keywords named here; a keyword without a value has no default.
It returns one value a group, and the engine sums them under the measure that the loss declares.

- `w`, `l`: the summed log-probs of the chosen and of the rejected response under the policy;
  `rw`, `rl`: those under the reference
- `a = w - rw`, `b = l - rl`, `D = a - b`; of a list `a_k`, best to worst
- `wbar`, `lbar`: `w` and `l` divided by their token counts
- needs are those of the defaults; `losses.needs(loss)` reads them with a loss's own keywords
"""


def page() -> str:
    """The text of docs/losses.md."""
    parts = [INTRO]
    for family, listed in groupby(losses.entries(), key=lambda entry: entry.family):
        parts += [f"## {family}\n", catalogue.about(family) + "\n"]
        parts += [section(entry) for entry in listed]
    return "\n".join([*parts, estimators()])


def section(entry: catalogue.Entry) -> str:
    """One loss."""
    links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in entry.papers)
    keywords = f"`{entry.keywords}`" if entry.keywords else ""
    known = {"Keywords": keywords, "Needs": entry.needed, "Papers": links}
    facts = "\n".join(f"- {name}: {value}" for name, value in known.items() if value)
    formula = f"```text\n{entry.formula}\n```" if entry.formula else ""
    parts = [f"### {entry.name}", entry.summary, formula, entry.remarks, facts]
    return "\n\n".join(part for part in parts if part) + "\n"


def estimators() -> str:
    """The truth table of the KL estimators."""
    head, *rest = (kl_table.__doc__ or "").splitlines()
    heading = head.partition(",")[0]
    rows = [
        kl_table.HEADER,
        ["---"] * len(kl_table.HEADER),
        *map(kl_table.cells, kl_table.kl_table()),
    ]
    lines = [f"## {heading}", *rest, "", kl_table.LEGEND, ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "In words:", ""]
    lines += [f"- {row.estimator} per {row.unit}: {row.verdict}" for row in kl_table.kl_table()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
