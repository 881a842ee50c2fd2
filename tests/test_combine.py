"""Losses made of losses: mixes, weights, and a pair loss over all pairs of a list."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.description import canonical, describe
from dpo_jax.losses import Needs, Statistic
from dpo_jax.override import options, override, with_numbers
from dpo_jax.structs import BadInput, Scored
from dpo_jax.values import show

f32 = partial(np.asarray, dtype=np.float32)
DPO = partial(losses.dpo, beta=0.1)
RPO = losses.mix((1.0, DPO), (0.25, losses.nll))
WPO = losses.weighted(DPO, losses.wpo_weight)
ALIGNED = f32([[-0.5, -0.25], [0.125, -1.0], [0.0, 0.0]])
PAIRS = Scored(
    f32([[-24.5, -37.5], [-31.0, -28.5], [-3.25, -4.5]]),
    ref_logp_BK=f32([[-26.0, -35.25], [-30.25, -30.0], [-3.0, -4.0]]),
    length_BK=np.array([[12, 17], [9, 8], [1, 2]]),
    aligned_BK=ALIGNED,
    margin_B=f32([0.5, 1.0, 0.0]),
    delta=jnp.float32(0.125),
)
LIST = {
    "logp_BK": f32([[-24.5, -37.5, -30.0, -8.0], [-31.0, -28.5, -27.0, -9.0]]),
    "ref_logp_BK": f32([[-26.0, -35.25, -29.0, -8.5], [-30.25, -30.0, -30.0, -9.0]]),
    "length_BK": np.array([[12, 17, 4, 8], [9, 8, 7, 2]]),
    "mask_BK": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "score_BKC": f32([[[3.0], [2.0], [1.0], [0.5]], [[3.0], [1.0], [0.0], [9.0]]]),
}
MARGIN = f32([0.5, 1.0])
LISTS = Scored(**LIST, margin_B=MARGIN, delta=jnp.float32(0.125))


def chosen(scored, *, beta):
    return beta * scored.logp_BK[:, 0]


@losses.needs(
    rule=lambda beta: Needs(statistics=(Statistic("delta", partial(chosen, beta=beta), keep=1.0),))
)
def shifted(scored, *, beta):
    """A pair loss that reads a mean over the steps."""
    return chosen(scored, beta=beta) - scored.delta


def algorithm(model, *, loss, share: float = 0.5):
    """Stands in for an algorithm."""


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def slopes(loss, scored):
    return jax.grad(lambda logp: jnp.sum(loss(replace(scored, logp_BK=logp))))(
        jnp.asarray(scored.logp_BK)
    )


# mix


def test_a_mix_is_the_sum_of_its_terms():
    expected = losses.dpo(PAIRS, beta=0.1) + 0.25 * losses.nll(PAIRS)
    close(RPO(PAIRS), expected)
    close(slopes(RPO, PAIRS), slopes(DPO, PAIRS) + 0.25 * slopes(losses.nll, PAIRS))
    close(jax.jit(lambda c: losses.mix((c, DPO), (0.25, losses.nll))(PAIRS))(1.0), expected)


def test_terms_keep_their_own_measures():
    assert losses.terms(RPO) == ((1.0, DPO), (0.25, losses.nll))
    assert [losses.needs(loss).measure for _, loss in losses.terms(RPO)] == ["groups", "tokens"]
    assert losses.terms(DPO) == ((1.0, DPO),)


def test_a_mix_in_a_mix_is_its_terms():
    nested = losses.mix((0.5, RPO), (2.0, losses.hinge))
    assert losses.terms(nested) == ((0.5, DPO), (0.125, losses.nll), (2.0, losses.hinge))
    by_hand = losses.Mix(((0.5, RPO), (1.0, DPO)))
    close(by_hand(PAIRS), 0.5 * RPO(PAIRS) + DPO(PAIRS))
    assert losses.terms(by_hand) == ((0.5, DPO), (0.125, losses.nll), (1.0, DPO))


def test_needs_of_a_mix_are_those_of_all_its_terms():
    assert losses.needs(RPO) == Needs(fields=("length_BK",))
    free = partial(losses.dpo, beta=0.1, reference_free=True)
    assert losses.needs(losses.mix((1.0, free), (1.0, losses.nll))).reference is False
    assert losses.needs(losses.mix((1.0, DPO), (1.0, partial(losses.aot, beta=0.1)))).coupled
    one = losses.needs(losses.mix((1.0, partial(losses.kto, beta=0.1)), (0.1, losses.nll)))
    assert (one.responses, one.partner, one.fields) == (1, True, ("label_B", "length_BK"))
    assert losses.needs(losses.mix((1.0, losses.nll))).responses is None


def test_terms_of_different_K_are_refused():
    with pytest.raises(BadInput, match=r"losses\.mix: its losses want 1 and 2 responses"):
        losses.needs(losses.mix((1.0, DPO), (1.0, partial(losses.kto, beta=0.1))))


def test_one_field_cannot_be_two_means():
    bco = partial(losses.bco, beta=0.1)
    same = losses.mix((0.5, bco), (0.5, partial(losses.bco, beta=0.1)))
    assert [each.field for each in losses.needs(same).statistics] == ["delta"]
    with pytest.raises(BadInput, match=r"Scored\.delta as different means"):
        losses.needs(losses.mix((0.5, bco), (0.5, partial(losses.bco, beta=0.2))))
    pairs = [losses.all_pairs(partial(shifted, beta=beta)) for beta in (0.1, 0.1, 0.2)]
    losses.needs(losses.mix((1.0, pairs[0]), (1.0, pairs[1])))
    with pytest.raises(BadInput, match=r"Scored\.delta as different means"):
        losses.needs(losses.mix((1.0, pairs[0]), (1.0, pairs[2])))


@pytest.mark.parametrize("terms", [(), (DPO,), ((DPO, 1.0),), ((1.0, DPO, 2.0),), ((1.0, 2.0),)])
def test_what_is_no_mix_is_refused(terms):
    with pytest.raises(BadInput, match=r"losses\.mix"):
        losses.mix(*terms)


# weighted


def test_a_weight_multiplies_and_carries_no_gradient():
    weight_B = np.exp(ALIGNED.sum(axis=1))
    close(losses.wpo_weight(PAIRS), weight_B)
    close(WPO(PAIRS), weight_B * DPO(PAIRS))
    close(slopes(WPO, PAIRS), weight_B[:, None] * slopes(DPO, PAIRS))
    slope = jax.grad(lambda x: jnp.sum(WPO(replace(PAIRS, aligned_BK=x))))(PAIRS.aligned_BK)
    np.testing.assert_array_equal(slope, np.zeros((3, 2)))


def test_needs_of_a_weighted_loss_are_those_of_both():
    assert losses.needs(WPO) == Needs(fields=("aligned_BK",))
    free = losses.weighted(partial(losses.simpo, beta=2.0, gamma=0.5), losses.wpo_weight)
    assert losses.needs(free) == Needs(reference=False, fields=("length_BK", "aligned_BK"))
    tokens = losses.weighted(losses.nll, losses.wpo_weight)
    assert losses.needs(tokens).measure == "tokens"
    with pytest.raises(BadInput, match=r"losses\.weighted: its losses want 1 and 2 responses"):
        losses.needs(losses.weighted(partial(losses.npo, beta=0.1), losses.wpo_weight))


def test_a_weighted_mix_is_the_mix_of_its_weighted_terms():
    both = losses.weighted(RPO, losses.wpo_weight)
    assert [coefficient for coefficient, _ in losses.terms(both)] == [1.0, 0.25]
    assert [losses.needs(loss).measure for _, loss in losses.terms(both)] == ["groups", "tokens"]
    close(both(PAIRS), losses.wpo_weight(PAIRS) * RPO(PAIRS))
    with pytest.raises(BadInput, match="several measures"):
        losses.needs(partial(WPO, loss=RPO))


# all pairs


@pytest.mark.parametrize(
    "loss",
    [
        DPO,
        partial(losses.modpo, beta=0.1, weight=0.5),
        partial(losses.simpo, beta=2.0, gamma=0.5),
        partial(losses.odpo, beta=0.1),
        partial(losses.orpo),
        partial(losses.bco_pair, beta=0.1),
    ],
    ids=show,
)
def test_all_pairs_is_the_mean_over_the_pairs_that_are_there(loss):
    def pair(b, i, j):
        at = (slice(b, b + 1), np.array([i, j]))
        two = {name: x[at] for name, x in LIST.items()}
        return loss(replace(LISTS, **two, margin_B=MARGIN[b : b + 1]))[0]

    expected = [
        np.mean([pair(b, i, j) for i, j in itertools.combinations(range(K), 2)])
        for b, K in enumerate((4, 3))
    ]
    close(losses.all_pairs(loss)(LISTS), expected)


def test_all_pairs_of_a_pair_is_the_pair():
    close(losses.all_pairs(DPO)(PAIRS), DPO(PAIRS))
    close(slopes(losses.all_pairs(DPO), PAIRS), slopes(DPO, PAIRS))


def test_all_pairs_ignores_padding_and_gives_0_without_pairs():
    loss = losses.all_pairs(DPO)
    rubbish = np.where(LIST["mask_BK"], LIST["logp_BK"], np.nan)
    close(loss(replace(LISTS, logp_BK=rubbish)), loss(LISTS))
    slope = slopes(loss, replace(LISTS, logp_BK=rubbish))
    close(slope, slopes(loss, LISTS))
    assert slope[1, 3] == 0
    alone = replace(LISTS, mask_BK=np.array([[0, 1, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(loss(alone), [0, 0])
    np.testing.assert_array_equal(slopes(loss, alone), np.zeros((2, 4)))
    single = Scored(**{name: x[:, :1] for name, x in LIST.items()})
    np.testing.assert_array_equal(loss(single), [0, 0])


def test_needs_of_all_pairs_are_those_of_the_pair_for_any_K():
    assert losses.needs(losses.all_pairs(DPO)) == Needs(responses=None)
    odpo = losses.all_pairs(partial(losses.odpo, beta=0.1))
    assert losses.needs(odpo) == Needs(responses=None, fields=("score_BKC",))


def test_a_statistic_of_a_pair_is_averaged_over_the_pairs():
    (found,) = losses.needs(losses.all_pairs(partial(shifted, beta=0.1))).statistics
    assert (found.field, found.keep) == ("delta", 1.0)
    first, second = 0.1 * LISTS.logp_BK
    expected = [(3 * first[0] + 2 * first[1] + first[2]) / 6, (2 * second[0] + second[1]) / 3]
    close(found.value(LISTS), expected)


def test_all_pairs_of_a_mix_is_a_mix_of_all_pairs():
    hinge = partial(losses.hinge, beta=0.1)
    both = losses.all_pairs(losses.mix((1.0, DPO), (0.5, hinge)))
    expected = losses.all_pairs(DPO)(LISTS) + 0.5 * losses.all_pairs(hinge)(LISTS)
    close(both(LISTS), expected)
    assert len(losses.terms(both)) == 2


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (partial(losses.aot, beta=0.1), "aot.*compares groups"),
        (losses.nll, "two responses, not nll"),
        (partial(losses.kto, beta=0.1), "two responses, not kto"),
        (losses.mix((1.0, DPO), (1.0, losses.nll)), "two responses, not nll"),
        (losses.all_pairs(DPO), "two responses, not over_pairs"),
    ],
)
def test_all_pairs_refuses_what_compares_no_pairs(loss, said):
    with pytest.raises(BadInput, match=said):
        losses.all_pairs(loss)
    if not isinstance(loss, losses.Mix):
        swapped = partial(losses.all_pairs(DPO), loss=loss)
        with pytest.raises(BadInput, match=said):
            losses.needs(swapped)
        with pytest.raises(BadInput, match=said):
            swapped(LISTS)


# As values of an experiment


def made(make):
    return partial(algorithm, loss=make())


RECIPES = [
    lambda: losses.mix((1.0, partial(losses.dpo, beta=0.1)), (0.25, losses.nll)),
    lambda: losses.weighted(partial(losses.dpo, beta=0.1), losses.wpo_weight),
    lambda: losses.all_pairs(partial(losses.dpo, beta=0.1)),
]


@pytest.mark.parametrize("make", RECIPES)
def test_equal_combinations_have_equal_descriptions(make):
    assert canonical(describe(made(make))) == canonical(describe(made(make)))


def test_descriptions_differ_where_anything_differs():
    pairs = [(1.0, DPO), (0.25, losses.nll)]
    mixes = [
        losses.mix(*pairs),
        losses.mix(*reversed(pairs)),
        losses.mix((2.0, DPO), pairs[1]),
        losses.mix((1.0, partial(DPO, beta=0.2)), pairs[1]),
        losses.mix(pairs[0]),
        WPO,
        losses.weighted(partial(DPO, beta=0.2), losses.wpo_weight),
        losses.all_pairs(DPO),
    ]
    texts = {canonical(describe(loss)) for loss in mixes}
    assert len(texts) == len(mixes)


@pytest.mark.parametrize(
    ("make", "path"),
    [*zip(RECIPES, ["loss.terms.0.1.beta", "loss.loss.beta", "loss.loss.beta"], strict=True)],
)
def test_the_keywords_of_an_inner_loss_are_options(make, path):
    value = made(make)
    assert (path, 0.1) in options(value)
    changed = override(value, {path: "0.3"})
    (_, inner), *_ = losses.terms(changed.keywords["loss"])
    beta = inner.keywords.get("beta") or inner.keywords["loss"].keywords["beta"]
    assert beta == 0.3
    assert canonical(describe(with_numbers(value, {path: 0.3}))) == canonical(describe(changed))
    assert (path, 0.1) in options(value)  # the old value is as it was


def test_the_terms_of_a_mix_are_options():
    value = made(RECIPES[0])
    changed = override(value, {"loss.terms.1.0": "0.5", "loss.terms.1.1.per": "sequence"})
    (one, dpo), (half, nll) = losses.terms(changed.keywords["loss"])
    assert (one, half, dpo.keywords, nll.keywords) == (1, 0.5, {"beta": 0.1}, {"per": "sequence"})
    swapped = override(value, {"loss.terms.0.1": "losses.hinge"})
    assert swapped.keywords["loss"].terms[0][1].func is losses.hinge
    assert swapped.keywords["loss"].terms[0][1].keywords == {"beta": 0.1}
    for path, said in [
        ("loss.terms.2.0", "no option loss.terms.2"),
        ("loss.terms.0.1.betta", "nearest is loss.terms.0.1.beta"),
        ("loss.terms.0.0", "expected float"),
    ]:
        with pytest.raises(BadInput, match=said):
            override(value, {path: "x"})


def test_a_mix_can_take_the_place_of_a_loss():
    value = partial(algorithm, loss=DPO)
    assert override(value, {"loss": RPO}).keywords["loss"] is RPO
    with pytest.raises(BadInput, match=r"loss\.beta"):
        override(value, {"loss": RPO, "loss.beta": 0.3})
    assert show(RPO) == "Mix"
