"""What the losses must do whatever their formulas look like: fixed points, invariances, limits."""

import itertools
from functools import partial, update_wrapper

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import Needs
from dpo_jax.structs import BadInput, Scored

f32 = partial(np.asarray, dtype=np.float32)
i32 = partial(np.asarray, dtype=np.int32)
BETA = 0.3
LOGP = f32([[-24.5, -37.5], [-31.0, -28.5], [-3.25, -4.5]])
REF = f32([[-26.0, -35.25], [-30.25, -30.0], [-3.0, -4.0]])
LENGTH = i32([[12, 17], [9, 8], [1, 2]])


def margin_of(D, **fields):
    """Pairs whose log-ratio margins are D, the reference at 0."""
    D = jnp.asarray(D, jnp.float32)
    return Scored(
        logp_BK=jnp.stack([D, jnp.zeros_like(D)], axis=1),
        ref_logp_BK=jnp.zeros((D.shape[0], 2)),
        **fields,
    )


def slope_in(loss, D):
    """d loss / d D of each pair."""
    return jax.grad(lambda D: jnp.sum(loss(margin_of(D))))(jnp.asarray(D, jnp.float32))


def sigmoid(z):
    return 1 / (1 + np.exp(-np.float64(z)))


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


# Pairs: fixed points


@pytest.mark.parametrize("divergence", [losses.reverse_kl, losses.jensen_shannon])
def test_dpo_is_log_2_where_the_policy_is_the_reference(divergence):
    value = losses.dpo(Scored(REF, ref_logp_BK=REF), beta=BETA, divergence=divergence)
    close(value, np.full(3, np.log(2)))


def test_dpo_gradient_at_the_reference_is_half_beta():
    slope = jax.grad(lambda logp: jnp.sum(losses.dpo(Scored(logp, ref_logp_BK=REF), beta=BETA)))(
        jnp.asarray(REF)
    )
    close(slope, np.tile([-BETA / 2, BETA / 2], (3, 1)))


def test_dpo_weighs_a_pair_by_how_wrong_its_implicit_reward_is():
    D = np.array([-800, -40, -3, -0.5, 0, 0.5, 3, 40, 800])
    slope = slope_in(partial(losses.dpo, beta=BETA), D)
    with np.errstate(over="ignore"):
        close(slope, -BETA * sigmoid(-BETA * D))


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3])
def test_smoothed_dpo_is_least_at_the_log_odds_of_a_right_label(e):
    best = np.log((1 - e) / e) / BETA
    loss = partial(losses.dpo, beta=BETA, label_smoothing=e)
    close(slope_in(loss, [best]), 0)
    close(loss(margin_of([best])), -e * np.log(e) - (1 - e) * np.log(1 - e))
    below, above = slope_in(loss, [best - 1, best + 1])
    assert below < 0 < above


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_ipo_is_least_at_half_the_inverse_of_beta(beta):
    loss = partial(losses.ipo, beta=beta, length_norm=False)
    target = 1 / (2 * beta)
    close(loss(margin_of([target])), 0)
    close(slope_in(loss, [target - 1, target, target + 1]), [-2, 0, 2], 1e-5)


def test_ipo_reaches_its_target_per_token_by_default():
    length_BK = jnp.array([[4, 7]])
    close(losses.ipo(margin_of([20.0], length_BK=length_BK), beta=0.1), 0)


def test_hinge_pushes_with_beta_up_to_the_margin_and_not_beyond():
    loss = partial(losses.hinge, beta=BETA)
    edge = 1 / BETA
    slope = slope_in(loss, [-800, 0, edge - 0.01, edge + 0.01, 800])
    np.testing.assert_array_equal(slope, f32([-BETA, -BETA, -BETA, 0, 0]))
    np.testing.assert_array_equal(loss(margin_of([edge + 0.01, 800])), [0, 0])


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.dpo, beta=BETA),
        partial(losses.hinge, beta=BETA),
        partial(losses.ipo, beta=BETA, length_norm=False),
    ],
)
def test_a_prompt_dependent_constant_changes_nothing(loss):
    """Only the difference of log-ratios counts: what is common to both responses cancels."""
    shift = f32([[4.0], [-8.0], [0.5]])
    close(loss(Scored(LOGP + shift, ref_logp_BK=REF)), loss(Scored(LOGP, ref_logp_BK=REF)))


