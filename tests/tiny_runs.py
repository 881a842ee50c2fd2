"""Two small whole runs that several tests share; EXPERIMENT makes this an experiment module."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Evaluation, Experiment, Optim, Run, Sampled
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import annotators, sentiment

FUSE = "fuse"  # a file in the working directory: "calls signal"
CLOCK = ("tokens_per_second", "mfu", "data_wait_share")  # metrics that differ from run to run


def judged(records: Sequence[dict[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """`words`; where a fuse lies and has burnt down, the process gets its signal."""
    if os.path.exists(FUSE):
        calls, number = map(int, Path(FUSE).read_text().split())
        Path(FUSE).write_text(f"{calls - 1} {number}")
        if calls == 0:
            os.remove(FUSE)
            os.kill(os.getpid(), number)
    return words(records, responses)


def words(records: Sequence[dict[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """A reward that a barely trained model can earn."""
    return np.array([float(len(text.split())) for text in responses])


SFT = Experiment(
    name="sft",
    model=Config(V=len(sentiment.VOCABULARY), D=16, L=1, H=2, J=2, E=8, F=16),
    data=Data(
        source=partial(sentiment.reviews, n=160, seed=0),
        tokenizer=sentiment.tokenizer,
        groups=16,
        row_tokens=64,
    ),
    algorithm=sft,
    optim=Optim(learning_rate=0.03, schedule=optim.cosine),
    run=Run(steps=30),
)
PAIRS = Sampled(
    parent=SFT,
    prompts=partial(sentiment.prompts, n=8, seed=3),
    rewards=(words,),
    annotator=partial(annotators.bradley_terry, temperature=4.0),
    n=3,
    max_tokens=32,
)
EXPERIMENT = Experiment(
    name="dpo",
    parent=SFT,
    data=Data(source=PAIRS, tokenizer=sentiment.tokenizer, groups=4, row_tokens=128),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.5)),
    optim=Optim(learning_rate=0.01),
    run=Run(steps=6, eval_every=2),
    evaluation=Evaluation(
        source=PAIRS,
        prompts=partial(sentiment.prompts, n=4, seed=5),
        rewards=(judged,),
        max_tokens=16,
    ),
)


def rows(directory: Any, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The JSON lines of a file in a run directory."""
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def timeless(directory: Any) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(directory)]


def snapshot(directory: Any) -> dict[str, tuple[int, bytes]]:
    """Every file below with the time of its last change and its content."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
