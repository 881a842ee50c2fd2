"""Sampling with a key/value cache: prompts are read once, samples grow by one token a step."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data.prompt_rows import PromptRows, one_each, several
from dpo_jax.parallel import letters, on_host, over_rows, row_multiple
from dpo_jax.structs import BadInput, Model, Params, precise

PROMPT_BUCKET = 16  # prompts are padded to multiples of this, so that few shapes compile
PACKED = 128  # tokens of the longest prompt from which on several are read in a row
ALL = 2**31 - 1  # ids
FEW = 64  # ids: among no more, one is drawn at once, not a block of them before


class Samples(NamedTuple):
    """n responses to each of B prompts; a response ends with `eos` or after max_tokens."""

    responses: list[list[np.ndarray]]  # [prompt][sample] -> int32 ids
    logps: list[list[np.ndarray]]  # log-probability of every token, of the untruncated policy
    finished: np.ndarray  # (B, n) bool: ended with eos


def sample(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    key: jax.Array,
    eos: int,
    n: int = 1,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocabulary: int | None = None,
    records: Sequence[int] | None = None,
    first: Sequence[int] | None = None,
    width: int = 0,
    rows: int = 512,
) -> Samples:
    """Samples n responses to every prompt.

    prompts: int32 id arrays, not empty. records: what numbers a prompt for its random key (its
    place by default): sample k of record r draws from fold_in(fold_in(key, r), k), so batch size,
    order and mesh do not change it. first: k of a prompt's first sample, 0 by default; a record
    that stands there twice goes on counting. temperature 0 takes the likeliest token. top_k 0 and
    top_p 1 are off; both keep at least one token. vocabulary: ids from this on are never drawn,
    such as those that pad an embedding beyond its tokenizer; None = all may be. width: prompts are
    padded to as many tokens at least, so that calls share a program. rows: sequences that run side
    by side, at most.
    Raises: BadInput for options out of range, an empty prompt, or more positions than there are.
    """
    _check(prompts, temperature, top_k, top_p, min(max_tokens, n))
    check_places(model, prompts, max_tokens)
    if not prompts:
        return Samples([], [], np.zeros((0, n), bool))
    numbers = np.arange(len(prompts)) if records is None else np.asarray(records)
    # of a few prompts no more rows than they fill, of many always the same number
    per_call = max(1, min(rows // n, 1 << (len(prompts) - 1).bit_length()))
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else row_multiple(mesh)
    per_call = -(-per_call // parts) * parts
    starts = np.zeros(len(prompts), int) if first is None else np.asarray(first)
    longest = max(width, *(len(prompt) for prompt in prompts))
    width = -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET
    packed = model.dealt is not None and width >= PACKED
    place = partial(several, parts=parts) if packed else one_each
    run = _compiled(model, n, max_tokens, eos, temperature == 0, top_k > 0, top_p < 1, packed)
    cuts = (ALL if vocabulary is None else vocabulary, temperature, top_k, top_p)
    tokens, logps = [], []
    for start in range(0, len(prompts), per_call):
        part = prompts[start : start + per_call]
        laid = place(part, count=per_call, width=width)
        own_B = np.where(laid.place_B < 0, 0, start + laid.place_B)
        record_B, first_B = (x[own_B].astype(np.int32) for x in (numbers, starts))
        drawn = on_host(run(params, laid, width, record_B, first_B, key, *cuts))
        in_order = np.argsort(laid.place_B, kind="stable")[-len(part) :]
        tokens.append(drawn[0][in_order])
        logps.append(drawn[1][in_order])
    return _trimmed(np.concatenate(tokens), np.concatenate(logps), eos)


def _check(
    prompts: Sequence[np.ndarray], temperature: float, top_k: int, top_p: float, least: int
) -> None:
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or least < 1:
        raise BadInput(
            "sampling wants temperature >= 0, top_k >= 0, 0 < top_p <= 1, max_tokens and n >= 1"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise BadInput("sampling wants prompts of at least one token (BOS, say)")


def check_places(model: Model, prompts: Sequence[np.ndarray], max_tokens: int) -> None:
    """Raises BadInput where a prompt and max_tokens behind it need more positions than a model
    has."""
    longest = max(map(len, prompts), default=0)
    if model.places is not None and longest + max_tokens > model.places:
        raise BadInput(
            f"the longest prompt takes {longest} positions and evaluation.max_tokens={max_tokens} "
            f"more, the model has model.P={model.places}: lower max_tokens or shorten the prompts"
        )


def _trimmed(tokens_BKM: np.ndarray, logp_BKM: np.ndarray, eos: int) -> Samples:
    ended_BKM = tokens_BKM == eos
    finished_BK = ended_BKM.any(axis=-1)
    length_BK = np.where(finished_BK, ended_BKM.argmax(axis=-1) + 1, tokens_BKM.shape[-1])

    def cut(x_BKM: np.ndarray) -> list[list[np.ndarray]]:
        rows = zip(x_BKM, length_BK, strict=True)
        return [[x[:m] for x, m in zip(x_KM, length_K, strict=True)] for x_KM, length_K in rows]

    return Samples(cut(tokens_BKM), cut(logp_BKM), finished_BK)


@lru_cache(maxsize=16)
def _compiled(
    model: Model,
    n: int,
    max_tokens: int,
    eos: int,
    greedy: bool,
    by_k: bool,
    by_p: bool,
    packed: bool,
):
    """The jitted sampler of one model and one set of flags; rates and cuts are traced."""

    def run(params, laid: PromptRows, width, record_B, first_B, key, *cuts):
        vocabulary, temperature, top_k, top_p = cuts
        B, S, length_B = len(laid.length_B), width + max_tokens, laid.length_B
        params = model.apart(params)
        last_BD, cache = (_dealt if packed else _read)(model, params, laid, width, S)
        cache = repeat_rows(cache, n)
        hidden_RD = jnp.repeat(last_BD, n, axis=0)
        length_R = jnp.repeat(length_B, n)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, record_B)
        number_BK = first_B[:, None] + jnp.arange(n)[None, :]
        keys_R = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, number_BK).reshape(B * n)

        def step(carry):
            t, hidden_RD, cache, ended_R, token_MR, logp_MR = carry
            logits_RV = precise(model.unembed(params, hidden_RD))
            logits_RV = logits_RV if greedy else logits_RV / temperature
            id_V = jnp.arange(logits_RV.shape[-1])
            kept_RV = jnp.where(id_V[None, :] < vocabulary, logits_RV, -jnp.inf)
            kept_RV = keep_top_k(kept_RV, top_k) if by_k else kept_RV
            kept_RV = keep_top_p(kept_RV, top_p) if by_p else kept_RV
            keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys_R, t)
            token_R = likeliest(kept_RV) if greedy else drawn(keys_now, kept_RV)
            token_R = jnp.where(ended_R, eos, token_R).astype(jnp.int32)
            logp_R = jnp.take_along_axis(jax.nn.log_softmax(logits_RV), token_R[:, None], axis=-1)[
                :, 0
            ]
            position_R = length_R + t
            until_R = jnp.full_like(position_R, S)
            hidden_RTD, cache = model.hidden(
                params, token_R[:, None], position_R[:, None], until_R[:, None], cache
            )
            ended_R = ended_R | (token_R == eos)
            token_MR, logp_MR = token_MR.at[t].set(token_R), logp_MR.at[t].set(logp_R)
            return t + 1, hidden_RTD[:, 0], cache, ended_R, token_MR, logp_MR

        def unfinished(carry):
            t, _, _, ended_R, _, _ = carry
            return (t < max_tokens) & ~jnp.all(ended_R)

        ended_R = jnp.repeat(length_B == 0, n)
        token_MR = jnp.full((max_tokens, B * n), eos, jnp.int32)
        logp_MR = jnp.zeros((max_tokens, B * n), precise(hidden_RD).dtype)
        start = (jnp.int32(0), hidden_RD, cache, ended_R, token_MR, logp_MR)
        *_, token_MR, logp_MR = jax.lax.while_loop(unfinished, step, start)
        return token_MR.T.reshape(B, n, max_tokens), logp_MR.T.reshape(B, n, max_tokens)

    return jax.jit(run, static_argnames="width")


def _read(model: Model, params: Params, laid: PromptRows, width: int, S: int):
    """(hidden_BD, cache): the last token of every prompt, and a cache of S places that goes on
    behind `width` of them; the prompts stand in rows of their own."""
    real_RT = jnp.arange(width)[None, :] < laid.length_B[:, None]
    until_RT = jnp.where(real_RT, S, laid.until_RT)  # what is drawn sees them too
    places = laid.tokens_RT, laid.positions_RT, until_RT
    hidden_RND, cache = model.hidden_at(params, laid.end_RN, *places, S)
    return hidden_RND[:, 0], cache


def _dealt(model: Model, params: Params, laid: PromptRows, width: int, S: int):
    """`_read` of prompts that stand several in a row: read so, and then dealt out."""
    assert model.dealt is not None
    places = laid.tokens_RT, laid.positions_RT, laid.until_RT
    room = laid.tokens_RT.shape[1] + width  # the last prompt of a row is cut out as wide as others
    hidden_RND, cache = model.hidden_at(params, laid.end_RN, *places, room)
    where = laid.row_B, laid.start_B, laid.length_B
    cache = model.dealt(cache, *where, width=width, places=S)
    picked = over_rows(lambda _, x, row, nth: x[row, nth], None, hidden_RND, laid.row_B, laid.nth_B)
    return picked, cache


def repeat_rows(cache, n: int):
    """Every row of a cache n times in a row; the name of a leaf says which axis is R, counted from
    its end: with all layers in one array, L stands in front."""

    def repeat(path, leaf):
        axes = letters(path)
        return jnp.repeat(leaf, n, axis=axes.index("R") - len(axes)) if "R" in axes else leaf

    return jax.tree_util.tree_map_with_path(repeat, cache)


def drawn(keys_R: jax.Array, logits_RV: jax.Array) -> jax.Array:
    """An id of every row, from the softmax of its logits by its own key.

    The place of the largest sum of a logit and Gumbel noise (Maddison et al. 1411.0030). The
    largest sum of a block is Gumbel noise around the logsumexp of its logits, so that of more than
    FEW ids one of X blocks is drawn first, then one of its ids: X + V/X random numbers, not V.
    Rounding of the logits moves a draw only where two sums nearly tie. -inf is never drawn where
    there is anything else.
    """
    R, V = logits_RV.shape
    if V <= FEW:
        return _noisy_argmax(keys_R, logits_RV)
    size = 1 << (V.bit_length() // 2)
    filled_RV = jnp.pad(logits_RV, ((0, 0), (0, -V % size)), constant_values=-jnp.inf)
    logits_RXW = filled_RV.reshape(R, -1, size)
    of_block_R, of_id_R = jnp.moveaxis(jax.vmap(jax.random.split)(keys_R), 1, 0)
    block_R = _noisy_argmax(of_block_R, jax.nn.logsumexp(logits_RXW, axis=-1))
    logits_RW = jnp.take_along_axis(logits_RXW, block_R[:, None, None], axis=1)[:, 0]
    return block_R * size + _noisy_argmax(of_id_R, logits_RW)


def _noisy_argmax(keys_R: jax.Array, x_RN: jax.Array) -> jax.Array:
    noise_RN = jax.vmap(lambda key, x_N: jax.random.gumbel(key, x_N.shape, x_N.dtype))(keys_R, x_RN)
    return likeliest(x_RN + noise_RN)


def likeliest(x_RV: jax.Array) -> jax.Array:
    """The argmax, by way of the maximum: XLA vectorises that, but what an argmax reads it makes
    number by number."""
    return jnp.argmax(x_RV == jnp.max(x_RV, axis=-1, keepdims=True), axis=-1)


def keep_top_k(logits_RV: jax.Array, top_k: jax.Array) -> jax.Array:
    """-inf for all but the top_k largest logits of a row (ties with the last one stay)."""
    ordered_RV = jnp.sort(logits_RV, axis=-1)
    V = logits_RV.shape[-1]
    least_R = jnp.take(ordered_RV, jnp.clip(V - top_k, 0, V - 1), axis=-1)
    return jnp.where(logits_RV >= least_R[:, None], logits_RV, -jnp.inf)


def keep_top_p(logits_RV: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the smallest set of likeliest tokens that holds a mass of top_p
    (Holtzman et al. 1904.09751)."""
    ordered_RV = -jnp.sort(-logits_RV, axis=-1)
    mass_RV = jax.nn.softmax(ordered_RV, axis=-1)
    before_RV = jnp.cumsum(mass_RV, axis=-1) - mass_RV  # the mass of what is likelier
    least_R = jnp.min(jnp.where(before_RV < top_p, ordered_RV, jnp.inf), axis=-1)
    return jnp.where(logits_RV >= least_R[:, None], logits_RV, -jnp.inf)
