"""What the losses of pairs become at the ends of their keywords, and where they are at rest."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.structs import BadInput, Scored

BETA = 0.3
LOGP = np.array([[-24.5, -37.5], [-31.0, -28.5], [-3.25, -4.5]], np.float32)
REF = np.array([[-26.0, -35.25], [-30.25, -30.0], [-3.0, -4.0]], np.float32)
LENGTH = np.array([[12, 17], [9, 8], [1, 2]], np.int32)
SCORE = np.array([[[2.0], [0.5]], [[1.0], [0.0]], [[-1.0], [-4.0]]], np.float32)
KL = np.array([[0.5, 1.25], [2.0, 0.75], [0.0, 0.125]], np.float32)
PAIRS = Scored(
    LOGP,
    ref_logp_BK=REF,
    length_BK=LENGTH,
    score_BKC=SCORE,
    kl_BK=KL,
    margin_B=np.array([0.5, -1.0, 2.0], np.float32),
    soft_label_B=np.ones(3, np.float32),
)


def margin_of(D, **fields):
    """Pairs whose log-ratio margins are D, the reference at 0."""
    D = jnp.asarray(D, jnp.float32)
    logp_BK = jnp.stack([D, jnp.zeros_like(D)], axis=1)
    return Scored(logp_BK, ref_logp_BK=jnp.zeros_like(logp_BK), **fields)


def slope_in(loss, D):
    """d loss / d D of each pair."""
    return jax.grad(lambda D: jnp.sum(loss(margin_of(D))))(jnp.asarray(D, jnp.float32))


def slopes(loss, scored):
    """d sum(loss) / d every field of scored that holds real numbers."""
    return jax.grad(lambda scored: jnp.sum(loss(scored)), allow_int=True)(scored)


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z, np.float64)))


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.robust_dpo, label_smoothing=0.0),
        partial(losses.dpop, lam=0.0),
        partial(losses.r_dpo, alpha=0.0),
        partial(losses.odpo, alpha=0.0),
        partial(losses.odpo, f=lambda gap: 0 * gap),
        partial(losses.modpo, weight=1.0),
        losses.soft_dpo,
        partial(losses.tdpo, alpha=0.0),
        partial(losses.dpo, label_smoothing=0.0, divergence=losses.alpha_divergence(alpha=1.0)),
    ],
)
def test_dpo_is_the_end_of_its_variants(loss):
    close(loss(PAIRS, beta=BETA), losses.dpo(PAIRS, beta=BETA))


@pytest.mark.parametrize("e", [0.0, 0.1, 0.5])
def test_a_soft_label_is_a_smoothing_for_one_pair(e):
    soft = replace(PAIRS, soft_label_B=np.full(3, 1 - e, np.float32))
    close(
        losses.soft_dpo(soft, beta=BETA),
        losses.dpo(PAIRS, beta=BETA, label_smoothing=e),
    )


def test_the_losses_without_a_reference_are_those_of_a_reference_of_zeros():
    free = partial(losses.dpo, beta=BETA, reference_free=True)
    close(losses.cpo(PAIRS, beta=BETA), free(PAIRS))
    close(losses.cpo(PAIRS, beta=BETA, label_smoothing=0.2), free(PAIRS, label_smoothing=0.2))
    close(losses.simpo(PAIRS, beta=BETA, gamma=0.0), free(PAIRS, length_norm=True))
    close(
        losses.slic(PAIRS),
        losses.hinge(Scored(LOGP, ref_logp_BK=np.zeros_like(REF)), beta=1.0),
    )


def test_length_norm_divides_the_log_ratios_by_their_counts():
    per_token = Scored(LOGP / LENGTH, ref_logp_BK=REF / LENGTH)
    close(losses.dpo(PAIRS, beta=5.0, length_norm=True), losses.dpo(per_token, beta=5.0))
    close(losses.ipo(PAIRS, beta=BETA), losses.ipo(per_token, beta=BETA, length_norm=False))


def test_alpha_po_joins_simpo_at_zero():
    simpo = partial(losses.simpo, beta=2.0, gamma=0.5)
    alpha_po = partial(losses.alpha_po, beta=2.0, gamma=0.5)
    close(alpha_po(PAIRS, alpha=0.0), simpo(PAIRS))
    for tiny in (1e-5, -1e-5, 1e-30):
        close(alpha_po(PAIRS, alpha=tiny), simpo(PAIRS), 1e-4)
    at_zero = jax.jit(lambda alpha: slopes(partial(alpha_po, alpha=alpha), PAIRS).logp_BK)(0.0)
    close(at_zero, slopes(simpo, PAIRS).logp_BK)


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3])
def test_robust_dpo_is_dpo_of_the_true_labels_on_average_over_flips(e):
    right = np.array([-800, -40, -3, -0.5, 0, 0.5, 3, 40, 800])
    robust = partial(losses.robust_dpo, beta=BETA, label_smoothing=e)
    with jax.enable_x64(True):
        mean = (1 - e) * robust(wide(right)) + e * robust(wide(-right))
        close(mean, losses.dpo(wide(right), beta=BETA), 1e-12)


def wide(D):
    """`margin_of` in float64."""
    logp_BK = np.stack([D, np.zeros_like(D)], axis=1)
    return Scored(logp_BK, ref_logp_BK=np.zeros_like(logp_BK))


@pytest.mark.parametrize("e", [1e-3, 0.1])
def test_exo_is_least_at_the_log_odds_of_its_label(e):
    best = np.log((1 - e) / e) / BETA
    loss = partial(losses.exo, beta=BETA, label_smoothing=e)
    close(loss(margin_of([best])), 0)
    close(slope_in(loss, [best]), 0)
    below, above = slope_in(loss, [best - 1, best + 1])
    assert below < 0 < above


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_soft_dpo_is_least_at_the_log_odds_of_its_label(p):
    loss = partial(losses.soft_dpo, beta=BETA)
    best = np.log(p / (1 - p)) / BETA

    def slope(D):
        label_B = jnp.float32([p])
        return jax.grad(lambda D: loss(margin_of(D, soft_label_B=label_B))[0])(jnp.float32([D]))

    close(slope(best), 0)
    assert slope(best - 1) < 0 < slope(best + 1)


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_sppo_rests_where_the_log_ratios_are_half_the_inverse_of_beta(beta):
    target = 1 / (2 * beta)
    at_rest = Scored(jnp.float32([[target, -target]]), ref_logp_BK=jnp.zeros((1, 2)))
    loss = partial(losses.sppo_hard, beta=beta)
    close(loss(at_rest), 0)
    close(slopes(loss, at_rest).logp_BK, [[0, 0]])
    close(losses.cal_dpo(at_rest, beta=beta), np.log1p(np.exp(-2 * target)))


def test_nca_rests_at_the_share_of_pairs_in_which_a_response_is_chosen():
    """Two responses, the first chosen in 3 of 4 pairs: beta a = log(2 * 3/4), log(2 * 1/4)."""
    x = jnp.log(jnp.float32([1.5, 0.5])) / BETA

    def total(x):
        logp_BK = jnp.stack([x, x[::-1]])  # chosen first: the usual pair, and the flipped one
        value_B = losses.nca(Scored(logp_BK, ref_logp_BK=jnp.zeros((2, 2))), beta=BETA)
        return 0.75 * value_B[0] + 0.25 * value_B[1]

    close(jax.grad(total)(x), [0, 0])
    assert not np.allclose(jax.grad(total)(x + 1), 0, atol=1e-3)


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (losses.nca, (-0.25, 0.25)),
        (losses.bco_pair, (-0.5, 0.5)),
        (losses.apo_zero, (-0.25, 0.25)),
        (losses.apo_down, (0.0, 0.25)),
        (partial(losses.chi_po, clip=5.0), (-1.0, 1.0)),
    ],
)
def test_gradients_at_the_reference_in_units_of_beta(loss, slope):
    at = Scored(REF, ref_logp_BK=REF)
    expected = np.tile(BETA * np.array(slope), (3, 1))
    close(slopes(partial(loss, beta=BETA), at).logp_BK, expected)


@pytest.mark.parametrize(
    "loss",
    [
        losses.nca,
        losses.bco_pair,
        losses.sppo_hard,
        losses.apo_zero,
        losses.apo_down,
        losses.cal_dpo,
        partial(losses.chi_po, clip=5.0),
    ],
)
def test_an_absolute_loss_sees_what_is_common_to_both_responses(loss):
    shifted = replace(PAIRS, logp_BK=LOGP - 1)
    assert np.all(np.abs(loss(shifted, beta=BETA) - loss(PAIRS, beta=BETA)) > 1e-4)


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_discopop_is_finite_at_far_margins(beta, tau):
    loss = partial(losses.discopop, beta=beta, tau=tau)
    D = [-800.0, -200.0, 0.0, 200.0, 800.0]
    value, slope = loss(margin_of(D)), slope_in(loss, D)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
    if tau < 1:  # logistic where the pair is wrong, exponential where it is right
        close(value[:2], [800 * beta, 200 * beta])
        close(slope[:2], -beta)
    close(value[2], (np.log(2) + 1) / 2)
    close(value[3:], np.exp(-beta * np.array(D[3:])))


def test_dpop_pushes_only_the_chosen_response_that_fell():
    fallen = Scored(jnp.float32([[-2.0, 0.0], [2.0, 0.0]]), ref_logp_BK=jnp.zeros((2, 2)))
    slope = slopes(partial(losses.dpop, beta=0.1, lam=5.0), fallen).logp_BK
    z = 0.1 * np.array([-2 - 5 * 2, 2])
    close(slope, -0.1 * sigmoid(-z)[:, None] * np.array([[6, -1], [1, -1]]))


def test_r_dpo_takes_the_length_from_the_reward():
    """Where policy == reference the longer chosen response already has z = alpha * its excess."""
    longer = Scored(REF, ref_logp_BK=REF, length_BK=LENGTH)
    excess = LENGTH[:, 0] - LENGTH[:, 1]
    close(losses.r_dpo(longer, beta=BETA, alpha=0.1), np.log1p(np.exp(-0.1 * excess)))


def test_odpo_reads_the_first_criterion_and_no_gap_below_a_millionth():
    beyond = np.concatenate([SCORE, np.full_like(SCORE, 7.0)], axis=2)
    odpo = partial(losses.odpo, beta=BETA)
    close(odpo(replace(PAIRS, score_BKC=beyond)), odpo(PAIRS))
    tied, backwards = replace(PAIRS, score_BKC=0 * SCORE), replace(PAIRS, score_BKC=-SCORE)
    np.testing.assert_array_equal(odpo(tied), odpo(backwards))
    close(odpo(tied), odpo(PAIRS, f=lambda gap: np.log(1e-6) + 0 * gap))


def test_tdpo_lets_no_gradient_through_the_chosen_response():
    slope = slopes(partial(losses.tdpo, beta=BETA, alpha=0.5), PAIRS).kl_BK
    np.testing.assert_array_equal(slope[:, 0], 0)
    assert np.all(slope[:, 1] > 0)


def test_chi_po_is_dpo_with_the_exponentials_of_the_log_ratios_and_stops_at_its_clip():
    inside = Scored(jnp.float32([[0.5, -0.5]]), ref_logp_BK=jnp.zeros((1, 2)))
    z = 0.1 * (np.exp(0.5) + 0.5 - np.exp(-0.5) + 0.5)
    close(losses.chi_po(inside, beta=0.1, clip=5.0), np.log1p(np.exp(-z)))
    outside = Scored(jnp.float32([[79.0, 0.0], [500.0, 0.0], [0.0, 500.0]]))
    outside = replace(outside, ref_logp_BK=jnp.zeros((3, 2)))
    loss = partial(losses.chi_po, beta=0.1, clip=5.0)
    close(loss(outside), np.log1p(np.exp([-10.0, -10.0, 10.0])))
    np.testing.assert_array_equal(slopes(loss, outside).logp_BK, np.zeros((3, 2)))


def test_alpha_po_stops_at_the_exponent_80_with_no_gradient_beyond():
    logp_BK = jnp.float32([[-1.0, -80.0], [-1.0, -400.0]])
    scored = Scored(logp_BK, length_BK=np.ones((2, 2), np.int32))
    loss = partial(losses.alpha_po, beta=1e-33, gamma=0.0, alpha=1.01)
    value, slope = loss(scored), slopes(loss, scored).logp_BK
    assert np.all(np.isfinite(value))
    assert value[0] == value[1]
    np.testing.assert_array_equal(slope[:, 1], 0)


def test_orpo_of_a_certain_response_is_finite():
    logp_BK = jnp.float32([[-0.0, -5.0], [-5.0, -0.0], [-0.0, -0.0], [-800.0, -1e-9]])
    scored = Scored(logp_BK, length_BK=np.ones((4, 2), np.int32))
    value, slope = losses.orpo(scored, lam=1.0), slopes(losses.orpo, scored).logp_BK
    certain = np.log(1e-7)  # the log odds of anything count from here
    even = -5 - np.log1p(-np.exp(-5.0))
    close(value[1], np.log1p(np.exp(-certain - even)), 1e-5)
    close(value[2], np.log(2))
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))


def test_orpo_counts_log_odds_to_the_last_digits():
    mean = np.array([[-1e-6, -1e-3], [-0.5, -0.9], [-30.0, -20.0]])
    log_odds = mean - np.log(-np.expm1(mean))
    expected = np.logaddexp(0, log_odds[:, 1] - log_odds[:, 0])
    scored = Scored(jnp.float32(mean), length_BK=np.ones((3, 2), np.int32))
    close(losses.orpo(scored, lam=1.0), expected, 2e-6)


def test_simper_is_the_difference_of_the_mean_probabilities():
    even = Scored(jnp.log(jnp.float32([[0.25, 0.01]])), length_BK=np.array([[1, 2]]))
    close(losses.simper(even), -0.25 + 0.1)


def test_the_shift_of_bco_gets_no_gradient():
    shifted = replace(PAIRS, delta=jnp.float32(0.5))
    slope = slopes(partial(losses.bco_pair, beta=BETA), shifted)
    assert slope.delta == 0
    assert np.all(slope.logp_BK != 0)


@pytest.mark.parametrize(
    ("loss", "field"),
    [
        (partial(losses.r_dpo, beta=BETA, alpha=0.1), "length_BK"),
        (partial(losses.odpo, beta=BETA), "score_BKC"),
        (partial(losses.modpo, beta=BETA, weight=0.5), "margin_B"),
        (partial(losses.soft_dpo, beta=BETA), "soft_label_B"),
        (partial(losses.tdpo, beta=BETA), "kl_BK"),
        (partial(losses.simpo, beta=BETA, gamma=0.5), "length_BK"),
        (partial(losses.alpha_po, beta=BETA, gamma=0.5, alpha=0.5), "length_BK"),
        (losses.orpo, "length_BK"),
        (losses.simper, "length_BK"),
    ],
)
def test_a_declared_field_is_asked_for_by_name(loss, field):
    assert losses.needs(loss).fields == (field,)
    with pytest.raises(BadInput, match=rf"losses\.\w+ needs Scored\.{field}"):
        loss(replace(PAIRS, **{field: None}))


def test_a_reference_is_asked_for_exactly_where_it_is_declared():
    keywords = {"beta": BETA, "alpha": 0.5, "gamma": 0.5, "weight": 0.5, "clip": 5.0}
    keywords["label_smoothing"] = 0.1
    free = {"cpo", "simpo", "alpha_po", "orpo", "slic", "simper", "unlikelihood"}
    with_reference = {"dpo", "robust_dpo", "hinge", "ipo", "exo", "discopop", "dpop", "r_dpo"}
    with_reference |= {"odpo", "modpo", "soft_dpo", "chi_po", "tdpo", "nca", "bco_pair"}
    with_reference |= {"sppo_hard", "apo_zero", "apo_down", "cal_dpo", "aot", "aot_unpaired"}
    for name in free | with_reference | {"beta_dpo"}:
        loss = getattr(losses, name)
        given = {key: keywords[key] for key in loss.__annotations__ if key in keywords}
        call = partial(loss, replace(PAIRS, ref_logp_BK=None), **given)
        assert losses.needs(partial(loss, **given)).responses == 2
        assert losses.needs(loss).reference == (name not in free)
        if name in free:
            assert call().shape == (3,)
            continue
        with pytest.raises(BadInput, match=rf"losses\.{name} needs Scored\.ref_logp_BK"):
            call()
