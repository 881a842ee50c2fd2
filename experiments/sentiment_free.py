"""dpo-jax sweep experiments/sentiment_free.py: losses of pairs without a reference, three seeds.
Cost: four minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/sentiment_free/sweep.png
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.experiment import Sweep, each, override
from experiments.sentiment_pairs import EXPERIMENT as PAIRS

NLL = losses.nll
LOSSES = {
    "simpo": partial(losses.simpo, beta=2.0, gamma=0.5),
    "alpha_po": partial(losses.alpha_po, beta=2.0, gamma=0.5, alpha=0.1),
    "cpo": losses.mix((1.0, partial(losses.cpo, beta=0.25)), (1.0, NLL)),
    "orpo": losses.mix((1.0, partial(losses.orpo, lam=0.5)), (1.0, NLL)),
    "slic": losses.mix((1.0, losses.slic), (0.5, NLL)),
    "simper": losses.simper,
    "unlikelihood": partial(losses.unlikelihood, alpha=0.2),
    "preferred_sft": NLL,
}
EXPERIMENT = replace(
    override(PAIRS, {"algorithm.loss": LOSSES["simpo"]}),
    name="sentiment_free",
)
SWEEP = Sweep("sentiment_free", each(EXPERIMENT, "algorithm.loss", LOSSES))
