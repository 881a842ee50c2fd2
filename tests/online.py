"""The enumerable world as texts, for algorithms that sample: what they learn can be computed."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.loader import Loader
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import response_logps
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.parallel import make_mesh
from dpo_jax.structs import Algorithm, Batch, Context, Group, TrainState
from dpo_jax.worlds import enumerable

WORDS = ("<eos>", "a", "b")
STEPS = 3
CONFIG = Config(V=len(WORDS), D=16, L=1, H=2, J=2, E=8, F=16)
MODEL = decoder(CONFIG)
BARE = enumerable.random_world(vocabulary=len(WORDS), steps=STEPS, seed=1)


@cache
def tokenizer() -> Any:
    """A word is a token; there is no BOS, so prompts start with EOS."""
    import tokenizers
    import transformers

    index = {word: i for i, word in enumerate(WORDS)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(index))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=WORDS[0], clean_up_tokenization_spaces=False
    )


def logps(params: Any) -> jax.Array:
    """The model's log-probability of every response of the world, logp_BK."""
    groups = BARE.groups()
    batch = pack(groups, row_tokens=max(group.tokens for group in groups), rows=len(groups))
    return response_logps(MODEL, params, batch)[:, 0]


# weights whose policy is far from even and leaves out nothing
START = MODEL.init(jax.random.key(0))
REFERENCE = {**START, "embed_VD": 0.5 * START["embed_VD"]}
FROZEN = {"reference": REFERENCE}
WORLD = replace(BARE, ref_logp_BK=np.asarray(logps(REFERENCE), np.float64))


def prompts() -> list[dict[str, Any]]:
    """The prompts of the world as a data source."""
    return [{"prompt": " ".join(WORDS[i] for i in prompt[1:])} for prompt in WORLD.prompts]


def truth(records: Any, responses: Any) -> np.ndarray:
    """The reward of the world."""
    where = {record["prompt"]: b for b, record in enumerate(prompts())}
    ids = [tuple(WORDS.index(word) for word in text.split()) for text in responses]
    known = {tuple(i for i in listed if i): k for k, listed in enumerate(WORLD.responses)}
    rows = [where[record["prompt"]] for record in records]
    return WORLD.reward_BK[rows, [known[each] for each in ids]]


def groups() -> list[Group]:
    """The prompts, without responses."""
    return [
        Group(np.array(prompt, np.int32), [], record=b) for b, prompt in enumerate(WORLD.prompts)
    ]


def asking(step_groups: int, *, steps: int) -> Loader:
    """Batches of prompts, each as often as the others."""
    return Loader(groups(), step_groups=step_groups, row_tokens=64, seed=0, steps=steps)


def asked(step_groups: int = 8, *, step: int = 0) -> Batch:
    """One of them."""
    return asking(step_groups, steps=step + 1).batch(step)


def bound(
    algorithm: Algorithm, *, step_groups: int = 8, row_tokens: int = 64, rows: int = 1, mesh=None
) -> Algorithm:
    """The algorithm with a collect that samples, for one device unless a mesh is given."""
    assert algorithm.online is not None
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    context = Context(tokenizer(), prompts(), groups(), step_groups, row_tokens, rows, mesh)
    return algorithm.online(context)


def started(algorithm: Algorithm, params: Any = None) -> TrainState:
    """A state without optimizer."""
    params = REFERENCE if params is None else params
    trained, memory = algorithm.init(jax.random.key(1), params, FROZEN)
    return TrainState(jnp.int32(0), trained, None, memory, jnp.int32(0))


def away(scale: float = 0.1) -> Any:
    """Weights at some distance from the reference."""
    leaves, tree = jax.tree.flatten(REFERENCE)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)
