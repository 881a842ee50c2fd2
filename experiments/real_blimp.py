"""dpo-jax train experiments/real_blimp.py: SFT and DPO from scratch on BLiMP's minimal pairs.
Cost: TODO minutes on 2 CPU cores.
Result: TODO; `python scripts/real_data.py` adds the intervals. Data: see _folder.py.
"""

from dataclasses import replace
from functools import partial

from dpo_jax.data import bpe, published, splits, views
from dpo_jax.experiment import Data, Evaluation
from experiments import real_hh as hh
from experiments._folder import FOLDER

FILE = f"{FOLDER}/blimp_pairs.jsonl.gz"
ROWS = partial(splits.part, source=FILE, share=0.2, by="record", layout=published.blimp)
TRAIN, HELD_OUT = partial(ROWS, held_out=False), partial(ROWS, held_out=True)
PAIRS = Data(
    source=TRAIN, tokenizer=partial(bpe.byte_level, source=TRAIN), groups=64, row_tokens=128
)
SFT = replace(
    hh.SFT,
    name="real_blimp_sft",
    data=replace(PAIRS, arrange=views.first),
    run=replace(hh.SFT.run, steps=400),
    evaluation=Evaluation(source=HELD_OUT),
)
EXPERIMENT = replace(
    hh.EXPERIMENT,
    name="real_blimp",
    parent=SFT,
    data=PAIRS,
    run=replace(SFT.run, steps=300),
    evaluation=SFT.evaluation,
)
