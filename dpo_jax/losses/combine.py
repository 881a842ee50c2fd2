"""Losses made of losses: sums of terms, and weights that depend on the policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.losses.door import floating, present
from dpo_jax.losses.needs import Loss, Needs, Statistic, name_of, needs, parts_of, together
from dpo_jax.structs import Array, BadInput, Scored

Term = tuple[float | Array, Loss]
Weight = Callable[[Scored], Array]


@dataclass(frozen=True)
class Mix:
    """A sum of losses, each with its coefficient; made by `mix`.

    Called like a loss it sums the values of a group, as if all were under one measure; training
    sums every term under its own.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        for term in self.terms:
            pair = isinstance(term, tuple) and len(term) == 2
            if not pair or callable(term[0]) or not callable(term[1]):
                raise BadInput(f"losses.mix takes (coefficient, loss), not {term!r}")
        if not self.terms:
            raise BadInput("losses.mix() is empty: give (coefficient, loss), ...")

    def __call__(self, scored: Scored) -> jax.Array:
        values = [coefficient * floating(loss(scored)) for coefficient, loss in terms(self)]
        return jnp.sum(jnp.stack(values), axis=0)

    def needs(self, **_: object) -> Needs:
        """Those of the terms; BadInput where they want different K or different statistics."""
        return _together([needs(loss) for _, loss in self.terms], "mix")


def mix(*terms: Term) -> Mix:
    """A sum of losses: mix((1.0, dpo), (alpha, nll)).

        sum_i coefficient_i loss_i

    Training sums every term under the measure that it declares (pairs for DPO, the tokens of the
    chosen responses for the NLL): RPO 2404.19733 = mix((1, dpo), (alpha, nll)), MPO 2411.10442 =
    mix((.8, dpo), (.2, bco_pair), (1, nll)). A mix inside a mix is its terms. Rewards in the
    metrics are those of the first term. Errors: BadInput, at the latest when its needs are read.
    """
    return Mix(tuple(flat for term in terms for flat in _flat(term)))


def terms(loss: Loss) -> tuple[Term, ...]:
    """(coefficient, loss) of every term of a mix; ((1.0, loss),) of any other loss."""
    if not isinstance(loss, Mix):
        return ((1.0, loss),)
    return tuple(flat for term in loss.terms for flat in _flat(term))


def weighted(loss: Loss, weight: Weight) -> Loss:
    """A loss whose groups are weighted by a function of what is scored: WPO is one.

        weight(scored)_B loss(scored)_B

    The weight carries no gradient and is not normalised. A weight function declares its needs
    with `needs(...)` like a loss. A weighted `mix` is the mix of its weighted terms.
    """
    if isinstance(loss, Mix):
        return mix(*((coefficient, weighted(term, weight)) for coefficient, term in loss.terms))
    return partial(by_weight, loss=loss, weight=weight)


def _needs_of_weighted(*, loss: Loss, weight: Weight, **_: object) -> Needs:
    if isinstance(loss, Mix):
        raise BadInput("losses.weighted: a mix has several measures; weigh its terms one by one")
    return _together([needs(loss), needs(weight)], "weighted")


@needs(rule=_needs_of_weighted)
def by_weight(scored: Scored, *, loss: Loss, weight: Weight) -> jax.Array:
    """What `weighted(loss, weight)` makes a partial of: weight(scored) loss(scored)."""
    return jax.lax.stop_gradient(floating(weight(scored))) * floating(loss(scored))


@needs(reference=False, fields=("aligned_BK",))
def wpo_weight(scored: Scored) -> jax.Array:
    """The weight of weighted preference optimisation, Zhou et al. 2406.11827.

        exp(aligned_w + aligned_l),   aligned = mean_t [ log p_t - log sum_v p_t(v)^2 ]

    p_t(v): the policy's probability of v at token t of the response, p_t that of the token itself.
    WPO is `weighted(dpo, wpo_weight)`: pairs count by how likely the policy is to have said them.
    A token drawn from the policy has p_t / sum_v p_t(v)^2 = 1 on average. Needs aligned_BK, K = 2.
    Returns weight_B, more than 0.
    """
    return jnp.exp(jnp.sum(present(scored, "aligned_BK", "wpo_weight"), axis=1))


def _flat(term: Term) -> tuple[Term, ...]:
    if not (isinstance(term, tuple) and len(term) == 2 and isinstance(term[1], Mix)):
        return (term,)
    return tuple((term[0] * inner, loss) for inner, loss in terms(term[1]))


def _together(parts: Sequence[Needs], name: str) -> Needs:
    """`together`, but two losses may not read different statistics under one name."""
    found: dict[str, Statistic] = {}
    for statistic in (each for part in parts for each in part.statistics):
        first = found.setdefault(statistic.field, statistic)
        if _meaning(first) != _meaning(statistic):
            raise BadInput(
                f"losses.{name}: two of its losses read Scored.{statistic.field} as different "
                f"means ({name_of(first.value)}, {name_of(statistic.value)}); give both the same "
                "hyperparameters or take one"
            )
    return together(list(parts), name)


def _meaning(statistic: Statistic) -> tuple[object, ...]:
    return _plain(statistic.value), statistic.keep, statistic.partner


def _plain(value: object) -> object:
    """What can be compared: two partials of one function with equal keywords are equal."""
    if not isinstance(value, partial):
        return value
    function, keywords = parts_of(value)
    return function, {name: _plain(item) for name, item in keywords.items()}
