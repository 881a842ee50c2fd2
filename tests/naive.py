"""The slow obvious way, which the engine must agree with: every response in a row of its own,
behind its prompt, through full logits. With a model small enough to compile in no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from dpo_jax.data.packing import pack
from dpo_jax.structs import Algorithm, Batch, Group, Model, Params, TrainState
from dpo_jax.train import make_update

V, D = tiny.CONFIG.V, 8


def _init(key: jax.Array) -> Params:
    names = {"embed_VD": (V, D), "mix_DF": (D, D), "head_DV": (D, V)}
    keys = jax.random.split(key, len(names))
    return {
        name: jax.random.normal(key, shape) / 2
        for key, (name, shape) in zip(keys, names.items(), strict=True)
    }


def _hidden(params, tokens_RT, positions_RT, until_RT, cache=None):
    """A token, its position, and the mean of all that it sees."""
    place_T = jnp.arange(tokens_RT.shape[1])
    behind_TT = place_T[None, :] <= place_T[:, None]
    seen_RTT = behind_TT[None] & (place_T[None, :, None] < jnp.asarray(until_RT)[:, None, :])
    x_RTD = params["embed_VD"][tokens_RT]
    total_RTD = jnp.einsum("rts,rsd->rtd", jnp.where(seen_RTT, 1.0, 0.0), x_RTD)
    mean_RTD = total_RTD / jnp.maximum(jnp.sum(seen_RTT, axis=2, keepdims=True), 1)
    position_RT1 = jnp.cos(jnp.asarray(positions_RT, float))[:, :, None]
    return jnp.tanh(
        x_RTD + position_RT1 + jnp.einsum("rtd,df->rtf", mean_RTD, params["mix_DF"])
    ), None


def _unembed(params, hidden) -> Any:
    return jnp.einsum("...d,dv->...v", hidden, params["head_DV"])


MODEL = Model(_init, _hidden, _unembed)
POLICY, REFERENCE = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
TX = optax.chain(optax.trace(decay=0.0), optax.scale(-0.1))  # keeps the gradient of a step


# The engine


def groups(n: int, *, responses: int = 2, seed: int = 0, longest: int = 5) -> list[Group]:
    """`tiny.groups`, with records, and responses some of whose tokens do not count."""
    rng = np.random.default_rng(seed)

    def counted(response: np.ndarray) -> np.ndarray:
        mask = rng.random(len(response)) < 0.8
        mask[rng.integers(len(mask))] = True
        return mask

    found = tiny.groups(n, responses=responses, seed=seed, longest=longest)
    return [
        replace(group, scored=[counted(r) for r in group.responses], record=b)
        for b, group in enumerate(found)
    ]


def lone(n: int, *, label: float | None = None, seed: int = 0) -> list[Group]:
    """Single responses with a label, two in three desirable where none is given."""
    labels = [float(b % 3 != 1) if label is None else label for b in range(n)]
    found = groups(n, responses=1, seed=seed)
    return [replace(group, label=label) for group, label in zip(found, labels, strict=True)]


def lists(*sizes: int) -> list[Group]:
    """One list of every size."""
    found = [groups(1, responses=size, seed=size, longest=3)[0] for size in sizes]
    return [replace(group, record=b) for b, group in enumerate(found)]


def packed(
    items: Sequence[Group], *, row_tokens: int = 32, rows: int = 8, scored: int = 24
) -> Batch:
    """All batches of one shape, with empty slots."""
    return pack(items, row_tokens=row_tokens, rows=rows, scored=scored, slots=6)


def started(algorithm: Algorithm, params: Params = POLICY) -> TrainState:
    params, memory = algorithm.init(jax.random.key(0), params, {"reference": REFERENCE})
    return TrainState(jnp.int32(0), params, TX.init(params), memory, jnp.int32(0))


class Engine:
    """One compiled step of an algorithm."""

    def __init__(self, algorithm: Algorithm, *, microbatches: int = 1):
        self.algorithm = algorithm
        self.update = jax.jit(make_update(algorithm, TX, microbatches=microbatches))

    def __call__(
        self, batch: Batch, state: TrainState | None = None, reference: Params = REFERENCE
    ) -> tuple[TrainState, dict[str, float]]:
        """(state, metrics) after a step, which is the first where no state is given."""
        frozen = {"reference": reference} if self.algorithm.frozen else {}
        before = started(self.algorithm) if state is None else state
        after, metrics = self.update(before, frozen, batch, jax.random.key(0))
        return after, {name: float(x) for name, x in metrics.items()}


def evaluated(algorithm: Algorithm, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of the policy, to be traced."""
    state, frozen = started(algorithm), {"reference": REFERENCE}
    batch, memory = algorithm.collect(state, frozen, batch, jax.random.key(0))
    batch = algorithm.measure(batch)
    return algorithm.objective(state.params, frozen, memory, batch, jax.random.key(0))


def gradient(state: TrainState) -> Params:
    """The gradient of the step that led here."""
    return state.opt_state[0].trace


