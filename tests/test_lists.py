"""What the losses of lists must do: agree with the pair losses, ignore padding, stop moving."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.structs import BadInput, Scored

f32 = partial(np.asarray, dtype=np.float32)
BETA = 0.3
LOSSES = {
    "plackett_luce_dpo": partial(losses.plackett_luce_dpo, beta=BETA),
    "info_nca": partial(losses.info_nca, beta=BETA, alpha=0.5),
    "nca_list": partial(losses.nca_list, beta=BETA, alpha=0.5),
    "lipo": partial(losses.lipo, beta=BETA),
    "all_pairs": losses.all_pairs(partial(losses.dpo, beta=BETA)),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def lists(B, K, seed=0):
    """B lists of K responses with scores that fall along K."""
    rng = np.random.default_rng(seed)
    logp_BK, ref_logp_BK = rng.normal(-20, 4, (2, B, K))
    score_BK = -np.sort(-rng.normal(0, 2, (B, K)), axis=1)
    return Scored(f32(logp_BK), ref_logp_BK=f32(ref_logp_BK), score_BKC=f32(score_BK)[:, :, None])


def field(scored, name):
    return np.asarray(getattr(scored, name))


@cache
def compiled(loss):
    """Value and gradient as one program: op by op, every shape compiles every op."""

    def total(logp_BK, scored):
        loss_B = loss(replace(scored, logp_BK=logp_BK))
        return jnp.sum(loss_B), loss_B

    return jax.jit(jax.grad(total, has_aux=True))


def gradient(loss, scored):
    return compiled(loss)(jnp.asarray(scored.logp_BK), scored)[0]


def value(loss, scored):
    return compiled(loss)(jnp.asarray(scored.logp_BK), scored)[1]


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("D", [0.0, 2.0, -3.0, 800.0, -800.0])
def test_plackett_luce_of_two_is_dpo(D):
    pair = Scored(jnp.float32([[D - 5, -5]]), ref_logp_BK=jnp.zeros((1, 2)))
    ranked, paired = (partial(f, beta=BETA) for f in (losses.plackett_luce_dpo, losses.dpo))
    np.testing.assert_array_equal(ranked(pair), paired(pair))
    close(gradient(ranked, pair), gradient(paired, pair), 1e-7)


def test_certain_scores_make_nca_of_two_the_pair_losses():
    scored = lists(8, 2)
    sure = replace(scored, score_BKC=np.tile(f32([[1.0], [0.0]]), (8, 1, 1)))
    close(losses.info_nca(sure, beta=BETA, alpha=0.01), losses.dpo(scored, beta=BETA))
    close(losses.nca_list(sure, beta=BETA, alpha=0.01), losses.nca(scored, beta=BETA))


def test_lipo_of_two_is_dpo_by_the_cost_of_a_swap():
    scored = replace(lists(8, 2), score_BKC=np.tile(f32([[2.0], [1.0]]), (8, 1, 1)))
    cost = (2**2 - 2**1) * (1 / np.log(2) - 1 / np.log(3))
    close(losses.lipo(scored, beta=BETA), cost * losses.dpo(scored, beta=BETA))


@each_loss
@pytest.mark.parametrize("K", [1, 2, 7])
def test_padding_changes_nothing_wherever_it_stands(loss, K):
    scored = lists(4, K)
    places = np.sort(np.random.default_rng(1).permutation(K + 3)[:K])
    rubbish = f32([np.nan, 9e9, -9e9])

    def padded(x, filling):
        wide = np.full((4, K + 3, *x.shape[2:]), filling, np.float32)
        wide[:, places] = x
        return wide

    for filling in rubbish:
        mask_BK = np.zeros((4, K + 3), np.int32)
        mask_BK[:, places] = 1
        wide = Scored(
            padded(scored.logp_BK, filling),
            ref_logp_BK=padded(scored.ref_logp_BK, filling / 2),
            score_BKC=padded(field(scored, "score_BKC"), filling),
            mask_BK=mask_BK,
        )
        close(value(loss, wide), value(loss, scored))
        slope = gradient(loss, wide)
        close(slope[:, places], gradient(loss, scored))
        np.testing.assert_array_equal(np.delete(slope, places, axis=1), 0)


@each_loss
def test_a_group_without_responses_is_zero(loss):
    scored = replace(lists(2, 3), mask_BK=np.zeros((2, 3)))
    np.testing.assert_array_equal(value(loss, scored), [0, 0])
    np.testing.assert_array_equal(gradient(loss, scored), np.zeros((2, 3)))


def test_values_where_the_policy_is_the_reference():
    scored = lists(2, 5)
    scored = replace(scored, logp_BK=scored.ref_logp_BK)
    close(LOSSES["plackett_luce_dpo"](scored), [np.log(120)] * 2)
    close(LOSSES["info_nca"](scored), [np.log(5)] * 2)
    close(LOSSES["nca_list"](scored), [2 * np.log(2)] * 2)
    close(LOSSES["all_pairs"](scored), [np.log(2)] * 2)


def test_info_nca_stands_still_where_rewards_are_scores_up_to_a_constant():
    scored = lists(3, 6)
    ratio_BK = field(scored, "score_BKC")[:, :, 0] / (0.5 * BETA) + f32([[7.0], [0.0], [-3.0]])
    best = replace(scored, logp_BK=field(scored, "ref_logp_BK") + ratio_BK)
    close(gradient(LOSSES["info_nca"], best), np.zeros((3, 6)), 1e-6)
    assert np.max(np.abs(gradient(LOSSES["info_nca"], scored))) > 1e-2
    # NCA fixes the constant too
    assert np.max(np.abs(gradient(LOSSES["nca_list"], best))) > 1e-2


def test_nca_list_stands_still_at_k_times_the_share_and_there_alone():
    scored = lists(3, 6)
    share_BK = jax.nn.softmax(field(scored, "score_BKC")[:, :, 0] / 0.5, axis=1)
    best = replace(scored, logp_BK=field(scored, "ref_logp_BK") + np.log(6 * share_BK) / BETA)
    close(gradient(LOSSES["nca_list"], best), np.zeros((3, 6)), 1e-6)
    close(gradient(LOSSES["info_nca"], best), np.zeros((3, 6)), 1e-6)


def test_lipo_does_not_compare_equal_scores_and_counts_a_pair_once():
    scored = replace(lists(1, 4), score_BKC=f32([[[1.0], [1.0], [1.0], [1.0]]]))
    np.testing.assert_array_equal(losses.lipo(scored, beta=BETA), [0])
    two_levels = replace(scored, score_BKC=f32([[[2.0], [0.0], [0.0], [2.0]]]))
    reward = BETA * (scored.logp_BK - field(scored, "ref_logp_BK"))[0]
    rank = 1 + np.argsort(np.argsort(-reward))
    expected = sum(
        3 * abs(1 / np.log1p(rank[i]) - 1 / np.log1p(rank[j])) * np.log1p(np.exp(-gap))
        for i in (0, 3)
        for j in (1, 2)
        for gap in [reward[i] - reward[j]]
    )
    close(losses.lipo(two_levels, beta=BETA), [expected])


def test_lipo_does_not_need_a_sorted_list():
    scored = lists(3, 5)
    order = np.array([3, 0, 4, 1, 2])
    moved = Scored(
        scored.logp_BK[:, order],
        ref_logp_BK=field(scored, "ref_logp_BK")[:, order],
        score_BKC=field(scored, "score_BKC")[:, order],
    )
    close(losses.lipo(moved, beta=BETA), losses.lipo(scored, beta=BETA))
    assert np.all(np.abs(LOSSES["plackett_luce_dpo"](moved) - LOSSES["plackett_luce_dpo"](scored)))


@pytest.mark.parametrize("name", ["info_nca", "nca_list", "lipo"])
def test_only_the_first_criterion_counts(name):
    scored = lists(2, 3)
    two = np.concatenate(
        [field(scored, "score_BKC"), 100 * field(scored, "score_BKC")[:, ::-1]], axis=2
    )
    np.testing.assert_array_equal(
        LOSSES[name](replace(scored, score_BKC=two)), LOSSES[name](scored)
    )
    assert losses.needs(LOSSES[name]).fields == ("score_BKC",)
    with pytest.raises(BadInput, match=rf"losses\.{name} needs Scored\.score_BKC"):
        LOSSES[name](replace(scored, score_BKC=None))


@each_loss
def test_a_list_loss_takes_any_K_and_compares_no_groups(loss):
    needs = losses.needs(loss)
    assert (needs.reference, needs.responses, needs.coupled) == (True, None, False)
