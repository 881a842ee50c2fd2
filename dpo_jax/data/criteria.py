"""Several named criteria weighted into one order, margin or soft label.

Functions groups -> groups on the host, for `Data.arrange`; the keywords are criteria of the data
and their weights:

    arrange=partial(criteria.order, helpfulness=0.7, safety=0.3)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np

from dpo_jax.data.views import select
from dpo_jax.structs import BadInput, Group

TOTAL = "total"  # the criterion that a weighted sum becomes


def order(groups: Sequence[Group], /, **weights: float) -> list[Group]:
    """Responses best to worst by the weighted sum of criteria; equal sums keep their order.

    The sum, as float32, stands as the first criterion, named "total", in place of one of that name.
    """
    return [_ordered(group, weights, "order") for group in groups]


def margins(groups: Sequence[Group], /, *, by: str, **weights: float) -> list[Group]:
    """Pairs ordered by criterion `by`; margin = the weighted sum of others, first minus second.

    The data of MODPO, Zhou et al. 2310.03708. Equal scores keep their order.
    """
    if by in weights:
        raise BadInput(f"margins: by={by} is the order of the pairs; give weights to the others")
    found = []
    for group in groups:
        _check_pair(group, "margins")
        placed = _placed(group, _sum(group, {by: 1.0}, "margins"))
        first, second = _sum(placed, weights, "margins").tolist()
        found.append(replace(placed, margin=first - second))
    return found


def soft_labels(
    groups: Sequence[Group], /, *, temperature: float = 1.0, **weights: float
) -> list[Group]:
    """Pairs as `order` leaves them, with soft_label = sigmoid(gap of the sums / temperature)."""
    if not temperature > 0:
        raise BadInput(f"soft_labels: temperature is {temperature}: give a positive one")
    found = []
    for group in groups:
        _check_pair(group, "soft_labels")
        placed = _ordered(group, weights, "soft_labels")
        assert placed.scores is not None, "_ordered adds the total"
        gap = float(placed.scores[0, 0]) - float(placed.scores[1, 0])
        found.append(replace(placed, soft_label=(1 + math.tanh(gap / (2 * temperature))) / 2))
    return found


def votes(groups: Sequence[Group], /) -> list[Group]:
    """Pairs by the votes of their criteria, each an annotator who scored both responses.

    A vote is for the response of the higher score, half for each where they are equal. The first
    has most votes (equal shares keep the order); soft_label is its share.
    """
    found = []
    for group in groups:
        _check_pair(group, "votes")
        if group.scores is None:
            raise BadInput('votes: the data has no "scores" to vote by')
        gap_C = np.asarray(group.scores[0] - group.scores[1], np.float64)
        share = float(np.mean((1 + np.sign(gap_C)) / 2))
        placed = select(group, (0, 1) if share >= 0.5 else (1, 0))
        found.append(replace(placed, soft_label=max(share, 1 - share)))
    return found


def soft_ties(groups: Sequence[Group], /) -> list[Group]:
    """Pairs with soft_label 1/2 where they are ties; of the others 1 where it has none."""
    found = []
    for group in groups:
        certain = 1.0 if group.soft_label is None else group.soft_label
        found.append(replace(group, soft_label=0.5 if _is_tie(group, "soft_ties") else certain))
    return found


def without_ties(groups: Sequence[Group], /) -> list[Group]:
    """Pairs that are no ties, ordered by their soft_label, which nothing is left of."""
    found = []
    for group in groups:
        if not _is_tie(group, "without_ties"):
            turned = group.soft_label is not None and group.soft_label < 0.5
            found.append(replace(select(group, (1, 0) if turned else (0, 1)), soft_label=None))
    if not found:
        raise BadInput(f"without_ties: all of {len(groups)} pairs are ties")
    return found


def _is_tie(group: Group, function: str) -> bool:
    """Whether a pair has soft_label 1/2, or equal scores: in the total, or in every criterion."""
    _check_pair(group, function)
    if group.soft_label == 0.5:
        return True
    if group.scores is None:
        return False
    judged = slice(0, 1) if TOTAL in group.criteria else slice(None)
    return bool(np.array_equal(group.scores[0, judged], group.scores[1, judged]))


def _ordered(group: Group, weights: Mapping[str, float], function: str) -> Group:
    """The group by its weighted sum, which becomes its first criterion."""
    placed = _placed(group, _sum(group, weights, function))
    assert placed.scores is not None, "_sum has read them"
    others = [c for c, name in enumerate(group.criteria) if name != TOTAL]
    total_K1 = _sum(placed, weights, function)[:, None]
    return replace(
        placed,
        scores=np.concatenate([total_K1, placed.scores[:, others]], axis=1),
        criteria=(TOTAL, *(group.criteria[c] for c in others)),
    )


def _placed(group: Group, total_K: np.ndarray) -> Group:
    return select(group, np.argsort(-total_K, kind="stable").tolist())


def _sum(group: Group, weights: Mapping[str, float], function: str) -> np.ndarray:
    """The weighted sum of criteria, float32 (K,). Errors: BadInput for weights of no criterion."""
    if group.scores is None or not group.criteria:
        raise BadInput(
            f'{function}: the data has no named criteria; give each record "scores": '
            "{NAME: [one number per response]}"
        )
    there = ", ".join(group.criteria)
    if not weights:
        raise BadInput(f"{function}: give data.arrange.NAME=WEIGHT for criteria among {there}")
    for name, weight in weights.items():
        if name not in group.criteria:
            raise BadInput(f"{function}: there is no criterion {name}; the data has {there}")
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise BadInput(f"{function}: {name}={weight!r}; a weight is a finite number")
    columns = [group.criteria.index(name) for name in weights]
    chosen_KC = np.asarray(group.scores, np.float64)[:, columns]
    return (chosen_KC @ np.array([*weights.values()], np.float64)).astype(np.float32)


def _check_pair(group: Group, function: str) -> None:
    count = len(group.responses)
    if count != 2:
        raise BadInput(
            f"{function}: a group of {count} responses is no pair; criteria.order takes any number,"
            " views.pairs makes pairs of it"
        )
