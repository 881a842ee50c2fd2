"""dpo-jax train experiments/real_hh.py: SFT and DPO from scratch on human preferences about harm.
Cost: TODO minutes on 2 CPU cores.
Result: TODO; `python scripts/real_data.py` adds the intervals. Data: see _folder.py.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.sft import sft
from dpo_jax.data import bpe, splits, views
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from experiments._folder import FOLDER

ROWS = partial(splits.part, source=f"{FOLDER}/hh_harmless_test.jsonl.gz", share=0.2)
TRAIN, HELD_OUT = partial(ROWS, held_out=False), partial(ROWS, held_out=True)
PAIRS = Data(
    source=TRAIN,
    tokenizer=partial(bpe.byte_level, source=TRAIN),
    groups=16,
    row_tokens=384,
    truncation="prompt",
)
SFT = Experiment(
    name="real_hh_sft",
    model=Config(V=2048, D=96, L=2, H=4, J=4, E=24, F=256),
    data=replace(PAIRS, arrange=views.first),
    algorithm=sft,
    optim=Optim(learning_rate=4e-3, schedule=optim.cosine, warmup=20),
    run=Run(steps=200, log_every=10),
    evaluation=Evaluation(source=HELD_OUT),
)
DPO = partial(preference, loss=partial(losses.dpo, beta=0.1))
EXPERIMENT = replace(SFT, name="real_hh", model=None, parent=SFT, data=PAIRS, algorithm=DPO)
EXPERIMENT = replace(
    EXPERIMENT, optim=replace(SFT.optim, learning_rate=5e-4), run=replace(SFT.run, steps=150)
)
