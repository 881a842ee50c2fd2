"""dpo-jax train experiments/ultrafeedback_qwen3.py: DPO of Qwen3-0.6B on UltraFeedback.
Cost: by estimate 20 minutes of an H100: 62,000 pairs x 750 tokens (the prompt once) x 10 x 0.6e9
flops (forward, backward, forward again for remat, the reference's forward) are 2.8e17, at 25% of
its 989e12 a second, for the model is small; 12 minutes of a TPU v5e-8. Weights, gradients, AdamW
and the reference are 20 bytes a parameter, 12 GB: a GPU of 24 GB, or a v5e-4 and more.
Result: not run yet.
"""

from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Evaluation, Experiment, Mesh, Optim, Run
from dpo_jax.smoke import smoke

QWEN3, PAIRS = "Qwen/Qwen3-0.6B", "hub:trl-lib/ultrafeedback_binarized"
EXPERIMENT = Experiment(
    name="ultrafeedback_qwen3",
    parent=QWEN3,
    data=Data(source=PAIRS, tokenizer=QWEN3, groups=64, row_tokens=2048, on_bad="skip"),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-6, schedule=optim.linear, warmup=97),
    run=Run(
        steps=970,  # an epoch
        mesh=Mesh(data=1, fsdp=-1),
        dtype="bfloat16",
        remat="full",
        microbatches=4,
        save_every=200,
    ),
    evaluation=Evaluation(source=f"{PAIRS}:test"),
)
SMOKE = smoke(EXPERIMENT)
