"""The truth table of the KL estimators: which value, which gradient, in worlds without noise."""

from itertools import product

import numpy as np
import pytest

from dpo_jax.worlds import enumerable, kl_table
from dpo_jax.worlds.kl_table import ESTIMATORS, EXACT, TARGETS, UNITS, Errors, Row

# What theory says of the value and of the gradients as a loss, as a penalty and as both; None =
# of none of the targets. Held: E[d grad log p] of one step is that of the step's own KL, and what
# the choice of a token does to the KL of the tokens after it is not in the loss of its estimate.
THEORY = {
    ("k1", "token"): (True, "zero", "reverse", "reverse"),
    ("abs", "token"): (False, "variation_held", None, None),
    ("k2", "token"): (False, "reverse_held", None, None),
    ("k3", "token"): (True, "forward_held", None, "reverse"),
    ("exact", "token"): (True, "reverse_held", None, "reverse"),
    ("k1", "sequence"): (True, "zero", "reverse", "reverse"),
    ("abs", "sequence"): (False, "variation", None, None),
    ("k2", "sequence"): (False, "reverse", None, None),
    ("k3", "sequence"): (True, "forward", None, "reverse"),
    ("exact", "sequence"): (True, "reverse", "zero", "reverse"),
}


def another_world():
    """Another vocabulary, more steps, one prompt."""
    rng = np.random.default_rng(3)
    shape = (1, len(enumerable.tree(4, 2).prefixes), 4)
    return kl_table.measured(rng.standard_normal(shape), rng.standard_normal(shape), steps=2)


@pytest.fixture(scope="module", params=[kl_table.kl_table, another_world])
def rows(request) -> dict[tuple[str, str], Row]:
    return {(row.estimator, row.unit): row for row in request.param()}


def test_every_estimator_stands_in_the_table(rows):
    assert set(rows) == set(product(ESTIMATORS, UNITS)) == set(THEORY)


@pytest.mark.parametrize("key", THEORY, ids="-per-".join)
def test_the_table_is_what_theory_says(rows, key):
    row, (unbiased, *gradients) = rows[key], THEORY[key]
    assert abs(row.value) < EXACT if unbiased else abs(row.value) > 0.01
    for errors, target in zip((row.loss, row.penalty, row.both), gradients, strict=True):
        exact = {name for name in Errors._fields if getattr(errors, name) < EXACT}
        assert exact == ({target} if target else set())


def test_targets_are_apart(rows):
    """A gradient cannot be that of two targets: k1's penalty is one of them, far from the rest."""
    errors = rows["k1", "sequence"].penalty
    assert errors.zero == pytest.approx(1)
    assert all(getattr(errors, name) > 0.05 for name in TARGETS if name != "reverse")


def test_what_a_loss_lacks_its_penalty_has(rows):
    """Of an unbiased estimator each alone is off by as much as the other is long."""
    for estimator, unit in product(("k1", "k3", "exact"), UNITS):
        row = rows[estimator, unit]
        assert row.loss.reverse == pytest.approx(row.penalty.zero, abs=EXACT)
        assert row.penalty.reverse == pytest.approx(row.loss.zero, abs=EXACT)


def test_one_choice_by_hand():
    """EOS with 1/4 under the policy and 1/2 under the reference, or a word; one logit z moves.

    dp/dz = 3/16 = s; d = log 1/2 and log 3/2; d(p)/dz of any sum over y is s (f(EOS) - f(word)).
    """
    rows = kl_table.measured(np.log([[[1.0, 3.0]]]), np.log([[[1.0, 1.0]]]), steps=1)
    by_name = {(row.estimator, row.unit): row for row in rows}
    d, p = np.log([1 / 2, 3 / 2]), np.array([1 / 4, 3 / 4])
    divergence = p @ d
    reverse, forward = d[0] - d[1], (1 / 4 - 1 / 2) / (3 / 16)  # gradients over 3/16
    for unit in UNITS:
        k2, k3 = by_name["k2", unit], by_name["k3", unit]
        assert k2.value == pytest.approx(p @ d**2 / 2 / divergence - 1)
        assert by_name["abs", unit].value == pytest.approx(p @ np.abs(d) / divergence - 1)
        assert k2.penalty.zero == pytest.approx(abs((d[0] ** 2 - d[1] ** 2) / 2 / reverse))
        assert k3.loss.zero == pytest.approx(forward / reverse)
        assert k3.loss.reverse == pytest.approx(abs(forward / reverse - 1))
        assert k3.penalty.reverse == pytest.approx(abs(forward / reverse))


def test_verdicts_follow_the_numbers():
    off = Errors(*[0.25] * 7)
    row = Row("k1", "token", 0.0, off._replace(zero=0.0), off._replace(reverse=1e-15), off)
    assert row.verdict == (
        "value unbiased; as loss: 0; as penalty: KL(p, r); as both: 25% off KL(p, r)"
    )
    other = row._replace(value=-0.5, loss=off._replace(forward_held=0.0))
    assert other.verdict.startswith(
        "value biased by -50%; as loss: tokens' KL(r, p), prefixes held; "
    )


def test_text_shows_every_row():
    shown = kl_table.text()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 160
    for row in kl_table.kl_table():
        assert f"{row.estimator} per {row.unit}: {row.verdict}" in lines
        assert any(all(cell in line for cell in kl_table.cells(row)) for line in lines)