def test_reference_free_is_a_reference_of_zeros():
    scored = Scored(LOGP, ref_logp_BK=REF)
    zeros = Scored(LOGP, ref_logp_BK=np.zeros_like(REF))
    expected = losses.dpo(zeros, beta=BETA)
    np.testing.assert_array_equal(losses.dpo(scored, beta=BETA, reference_free=True), expected)
    np.testing.assert_array_equal(
        losses.dpo(Scored(LOGP), beta=BETA, reference_free=True), expected
    )


@pytest.mark.parametrize("length_norm", [False, True])
def test_an_empty_slot_is_finite_and_has_no_gradient_of_its_own(length_norm):
    """Padding reaches the losses with log-probs 0 and length 0; 0 * NaN would be NaN."""
    empty = np.zeros((1, 2), np.float32)

    def total(logp):
        scored = Scored(logp, ref_logp_BK=empty, length_BK=np.zeros((1, 2), np.int32))
        pair = losses.dpo(scored, beta=BETA, length_norm=length_norm)
        return jnp.sum(0 * (pair + losses.ipo(scored, beta=BETA) + losses.nll(scored)))

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(empty)), empty)


def test_minus_zero_is_a_log_probability_like_any_other():
    """log p = -0.0 is a certain token, not a missing one."""
    minus, plus = f32([[-0.0, -2.0]]), f32([[0.0, -2.0]])
    length_BK = i32([[4, 2]])
    for loss in (partial(losses.dpo, beta=BETA, length_norm=True), partial(losses.ipo, beta=BETA)):
        first, second = (
            loss(Scored(x, ref_logp_BK=-plus, length_BK=length_BK)) for x in (minus, plus)
        )
        np.testing.assert_array_equal(first, second)
    assert losses.nll(Scored(minus, length_BK=length_BK)) == 0
    assert losses.plackett_luce(minus * f32([[1, 0]])) == np.log(f32(2))
    for estimate in (losses.kl_k1, losses.kl_abs, losses.kl_k2, losses.kl_k3):
        np.testing.assert_array_equal(estimate(minus, plus), [[0, 0]])


@pytest.mark.parametrize("K", [1, 3])
def test_nll_reads_the_first_response_only(K):
    logp_BK = -np.arange(1, 2 * K + 1, dtype=np.float32).reshape(2, K)
    scored = Scored(logp_BK, length_BK=np.full((2, K), 4))
    close(losses.nll(scored), -logp_BK[:, 0] / 4)


# Lists


def test_plackett_luce_of_two_is_dpo():
    ratio = jnp.asarray(LOGP - REF)
    close(losses.plackett_luce(BETA * ratio), losses.dpo(Scored(LOGP, ref_logp_BK=REF), beta=BETA))


def test_plackett_luce_of_two_is_bradley_terry_at_any_margin():
    score = jnp.float32([[800, 0], [0, 800], [-431, -447], [2, 2]])
    np.testing.assert_array_equal(losses.plackett_luce(score), losses.bradley_terry(score))


def test_plackett_luce_is_a_distribution_over_orders():
    score = f32([1.5, -0.25, 0.5, 3.0])
    orders = jnp.stack([score[list(order)] for order in itertools.permutations(range(4))])
    close(jnp.sum(jnp.exp(-losses.plackett_luce(orders))), 1)


def test_plackett_luce_ignores_padding_wherever_it_stands():
    score = f32([[1.5, -0.25, 0.5]])
    rubbish = f32(np.nan)
    padded = f32([[1.5, rubbish, -0.25, 0.5, rubbish, 9e9]])
    mask = np.array([[1, 0, 1, 1, 0, 0]])
    close(losses.plackett_luce(padded, mask), losses.plackett_luce(score))
    slope = jax.grad(lambda s: jnp.sum(losses.plackett_luce(s, mask)))(jnp.asarray(padded))
    expected = jax.grad(lambda s: jnp.sum(losses.plackett_luce(s)))(jnp.asarray(score))
    close(slope[:, [0, 2, 3]], expected)
    np.testing.assert_array_equal(slope[:, [1, 4, 5]], [[0, 0, 0]])


def test_plackett_luce_of_one_or_of_none_is_zero():
    score = jnp.float32([[5.0, 1.0], [3.0, -2.0]])
    np.testing.assert_array_equal(losses.plackett_luce(score[:, :1]), [0, 0])
    np.testing.assert_array_equal(losses.plackett_luce(score, jnp.array([[1, 0], [0, 0]])), [0, 0])


