"""dpo-jax sweep experiments/label_noise.py: DPO, cDPO and robust DPO under flipped labels.
Cost: ten minutes on 2 CPU cores, the SFT run and the sampled pairs included.
Result: runs/label_noise/sweep.png, the true reward against the share of flipped labels.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.experiment import Sweep, override
from dpo_jax.worlds import annotators, sentiment
from experiments.sentiment_dpo import PAIRS
from experiments.sentiment_pairs import EXPERIMENT as BASE

FLIPS = partial(annotators.flips, rate=0.0, annotator=annotators.bradley_terry)
SOURCE = replace(PAIRS, prompts=partial(sentiment.prompts, n=1500, seed=3), annotator=FLIPS)
EXPERIMENT = replace(BASE, name="label_noise", data=replace(BASE.data, source=SOURCE, arrange=None))
SMOOTHED = partial(losses.dpo, beta=0.25, label_smoothing=0.0)
LOSSES = {
    "dpo": partial(losses.dpo, beta=0.25),
    "cdpo": SMOOTHED,
    "robust_dpo": partial(losses.robust_dpo, beta=0.25, label_smoothing=0.0),
}
RATE, KNOWN = "data.source.annotator.rate", "algorithm.loss.label_smoothing"
MEMBERS = [  # the rate is known to all but dpo
    {"name": name, "algorithm.loss": loss, RATE: rate, "run.seed": seed}
    | ({} if name == "dpo" else {KNOWN: rate})
    for rate in (0.0, 0.1, 0.2, 0.3)
    for name, loss in LOSSES.items()
    for seed in range(3)
]
SWEEP = Sweep("label_noise", tuple(override(EXPERIMENT, each) for each in MEMBERS), x=RATE)
