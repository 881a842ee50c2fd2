"""dpo-jax train experiments/real_gsm8k.py: KTO from scratch on solutions that are right or wrong.
Cost: 14 minutes on 2 busy CPU cores, SFT included; 8 minutes of CPU time.
Result: right solutions are 0.61 [0.53, 0.69] above wrong ones in reward; docs/results.md.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import bpe, layouts
from dpo_jax.experiment import Data, Evaluation
from experiments import real_hh as hh
from experiments._folder import FOLDER

FILE = f"{FOLDER}/gsm8k_solutions_binary.jsonl.gz"
LAYOUT = partial(layouts.fields, prompt="question", completion="completion", label="label")
LEARNED = partial(bpe.byte_level, source=FILE, layout=LAYOUT)
KTO = partial(losses.kto, beta=0.1, desirable=1.62)  # 2,404 solutions are wrong, 1,484 right
SFT = replace(
    hh.SFT,
    name="real_gsm8k_sft",
    data=Data(source=FILE, layout=LAYOUT, tokenizer=LEARNED, groups=16, row_tokens=384),
    run=replace(hh.SFT.run, steps=150),
    evaluation=Evaluation(),
)
EXPERIMENT = replace(
    hh.EXPERIMENT,
    name="real_gsm8k",
    parent=SFT,
    data=replace(SFT.data, row_tokens=640),  # room for a partner beside the longest
    algorithm=partial(preference, loss=KTO),
    optim=replace(hh.EXPERIMENT.optim, learning_rate=1e-4),
    run=replace(SFT.run, steps=120),
    evaluation=Evaluation(),
)
