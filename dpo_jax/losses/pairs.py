"""Losses of pairs that compare both responses under the policy and a reference.

w and l are the summed log-probs of the chosen and the rejected response under the policy, rw and
rl those under the reference; a = w - rw, b = l - rl and D = a - b. One `Scored` in, one unreduced
value a pair out. Hyperparameters are keywords and may be traced arrays; flags and functions may
not. Float32 or better inside and out, with finite values and gradients at |D| up to 800.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from dpo_jax.losses.divergence import Divergence, bounded, reverse_kl
from dpo_jax.losses.door import floating, present
from dpo_jax.losses.measure import per_token
from dpo_jax.losses.needs import Needs, needs
from dpo_jax.losses.ranking import logistic
from dpo_jax.structs import Array, Scored

SMALLEST_GAP = 1e-6  # of ODPO's scores: the log of a smaller one is no margin


def _lengths(length_norm: bool) -> tuple[str, ...]:
    return ("length_BK",) if length_norm else ()


@needs(
    rule=lambda reference_free, length_norm, **_: Needs(
        reference=not reference_free, fields=_lengths(length_norm)
    )
)
def dpo(
    scored: Scored,
    *,
    beta: Array | float,
    label_smoothing: Array | float = 0.0,
    divergence: Divergence = reverse_kl,
    reference_free: bool = False,
    length_norm: bool = False,
) -> jax.Array:
    """Direct preference optimisation, Rafailov et al. 2305.18290 eq. 7.

        -(1-e) log sigmoid(z) - e log sigmoid(-z),   z = beta (s(a) - s(b)),   e = label_smoothing

    Label smoothing is conservative DPO (E. Mitchell, "A note on DPO with noisy preferences",
    2023): the optimum lies at z = log((1-e)/e). divergence: s of f-DPO (2309.16240).
    reference_free: rw = rl = 0. length_norm: a and b are divided by their token counts first
    (Tulu 3, 2411.15124 section 5, with a beta of 5).
    Needs K = 2, ref_logp_BK unless reference_free, length_BK with length_norm. Returns loss_B:
    log 2 where policy == reference, gradient in w there -beta/2, in general -beta sigmoid(-z).
    """
    ratio_BK = ratio(scored, "dpo", reference=not reference_free, length_norm=length_norm)
    return logistic(beta * margin(divergence(ratio_BK)), label_smoothing)


@needs()
def robust_dpo(
    scored: Scored,
    *,
    beta: Array | float,
    label_smoothing: Array | float,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """Robust DPO, Chowdhury et al. 2403.00409 eq. 12.

        [ -(1-e) log sigmoid(z) + e log sigmoid(-z) ] / (1 - 2e),   z = beta (s(a) - s(b))

    e = label_smoothing, the share of flipped labels, below 1/2. Its mean over such flips is DPO
    of the true labels; it has no lower bound. divergence: s of f-DPO (2309.16240).
    Needs K = 2, ref_logp_BK. Returns loss_B: log 2 where policy == reference.
    """
    z_B = beta * margin(divergence(ratio(scored, "robust_dpo")))
    e = jnp.asarray(label_smoothing, z_B.dtype)
    right_B, flipped_B = logistic(z_B), logistic(-z_B)
    return ((1 - e) * right_B - e * flipped_B) / (1 - 2 * e)


@needs()
def hinge(scored: Scored, *, beta: Array | float, divergence: Divergence = reverse_kl) -> jax.Array:
    """The hinge of SLiC 2305.10425 on implicit rewards, Liu et al. (RSO) 2309.06657.

        relu(1 - beta (s(a) - s(b)))

    divergence: s of f-DPO (2309.16240). Needs K = 2, ref_logp_BK. Returns loss_B: 1 where
    policy == reference; beyond the margin value and gradient are exactly 0.
    """
    return jax.nn.relu(1 - beta * margin(divergence(ratio(scored, "hinge"))))


@needs(rule=lambda length_norm, **_: Needs(fields=_lengths(length_norm)))
def ipo(scored: Scored, *, beta: Array | float, length_norm: bool = True) -> jax.Array:
    """Identity preference optimisation, Azar et al. 2310.12036 eq. 17 (beta is its tau).

        (x - 1/(2 beta))^2,   x = a - b, each divided by its token count first with length_norm

    Published with sums of log-probs (length_norm=False); implementations are split between sum
    and mean, and a good beta of the one is not a good beta of the other.
    Needs K = 2, ref_logp_BK, length_BK with length_norm. Returns loss_B, 0 at x = 1/(2 beta).
    """
    x_B = margin(ratio(scored, "ipo", length_norm=length_norm))
    beta = jnp.asarray(beta, x_B.dtype)  # a bfloat16 beta would round the target
    return (x_B - 1 / (2 * beta)) ** 2


@needs()
def exo(
    scored: Scored,
    *,
    beta: Array | float,
    label_smoothing: Array | float = 1e-3,
    divergence: Divergence = reverse_kl,
) -> jax.Array:
    """Efficient exact optimisation of pairs, Ji et al. 2402.00856 eq. 16.

        sig(z) [log sig(z) - log(1-e)] + sig(-z) [log sig(-z) - log e],   z = beta (s(a) - s(b))

    sig = sigmoid, e = label_smoothing, above 0: the reverse KL of the policy's preference to the
    smoothed label. divergence: s of f-DPO (2309.16240).
    Needs K = 2, ref_logp_BK. Returns loss_B, 0 at z = log((1-e)/e); far below, where the pair is
    plainly wrong, the gradient vanishes.
    """
    z_B = beta * margin(divergence(ratio(scored, "exo")))
    e = jnp.asarray(label_smoothing, z_B.dtype)
    right_B = jax.nn.sigmoid(z_B) * (jax.nn.log_sigmoid(z_B) - jnp.log1p(-e))
    return right_B + jax.nn.sigmoid(-z_B) * (jax.nn.log_sigmoid(-z_B) - jnp.log(e))


@needs()
def discopop(scored: Scored, *, beta: Array | float, tau: Array | float = 0.05) -> jax.Array:
    """DiscoPOP, the log-ratio modulated loss found by Lu et al. 2406.08414 eq. 5.

        (1-t) (-log sigmoid(beta D)) + exp(log t - beta D),   t = sigmoid(beta D / tau)

    Logistic where the pair is wrong, exponential where it is right. Needs K = 2, ref_logp_BK.
    Returns loss_B: (log 2 + 1) / 2 where policy == reference; not convex near there.
    """
    z_B = beta * margin(ratio(scored, "discopop"))
    tau = jnp.asarray(tau, z_B.dtype)
    # t exp(-z) as one exponent: apart they are 0 * inf far below 0.
    right_B = jnp.exp(bounded(jax.nn.log_sigmoid(z_B / tau) - z_B))
    return jax.nn.sigmoid(-z_B / tau) * logistic(z_B) + right_B


@needs()
def dpop(scored: Scored, *, beta: Array | float, lam: Array | float = 50.0) -> jax.Array:
    """DPO-positive (Smaug), Pal et al. 2402.13228.

        -log sigmoid(beta (D - lam relu(rw - w)))

    The chosen response may not fall below the reference. Needs K = 2, ref_logp_BK. Returns
    loss_B: log 2 where policy == reference.
    """
    ratio_BK = ratio(scored, "dpop")
    fallen_B = jax.nn.relu(-ratio_BK[:, 0])
    return logistic(beta * (margin(ratio_BK) - lam * fallen_B))


@needs(fields=("length_BK",))
def r_dpo(scored: Scored, *, beta: Array | float, alpha: Array | float) -> jax.Array:
    """Length-regularised DPO, Park et al. 2403.19159 eq. 9.

        -log sigmoid(beta D + alpha (|w| - |l|))

    |w| and |l| are token counts; alpha > 0 takes alpha a token from the reward, so beta D need
    not reward what is only longer (some papers print the other sign).
    Needs K = 2, ref_logp_BK, length_BK. Returns loss_B.
    """
    z_B = beta * margin(ratio(scored, "r_dpo"))
    longer_B = margin(present(scored, "length_BK", "r_dpo")).astype(z_B.dtype)
    return logistic(z_B + alpha * longer_B)


@needs(fields=("score_BKC",))
def odpo(
    scored: Scored,
    *,
    beta: Array | float,
    alpha: Array | float = 1.0,
    f: Callable[[jax.Array], jax.Array] = jnp.log,
) -> jax.Array:
    """DPO with an offset, Amini et al. 2402.10571.

        -log sigmoid(beta D - alpha f(score_w - score_l))

    The score is the first of score_BKC; gaps below 1e-6 count as 1e-6. f: gap -> offset.
    Needs K = 2, ref_logp_BK, score_BKC. Returns loss_B.
    """
    z_B = beta * margin(ratio(scored, "odpo"))
    gap_B = margin(present(scored, "score_BKC", "odpo")[:, :, 0])
    offset_B = floating(f(jnp.maximum(gap_B, SMALLEST_GAP)))
    return logistic(z_B - alpha * offset_B)


@needs(fields=("margin_B",))
def modpo(scored: Scored, *, beta: Array | float, weight: Array | float) -> jax.Array:
    """Multi-objective DPO, Zhou et al. 2310.03708.

        -log sigmoid((beta D - (1 - weight) m) / weight)

    m is margin_B, the reward of chosen less rejected under the other criteria; weight, above 0,
    is that of the criterion which orders the pair. weight = 1 is DPO.
    Needs K = 2, ref_logp_BK, margin_B. Returns loss_B. The minimiser is the optimal policy of
    weight r + (1 - weight) (the others' reward).
    """
    z_B = beta * margin(ratio(scored, "modpo"))
    weight = jnp.asarray(weight, z_B.dtype)
    return logistic((z_B - (1 - weight) * present(scored, "margin_B", "modpo")) / weight)


@needs(fields=("soft_label_B",))
def soft_dpo(scored: Scored, *, beta: Array | float) -> jax.Array:
    """DPO of soft labels: conservative DPO with a rate for every pair, Furuta et al. 2409.06691.

        -p log sigmoid(beta D) - (1-p) log sigmoid(-beta D)

    p is soft_label_B, the probability that the first response is the better one; a tie is 1/2.
    Needs K = 2, ref_logp_BK, soft_label_B. Returns loss_B, least at beta D = log(p/(1-p)).
    """
    z_B = beta * margin(ratio(scored, "soft_dpo"))
    p_B = present(scored, "soft_label_B", "soft_dpo")
    return p_B * logistic(z_B) + (1 - p_B) * logistic(-z_B)


@needs()
def chi_po(scored: Scored, *, beta: Array | float, clip: Array | float) -> jax.Array:
    """Chi-squared preference optimisation, Huang et al. 2407.13399 algorithm 1.

        -log sigmoid(clamp(beta (f(a) - f(b)), -2 clip, 2 clip)),   f(x) = exp(x) + x

    f is the link of chi-squared plus KL regularisation; clip bounds the reward (its R, about 5).
    Exponents stop at 80; outside the clamp the gradient is 0.
    Needs K = 2, ref_logp_BK. Returns loss_B: log 2 where policy == reference.
    """
    ratio_BK = ratio(scored, "chi_po")
    z_B = beta * margin(jnp.exp(bounded(ratio_BK)) + ratio_BK)
    most = 2 * jnp.asarray(clip, z_B.dtype)
    return logistic(jnp.clip(z_B, -most, most))


@needs(fields=("kl_BK",))
def tdpo(scored: Scored, *, beta: Array | float, alpha: Array | float = 0.5) -> jax.Array:
    """Token-level DPO, the second variant (TDPO2) of Zeng et al. 2404.11999.

        -log sigmoid(beta (D - alpha (K_l - sg K_w)))

    K is kl_BK: KL(reference, policy) over the vocabulary, summed over the response's tokens; sg
    stops the gradient. Needs K = 2, ref_logp_BK, kl_BK. Returns loss_B: log 2 where
    policy == reference.
    """
    kl_BK = present(scored, "kl_BK", "tdpo")
    gap_B = kl_BK[:, 1] - jax.lax.stop_gradient(kl_BK[:, 0])
    return logistic(beta * (margin(ratio(scored, "tdpo")) - alpha * gap_B))


def ratio(
    scored: Scored, loss: str, *, reference: bool = True, length_norm: bool = False
) -> jax.Array:
    """a and b of pairs, (B, 2): log-probs less the reference's, per token with length_norm."""
    ratio_BK = present(scored, "logp_BK", loss)
    chex.assert_axis_dimension(ratio_BK, 1, 2, custom_message=f"losses.{loss} takes pairs, K = 2")
    if reference:
        ratio_BK = ratio_BK - present(scored, "ref_logp_BK", loss)
    if length_norm:
        ratio_BK = per_token(ratio_BK, present(scored, "length_BK", loss))
    return ratio_BK


def margin(score_BK: Array) -> jax.Array:
    """The first response's score less the second's; the cast is for a user's divergence."""
    score_BK = floating(score_BK)
    return score_BK[:, 0] - score_BK[:, 1]
