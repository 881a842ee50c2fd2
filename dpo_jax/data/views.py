"""Other views of the same groups: a list as pairs, a pair as lone responses, a partner beside each.

Functions groups -> groups on the host, for `Data.arrange` and for algorithms. What comes from one
group keeps its record and its weight, and nothing is tokenised again.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from dpo_jax.structs import BadInput, Group


def select(group: Group, places: Sequence[int]) -> Group:
    """The group with the responses at these places, in this order, their masks and scores too.

    soft_label and margin compare the first of two with the second: where the two change places
    they are turned round, and with another number of responses they mean nothing and are left out.
    """
    places = list(places)
    soft_label, margin = group.soft_label, group.margin
    if sorted(places) != [0, 1] or len(group.responses) != 2:
        soft_label = margin = None
    elif places == [1, 0]:
        soft_label = None if soft_label is None else 1 - soft_label
        margin = None if margin is None else -margin
    return replace(
        group,
        responses=[group.responses[k] for k in places],
        scored=None if group.scored is None else [group.scored[k] for k in places],
        scores=None if group.scores is None else group.scores[places],
        soft_label=soft_label,
        margin=margin,
    )


def pairs(groups: Sequence[Group]) -> list[Group]:
    """A ranking of K as K // 2 pairs: best and worst, second and last but one, and so inwards.

    Each response stands in one pair; the middle of an odd K in none.
    """
    return list(chain.from_iterable(_pairs(group, b) for b, group in enumerate(groups)))


def _pairs(group: Group, b: int) -> list[Group]:
    count = len(group.responses)
    if count < 2:
        raise BadInput(f"pairs: {_named(group, b)} has {_counted(count)}, a pair takes 2")
    return [select(group, (k, count - 1 - k)) for k in range(count // 2)]


def first(groups: Sequence[Group]) -> list[Group]:
    """The best response of every group alone: SFT on the chosen ones of pairs."""
    return [select(group, (0,)) for group in groups]


def unpaired(groups: Sequence[Group]) -> list[Group]:
    """Every response alone: label 1 for the better half of its group, 0 for the other.

    The middle of an odd K is left out; a lone response keeps the label it has.
    """
    return list(chain.from_iterable(_alone(group, b) for b, group in enumerate(groups)))


def _alone(group: Group, b: int) -> list[Group]:
    count = len(group.responses)
    if count == 1 and group.label is not None:
        return [group]
    if count < 2:
        raise BadInput(f"unpaired: {_named(group, b)} has {_counted(count)} and no label")
    half = count // 2
    labels = {k: float(k < half) for k in range(count) if k < half or k >= count - half}
    return [replace(select(group, (k,)), label=label) for k, label in labels.items()]


def partnered(groups: Sequence[Group], row_tokens: int | None = None) -> list[Group]:
    """Lone responses, each with a second beside it that answers another prompt.

    It is that of the group half the data further on (after the last comes the first), so that
    every response is a partner once, or of the next one behind it whose prompt and response both
    differ and which leaves the group within row_tokens. The second has no scores here: they are 0.
    Errors: BadInput for a group of another K, or without such a partner.
    """
    for b, group in enumerate(groups):
        if len(group.responses) != 1:
            count = _counted(len(group.responses))
            raise BadInput(f"partnered: {_named(group, b)} has {count}, it must be 1 response")
    ids = [(group.prompt.tobytes(), group.responses[0].tobytes()) for group in groups]
    sizes = [len(group.responses[0]) for group in groups]
    found = []
    for b, group in enumerate(groups):
        room = np.inf if row_tokens is None else row_tokens - group.tokens
        start = b + max(1, len(groups) // 2)
        after = (j % len(groups) for j in range(start, start + len(groups)))
        differing = (j for j in after if ids[j][0] != ids[b][0] and ids[j][1] != ids[b][1])
        partner = next((j for j in differing if sizes[j] <= room), None)
        if partner is None:
            raise BadInput(_no_partner(groups, b, row_tokens))
        found.append(_beside(group, groups[partner]))
    return found


def _beside(group: Group, other: Group) -> Group:
    """The group with the other's response as its second."""
    scored = None
    if group.scored is not None or other.scored is not None:
        scored = [
            np.ones(len(one.responses[0]), bool) if one.scored is None else one.scored[0]
            for one in (group, other)
        ]
    scores = group.scores
    if scores is not None:
        scores = np.concatenate([scores, np.zeros_like(scores)])
    responses = [group.responses[0], other.responses[0]]
    return replace(group, responses=responses, scored=scored, scores=scores)


def _no_partner(groups: Sequence[Group], b: int, row_tokens: int | None) -> str:
    prompt, response = groups[b].prompt.tobytes(), groups[b].responses[0].tobytes()
    differing = [
        len(group.responses[0])
        for group in groups
        if group.prompt.tobytes() != prompt and group.responses[0].tobytes() != response
    ]
    what = f"partnered: {_named(groups[b], b)} finds no response of another prompt"
    if not differing:
        return f"{what} that differs from its own, among {len(groups)} groups"
    size = groups[b].tokens + min(differing)
    return f"{what} that fits a row of {row_tokens} tokens with it; row_tokens={size} would do"


def _named(group: Group, b: int) -> str:
    """A group in messages: its record, or its place."""
    return f"group {b}" if group.record is None else f"record {group.record}"


def _counted(count: int) -> str:
    return "1 response" if count == 1 else f"{count or 'no'} responses"
