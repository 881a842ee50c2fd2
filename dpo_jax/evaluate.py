"""What a policy is worth: held-out loss and accuracy, sampled reward and exact-per-token KL."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from dpo_jax.data.loader import sequential
from dpo_jax.data.template import encode_prompts, response_end
from dpo_jax.data.tokens import vocabulary
from dpo_jax.logprobs import ROUNDED, per_response, token_kls
from dpo_jax.parallel import fetched, on_host, row_multiple, shard_batch
from dpo_jax.sampling import sample
from dpo_jax.structs import Algorithm, Batch, Group, Model, Params, TrainState, join

KL_RESPONSES = 256  # responses whose KL is taken in one call
KL_ROW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Completions:
    """n sampled responses to each of B prompts and what they are worth."""

    records: list[dict[str, Any]]
    texts: list[list[str]]  # [prompt][sample]
    rewards: dict[str, np.ndarray]  # name -> (B, n)
    kl: np.ndarray | None  # (B, n) KL(policy, reference) in nats summed over the response
    finished: np.ndarray  # (B, n)
    tokens: np.ndarray  # (B, n)

    def metrics(self) -> dict[str, float]:
        """Mean and standard error of every reward and of the KL, over prompts."""
        columns = {f"samples/{name}": x_BK for name, x_BK in self.rewards.items()}
        columns |= {} if self.kl is None else {"samples/kl": self.kl}
        summary = {
            "samples/length": float(self.tokens.mean()),
            "samples/finished": float(self.finished.mean()),
        }
        for name, x_BK in columns.items():
            summary[name], summary[f"{name}_se"] = mean_and_error(x_BK)
        return summary

    def rows(self, step: int) -> Iterator[dict[str, Any]]:
        """One JSON-able row a sample, for samples.jsonl."""
        for i, (record, texts) in enumerate(zip(self.records, self.texts, strict=True)):
            for k, text in enumerate(texts):
                scores = {name: float(x_BK[i, k]) for name, x_BK in self.rewards.items()}
                scores |= {} if self.kl is None else {"kl": float(self.kl[i, k])}
                yield {"step": step, "prompt": record["prompt"], "response": text, **scores}


def mean_and_error(x_BK: np.ndarray) -> tuple[float, float]:
    """Mean of all entries and its standard error from the B row means (0 where B is 1)."""
    row_B = np.asarray(x_BK, np.float64).mean(axis=1)
    error = row_B.std(ddof=1) / np.sqrt(len(row_B)) if len(row_B) > 1 else 0.0
    return float(row_B.mean()), float(error)


def held_out(
    bind: Callable[[dict[str, Any]], Algorithm],
    numbers: dict[str, Any],
    state: TrainState,
    frozen: Params,
    batches: Sequence[Batch],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """The objective and its metrics on held-out batches, every group counted once.

    bind(numbers) is the algorithm; what `numbers` holds is an argument of the compiled programs,
    which members of a sweep share. The batches (of one shape) are completed one by one and weighed
    as one step, so the result is the exact mean whatever the batch size.
    """
    algorithm = bind(numbers)
    complete, value = _compiled(bind, algorithm.fused)
    key = jax.random.key(0)  # offline algorithms draw nothing
    done, memory = [], state.memory
    for batch in batches:
        complete_batch, memory = complete(numbers, state, frozen, shard_batch(mesh, batch), key)
        done.append(on_host(complete_batch))
    state = replace(state, memory=memory)  # a moving reference moves before it is compared with
    whole = algorithm.measure(_joined(done))
    total: dict[str, float] = {}
    for part in _parts(whole, len(batches)):
        metrics = on_host(value(numbers, state, frozen, shard_batch(mesh, part), key))
        total = {name: total.get(name, 0.0) + float(x) for name, x in metrics.items()}
    return total | _derived(total)


def _derived(total: dict[str, float]) -> dict[str, float]:
    """What is no mean over groups but made of such: of a reward model, the standard deviation of
    its rewards and, within prompts, their correlation with every criterion (0 without variance)."""
    found: dict[str, float] = {}
    if "rewards/square" in total:
        variance = total["rewards/square"] - total["rewards/mean"] ** 2
        found["rewards/std"] = math.sqrt(max(variance, 0.0))
    for name in [name for name in total if name.endswith("/covariance")]:
        stem = name.removesuffix("/covariance")
        spread = math.sqrt(total["rewards/variance"] * total[f"{stem}/variance"])
        found[f"{stem}/correlation"] = total[name] / spread if spread else 0.0
    return found


def _joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches; scalars of a batch are averaged by the weight of its groups."""
    rows = jax.tree.map(
        lambda *parts: np.concatenate(parts), *(replace(batch, shared={}) for batch in batches)
    )
    weights = [float(np.sum(batch.weight_RG)) for batch in batches]
    shared = {
        name: np.average([batch.shared[name] for batch in batches], weights=weights)
        for name in batches[0].shared
    }
    return replace(rows, shared=jax.tree.map(np.float32, shared))


