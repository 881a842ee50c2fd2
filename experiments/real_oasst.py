"""dpo-jax train experiments/real_oasst.py: Plackett-Luce DPO from scratch on ranked conversations.
Cost: TODO minutes on 2 CPU cores.
Result: TODO; `python scripts/real_data.py` adds the intervals. Data: see _folder.py.
"""

from dataclasses import replace
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import bpe, published, views
from dpo_jax.experiment import Data, Evaluation
from experiments import real_hh as hh
from experiments._folder import FOLDER

FILE, LAYOUT = f"{FOLDER}/oasst_en100_trees.jsonl.gz", published.oasst_tree
LEARNED = partial(bpe.byte_level, source=FILE, layout=LAYOUT)
CHAT = partial(LEARNED, others=bpe.TURNS, template=bpe.CHATML)
LISTS = Data(
    source=FILE, layout=LAYOUT, tokenizer=CHAT, groups=8, row_tokens=512, truncation="response"
)
SFT = replace(
    hh.SFT,
    name="real_oasst_sft",
    data=replace(LISTS, arrange=views.first),
    run=replace(hh.SFT.run, steps=100),
    evaluation=Evaluation(),
)
EXPERIMENT = replace(
    hh.EXPERIMENT,
    name="real_oasst",
    parent=SFT,
    data=LISTS,
    algorithm=partial(preference, loss=partial(losses.plackett_luce_dpo, beta=0.1)),
    run=SFT.run,
    evaluation=Evaluation(),
)
