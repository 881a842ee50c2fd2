"""The metrics of preference training, counted by hand from log-probs that are taken one by one."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from naive import (
    MODEL,
    POLICY,
    Engine,
    evaluated,
    gradient,
    groups,
    lists,
    log_prob,
    log_ratio,
    mean,
    packed,
)
from tiny import relative_error

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.packing import pack
from dpo_jax.structs import Group

BETA = 0.3
DPO = partial(losses.dpo, beta=BETA)
NLL = partial(losses.nll, per="token")


def test_a_pair_is_a_list_of_two():
    """A whole update of dpo and of plackett_luce_dpo is the same."""
    batch = packed(groups(11))
    pair, ranked = (
        Engine(preference(MODEL, loss=loss))(batch)
        for loss in (DPO, partial(losses.plackett_luce_dpo, beta=BETA))
    )
    assert ranked[1] == pytest.approx(pair[1], rel=1e-5)
    assert relative_error(gradient(ranked[0]), gradient(pair[0])) < 1e-5
    assert relative_error(ranked[0].params, pair[0].params) < 1e-6


def test_the_rejected_response_of_a_list_is_the_last_that_is_there():
    items = lists(16, 1, 2, 7, 4)
    batch = pack(items, row_tokens=64, rows=4)
    algorithm = preference(MODEL, loss=partial(losses.plackett_luce_dpo, beta=BETA))
    _, metrics = jax.jit(lambda: evaluated(algorithm, batch))()
    last = {g.record: len(g.responses) - 1 for g in items}
    margin = {g.record: BETA * (log_ratio(g) - log_ratio(g, last[g.record])) for g in items}
    expected = {
        "rewards/chosen": mean(items, lambda g: BETA * log_ratio(g)),
        "rewards/rejected": mean(items, lambda g: BETA * log_ratio(g, last[g.record])),
        "rewards/margins": mean(items, lambda g: margin[g.record]),
        "rewards/accuracies": mean(items, lambda g: float(margin[g.record] > 0)),
        "rewards/ties": mean(items, lambda g: float(last[g.record] == 0)),
        "logps/rejected": mean(items, lambda g: log_prob(POLICY, g, last[g.record])),
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["rewards/accuracies"] < 1


def test_criteria_are_counted_one_by_one():
    """Three kinds of pairs in turn: the criteria agree, conflict, and one of them is tied."""
    table = [[[5, 3], [2, 1]], [[4, 1], [3, 6]], [[1, 2], [1, 0]]]
    items = [
        replace(g, scores=np.array(table[b % 3], np.float32), criteria=("helpful", "safe"))
        for b, g in enumerate(groups(11))
    ]
    algorithm = preference(MODEL, loss=DPO)
    batch = packed(algorithm.prepare(items))
    _, metrics = Engine(algorithm, microbatches=2)(batch)
    for c, name in enumerate(("helpful", "safe")):

        def gap(group: Group, c: int = c) -> float:
            assert group.scores is not None
            return float(group.scores[0, c] - group.scores[1, c])

        def agrees(group: Group) -> float:
            margin = log_ratio(group) - log_ratio(group, 1)
            return float(np.sign(margin) == np.sign(gap(group)) != 0)

        assert metrics[f"criteria/{name}/margins"] == pytest.approx(mean(items, gap), rel=1e-5)
        assert metrics[f"criteria/{name}/accuracies"] == pytest.approx(mean(items, agrees))
        assert 0 < metrics[f"criteria/{name}/accuracies"] < 1


@pytest.mark.parametrize(
    ("loss", "reward"),
    [
        (losses.mix((1.0, DPO), (5.0, NLL)), lambda g: BETA * log_ratio(g)),
        (
            losses.weighted(losses.mix((1.0, DPO), (1.0, NLL)), losses.wpo_weight),
            lambda g: BETA * log_ratio(g),
        ),
        (
            losses.mix((1.0, partial(losses.cpo, beta=BETA)), (1.0, NLL)),
            lambda g: BETA * log_prob(POLICY, g),
        ),
        (
            losses.mix((1.0, partial(losses.simpo, beta=BETA, gamma=0.1)), (1.0, DPO)),
            lambda g: BETA * log_prob(POLICY, g) / int(g.scored[0].sum()),
        ),
    ],
    ids=["rpo", "wpo", "cpo with nll", "simpo with dpo"],
)
def test_rewards_are_those_of_the_first_term(loss, reward):
    items = groups(6)
    _, metrics = jax.jit(lambda: evaluated(preference(MODEL, loss=loss), packed(items)))()
    assert float(metrics["rewards/chosen"]) == pytest.approx(mean(items, reward), rel=1e-5)
