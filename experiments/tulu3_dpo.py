"""dpo-jax train experiments/tulu3_dpo.py: Tulu 3's DPO of Llama 3.1 8B, length-normalised.
Cost: by estimate 4 hours of a TPU v5p-16 (8 chips x 459e12): 271,409 pairs x 1000 tokens (the
prompt once) x 10 x 8e9 flops (forward, backward, forward again for remat, the reference's forward)
are 2.2e19, at 40%. Memory, mesh and LORA: as experiments/ultrafeedback_zephyr.py.
Result: not run yet; that of its authors is allenai/Llama-3.1-Tulu-3-8B-DPO.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import splits
from dpo_jax.experiment import Evaluation
from dpo_jax.smoke import smoke
from experiments.ultrafeedback_zephyr import EXPERIMENT as ZEPHYR
from experiments.ultrafeedback_zephyr import LORA

MIXTURE = "hub:allenai/llama-3.1-tulu-3-8b-preference-mixture"
PARTS = partial(splits.part, source=MIXTURE, share=0.005, layout=ZEPHYR.data.layout)
EXPERIMENT = replace(
    ZEPHYR,
    name="tulu3_dpo",
    # the authors cut a prompt with one answer at 2048
    data=replace(ZEPHYR.data, source=partial(PARTS, held_out=False), layout=None, row_tokens=4096),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=5.0, length_norm=True)),
    optim=replace(ZEPHYR.optim, schedule=optim.linear, warmup=211),
    run=replace(ZEPHYR.run, steps=2110, microbatches=8, save_every=200),  # an epoch
    evaluation=Evaluation(source=partial(PARTS, held_out=True)),
)
FAST = replace(EXPERIMENT.optim, learning_rate=5e-6)
LORA = replace(EXPERIMENT, name="tulu3_dpo_lora", lora=LORA.lora, optim=FAST)
SMOKE = smoke(EXPERIMENT)
