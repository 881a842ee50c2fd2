"""dpo-jax train experiments/hh_dpo.py: the DPO paper's dialogue: Pythia 2.8B on Anthropic's HH.
Cost: by estimate an hour of an H100 beside experiments/hh_sft.py: 160,800 pairs x 300 tokens (the
prompt once) x 10 x 2.8e9 flops (forward, backward, forward again for remat, the reference's
forward) are 1.4e18, at 40% of its 989e12 a second; 18 minutes of a TPU v5e-16. With the reference 16 bytes a parameter, 45 GB: a GPU of 80 GB, or a v5e-8 and more.
Result: not run yet; in the paper (2305.18290) GPT-4 prefers its best samples to the chosen answers
in about 60%.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.smoke import smoke
from experiments.hh_sft import EXPERIMENT as SFT

EXPERIMENT = replace(
    SFT,
    name="hh_dpo",
    parent=SFT,
    data=replace(SFT.data, arrange=None),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=replace(SFT.optim, learning_rate=5e-7),  # of the authors' code; the paper says 1e-6
)
SMOKE = smoke(EXPERIMENT)