def test_scores_may_be_shifted_together():
    score = jnp.float32([[1.5, -0.25, 0.5], [4.0, 2.0, -8.0]])
    shift = jnp.float32([[64.0], [-16.0]])
    close(losses.plackett_luce(score + shift), losses.plackett_luce(score), 1e-5)
    close(losses.bradley_terry((score + shift)[:, :2]), losses.bradley_terry(score[:, :2]), 1e-5)


def test_a_margin_moves_the_tie():
    score = jnp.float32([[2.0, 0.0], [0.5, 0.0]])
    close(losses.bradley_terry(score, margin=jnp.float32([2.0, 0.5])), np.full(2, np.log(2)))


# Divergences


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [
        (losses.reverse_kl, lambda x: np.ones_like(x)),
        (losses.forward_kl, lambda x: np.exp(-x)),
        (losses.jensen_shannon, lambda x: sigmoid(-x)),
        (losses.alpha_divergence(alpha=0.3), lambda x: np.exp(-0.7 * x)),
        (losses.alpha_divergence(alpha=2.0), lambda x: np.exp(x)),
    ],
)
def test_a_score_is_the_slope_of_its_divergence(divergence, slope):
    """s(log u) = f'(u) up to a constant, so ds/dx = u f''(u); f as in 2309.16240."""
    x = f32([-3, -0.5, 0, 0.5, 3])
    close(jax.vmap(jax.grad(divergence))(jnp.asarray(x)), slope(x), 1e-5)


@pytest.mark.parametrize(
    ("divergence", "rate"),
    [(losses.forward_kl, -1.0), *[(losses.alpha_divergence(alpha=a), a - 1) for a in (0.5, 2.0)]],
)
def test_exponents_stop_at_80_with_no_gradient_beyond(divergence, rate):
    x = jnp.float32([79.0, 81.0, 800.0]) / rate
    score, slope = jax.vmap(jax.value_and_grad(divergence))(x)
    close(score * rate, np.exp([79.0, 80.0, 80.0]), 1e-5)
    close(slope[0], np.exp(79.0), 1e-5)
    np.testing.assert_array_equal(slope[1:], [0, 0])


def test_alpha_divergence_joins_forward_and_reverse_kl():
    x = jnp.float32([-3, 0, 2])
    close(losses.alpha_divergence(x, alpha=0.0), losses.forward_kl(x))
    close(losses.alpha_divergence(x, alpha=1.0), losses.reverse_kl(x))
    at_one = jax.vmap(jax.grad(losses.alpha_divergence(alpha=1.0)))(x)
    np.testing.assert_array_equal(at_one, [1, 1, 1])
    traced = jax.jit(lambda alpha: losses.alpha_divergence(x, alpha=alpha))
    close(traced(1.0), x)
    close(losses.alpha_divergence()(x), losses.alpha_divergence(x, alpha=0.5))


# KL estimates, all tokens of a small vocabulary listed

P = np.array([0.5, 0.3, 0.2])
Q = np.array([0.4, 0.4, 0.2])
KL = np.sum(P * np.log(P / Q))


