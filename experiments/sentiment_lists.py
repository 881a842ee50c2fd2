"""dpo-jax sweep experiments/sentiment_lists.py: losses of whole rankings, three seeds.
Cost: five minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/sentiment_lists/sweep.png
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.experiment import Sweep, each, override
from experiments.sentiment_pairs import EXPERIMENT as PAIRS

LOSSES = {
    "plackett_luce_dpo": partial(losses.plackett_luce_dpo, beta=0.25),
    "all_pairs_dpo": losses.all_pairs(partial(losses.dpo, beta=0.25)),
    "info_nca": partial(losses.info_nca, beta=0.25, alpha=1.0),
    "nca_list": partial(losses.nca_list, beta=0.25, alpha=1.0),
    "lipo": partial(losses.lipo, beta=0.25),
}
EXPERIMENT = replace(
    override(PAIRS, {"algorithm.loss": LOSSES["plackett_luce_dpo"]}),
    name="sentiment_lists",
    # as many responses a step as 64 pairs have
    data=replace(PAIRS.data, arrange=None, groups=32, row_tokens=160),
)
SWEEP = Sweep("sentiment_lists", each(EXPERIMENT, "algorithm.loss", LOSSES))
