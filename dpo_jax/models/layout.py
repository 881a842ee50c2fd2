"""How a tensor of a file holds our parameters, written with the axis letters of both.

A layout has one word per axis of the tensor: the letters whose sizes multiply to it. `HE D` is a
matrix of all heads by model width; the axes of our parameter stand in its name, so `q_DHE` out of
`HE D` says what to split and what to turn. Several parameters in one tensor stand one after the
other along an axis (`HE+JE+JE D`), or by turns, where a number stands in the word: in `H3E D` each
head has its query, its key and its value.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.models.transformer import Config


class Row(NamedTuple):
    """One tensor of a file, or one a layer where its name has a place for the layer, {}."""

    name: str
    layout: str
    leaves: tuple[str, ...]

    @property
    def layered(self) -> bool:
        return "{}" in self.name


def row(name: str, layout: str, *leaves: str) -> Row:
    return Row(name, layout, leaves)


def shape(at: Row, config: Config) -> tuple[int, ...]:
    """The shape of the tensor."""
    return tuple(sum(_sizes(axis.split("+"), config)) for axis in at.layout.split())


def cut(at: Row, leaf: str, config: Config) -> Callable[[np.ndarray], np.ndarray]:
    """The function from the tensor to one parameter: a view, so that parts of it can be read."""
    part, place, letters = at.leaves.index(leaf), [], ""
    for axis in at.layout.split():
        words = axis.split("+")
        along = part if len(words) > 1 else 0
        sizes = _sizes(words, config)
        place.append(slice(sum(sizes[:along]), sum(sizes[: along + 1])))
        letters += words[along]
    split = [_sizes(letter, config)[0] for letter in letters]
    by_turns = tuple(part if letter.isdigit() else slice(None) for letter in letters)
    kept = [letter for letter in letters if not letter.isdigit()]
    axes = leaf.rpartition("_")[2]
    axes = axes if "J" in kept else axes.replace("J", "H")  # every head has a key of its own
    order = [kept.index(letter) for letter in axes]

    def view(tensor: np.ndarray) -> np.ndarray:
        return tensor[tuple(place)].reshape(split)[by_turns].transpose(order)

    return view


def joined(at: Row, parameters: Sequence[Any], config: Config) -> np.ndarray:
    """The tensor, of one layer, that holds these parameters."""
    whole = np.empty(shape(at, config), np.asarray(parameters[0]).dtype)
    for leaf, value in zip(at.leaves, parameters, strict=True):
        cut(at, leaf, config)(whole)[...] = np.asarray(value)
    return whole


def _sizes(words: Sequence[str], config: Config) -> list[int]:
    """The size of every word: of its letters, multiplied."""
    return [
        math.prod(int(x) if x.isdigit() else getattr(config, x) for x in word) for word in words
    ]
