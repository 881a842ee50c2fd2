"""Losses as pure functions of small arrays: values in, one unreduced value a group out.

A loss never sees logits, a model or a config; it does not average, log or draw random numbers,
and does not branch on the value of a hyperparameter. `losses.needs(loss)` says what it wants.
"""

from dpo_jax.losses import advantage, measure
from dpo_jax.losses.absolute import apo_down, apo_zero, bco_pair, cal_dpo, nca, sppo_hard
from dpo_jax.losses.catalogue import entries, table
from dpo_jax.losses.combine import Mix, mix, terms, weighted, wpo_weight
from dpo_jax.losses.coupled import aot, aot_unpaired, beta_dpo
from dpo_jax.losses.divergence import (
    alpha_divergence,
    forward_kl,
    jensen_shannon,
    kl_abs,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    reverse_kl,
)
from dpo_jax.losses.likelihood import (
    alpha_po,
    cpo,
    nll,
    orpo,
    simper,
    simpo,
    slic,
    unlikelihood,
)
from dpo_jax.losses.lists import all_pairs, info_nca, lipo, nca_list, plackett_luce_dpo
from dpo_jax.losses.needs import Needs, Statistic, needs
from dpo_jax.losses.pairs import (
    chi_po,
    discopop,
    dpo,
    dpop,
    exo,
    hinge,
    ipo,
    modpo,
    odpo,
    r_dpo,
    robust_dpo,
    soft_dpo,
    tdpo,
)
from dpo_jax.losses.policy import clipped_surrogate, clipped_value, reinforce
from dpo_jax.losses.ranking import bradley_terry, centering, plackett_luce, regression
from dpo_jax.losses.unpaired import apo_zero_unpaired, bco, kto, npo

__all__ = [
    "Mix",
    "Needs",
    "Statistic",
    "advantage",
    "all_pairs",
    "alpha_divergence",
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "beta_dpo",
    "bradley_terry",
    "cal_dpo",
    "centering",
    "chi_po",
    "clipped_surrogate",
    "clipped_value",
    "cpo",
    "discopop",
    "dpo",
    "dpop",
    "entries",
    "exo",
    "forward_kl",
    "hinge",
    "info_nca",
    "ipo",
    "jensen_shannon",
    "kl_abs",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto",
    "lipo",
    "measure",
    "mix",
    "modpo",
    "nca",
    "nca_list",
    "needs",
    "nll",
    "npo",
    "odpo",
    "orpo",
    "plackett_luce",
    "plackett_luce_dpo",
    "r_dpo",
    "regression",
    "reinforce",
    "reverse_kl",
    "robust_dpo",
    "simper",
    "simpo",
    "slic",
    "soft_dpo",
    "sppo_hard",
    "table",
    "tdpo",
    "terms",
    "unlikelihood",
    "weighted",
    "wpo_weight",
]
