"""dpo-jax train experiments/ultrafeedback_zephyr.py: Zephyr's DPO on UltraFeedback, Llama 3.1 8B.
Cost: by estimate 40 minutes of a TPU v5p-16 (8 chips x 459e12): 61,135 pairs x 750 tokens (the
prompt once) x 10 x 8e9 flops (forward, backward, forward again for remat, the reference's forward)
are 3.7e18, at 40%. Weights, gradients twice for the microbatches, AdamW and the reference are 24
bytes a parameter, 193 GB: a v5p-8, a v5e-32 or 4 GPUs of 80 GB. One of them does for LORA (write
x.py:LORA), whose weights stand once, 32 GB: by estimate two hours of an H100.
Result: not run yet; runs of this recipe on Mistral 7B reach a held-out accuracy of 0.75 to 0.77.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import layouts
from dpo_jax.experiment import Data, Evaluation, Experiment, Mesh, Optim, Run
from dpo_jax.models.lora import Lora
from dpo_jax.smoke import smoke

LLAMA_SFT = "allenai/Llama-3.1-Tulu-3-8B-SFT"
PAIRS = "hub:HuggingFaceH4/ultrafeedback_binarized"
SIDES = partial(layouts.fields, chosen="chosen", rejected="rejected")  # they hold the prompt
EXPERIMENT = Experiment(
    name="ultrafeedback_zephyr",
    parent=LLAMA_SFT,
    data=Data(f"{PAIRS}:train_prefs", LLAMA_SFT, layout=SIDES, groups=128, row_tokens=2048),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.01)),
    optim=Optim(learning_rate=5e-7, schedule=optim.cosine, warmup=48),
    run=Run(  # an epoch; weights over all devices
        478, mesh=Mesh(1, -1), dtype="bfloat16", remat="full", microbatches=4, save_every=100
    ),
    evaluation=Evaluation(source=f"{PAIRS}:test_prefs"),
)
FAST = replace(EXPERIMENT.optim, learning_rate=5e-6)
LORA = replace(EXPERIMENT, name="ultrafeedback_zephyr_lora", lora=Lora(128, 128.0), optim=FAST)
SMOKE = smoke(EXPERIMENT)
