"""dpo-jax train experiments/tldr_sft.py: Pythia 2.8B learns to summarise Reddit posts.
Cost: by estimate 45 minutes of an H100: 116,722 posts x 400 tokens x 8 x 2.8e9 flops (forward,
backward, and forward again for remat) are 1.0e18, at 40% of its 989e12 a second; 14 minutes of a
TPU v5e-16 (16 x 197e12). Memory and mesh: as experiments/hh_sft.py.
Result: not run yet; the start of experiments/tldr_dpo.py.
"""

from dataclasses import replace

from dpo_jax.experiment import Evaluation
from dpo_jax.smoke import smoke
from experiments.hh_sft import EXPERIMENT as HH

TLDR = "hub:trl-lib/tldr"
EXPERIMENT = replace(
    HH,
    name="tldr_sft",
    data=replace(HH.data, source=TLDR, arrange=None),
    run=replace(HH.run, steps=1800),  # an epoch
    evaluation=Evaluation(source=f"{TLDR}:validation"),
)
SMOKE = smoke(EXPERIMENT)
