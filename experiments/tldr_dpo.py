"""dpo-jax train experiments/tldr_dpo.py: the DPO paper's summaries, on comparisons of OpenAI.
Cost: by estimate 50 minutes of an H100 beside experiments/tldr_sft.py: 92,858 pairs x 450 tokens
(the post once) x 10 x 2.8e9 flops (forward, backward, forward again for remat, the reference's
forward) are 1.2e18, at 40% of its 989e12 a second; 16 minutes of a TPU v5e-16.
Memory and mesh: as experiments/hh_dpo.py.
Result: not run yet; in the paper (2305.18290), with GPT-J, GPT-4 prefers its best samples to the
reference summaries in about 61%.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import splits
from dpo_jax.experiment import Evaluation
from dpo_jax.smoke import smoke
from experiments.tldr_sft import EXPERIMENT as SFT

PAIRS = "hub:trl-lib/tldr-preference"
HELD_OUT = partial(splits.part, source=f"{PAIRS}:validation", held_out=True, share=0.02)
EXPERIMENT = replace(
    SFT,
    name="tldr_dpo",
    parent=SFT,
    data=replace(SFT.data, source=PAIRS),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.5)),
    run=replace(SFT.run, steps=1450),  # an epoch
    evaluation=Evaluation(source=HELD_OUT),
)
SMOKE = smoke(EXPERIMENT)
