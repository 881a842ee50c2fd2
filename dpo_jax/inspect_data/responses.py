"""What the responses of a group are called, and how good they are held to be."""

from typing import NamedTuple

import numpy as np

from dpo_jax.structs import Group


class Place(NamedTuple):
    """A response of a group. rank: 1 for the best to 0 for the worst, None where nothing says.

    series: what it is counted under, beside groups of any number of responses.
    """

    name: str
    series: str
    rank: float | None


def places(group: Group) -> list[Place]:
    """The responses of a group in turn."""
    count = len(group.responses)
    if is_partnered(group):
        return [_alone(group), Place("partner", "partner", None)]
    if count == 1:
        return [_alone(group)]
    if count == 2:
        return [Place("chosen", "chosen", 1.0), Place("rejected", "rejected", 0.0)]
    series = ["chosen", *["between"] * (count - 2), "rejected"]
    return [
        Place(f"response {k + 1} of {count}", name, 1 - k / (count - 1))
        for k, name in enumerate(series)
    ]


def _alone(group: Group) -> Place:
    name = "completion" if group.label is None else "desirable" if group.label else "undesirable"
    return Place(name, name, 0.0 if name == "undesirable" else 1.0)


def is_partnered(group: Group) -> bool:
    """Whether the second response answers another prompt and only stands beside the first."""
    return group.label is not None and len(group.responses) == 2


def own(group: Group) -> list[np.ndarray]:
    """The responses to the prompt of the group, without a partner."""
    return list(group.responses[:1] if is_partnered(group) else group.responses)


def masks(group: Group) -> list[np.ndarray]:
    """Which tokens of each response count."""
    if group.scored is not None:
        return [np.asarray(mask, bool) for mask in group.scored]
    return [np.ones(len(ids), bool) for ids in group.responses]
