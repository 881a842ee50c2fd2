"""Every type that crosses a file.

The axis letters, one meaning each in the whole repository:

    R packed rows          T tokens of a row        S key/value tokens
    N scored tokens a row  G group slots of a row   K responses of a group
    B groups or sequences once flattened            C criteria
    V vocabulary           D model width            H query heads
    J key/value heads      E head width             F mlp width      L layers
    P positions            Z rank of an adapter

`flax.struct.dataclass` is for what lives on a device, frozen `dataclasses.dataclass` for what
lives on the host. Argument order everywhere: params, frozen, memory, batch, key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
Key = jax.Array
Params = Any  # a pytree of arrays whose names end in their axis letters
Memory = dict[str, Any]  # what changes and is not trained
Metrics = dict[str, jax.Array]


class BadInput(ValueError):
    """Unusable input: the message says what, where and what to do; the command exits with 2."""


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its K responses, tokenised apart (numpy, on the host).

    prompt: int32 ids, never empty. responses: K arrays of int32 ids, best to worst.
    scored: K boolean arrays, the tokens that count inside a response (all where None).
    scores: (K, C) float, named by criteria. record: index of the group in its source.
    ref_logps: K float arrays, what the reference says of the scored tokens, where it is known.
    """

    prompt: np.ndarray
    responses: Sequence[np.ndarray]
    scored: Sequence[np.ndarray] | None = None
    scores: np.ndarray | None = None
    label: float | None = None
    soft_label: float | None = None
    margin: float | None = None
    weight: float = 1.0
    record: int | None = None
    criteria: tuple[str, ...] = ()  # names of C
    ref_logps: Sequence[np.ndarray] | None = None

    @property
    def tokens(self) -> int:
        """Places of a row that the group takes: the prompt once and every response."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


@struct.dataclass
class Batch:
    """Rows that pack whole groups; query q sees key k when k <= q < until[k]."""

    tokens_RT: Array  # int32
    positions_RT: Array  # int32; positions of every response go on from its prompt
    until_RT: Array  # int32; the first place in the row that no longer sees this token
    target_RN: Array  # int32; the scored token
    source_RN: Array  # int32; the place whose hidden state predicts it
    slot_RN: Array  # int32; g*K + k, the response of the scored token; -1 = unused
    end_RGK: Array  # int32; place of the response's last token; -1 = no such response
    weight_RN: Array  # float32; measure over scored tokens, 0 = unused
    weight_RG: Array  # float32; measure over groups, 0 = empty
    record_RG: Array  # int32; index of the group in its source; -1 = empty
    score_RGKC: Array | None = None
    label_RG: Array | None = None
    soft_label_RG: Array | None = None
    margin_RG: Array | None = None
    ref_logp_RN: Array | None = None
    old_logp_RN: Array | None = None
    advantage_RN: Array | None = None
    return_RN: Array | None = None
    value_RN: Array | None = None
    shared: Mapping[str, Array] = field(default_factory=dict)  # scalars, never split
    criteria: tuple[str, ...] = struct.field(pytree_node=False, default=())  # names of C


@struct.dataclass
class Scored:
    """All that a preference loss may know of B groups; K runs best to worst."""

    logp_BK: Array
    ref_logp_BK: Array | None = None
    length_BK: Array | None = None
    mask_BK: Array | None = None
    weight_B: Array | None = None
    score_BKC: Array | None = None
    label_B: Array | None = None
    soft_label_B: Array | None = None
    margin_B: Array | None = None
    kl_BK: Array | None = None  # KL(reference, policy) summed over the response
    aligned_BK: Array | None = None  # WPO's log-weight of the response
    kl: Array | None = None  # scalar of the batch (KTO)
    delta: Array | None = None  # scalar of the batch (BCO, beta-DPO)


@struct.dataclass
class TrainState:
    step: Array  # int32
    params: Params
    opt_state: Any  # what the optimizer keeps, shaped like the parameters
    memory: Memory
    skipped: Array  # int32; updates left out because the gradient was not finite


class Model(NamedTuple):
    """A decoder as three pure functions; `params` is join(trained, frozen).

    places: how many positions it has, as a learned table of them does; None = any number.
    hidden_only: `hidden_at` without the work for other places; None = all are computed.
    apart: the params with every layer by itself, for a loop that reads them at each turn: slices of
    what lies together would be copied as often. They compute the same.
    dealt: a cache with a row for every prompt, of one that was made of rows of several
    (models/cache.py); None = a prompt is read in a row of its own.
    """

    init: Callable[[Key], Params]
    # (params, tokens_RT, positions_RT, until_RT, cache=None) -> (hidden_RTD, cache)
    hidden: Callable[..., tuple[jax.Array, Any]]
    unembed: Callable[[Params, jax.Array], jax.Array]  # (params, hidden_...D) -> logits_...V
    places: int | None = None
    # (params, at_RN, tokens_RT, positions_RT, until_RT, cache=None) -> (hidden_RND, cache)
    hidden_only: Callable[..., tuple[jax.Array, Any]] | None = None
    apart: Callable[[Params], Params] = lambda params: params
    # (cache, row_R, start_R, length_R, *, width, places) -> cache
    dealt: Callable[..., Any] | None = None

    def hidden_at(self, params: Params, at_RN: Array, *places: Any) -> tuple[jax.Array, Any]:
        """(hidden_RND, cache): the hidden states at at_RN of each row; places as for `hidden`."""
        if self.hidden_only is not None:
            return self.hidden_only(params, at_RN, *places)
        hidden_RTD, cache = self.hidden(params, *places)
        return at_places(hidden_RTD, at_RN), cache


def at_places(x_RT: jax.Array, at_RN: Array) -> jax.Array:
    """What stands at those places of each row, x_RN...; x may have more axes."""
    return jax.vmap(lambda x_T, at_N: x_T[at_N])(x_RT, at_RN)


def unchanged(groups: list[Group], row_tokens: int | None = None) -> list[Group]:
    """The `prepare` of an algorithm that takes any groups."""
    return groups


def as_it_is(
    state: TrainState, frozen: Mapping[str, Params], batch: Batch, key: Key
) -> tuple[Batch, Memory]:
    """The `collect` of an algorithm to which the data is enough."""
    return batch, state.memory


class Context(NamedTuple):
    """What an algorithm that samples learns of its run, once, on the host.

    records: the raw ones, by the numbers in record_RG. prompts: their groups, without responses.
    Rollouts stand in rows of row_tokens; their count is a multiple of rows_multiple.
    """

    tokenizer: Any
    records: Sequence[Mapping[str, Any]]
    prompts: Sequence[Group]
    step_groups: int
    row_tokens: int
    rows_multiple: int
    mesh: jax.sharding.Mesh


class Algorithm(NamedTuple):
    """A way to train, as pure functions.

    init(key, params, frozen) -> (params, memory): adds heads; memory is checkpointed.
    collect(state, frozen, batch, key) -> (batch, memory): completes the batch.
    measure(batch) -> batch: turns the raw weights of a whole optimizer step into measures.
    objective(params, frozen, memory, batch, key) -> (scalar, metrics): always traced; every
        value is a sum under the measures, so the parts of a split batch add up.
    frozen: names of the frozen weights it reads; `reference` is the policy at step 0, its adapters
        alone where there are some: join(fetched(frozen["reference"]), frozen), with
        `parallel.fetched`, is what a Model takes.
    cacheable: a batch that holds ref_logp_RN already wants no reference beside it.
    prepare(groups, row_tokens=None) -> groups: on the host, before they are packed in rows of so
        many tokens; BadInput for data it cannot use.
    coupled: a loss compares groups of a whole step, which microbatches would part.
    fused: collect is traceable too, the loop compiles both as one step.
    passes, minibatches: optimizer passes over a collected batch, and the parts of a pass.
    online: Context -> this algorithm with a `collect` that samples. Such a collect takes the batch
        of prompts on the host and gives rows on the mesh, whose `shared` holds metrics of them.
    """

    init: Callable[..., tuple[Params, Memory]]
    collect: Callable[..., tuple[Batch, Memory]]
    measure: Callable[[Batch], Batch]
    objective: Callable[..., tuple[jax.Array, Metrics]]
    passes: int = 1
    minibatches: int = 1
    fused: bool = False
    frozen: tuple[str, ...] = ()
    cacheable: bool = False
    prepare: Callable[..., list[Group]] = unchanged
    coupled: bool = False
    online: Callable[[Context], "Algorithm"] | None = None


def precise(x: Array) -> jax.Array:
    """`x` in float32 or better: half precision is widened, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def join(trained: Params, frozen: Mapping[str, Params]) -> Params:
    """The tree a Model is called with: with adapters {'base', 'lora'}, else the trained weights."""
    return {"base": frozen["base"], **trained} if "base" in frozen else trained


def parted(whole: Params) -> tuple[Params, dict[str, Params]]:
    """(trained, frozen) of the tree a Model is called with: where there is a base, it is frozen."""
    if "base" not in whole:
        return whole, {}
    return {name: x for name, x in whole.items() if name != "base"}, {"base": whole["base"]}
