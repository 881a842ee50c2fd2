"""Losses of single responses: one `Scored` of K = 1 in, one unreduced value a group out.

The first response of a group is scored, whatever stands beside it; a = w - rw is its summed
log-prob under the policy less that under the reference. label_B above 1/2 is desirable. A batch
may hold one class only.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.losses.door import present, statistic
from dpo_jax.losses.needs import Needs, Statistic, needs
from dpo_jax.structs import Array, Scored


def _partners_ratio(scored: Scored) -> jax.Array:
    """The log-ratio of the second response, which answers another prompt."""
    logp_BK, ref_logp_BK = (present(scored, name, "kto") for name in ("logp_BK", "ref_logp_BK"))
    return logp_BK[:, 1] - ref_logp_BK[:, 1]


@needs(
    responses=1,
    fields=("label_B",),
    statistics=(Statistic("kl", _partners_ratio, partner=True),),
)
def kto(
    scored: Scored,
    *,
    beta: Array | float,
    desirable: Array | float = 1.0,
    undesirable: Array | float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation, Ethayarajh et al. 2402.01306.

        desirable (1 - sigmoid(beta (a - k))),   undesirable (1 - sigmoid(beta (k - a)))

    k = max(kl, 0) without gradient: the mean over the step of the log-ratios of responses beside
    prompts that they do not answer, an estimate of KL(policy, reference). desirable, undesirable:
    the weights of the two classes; the paper keeps desirable * count to undesirable * count
    between 1 and 4/3.
    Needs K = 1, ref_logp_BK, label_B; kl, absent = 0. Returns loss_B: half its class's weight
    where policy == reference, gradient in w there -beta/4 times it (+ where undesirable).
    """
    kl = jax.nn.relu(statistic(scored, "kl", "kto"))
    good_B = _good(scored, "kto")
    z_B = beta * (_ratio(scored, "kto") - kl)
    return jnp.where(good_B, desirable, undesirable) * jax.nn.sigmoid(_towards(good_B, -z_B))


@needs(responses=1, fields=("label_B",))
def apo_zero_unpaired(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Anchored preference optimisation of single responses, D'Oosterlinck et al. 2408.06266.

        desirable: 1 - sigmoid(beta a),   undesirable: sigmoid(beta a)

    `kto` with k = 0; the two responses of a pair add up to `apo_zero`. Needs K = 1, ref_logp_BK,
    label_B. Returns loss_B: 1/2 where policy == reference.
    """
    z_B = beta * _ratio(scored, "apo_zero_unpaired")
    return jax.nn.sigmoid(_towards(_good(scored, "apo_zero_unpaired"), -z_B))


def _reward(scored: Scored, *, beta: Array | float) -> Array:
    return beta * _ratio(scored, "bco")


def _bco_needs(*, beta: Array | float = 1.0, **_: object) -> Needs:
    mean = Statistic("delta", partial(_reward, beta=beta), keep=1.0)
    return Needs(responses=1, fields=("label_B",), statistics=(mean,))


@needs(rule=_bco_needs)
def bco(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Binary classifier optimisation, Jung et al. 2404.04656.

        desirable: -log sigmoid(beta a - delta),   undesirable: -log sigmoid(-(beta a - delta))

    delta: the mean of beta a over all steps so far, without gradient; `bco_pair` is the form for
    pairs. Needs K = 1, ref_logp_BK, label_B; delta, absent = 0. Returns loss_B: log 2 where
    policy == reference and delta = 0.
    """
    z_B = _reward(scored, beta=beta) - statistic(scored, "delta", "bco")
    return -jax.nn.log_sigmoid(_towards(_good(scored, "bco"), z_B))


@needs(responses=1)
def npo(scored: Scored, *, beta: Array | float) -> jax.Array:
    """Negative preference optimisation, Zhang et al. 2404.05868.

        -log sigmoid(-beta a)

    Unlearning: every response is one to forget; it is DPO's loss of a rejected response alone.
    The paper multiplies by 2/beta. Needs K = 1, ref_logp_BK. Returns loss_B: log 2 where
    policy == reference; 0 in the limit of a response that is forgotten.
    """
    return -jax.nn.log_sigmoid(-beta * _ratio(scored, "npo"))


def _ratio(scored: Scored, loss: str) -> jax.Array:
    """a of the first response."""
    return (present(scored, "logp_BK", loss) - present(scored, "ref_logp_BK", loss))[:, 0]


def _good(scored: Scored, loss: str) -> jax.Array:
    return present(scored, "label_B", loss) > 0.5


def _towards(good_B: jax.Array, z_B: Array) -> jax.Array:
    """z where the response is desirable, -z where it is not."""
    return jnp.where(good_B, z_B, -z_B)
