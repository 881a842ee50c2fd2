"""dpo-jax train experiments/arithmetic_sft.py: a small decoder learns sums from a careless teacher.
Cost: a minute on 2 busy CPU cores.
Result: 59% +- 2% of its sampled answers are right; three in ten of the teacher's are wrong.
"""

from functools import partial

from dpo_jax import optim
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import arithmetic

EXPERIMENT = Experiment(
    name="arithmetic_sft",
    model=Config(V=len(arithmetic.VOCABULARY), D=64, L=2, H=4, J=4, E=16, F=192, tied=False),
    data=Data(
        source=partial(arithmetic.questions, n=50_000, seed=0, slips=0.3),
        tokenizer=arithmetic.tokenizer,
        groups=128,
        row_tokens=64,
    ),
    algorithm=sft,
    optim=Optim(
        learning_rate=4e-3,
        optimizer=partial(optim.adamw, b2=0.98, weight_decay=0.01),
        schedule=partial(optim.cosine, final=0.05),
        warmup=50,
    ),
    run=Run(steps=1500, log_every=10),
    evaluation=Evaluation(
        prompts=partial(arithmetic.questions, n=512, seed=1),
        rewards=(arithmetic.correct,),
        max_tokens=8,
    ),
)
