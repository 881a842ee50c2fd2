"""dpo-jax train experiments/hh_sft.py: Pythia 2.8B imitates the chosen answers of Anthropic's HH.
Cost: by estimate 40 minutes of an H100: 160,800 dialogues x 250 tokens x 8 x 2.8e9 flops (forward,
backward, and forward again for remat) are 0.9e18, at 40% of its 989e12 a second; 24 minutes of a
TPU v5e-8 (8 x 197e12). Weights, gradients and RMSprop are 12 bytes a parameter, 34 GB: a GPU of
80 GB or a v5e-8 holds them, whose devices run.mesh splits the weights over.
Result: not run yet; the start of experiments/hh_dpo.py.
"""


from dpo_jax import optim
from dpo_jax.algorithms.sft import sft
from dpo_jax.data import views
from dpo_jax.experiment import Data, Evaluation, Experiment, Mesh, Optim, Run
from dpo_jax.smoke import smoke

PYTHIA, HH = "EleutherAI/pythia-2.8b", "hub:Anthropic/hh-rlhf"
EXPERIMENT = Experiment(
    name="hh_sft",
    parent=PYTHIA,
    data=Data(
        source=HH,
        tokenizer=PYTHIA,
        groups=64,
        row_tokens=1024,  # a prompt and both answers; the authors cut either side at 512
        truncation="prompt",
        on_bad="skip",
        arrange=views.first,
    ),
    algorithm=sft,
    optim=Optim(learning_rate=1e-6, optimizer=optim.rmsprop, warmup=150, clip=10.0),
    run=Run(
        steps=2500,  # an epoch
        mesh=Mesh(data=1, fsdp=-1),
        dtype="bfloat16",
        remat="full",
        save_every=500,
    ),
    evaluation=Evaluation(source=f"{HH}:test"),
)
SMOKE = smoke(EXPERIMENT)
