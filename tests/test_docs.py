"""docs/losses.md is what scripts/docs.py writes, and what it writes is well formed."""

import re

from dpo_jax import losses
from dpo_jax.worlds import kl_table
from scripts import docs


def test_the_page_is_up_to_date():
    assert docs.PAGE.read_text() == docs.page(), "run: python scripts/docs.py"


def test_every_loss_has_a_section_with_its_formula():
    sections = re.split(r"^### ", docs.page(), flags=re.MULTILINE)[1:]
    assert len(sections) == len(losses.entries())
    for section, entry in zip(sections, losses.entries(), strict=True):
        assert section.startswith(f"{entry.name}\n\n{entry.summary}\n")
        assert (f"```text\n{entry.formula}\n```" in section) == bool(entry.formula)
        assert all(f"(https://arxiv.org/abs/{paper})" in section for paper in entry.papers)
        assert entry.keywords in section and entry.needed in section


def test_the_table_of_estimators_stands_in_the_page():
    page = docs.page()
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(tables) == 2 + len(kl_table.kl_table())
    assert {line.count("|") for line in tables} == {len(kl_table.HEADER) + 1}
    for row in kl_table.kl_table():
        assert "| " + " | ".join(kl_table.cells(row)) + " |" in tables
        assert row.verdict in page
