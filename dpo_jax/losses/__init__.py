"""Losses as pure functions of small arrays: values in, one unreduced value a group out.

A loss never sees logits, a model or a config; it does not average, log or draw random numbers,
and does not branch on the value of a hyperparameter. `losses.needs(loss)` says what it wants.
"""

from dpo_jax.losses import measure
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
from dpo_jax.losses.needs import Needs, needs
from dpo_jax.losses.preference import dpo, hinge, ipo, nll
from dpo_jax.losses.ranking import bradley_terry, plackett_luce

__all__ = [
    "Needs",
    "alpha_divergence",
    "bradley_terry",
    "dpo",
    "forward_kl",
    "hinge",
    "ipo",
    "jensen_shannon",
    "kl_abs",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "measure",
    "needs",
    "nll",
    "plackett_luce",
    "reverse_kl",
]
