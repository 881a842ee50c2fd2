"""Experiments on models and data of the hub in small, to be run anywhere in seconds.

    SMOKE = smoke(EXPERIMENT)        # then: dpo-jax train experiments/x.py:SMOKE
"""

from dataclasses import replace
from functools import partial
from typing import Any

from dpo_jax.data import bpe
from dpo_jax.data.hub import PREFIX
from dpo_jax.experiment import Data, Evaluation, Experiment
from dpo_jax.functions import unwrap
from dpo_jax.models.transformer import Config, Scaling
from dpo_jax.structs import BadInput
from dpo_jax.worlds import lookalikes

STEPS, GROUPS, ROW_TOKENS = 3, 4, 160
ROWS, HELD_OUT_ROWS = 24, 8
SIZES = (400, 32, 2, 4, 4, 8, 64)  # V D L H J E F
MODELS = {
    "EleutherAI/pythia-2.8b": Config(
        *SIZES,
        family="gpt_neox",
        P=512,
        rope_share=0.25,
        norm="layer",
        norm_eps=1e-5,
        tied=False,
        gated=False,
        parallel=True,
        activation="gelu",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
    "Qwen/Qwen3-0.6B": Config(
        *SIZES, family="qwen3", P=512, rope_base=1e6, qk_norm="head", tied=True
    ),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": Config(
        *SIZES,
        family="llama",
        P=512,
        rope_base=500_000.0,
        rope_scaling=Scaling("llama3", 8.0, 64, low=1.0, high=4.0),
        norm_eps=1e-5,
        tied=False,
    ),
}


def smoke(experiment: Experiment) -> Experiment:
    """The experiment and its parents in small: all that they say of algorithm, layout, truncation,
    optimizer, mesh, dtype and remat, and

    a tiny model of the same family with random weights in place of the hub's (MODELS), a tokenizer
    with the same kind of control tokens and chat template (lookalikes.TOKENIZERS), made-up rows in
    the form of the published ones (lookalikes.ROWS), three steps of four groups.
    Errors: BadInput for a name that has none of these.
    """
    parent: Any = experiment.parent
    evaluation, optim = experiment.evaluation, experiment.optim
    small = replace(
        experiment,
        name=f"{experiment.name}_smoke",
        data=_data(experiment.data),
        optim=replace(optim, warmup=min(optim.warmup, 1)),
        run=replace(experiment.run, steps=STEPS, save_every=0, eval_every=0, log_every=1),
        evaluation=Evaluation()
        if evaluation.source is None
        else Evaluation(source=_rows(evaluation.source, HELD_OUT_ROWS, seed=1)),
    )
    if isinstance(parent, Experiment):
        return replace(small, parent=smoke(parent))
    if parent is None:
        return small
    return replace(small, parent=None, model=_known(MODELS, parent))


def _data(data: Data) -> Data:
    return replace(
        data,
        source=_rows(data.source, ROWS, seed=0),
        tokenizer=partial(
            bpe.byte_level,
            source=partial(lookalikes.sentences, n=64, seed=0),
            size=SIZES[0],
            **_known(lookalikes.TOKENIZERS, data.tokenizer),
        ),
        groups=GROUPS,
        row_tokens=ROW_TOKENS,
    )


def _rows(source: Any, n: int, *, seed: int) -> Any:
    """Made-up rows for a source of the hub, or for a function of one."""
    named = source if isinstance(source, str) else unwrap(source)[2].get("source")
    name = str(named).removeprefix(PREFIX).split(":")[0]
    return partial(_known(lookalikes.ROWS, name), n=n, seed=seed)


def _known(table: dict[str, Any], name: Any) -> Any:
    if name not in table:
        raise BadInput(f"smoke: nothing is like {name}; there is {', '.join(table)}")
    return table[name]
