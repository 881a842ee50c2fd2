"""What cannot be right is refused before the first step: loss and data are named, and a remedy."""

import re
import sys
from functools import partial

import numpy as np
import pytest
from naive import MODEL
from test_bad_input import MODULE, PAIR, refused, write

from dpo_jax import cli, losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.structs import BadInput, Scored

NOTHING = """

def nothing(groups):
    return []
"""
OTHER = {**PAIR, "prompt": "this sequel", "chosen": "was boring ."}
JUDGED = {"prompt": "the film", "completion": "was good ."}
LIST = {"prompt": "the film", "responses": ["was good .", "was boring .", "was bad ."]}
NAMED = {"scores": {"helpful": [2, 1], "safe": [0, 3]}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with bad.py, an experiment that is fine but for its data."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(MODULE + NOTHING)
    yield tmp_path
    sys.modules.pop("bad", None)


@pytest.mark.parametrize(
    ("words", "records", "said"),
    [
        ("", [LIST], "loss dpo compares 2 responses, the data has 3 .*data.views.pairs"),
        ("", [JUDGED], "loss dpo compares 2 responses, the data has 1 .*loss of single responses"),
        ("losses.kto", [PAIR], "loss kto reads 1 response, the data has 2 .*data.views.unpaired"),
        ("losses.npo", [LIST], "loss npo reads 1 response, the data has 3 .*data.views.unpaired"),
        ("losses.nll", [{"prompt": "the film"}], "loss nll reads responses, the data has 0 .*give"),
        ("losses.kto", [JUDGED], "loss kto reads label, the data has none: .*data.views.unpaired"),
        ("losses.odpo", [PAIR], "loss odpo reads scores, the data has none: give every record"),
        ("losses.lipo", [LIST], "loss lipo reads scores, the data has none: give every record"),
        (
            "losses.modpo algorithm.loss.weight=0.5",
            [PAIR],
            "loss modpo reads margin, the data has none: .*data.criteria.margins",
        ),
        (
            "losses.soft_dpo",
            [PAIR],
            "loss soft_dpo reads soft_label, the data has none: .*data.criteria.soft_labels",
        ),
        (
            "losses.npo",
            [{**JUDGED, "label": True}],
            "the data has a label .*loss npo does not read: .*leave label out",
        ),
        (
            "",
            [{**PAIR, "soft_label": 0.7}],
            "the data has a soft_label .*loss dpo does not read: .*leave soft_label out",
        ),
        (
            "losses.odpo",
            [{**PAIR, **NAMED}],
            "loss odpo reads one score .*the data has helpful, safe: .*data.criteria.order",
        ),
        (
            "losses.kto",
            [{**JUDGED, "label": True}] * 2,
            "partnered: record 0 finds no response of another prompt",
        ),
        ("losses.dpo data.arrange=bad:nothing", [PAIR], "no groups to make batches of"),
    ],
)
def test_data_that_a_loss_cannot_read_is_refused(place, capsys, words, records, said):
    write("pairs.jsonl", *records)
    loss, *more = words.split() or ["losses.dpo"]
    _, error = refused(capsys, f"algorithm.loss={loss}", *more)
    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "algorithm.loss=losses.beta_dpo run.microbatches=2",
            r"run.microbatches=2 .*losses.beta_dpo.*run.microbatches=1, or take a loss",
        ),
        (
            "algorithm.loss=losses.aot run.microbatches=2",
            r"run.microbatches=2 .*losses.aot.*run.microbatches=1, or take a loss",
        ),
        (
            "algorithm.loss=losses.cpo algorithm.reference=algorithms.reference.soft_update",
            r"algorithm.reference=soft_update has no effect: loss cpo .*leave it out",
        ),
        (
            "algorithm.loss=losses.kto algorithm.score=algorithms.scores.length_desensitized "
            "data.arrange=data.views.unpaired",
            r"algorithm.score=length_desensitized compares 2 .*loss kto reads 1: take another",
        ),
        ("algorithm.loss=losses.dpo algorithm.loss.gamma=1", r"no option algorithm.loss.gamma"),
        ("algorithm.loss=losses.simpo", r"losses.simpo.* requires algorithm.loss.gamma: add"),
    ],
)
def test_options_that_a_loss_cannot_have_are_refused(place, capsys, words, said):
    write("pairs.jsonl", PAIR, OTHER)
    _, error = refused(capsys, *words.split())
    assert re.search(said, error), error


def test_a_score_of_pairs_is_refused_for_lists(place, capsys):
    """Found when the step is traced, which comes before anything is written."""
    write("pairs.jsonl", LIST)
    score = "algorithm.score=algorithms.scores.length_desensitized"
    _, error = refused(capsys, "algorithm.loss=losses.plackett_luce_dpo", score)
    assert "length_desensitized compares 2 lengths, the data has 3 a prompt" in error


def test_a_keyword_that_a_loss_does_not_have_is_refused(place, capsys):
    write("pairs.jsonl", PAIR, OTHER)
    (place / "bad.py").write_text(MODULE.replace("beta=0.1", "beta=0.1, betta=0.2"))
    _, error = refused(capsys)
    assert "loss dpo has no keyword betta: it takes beta, label_smoothing" in error


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (losses.simpo, "loss simpo requires beta, gamma: give it by `partial`"),
        (losses.mix((1.0, losses.slic), (1.0, losses.ipo)), "loss ipo requires beta"),
        (losses.weighted(losses.dpo, losses.wpo_weight), "loss dpo requires beta"),
        (losses.all_pairs(partial(losses.dpo, **{"rate": 1.0})), "loss dpo has no keyword rate"),
        (partial(lambda scored: scored, **{"beta": 1.0}), "has no keyword beta: it takes none"),
    ],
)
def test_keywords_are_checked_inside_combinations(loss, said):
    with pytest.raises(BadInput, match=said):
        preference(MODEL, loss=loss)


def test_a_reference_loss_without_a_reference_is_refused():
    alone = Scored(np.zeros((2, 2), np.float32))
    with pytest.raises(BadInput, match=r"losses.dpo needs Scored.ref_logp_BK, .*fill it, or take"):
        losses.dpo(alone, beta=0.1)
    with pytest.raises(BadInput, match=r"per='word' is neither .*take one"):
        preference(MODEL, loss=partial(losses.nll, per="word"))


def test_what_is_refused_works_with_its_remedy(place, capsys):
    """The pairs that kto refuses, by the view that the message names."""
    write("pairs.jsonl", PAIR, OTHER)
    words = ["algorithm.loss=losses.kto", "data.arrange=data.views.unpaired"]
    assert cli.main(["train", "bad.py", *words, "data.row_tokens=48"]) == 0
