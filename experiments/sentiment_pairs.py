"""dpo-jax sweep experiments/sentiment_pairs.py: losses of pairs with a reference, three seeds.
Cost: ten minutes on 2 CPU cores, the SFT run and the sampled rankings included.
Result: runs/sentiment_pairs/sweep.png
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.data import views
from dpo_jax.experiment import Evaluation, Run, Sweep, each
from dpo_jax.worlds import annotators, sentiment
from experiments.sentiment_dpo import EXPERIMENT as DPO
from experiments.sentiment_dpo import PAIRS

# one data set for all families: four responses to a prompt, best to worst
PROMPTS = partial(sentiment.prompts, n=3000, seed=3)
RANKED = replace(PAIRS, prompts=PROMPTS, annotator=annotators.plackett_luce)
EXPERIMENT = replace(
    DPO,
    name="sentiment_pairs",
    data=replace(DPO.data, source=RANKED, arrange=views.pairs, groups=64, row_tokens=96),
    run=Run(steps=60, log_every=10),
    evaluation=Evaluation(
        prompts=partial(sentiment.prompts, n=256, seed=5),
        rewards=(sentiment.reward, sentiment.legal),
        max_tokens=32,
    ),
)
NAMED = "dpo hinge exo discopop dpop beta_dpo nca bco_pair sppo_hard aot apo_zero apo_down cal_dpo"
LOSSES = {name: partial(getattr(losses, name), beta=0.25) for name in NAMED.split()} | {
    "cdpo": partial(losses.dpo, beta=0.25, label_smoothing=0.1),
    "robust_dpo": partial(losses.robust_dpo, beta=0.25, label_smoothing=0.1),
    "ipo": partial(losses.ipo, beta=0.25, length_norm=False),
    "r_dpo": partial(losses.r_dpo, beta=0.25, alpha=0.05),
    "odpo": partial(losses.odpo, beta=0.25, alpha=0.5),
    "chi_po": partial(losses.chi_po, beta=0.25, clip=5.0),
}
SWEEP = Sweep("sentiment_pairs", each(EXPERIMENT, "algorithm.loss", LOSSES))
