"""Losses without a reference: w and l are summed log-probs, wbar and lbar the means per token.

Promises of `pairs.py`. Mix them with `nll` where the paper adds a likelihood term.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses.divergence import bounded
from dpo_jax.losses.door import present
from dpo_jax.losses.measure import per_token
from dpo_jax.losses.needs import Needs, needs
from dpo_jax.losses.pairs import margin, ratio
from dpo_jax.losses.ranking import logistic
from dpo_jax.structs import Array, BadInput, Scored

HIGHEST_MEAN = -1e-7  # of ORPO's wbar and lbar: the odds of a certain response are infinite
LOG_2 = 0.6931471805599453


@needs(reference=False)
def cpo(scored: Scored, *, beta: Array | float, label_smoothing: Array | float = 0.0) -> jax.Array:
    """Contrastive preference optimisation without its likelihood term, Xu et al. 2401.08417.

        -(1-e) log sigmoid(z) - e log sigmoid(-z),   z = beta (w - l),   e = label_smoothing

    The paper adds nll: `mix((1, cpo), (1, nll))`. Needs K = 2, no reference. Returns loss_B.
    """
    return logistic(beta * margin(ratio(scored, "cpo", reference=False)), label_smoothing)


@needs(reference=False, fields=("length_BK",))
def simpo(scored: Scored, *, beta: Array | float, gamma: Array | float) -> jax.Array:
    """Simple preference optimisation, Meng et al. 2405.14734 eq. 6.

        -log sigmoid(beta (wbar - lbar) - gamma)

    gamma is the paper's, not the gamma/beta of some implementations (0.3 to 0.5 there, at a beta
    of 2 to 10). Needs K = 2, length_BK, no reference. Returns loss_B.
    """
    return logistic(beta * margin(_means(scored, "simpo")) - gamma)


@needs(reference=False, fields=("length_BK",))
def alpha_po(
    scored: Scored, *, beta: Array | float, gamma: Array | float, alpha: Array | float
) -> jax.Array:
    """AlphaPO, a family of rewards around SimPO, Gupta et al. 2501.03884.

        -log sigmoid(beta (f(wbar) - f(lbar)) - gamma),   f(y) = (1 - exp(-alpha y)) / alpha

    f(y) = y at alpha = 0, which is SimPO; exponents stop at 80, with gradient 0 beyond.
    Needs K = 2, length_BK, no reference. Returns loss_B.
    """
    mean_BK = _means(scored, "alpha_po")
    alpha = jnp.asarray(alpha, mean_BK.dtype)
    limit = alpha == 0
    safe = jnp.where(limit, 1, alpha)  # the branch not taken must be finite for the gradient
    reward_BK = jnp.where(limit, mean_BK, -jnp.expm1(bounded(-safe * mean_BK)) / safe)
    return logistic(beta * margin(reward_BK) - gamma)


@needs(reference=False, fields=("length_BK",))
def orpo(scored: Scored, *, lam: Array | float = 0.1) -> jax.Array:
    """The odds-ratio term of ORPO, Hong et al. 2403.07691 eq. 7.

        -lam log sigmoid(L),   L = (wbar - lbar) - (log(1 - exp(wbar)) - log(1 - exp(lbar)))

    L is the log odds ratio; wbar and lbar stop at -1e-7. The paper adds nll:
    `mix((1, nll), (1, orpo))`. Needs K = 2, length_BK, no reference. Returns loss_B: lam log 2
    where both responses are equally likely per token.
    """
    mean_BK = jnp.minimum(_means(scored, "orpo"), HIGHEST_MEAN)
    return logistic(margin(mean_BK - _log1mexp(mean_BK))) * lam


@needs(reference=False)
def slic(scored: Scored, *, delta: Array | float = 1.0) -> jax.Array:
    """The calibration term of SLiC-HF, Zhao et al. 2305.10425.

        relu(delta - (w - l))

    The paper adds nll by `mix`. Needs K = 2, no reference. Returns loss_B; beyond the margin
    value and gradient are exactly 0.
    """
    return jax.nn.relu(delta - margin(ratio(scored, "slic", reference=False)))


@needs(reference=False, fields=("length_BK",))
def simper(scored: Scored) -> jax.Array:
    """SimPER, inverse perplexities without hyperparameters, Xiao et al. 2502.00883.

        -exp(wbar) + exp(lbar)

    Needs K = 2, length_BK, no reference. Returns loss_B, in (-1, 1).
    """
    return -margin(jnp.exp(_means(scored, "simper")))


@needs(reference=False)
def unlikelihood(scored: Scored, *, alpha: Array | float) -> jax.Array:
    """Unlikelihood, the baseline of Rafailov et al. 2305.18290 section 6, after 1908.04319.

        -w + alpha l

    alpha, in [0, 1]: how strongly the rejected response is pushed down, without bound.
    Needs K = 2, no reference. Returns loss_B.
    """
    logp_BK = ratio(scored, "unlikelihood", reference=False)
    return -logp_BK[:, 0] + alpha * logp_BK[:, 1]


def _nll_needs(*, per: str, **_: object) -> Needs:
    if per not in ("token", "sequence"):
        raise BadInput(f'losses.nll: per={per!r} is neither "token" nor "sequence"; take one')
    measure = "tokens" if per == "token" else "groups"
    return Needs(reference=False, responses=None, measure=measure, fields=("length_BK",))


@needs(rule=_nll_needs)
def nll(scored: Scored, *, per: str = "token") -> jax.Array:
    """Mean negative log-likelihood of the first response's tokens.

        -w / |w|

    The loss of SFT, and the term that DPO is mixed with (RPO 2404.19733). per="token": the
    objective weighs group b by its share of the batch's tokens (the usual mean over tokens);
    per="sequence": by weight_B. The values are the same, the declared measure differs.
    Needs length_BK; any K, no reference. Returns loss_B; 0 for a response without tokens.
    """
    _nll_needs(per=per)  # the value does not depend on it, but a wrong word must not pass
    logp_BK, length_BK = present(scored, "logp_BK", "nll"), present(scored, "length_BK", "nll")
    return -per_token(logp_BK[:, 0], length_BK[:, 0])


def _means(scored: Scored, loss: str) -> jax.Array:
    """wbar and lbar, (B, 2)."""
    return ratio(scored, loss, reference=False, length_norm=True)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) of x < 0, to the last digits on both sides of -log 2."""
    near = x > -LOG_2
    far = jnp.where(near, -1, x)  # near 0 its branch would have an infinite gradient
    return jnp.where(near, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(far)))
