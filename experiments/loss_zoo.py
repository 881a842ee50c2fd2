"""dpo-jax sweep experiments/loss_zoo.py: every preference loss on the same responses, three seeds.
Cost: 21 minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/loss_zoo/sweep.png, a point a loss in reward and KL, and the table beside it.
"""

from dataclasses import replace

from dpo_jax.experiment import Sweep
from experiments import sentiment_free, sentiment_lists, sentiment_plugs, sentiment_unpaired
from experiments import sentiment_pairs as pairs

FAMILIES = (pairs, sentiment_plugs, sentiment_free, sentiment_unpaired, sentiment_lists)
EXPERIMENT = replace(pairs.EXPERIMENT, name="loss_zoo")
SWEEP = Sweep("loss_zoo", tuple(member for family in FAMILIES for member in family.SWEEP.members))
