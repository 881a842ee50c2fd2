"""dpo-jax frontier experiments/sentiment_frontier_quick.py: the frontier of all methods, in small.
Cost: four and a half minutes on 2 CPU cores, SFT and pairs included.
Result: runs/sentiment_frontier_quick/frontier.png: one seed, half the steps, a setting a method.
"""

from dataclasses import replace

from dpo_jax.experiment import Learned, options, override
from experiments.sentiment_controlled import REWARD
from experiments.sentiment_frontier import EXPERIMENT as WHOLE
from experiments.sentiment_frontier import FRONTIER as MEMBERS

EXPERIMENT = replace(WHOLE, name="sentiment_frontier_quick")
CHOSEN = {"algorithm.kl_target": 6.0, "algorithm.loss.alpha": 0.5, "run.seed": 0}
LEARNED = Learned(parent=override(REWARD, {"run.steps": 250}))


def small(member):
    """Half the steps; a learned reward that was trained for a third of them."""
    less = {"run.steps": member.run.steps // 2}
    if member.name == "ppo_learned":
        less["algorithm.rewards"] = (LEARNED,)
    return override(member, less)


def chosen(member):
    """Whether its options are those of CHOSEN, where it has them."""
    found = dict(options(member))
    return all(found.get(path) in (None, value) for path, value in CHOSEN.items())


FRONTIER = tuple(small(member) for member in MEMBERS if chosen(member))
