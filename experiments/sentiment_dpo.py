"""dpo-jax frontier experiments/sentiment_dpo.py: DPO on sampled reviews, for several betas.
Cost: five minutes on 2 CPU cores, the SFT run and the sampled pairs included.
Result: runs/sentiment_dpo/frontier.png; the numbers with hardware and commit: README.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run, Sampled, override
from dpo_jax.worlds import annotators, sentiment
from experiments.sentiment_sft import EXPERIMENT as SFT

PAIRS = Sampled(  # warmer than what is evaluated: broken reviews are among the pairs, and lose
    parent=SFT,
    prompts=partial(sentiment.prompts, n=4000, seed=3),
    rewards=(sentiment.reward,),
    annotator=annotators.bradley_terry,
    temperature=1.4,
    max_tokens=32,
)
# the blocks, which hold the grammar, stay
HEAD = partial(optim.only, names=("embed_VD", "unembed_DV"))
EXPERIMENT = Experiment(
    name="sentiment_dpo",
    parent=SFT,
    data=Data(source=PAIRS, tokenizer=sentiment.tokenizer, groups=96, row_tokens=80),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.25)),
    optim=Optim(learning_rate=3e-3, optimizer=HEAD, schedule=optim.cosine),
    run=Run(steps=200, eval_every=50),
    evaluation=Evaluation(
        source=replace(PAIRS, prompts=partial(sentiment.prompts, n=300, seed=4), seed=1),
        prompts=partial(sentiment.prompts, n=640, seed=5),
        rewards=(sentiment.reward, sentiment.legal),
        max_tokens=32,
    ),
)
FRONTIER = tuple(override(EXPERIMENT, {"algorithm.loss.beta": b}) for b in (0.1, 0.25, 0.5, 1))
