"""A learned table of positions: what needs more of them than there are is refused at the start."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import SFT, rows

import dpo_jax
from dpo_jax.experiment import Evaluation
from dpo_jax.structs import BadInput
from dpo_jax.worlds import sentiment

RECORDS = [
    {"prompt": "the film", "responses": ["was good ."], "where": "a:1"},
    {"prompt": "the good film", "responses": ["was good and the film was bad ."], "where": "a:2"},
] * 4
LONGEST = 1 + 3 + 8 + 1  # BOS, prompt, response, EOS


def learned(places: int, **changes):
    model = replace(SFT.model, positions="learned", P=places)
    short = replace(SFT, model=model, name="learned", run=replace(SFT.run, steps=2), **changes)
    return replace(short, data=replace(SFT.data, source=lambda: RECORDS, groups=4))


def test_rows_may_be_longer_than_the_table(place):
    """Four groups share rows of 64; their positions begin anew."""
    result = dpo_jax.run(learned(LONGEST), directory="fits")
    assert all(np.isfinite(row["loss"]) for row in rows(result.directory) if "loss" in row)


@pytest.mark.parametrize("role", ["data", "held-out data"])
def test_a_longer_response_is_refused_before_anything_is_written(place, role):
    wanted = learned(LONGEST - 1)
    if role == "held-out data":
        held_out = Evaluation(source=lambda: RECORDS)
        data = replace(wanted.data, source=lambda: RECORDS[:1] * 4)
        wanted = replace(wanted, data=data, evaluation=held_out)
    said = rf"data.row_tokens lets .* {LONGEST} tokens \(record 1\).* model.P={LONGEST - 1} "
    with pytest.raises(BadInput, match=said):
        dpo_jax.run(wanted, directory="short")
    assert not Path("short").exists()


def test_samples_that_would_be_longer_are_refused_before_anything_is_written(place):
    prompts = Evaluation(prompts=partial(sentiment.prompts, n=2, seed=0), max_tokens=LONGEST)
    with pytest.raises(BadInput, match=rf"evaluation.max_tokens={LONGEST} .* model.P={LONGEST}"):
        dpo_jax.run(learned(LONGEST, evaluation=prompts), directory="samples")
    assert not Path("samples").exists()