def expectation(estimate):
    """E over tokens of the policy P, and the expected gradient in the policy's logits."""

    def mean(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(P * estimate(logp, jnp.log(Q)))  # samples are fixed: P is a constant

    return jax.value_and_grad(mean)(jnp.log(P))


def slope_of(divergence):
    """The gradient of a divergence(p, q) in the logits of the policy, at P."""
    return jax.grad(lambda logits: divergence(jax.nn.softmax(logits), jnp.asarray(Q)))(jnp.log(P))


@pytest.mark.parametrize(
    ("estimate", "value", "divergence"),
    [
        (losses.kl_k1, KL, lambda p, q: 0.0 * jnp.sum(p)),
        (losses.kl_abs, np.sum(P * abs(np.log(P / Q))), lambda p, q: jnp.sum(jnp.abs(p - q))),
        (
            losses.kl_k2,
            np.sum(P * np.log(P / Q) ** 2 / 2),
            lambda p, q: jnp.sum(p * jnp.log(p / q)),
        ),
        (losses.kl_k3, KL, lambda p, q: jnp.sum(q * jnp.log(q / p))),
    ],
)
def test_what_the_value_and_the_gradient_of_an_estimate_estimate(estimate, value, divergence):
    with jax.enable_x64(True):
        mean, slope = expectation(estimate)
        target = slope_of(divergence)
    close(mean, value, 1e-12)
    close(slope, target, 1e-12)


def test_kl_exact_is_the_sum_over_the_vocabulary_and_so_is_its_gradient():
    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(
            lambda logits: losses.kl_exact(jax.nn.log_softmax(logits), jnp.log(Q))
        )(jnp.log(P))
        target = slope_of(lambda p, q: jnp.sum(p * jnp.log(p / q)))
    close(value, KL, 1e-12)
    close(slope, target, 1e-12)


def test_kl_exact_of_a_token_the_policy_cannot_say():
    logp = jnp.log(jnp.float32([0.5, 0.5, 0.0, 0.0]))
    ref = jnp.log(jnp.float32([0.25, 0.25, 0.5, 0.0]))
    value, slope = jax.value_and_grad(losses.kl_exact)(logp, ref)
    close(value, np.log(2))
    assert np.all(np.isfinite(slope))
    assert losses.kl_exact(ref, logp) == np.inf


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    d = f32(10.0) ** -np.arange(1, 7)
    value = losses.kl_k3(np.concatenate([d, -d]), np.zeros(12, np.float32))
    assert np.all(np.asarray(value) >= 0)
    close(value[1] / (d[1] ** 2 / 2 - d[1] ** 3 / 6), 1, 1e-3)


# The door


def test_a_missing_field_is_named_with_its_loss():
    for loss in (losses.dpo, losses.hinge, losses.ipo):
        with pytest.raises(BadInput, match=rf"losses\.{loss.__name__} needs Scored\.ref_logp_BK"):
            loss(Scored(LOGP, length_BK=LENGTH), beta=BETA)
    with pytest.raises(BadInput, match=r"losses\.ipo needs Scored\.length_BK"):
        losses.ipo(Scored(LOGP, ref_logp_BK=REF), beta=BETA)
    with pytest.raises(BadInput, match=r"losses\.nll needs Scored\.length_BK"):
        losses.nll(Scored(LOGP))


def test_wrong_shapes_are_named():
    with pytest.raises(AssertionError, match=r"losses\.dpo takes pairs"):
        losses.dpo(Scored(np.zeros((2, 3)), ref_logp_BK=np.zeros((2, 3))), beta=BETA)
    with pytest.raises(AssertionError, match=r"losses\.hinge: Scored\.ref_logp_BK"):
        losses.hinge(Scored(LOGP, ref_logp_BK=REF[:1]), beta=BETA)
    with pytest.raises(AssertionError, match="margin_B"):
        losses.bradley_terry(LOGP, margin=np.zeros((3, 1)))
    with pytest.raises(AssertionError):
        losses.kl_k3(LOGP, REF[:1])


def test_nll_refuses_an_unknown_mean():
    with pytest.raises(BadInput, match="per='word'"):
        losses.needs(partial(losses.nll, per="word"))
    with pytest.raises(BadInput, match="per='word'"):
        losses.nll(Scored(LOGP, length_BK=LENGTH), per="word")


def test_needs_follow_the_keywords_through_partials():
    assert losses.needs(losses.dpo) == Needs()
    free = partial(partial(losses.dpo, reference_free=True), beta=BETA)
    assert losses.needs(free) == Needs(reference=False)
    assert losses.needs(partial(free, reference_free=False)) == Needs()
    kept_apart = update_wrapper(partial(losses.dpo, reference_free=True), losses.dpo)
    assert losses.needs(partial(kept_apart, reference_free=False)) == Needs()
    assert losses.needs(partial(losses.dpo, length_norm=True)).fields == ("length_BK",)
    assert losses.needs(losses.ipo).fields == ("length_BK",)
    assert losses.needs(partial(losses.ipo, length_norm=False)).fields == ()
    per_token = Needs(reference=False, responses=None, measure="tokens", fields=("length_BK",))
    assert losses.needs(losses.nll) == per_token
    assert losses.needs(partial(losses.nll, per="sequence")).measure == "groups"


def test_a_users_loss_may_declare_its_needs_or_not():
    def plain(scored, *, beta):
        return beta * scored.logp_BK[:, 0]

    declared = losses.needs(reference=False, responses=None)(plain)
    assert declared is plain
    assert losses.needs(partial(declared, beta=BETA)) == Needs(reference=False, responses=None)
    assert losses.needs(lambda scored: scored.logp_BK[:, 0]) == Needs()
