"""dpo-jax sweep experiments/sentiment_criteria.py: praise against brevity, two ways to weigh them.
Cost: six minutes on 2 CPU cores, the SFT run and the sampled pairs included.
Result: runs/sentiment_criteria/sweep.png, the trade-off curves.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.data import criteria
from dpo_jax.experiment import Sweep, override
from dpo_jax.worlds import annotators, sentiment
from experiments.label_noise import EXPERIMENT as BASE
from experiments.label_noise import SOURCE

BOTH = (sentiment.reward, sentiment.brevity)
SCORED = replace(SOURCE, rewards=BOTH, annotator=annotators.bradley_terry)
SUM = partial(criteria.soft_labels, reward=1.0, brevity=0.0)
MARGIN = partial(criteria.margins, by="reward", brevity=0.5)
EXPERIMENT = replace(
    override(BASE, {"algorithm.loss": partial(losses.soft_dpo, beta=0.25)}),
    name="sentiment_criteria",
    data=replace(BASE.data, source=SCORED, arrange=SUM),
    evaluation=replace(BASE.evaluation, rewards=BOTH),
)
WEIGHED = [
    {"name": "weighed_labels", "data.arrange.reward": w, "data.arrange.brevity": (1 - w) / 2}
    for w in (0.0, 0.25, 0.5, 0.75, 1.0)
]
MODPO = [
    {"name": "modpo", "data.arrange": MARGIN, "algorithm.loss": loss}
    for loss in (partial(losses.modpo, beta=0.25, weight=w) for w in (0.25, 0.5, 0.75, 1.0))
]
CHANGES = [change | {"run.seed": seed} for change in WEIGHED + MODPO for seed in range(3)]
MEMBERS = tuple(override(EXPERIMENT, change) for change in CHANGES)
SWEEP = Sweep("sentiment_criteria", MEMBERS, x="eval_samples/brevity")
