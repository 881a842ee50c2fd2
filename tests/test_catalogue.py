"""The listing of the losses says what their signatures, docstrings and needs say."""

import inspect

import pytest

from dpo_jax import losses
from dpo_jax.losses import catalogue
from dpo_jax.losses.needs import Needs, Statistic

ENTRIES = {entry.name: entry for entry in losses.entries()}
MAKERS = {"all_pairs", "mix", "terms", "weighted"}  # of other losses
READERS = {"entries", "needs", "table"}


def test_every_public_function_is_listed_once():
    public = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert set(ENTRIES) == public - READERS
    assert len(ENTRIES) == len(losses.entries())
    assert {entry.family for entry in ENTRIES.values()} == set(catalogue.FAMILIES)


def test_an_entry_reads_the_loss():
    entry = ENTRIES["ipo"]
    assert entry.family == "pairs"
    assert entry.keywords == "beta, length_norm=True"
    assert entry.summary.startswith("Identity preference optimisation, Azar et al. 2310.12036")
    assert entry.formula.startswith("(x - 1/(2 beta))^2")
    assert entry.remarks.startswith("Published with sums")
    assert entry.papers == ("2310.12036",)
    assert entry.needs == losses.needs(losses.ipo)


def test_defaults_read_as_they_are_written():
    assert "label_smoothing=0, divergence=reverse_kl, reference_free=False" in (
        ENTRIES["dpo"].keywords
    )
    assert ENTRIES["exo"].keywords.startswith("beta, label_smoothing=0.001")
    assert ENTRIES["odpo"].keywords == "beta, alpha=1, f=log"
    assert ENTRIES["nll"].keywords == "per='token'"
    assert ENTRIES["mix"].keywords == "*terms"
    assert ENTRIES["simper"].keywords == ""


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in MAKERS])
def test_a_loss_of_groups_has_formula_paper_and_needs(name):
    """One of log-probs for `preference`, or of scores for `reward`."""
    entry = ENTRIES[name]
    first = next(iter(inspect.signature(getattr(losses, name)).parameters))
    of_groups = first in ("scored", "score_BK")
    assert (entry.needs is not None) == of_groups
    if of_groups:
        assert entry.formula and entry.papers and entry.summary.endswith(".")


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(), "pairs, reference"),
        (Needs(reference=False, fields=("length_BK",)), "pairs, lengths"),
        (Needs(responses=None, measure="tokens"), "any K, reference; weighs by tokens"),
        (Needs(responses=3, fields=("odd_B",), coupled=True), "K = 3, reference, odd_B; coupled"),
        (
            Needs(responses=1, statistics=(Statistic("kl", lambda s: s.logp_BK, partner=True),)),
            "K = 1, reference; kl (mean of this step, of responses to other prompts)",
        ),
        (
            Needs(statistics=(Statistic("delta", lambda s: s.logp_BK, keep=0.9),)),
            "pairs, reference; delta (running mean)",
        ),
    ],
)
def test_needs_in_words(needs, words):
    assert catalogue.in_words(needs) == words


def test_paragraphs():
    assert catalogue.paragraphs("One\nline.\n\n    x =\n      y\n\nThen.\n\n    z") == (
        "One line.",
        "x =\n  y",
        "Then.\n\n    z",
    )
    assert catalogue.paragraphs("No formula.\n\nThen.\n") == ("No formula.", "", "Then.")
    assert catalogue.paragraphs("") == ("", "", "")


def test_the_table_lists_all():
    lines = losses.table().splitlines()
    assert lines[0].strip() and max(map(len, lines)) <= 120
    for entry in ENTRIES.values():
        at = lines.index(f"  {entry.name}({entry.keywords})")
        assert lines[at + 1].strip() == (entry.formula or entry.summary).splitlines()[0]
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert len(titles) == len(catalogue.FAMILIES)
