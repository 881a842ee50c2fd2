"""dpo-jax sweep experiments/loss_zoo_quick.py: one loss a family of the zoo, three seeds.
Cost: three and a half minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/loss_zoo_quick/sweep.png
"""

from dataclasses import replace

from dpo_jax.experiment import Sweep
from experiments.loss_zoo import EXPERIMENT as ZOO
from experiments.loss_zoo import SWEEP as WHOLE

CHOSEN = ("dpo", "ipo", "simpo", "kto", "plackett_luce_dpo")
EXPERIMENT = replace(ZOO, name="loss_zoo_quick")
SWEEP = Sweep("loss_zoo_quick", tuple(each for each in WHOLE.members if each.name in CHOSEN))
