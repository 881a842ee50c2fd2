"""dpo-jax frontier experiments/sentiment_frontier.py: DPO and what it replaces, three seeds.
Cost: 24 minutes on 2 CPU cores, SFT run, pairs and reward model included.
Result: runs/sentiment_frontier/frontier.png, frontier.json and tables, after figure 2 of the DPO
paper (2305.18290); numbers with hardware and commit: docs/results.md.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.experiment import Learned, override, variations
from experiments.sentiment_controlled import EXPERIMENT as DPO
from experiments.sentiment_controlled import REWARD
from experiments.sentiment_grpo import EXPERIMENT as GRPO
from experiments.sentiment_online import EXPERIMENT as ONLINE
from experiments.sentiment_ppo import EXPERIMENT as PPO

EXPERIMENT = replace(DPO, name="sentiment_frontier")
SAMPLED = {
    "evaluation": replace(DPO.evaluation, source=None),
    "run": replace(DPO.run, steps=60, eval_every=10),
}
LEARNED = override(PPO, {"algorithm.rewards": (Learned(parent=REWARD),)})
LIKELY = override(DPO, {"algorithm.loss": partial(losses.nll, per="token")})
UNLIKELY = override(DPO, {"algorithm.loss": partial(losses.unlikelihood, alpha=0.2)})
METHODS = (
    ("dpo", DPO, {"algorithm.loss.beta": [0.05, 0.1, 1.0, 5.0]}),
    ("ppo_true", replace(PPO, **SAMPLED), {"algorithm.kl_target": [3.0, 6.0, 9.0, 12.0]}),
    ("ppo_learned", replace(LEARNED, **SAMPLED), {"algorithm.kl_target": [3.0, 6.0, 9.0, 12.0]}),
    ("grpo", replace(GRPO, **SAMPLED), {}),
    ("online_dpo", replace(ONLINE, **SAMPLED, data=replace(ONLINE.data, groups=32)), {}),
    ("unlikelihood", UNLIKELY, {"algorithm.loss.alpha": [0.05, 0.2, 0.5, 1.0]}),
    ("preferred_ft", LIKELY, {}),
)
FRONTIER = tuple(
    override(base, {"name": name, **new})
    for name, base, values in METHODS
    for new in variations({**values, "run.seed": [0, 1, 2]})
)
