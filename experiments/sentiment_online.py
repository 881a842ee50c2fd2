"""dpo-jax train experiments/sentiment_online.py: online DPO, the true reward orders fresh samples.
Cost: a minute on 2 CPU cores, beside the SFT run.
Result: RESULT
"""

from dataclasses import replace
from functools import partial

from dpo_jax.algorithms.online import online_dpo
from dpo_jax.experiment import Run
from dpo_jax.worlds import sentiment
from experiments.sentiment_dpo import EXPERIMENT as DPO

EXPERIMENT = replace(
    DPO,
    name="sentiment_online",
    data=replace(DPO.data, source=partial(sentiment.prompts, n=20_000, seed=6), groups=64),
    algorithm=partial(online_dpo, rewards=(sentiment.reward,), n=4, max_tokens=32),
    run=Run(steps=100, eval_every=50),
    evaluation=replace(DPO.evaluation, source=None),
)