# The slow obvious way


@dataclass(frozen=True)
class Said:
    """What full logits say of B groups of K responses; T runs over the places of a row."""

    logp_BKT: jax.Array
    ref_BKT: jax.Array
    kl_BKT: jax.Array  # KL(reference, policy)
    aligned_BKT: jax.Array  # log p - log sum_v p_v^2
    there_BKT: np.ndarray  # whether the place predicts a token that counts
    weight_B: np.ndarray
    label_B: np.ndarray

    def total(self, x_BKT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(self.there_BKT, x_BKT, 0.0), axis=2)

    @property
    def logp_BK(self) -> jax.Array:
        return self.total(self.logp_BKT)

    @property
    def ratio_BK(self) -> jax.Array:
        return self.total(self.logp_BKT - self.ref_BKT)

    @property
    def length_BK(self) -> np.ndarray:
        return self.there_BKT.sum(axis=2)

    @property
    def D_B(self) -> jax.Array:
        return self.ratio_BK[:, 0] - self.ratio_BK[:, 1]

    def mean(self, x_B: jax.Array | np.ndarray) -> jax.Array:
        """Over the groups, by their weights."""
        return jnp.sum(self.weight_B * x_B) / self.weight_B.sum()

    def nll(self) -> jax.Array:
        """Over all tokens of first responses, by the weights of their groups."""
        tokens = (self.weight_B * self.length_BK[:, 0]).sum()
        return -jnp.sum(self.weight_B * self.logp_BK[:, 0]) / tokens


def said(params: Params, reference: Params, items: Sequence[Group]) -> Said:
    """The groups through the model, one response a row, each token by the logits before it."""
    B, K = len(items), max(len(group.responses) for group in items)
    T = max(len(g.prompt) + len(r) for g in items for r in g.responses)
    tokens, there = np.zeros((B, K, T), np.int32), np.zeros((B, K, T - 1), bool)
    for b, group in enumerate(items):
        for k, response in enumerate(group.responses):
            line = [*group.prompt, *response]
            tokens[b, k, : len(line)] = line
            for t in range(len(response)):
                counts = group.scored is None or bool(group.scored[k][t])
                there[b, k, len(group.prompt) + t - 1] = counts
    logp, ref = (_log_probs(p, tokens.reshape(B * K, T)) for p in (params, reference))
    square = jax.nn.logsumexp(2 * logp, axis=2, keepdims=True)
    target = tokens.reshape(B * K, T)[:, 1:, None]

    def of_target(x_XTV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_XTV, target, axis=2)[:, :, 0].reshape(B, K, T - 1)

    return Said(
        logp_BKT=of_target(logp),
        ref_BKT=of_target(ref),
        kl_BKT=jnp.sum(jnp.exp(ref) * (ref - logp), axis=2).reshape(B, K, T - 1),
        aligned_BKT=of_target(logp - square),
        there_BKT=there,
        weight_B=np.array([group.weight for group in items], np.float32),
        label_B=np.array([group.label for group in items], object) == 1.0,
    )


def _log_probs(params: Params, tokens_XT: np.ndarray) -> jax.Array:
    """log p of the whole vocabulary at every place but the last, whatever came before it."""
    X, T = tokens_XT.shape
    positions_XT = np.broadcast_to(np.arange(T, dtype=np.int32), (X, T))
    hidden, _ = MODEL.hidden(params, tokens_XT, positions_XT, np.full((X, T), T, np.int32))
    return jax.nn.log_softmax(MODEL.unembed(params, hidden))[:, :-1]


def spoken(params: Params, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """log p of the vocabulary at every token of a response, one token after the other, float64."""
    embed, mix, head = (
        np.asarray(params[n], np.float64) for n in ("embed_VD", "mix_DF", "head_DV")
    )
    found, line = [], list(prompt)
    for token in response:
        seen = embed[line]
        hidden = np.tanh(seen[-1] + np.cos(len(line) - 1.0) + seen.mean(axis=0) @ mix)
        logits = hidden @ head
        found.append(logits - np.log(np.exp(logits).sum()))
        line.append(token)
    return np.array(found)


def log_prob(params: Params, group: Group, k: int = 0, weight: Callable = lambda t: 1.0) -> float:
    """log p of response k behind the prompt: token by token, the t-th that counts by weight(t)."""
    response, total, t = group.responses[k], 0.0, 0
    at = spoken(params, group.prompt, response)
    for place, token in enumerate(response):
        if group.scored is None or group.scored[k][place]:
            total += weight(t) * at[place, token]
            t += 1
    return total


def log_ratio(
    group: Group, k: int = 0, policy: Params = POLICY, reference: Params = REFERENCE
) -> float:
    """log p of response k under the policy less that under the reference."""
    return log_prob(policy, group, k) - log_prob(reference, group, k)


def mean(items: Sequence[Group], value: Callable[[Group], float]) -> float:
    """By the weights of the groups, one after the other."""
    return sum(g.weight * value(g) for g in items) / sum(g.weight for g in items)
