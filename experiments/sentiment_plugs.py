"""dpo-jax sweep experiments/sentiment_plugs.py: what DPO is combined with, three seeds.
Cost: six minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/sentiment_plugs/sweep.png

Divergences, exact KL, length, weights on pairs, mixtures and a moving reference.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms import reference, scores
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Sweep, each
from experiments.sentiment_pairs import EXPERIMENT as PAIRS

DPO = partial(losses.dpo, beta=0.25)
BCO, NLL = partial(losses.bco_pair, beta=0.25), losses.nll
MOVING = partial(reference.soft_update, alpha=0.6, every=40)
LOSSES = {
    "dpo_forward_kl": partial(DPO, divergence=losses.forward_kl),
    "dpo_jensen_shannon": partial(DPO, divergence=losses.jensen_shannon),
    "dpo_alpha_half": partial(DPO, divergence=losses.alpha_divergence),
    "dpo_length_norm": partial(losses.dpo, beta=5.0, length_norm=True),
    "tdpo": partial(losses.tdpo, beta=0.25),
    "wpo": losses.weighted(DPO, losses.wpo_weight),
    "rpo": losses.mix((1.0, DPO), (0.5, NLL)),
    "mpo": losses.mix((0.8, DPO), (0.2, BCO), (1.0, NLL)),
}
PLUGS = {name: partial(preference, loss=loss) for name, loss in LOSSES.items()} | {
    "ld_dpo": partial(preference, loss=DPO, score=scores.length_desensitized),
    "tr_dpo": partial(preference, loss=DPO, reference=MOVING),
}
EXPERIMENT = replace(PAIRS, name="sentiment_plugs", algorithm=PLUGS["tdpo"])
SWEEP = Sweep("sentiment_plugs", each(EXPERIMENT, "algorithm", PLUGS))