def _parts(batch: Batch, parts: int) -> Iterator[Batch]:
    rows = replace(batch, shared={})
    for part in range(parts):
        cut = jax.tree.map(
            lambda x, i=part: np.asarray(x).reshape(parts, -1, *x.shape[1:])[i], rows
        )
        yield replace(cut, shared=batch.shared)


@lru_cache(maxsize=8)
def _compiled(
    bind: Callable[[dict[str, Any]], Algorithm], fused: bool
) -> tuple[Callable, Callable]:
    def complete(numbers, state, frozen, batch, key):
        return bind(numbers).collect(state, frozen, batch, key)

    def value(numbers, state, frozen, batch, key):
        objective = bind(numbers).objective
        return objective(state.params, frozen, state.memory, batch, key)[1]

    compiled = partial(jax.jit, compiler_options=ROUNDED)
    return compiled(complete) if fused else complete, compiled(value)


def completions(
    model: Model,
    params: Params,
    frozen: Params,
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    rewards: Iterable[Callable],
    key: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
    n: int = 1,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Completions:
    """Samples n responses to the prompts of records, scores their texts, and takes the KL.

    rewards: functions (records, responses) -> scores_B. KL(policy, reference) is summed exactly
    over the vocabulary at every token of the sampled path, where frozen holds a reference (its
    adapters alone, where frozen holds a base too).
    """
    whole = join(params, frozen)
    prompts = encode_prompts(records, tokenizer)
    eos = response_end([record["prompt"] for record in records], tokenizer)
    drawn = sample(
        model,
        whole,
        prompts,
        key=key,
        eos=eos,
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocabulary=vocabulary(tokenizer),
    )
    flat = [response for responses in drawn.responses for response in responses]
    texts = tokenizer.batch_decode([ids[ids != eos] for ids in flat])
    repeated = [record for record in records for _ in range(n)]
    shape = (len(records), n)
    kl = None
    if "reference" in frozen:
        groups = [Group(*pair) for pair in zip(prompts, drawn.responses, strict=True)]
        reference = join(frozen["reference"], frozen)
        kl = _response_kls(model, whole, reference, groups, mesh)
    return Completions(
        records=list(records),
        texts=[texts[i : i + n] for i in range(0, len(texts), n)],
        rewards={
            f.__name__: np.asarray(f(repeated, texts), np.float64).reshape(shape) for f in rewards
        },
        kl=kl,
        finished=drawn.finished,
        tokens=np.asarray([len(ids) for ids in flat]).reshape(shape),
    )


def _response_kls(model, params, reference, groups, mesh) -> np.ndarray:
    """KL summed over every response, (B, n): groups packed in batches of one shape."""
    longest = max(group.tokens for group in groups)
    kls = _compiled_kls(model)
    kl_BK = np.zeros((len(groups), len(groups[0].responses)))
    for batch in sequential(
        groups,
        step_groups=max(1, KL_RESPONSES // kl_BK.shape[1]),
        row_tokens=max(2 * longest, KL_ROW_TOKENS),
        rows_multiple=row_multiple(mesh),
    ):
        kl_RGK = on_host(kls(params, reference, shard_batch(mesh, batch)))
        real_RG = batch.record_RG >= 0
        kl_BK[batch.record_RG[real_RG]] = kl_RGK[real_RG]
    return kl_BK


@lru_cache(maxsize=8)
def _compiled_kls(model: Model) -> Callable:
    def kls(params, reference, batch):
        return per_response(token_kls(model, params, fetched(reference), batch), batch)

    return jax.jit(kls, compiler_options=ROUNDED)
