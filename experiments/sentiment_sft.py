"""dpo-jax train experiments/sentiment_sft.py: a small decoder learns to write film reviews.
Cost: a minute on 2 CPU cores.
Result: 1.559 nats a token on held-out reviews, 98.6% of the samples are grammatical
(commit 4c19826, 2 cores of an AMD EPYC).
"""

from functools import partial

from dpo_jax import optim
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import sentiment

EXPERIMENT = Experiment(
    name="sentiment_sft",
    model=Config(V=len(sentiment.VOCABULARY), D=64, L=2, H=4, J=4, E=16, F=192, tied=False),
    data=Data(
        source=partial(sentiment.reviews, n=100_000, seed=0),
        tokenizer=sentiment.tokenizer,
        groups=64,
        row_tokens=64,
    ),
    algorithm=sft,
    optim=Optim(
        learning_rate=4e-3,
        optimizer=partial(optim.adamw, b2=0.98, weight_decay=0.01),
        schedule=partial(optim.cosine, final=0.05),
        warmup=50,
    ),
    run=Run(steps=2000, log_every=10),
    evaluation=Evaluation(
        source=partial(sentiment.reviews, n=1000, seed=1),
        prompts=partial(sentiment.prompts, n=512, seed=2),
        rewards=(sentiment.reward, sentiment.legal),
        max_tokens=32,
    ),
)
