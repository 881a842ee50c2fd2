"""dpo-jax frontier experiments/sentiment_dpo.py: DPO on sampled reviews, for several betas.

Cost: five minutes on 2 CPU cores, the SFT run and the sampled pairs included.
Result: runs/sentiment_dpo/frontier.png; `dpo-jax train` on the same file runs one beta.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run, Sampled, override
from dpo_jax.worlds import annotators, sentiment
from experiments.sentiment_sft import EXPERIMENT as SFT

PAIRS = Sampled(
    parent=SFT,
    prompts=partial(sentiment.prompts, n=6000, seed=3),
    reward=sentiment.reward,
    annotator=partial(annotators.bradley_terry, temperature=0.5),
    max_tokens=32,
)
EXPERIMENT = Experiment(
    name="sentiment_dpo",
    parent=SFT,
    data=Data(source=PAIRS, tokenizer=sentiment.tokenizer, groups=64, row_tokens=128),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.5)),
    optim=Optim(
        learning_rate=4e-3, optimizer=partial(optim.sgd, momentum=0.9), warmup=20, clip=None
    ),
    run=Run(steps=400, eval_every=50),
    evaluation=Evaluation(
        source=replace(PAIRS, prompts=partial(sentiment.prompts, n=400, seed=4), seed=1),
        prompts=partial(sentiment.prompts, n=768, seed=5),
        rewards=(sentiment.reward, sentiment.legal),
        max_tokens=32,
    ),
)
# DPO's gradient grows with beta: a rate over beta makes steps of one length
FRONTIER = tuple(
    override(EXPERIMENT, {"algorithm.loss.beta": beta, "optim.learning_rate": 2e-3 / beta})
    for beta in (0.1, 0.25, 0.5, 1.0)
)
