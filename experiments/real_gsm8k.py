"""dpo-jax train experiments/real_gsm8k.py: KTO from scratch on solutions that are right or wrong.
Cost: TODO minutes on 2 CPU cores.
Result: TODO; `python scripts/real_data.py` adds the intervals. Data: see _folder.py.
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
SFT = replace(
    hh.SFT,
    name="real_gsm8k_sft",
    data=Data(
        source=FILE,
        layout=LAYOUT,
        tokenizer=partial(bpe.byte_level, source=FILE, layout=LAYOUT),
        groups=16,
        row_tokens=384,
    ),
    run=replace(hh.SFT.run, steps=150),
    evaluation=Evaluation(),
)
EXPERIMENT = replace(
    hh.EXPERIMENT,
    name="real_gsm8k",
    parent=SFT,
    data=SFT.data,
    algorithm=partial(preference, loss=partial(losses.kto, beta=0.1)),
    run=SFT.run,
    evaluation=Evaluation(),
)
