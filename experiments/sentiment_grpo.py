"""dpo-jax train experiments/sentiment_grpo.py: GRPO on the true reward, four samples a prompt.
Cost: half a minute on 2 CPU cores, beside the SFT run.
Result: TODO
"""

from dataclasses import replace
from functools import partial

from dpo_jax.algorithms.policy import grpo
from dpo_jax.worlds import sentiment
from experiments.sentiment_ppo import EXPERIMENT as PPO

EXPERIMENT = replace(
    PPO,
    name="sentiment_grpo",
    data=replace(PPO.data, groups=32),
    algorithm=partial(grpo, rewards=(sentiment.reward,), n=4, max_tokens=32, beta=0.05),
)
