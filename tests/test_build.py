"""What the values of an experiment become."""

from dataclasses import replace

import numpy as np

from dpo_jax.build import data_digest
from dpo_jax.structs import Group


def test_the_digest_of_data_knows_everything_that_is_learned_from():
    ids = np.arange(1, 4, dtype=np.int32)
    group = Group(ids, [ids, ids[:2]], scored=[ids > 1, ids[:2] > 1], weight=1.0)
    others = [
        replace(group, prompt=ids[:2]),
        replace(group, responses=[ids[:2], ids]),
        replace(group, scored=[ids > 2, ids[:2] > 1]),
        replace(group, scores=np.array([[1.0], [0.0]])),
        replace(group, scores=np.array([[1.0], [0.5]])),
        replace(group, label=1.0),
        replace(group, soft_label=0.9),
        replace(group, margin=1.0),
        replace(group, weight=2.0),
    ]
    assert len({data_digest([each]) for each in (group, *others)}) == 1 + len(others)
    assert data_digest([group]) == data_digest([replace(group, record=7)])
