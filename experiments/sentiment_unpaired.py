"""dpo-jax sweep experiments/sentiment_unpaired.py: losses of single labelled responses.
Cost: four minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/sentiment_unpaired/sweep.png
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.data import views
from dpo_jax.experiment import Sweep, each, override
from experiments.sentiment_pairs import EXPERIMENT as PAIRS

LOSSES = {
    "kto": partial(losses.kto, beta=0.25),
    "bco": partial(losses.bco, beta=0.25),
    "apo_zero_unpaired": partial(losses.apo_zero_unpaired, beta=0.25),
}
EXPERIMENT = replace(
    override(PAIRS, {"algorithm.loss": LOSSES["kto"]}),
    name="sentiment_unpaired",
    # the better half of a ranking is desirable; as many responses a step as 64 pairs have
    data=replace(PAIRS.data, arrange=views.unpaired, groups=128),
)
SWEEP = Sweep("sentiment_unpaired", each(EXPERIMENT, "algorithm.loss", LOSSES))
