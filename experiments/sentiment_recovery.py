"""dpo-jax sweep experiments/sentiment_recovery.py: how many prompts do pairs and rankings want?
Cost: eight runs of the length of sentiment_reward, 25 min on 2 CPU cores.
Result: runs/sentiment_recovery/sweep.png, the correlation of learned and true reward within
prompts against the number of prompts; a prompt has one pair, or one ranking of four. Above 0.95
from 12,000 rankings and from 96,000 pairs (commit dac1f67; docs/results.md).
"""

from dataclasses import replace
from functools import partial

from dpo_jax.experiment import Sweep, override
from dpo_jax.worlds import annotators, sentiment
from experiments.sentiment_reward import EXPERIMENT as REWARD

PAIRED = partial(
    sentiment.judged, n=48_000, seed=3, annotator=annotators.bradley_terry, responses=2
)
EXPERIMENT = replace(REWARD, name="sentiment_recovery")
LINES = {
    # as many responses a step as the rankings have
    "pairs": (
        replace(REWARD, data=replace(REWARD.data, source=PAIRED, groups=64)),
        (24_000, 48_000, 96_000, 192_000),
    ),
    "rankings_of_four": (REWARD, (6_000, 12_000, 24_000, 48_000)),
}
SWEEP = Sweep(
    "sentiment_recovery",
    tuple(
        override(base, {"name": name, "data.source.n": n})
        for name, (base, counts) in LINES.items()
        for n in counts
    ),
    x="data.source.n",
    y="eval_criteria/reward/correlation",
)
