"""Reference log-probs found once, before the first step, and kept on disk: a value a token, by
content.

A response is known by its prompt's ids, its own and which of them are scored; the folder by the
weights and the precision of the reference. So order, rows, epochs, and what else stands in a group
change nothing, and runs of one reference share what they have in common. A part of the file set is
written whole or not at all: an interrupted pass goes on where it stopped.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dpo_jax.data.loader import sequential
from dpo_jax.logprobs import ROUNDED, token_logps
from dpo_jax.metrics import progress
from dpo_jax.parallel import on_host, own_bytes, row_multiple, shard_batch
from dpo_jax.structs import Algorithm, BadInput, Batch, Group, Model, Params

TOKENS = 2**20  # scored tokens of a part
ROW_TOKENS, STEP_TOKENS = 2048, 2**14  # of a row where no group needs more; of one call, about
CHECKED = 8  # groups whose stored values are compared with live ones
# the largest difference of a token's log-prob between two layouts of rows, by precision
TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 0.2}

Values = dict[bytes, np.ndarray]  # response -> logp_N of its scored tokens


def filled(
    groups: Sequence[Group],
    *,
    model: Model,
    reference: Params,
    dtype: str,
    home: epath.Path,
    mesh: jax.sharding.Mesh,
) -> list[Group]:
    """The groups with `ref_logps`, from `home` where they are there, else found and added.

    reference: the weights as the Model takes them, on the mesh; dtype: the precision it runs in.
    Raises: BadInput where what is stored differs from what the reference says now.
    """
    if jax.process_count() > 1:  # all read the same files, none while another writes
        multihost_utils.sync_global_devices("log-probs of the reference")
    folder = home / f"reference-{fingerprint(reference, dtype)}"
    stored, named = _stored(folder), [keys(group) for group in groups]
    there = [all(key in stored for key in own) for own in named]
    known = [group for group, whole in zip(groups, there, strict=True) if whole]
    fresh = [group for group, whole in zip(groups, there, strict=True) if not whole]
    _check(known[:CHECKED], stored, folder, TOLERANCE[dtype], model, reference, mesh)
    part: Values = {}
    for found in live(fresh, model, reference, mesh):
        part |= {key: logp_N for key, logp_N in found.items() if key not in stored}
        if sum(map(len, part.values())) >= TOKENS:
            stored |= _add(folder, part)
            part = {}
    stored |= _add(folder, part) if part else {}
    return [
        replace(group, ref_logps=[stored[key] for key in own])
        for group, own in zip(groups, named, strict=True)
    ]


def chosen(
    option: str, algorithm: Algorithm, named: str, reference: Params, memory: int | None
) -> bool:
    """Whether the log-probs are found before the first step, as `option`, run.reference, says.

    named: the algorithm, as the message calls it. reference: its weights on the mesh, or their
    shapes there. memory: bytes of a device, None = not known.
    Raises: BadInput where they are asked for and there are none to keep.
    """
    if option == "cached" and not algorithm.cacheable:
        raise BadInput(
            f"run.reference=cached: {named} compares with no fixed reference, or with more of it "
            "than the log-probs of tokens; take run.reference=live"
        )
    beside = option == "live" or fits(reference, memory)
    return algorithm.cacheable and (option == "cached" or not beside)


def fits(reference: Params, memory: int | None) -> bool:
    """Whether the reference's weights fit a device of so many bytes beside what training holds of
    as many: the weights, their gradient and two moments; a fifth stays for activations. True where
    the memory is not known."""
    return memory is None or 5 * own_bytes(reference) <= 0.8 * memory


def keys(group: Group) -> list[bytes]:
    """What each response of a group is known by."""
    prompt = np.asarray(group.prompt, np.int32).tobytes()
    masks = group.scored or [np.ones(len(ids), bool) for ids in group.responses]
    return [
        hashlib.blake2b(
            b"|".join((prompt, np.asarray(ids, np.int32).tobytes(), np.asarray(mask).tobytes())),
            digest_size=16,
        ).digest()
        for ids, mask in zip(group.responses, masks, strict=True)
    ]


def fingerprint(params: Params, dtype: str) -> str:
    """8 hex digits of weights and precision, whatever mesh the weights lie on."""
    whole = hashlib.sha256(dtype.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sums = on_host(_sums(leaf))
        whole.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}{sums}".encode())
    return whole.hexdigest()[:8]


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums of a leaf's bits modulo 2^32, each place with a factor of its own: exact, so that
    the order of adding does not matter."""
    size = leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if size >= 4 else f"uint{8 * size}")
    bits = bits.astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # no ravel, which would gather what is sharded
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
        stride = stride * bits.shape[axis] % 2**32
    mixed = (place * jnp.uint32(2654435761)) ^ (place >> 7)
    return jnp.sum(bits * (mixed | 1)), jnp.sum((bits ^ mixed) * jnp.uint32(2246822519))


def live(
    groups: Sequence[Group], model: Model, reference: Params, mesh: jax.sharding.Mesh
) -> Iterator[Values]:
    """What the reference says of every response, a batch of groups at a time."""
    if not groups:
        return
    numbered = [replace(group, record=b) for b, group in enumerate(groups)]
    longest = max(group.tokens for group in groups)
    mean = sum(group.tokens for group in groups) / len(groups)
    step = max(1, int(STEP_TOKENS / mean))
    batches = sequential(
        numbered,
        step_groups=step,
        row_tokens=max(longest, min(ROW_TOKENS, int(step * mean))),
        rows_multiple=row_multiple(mesh),
    )
    run = _compiled(model)
    count = -(-len(groups) // step)
    for _, batch in zip(progress(range(count), "ask the reference"), batches, strict=True):
        yield _by_response(batch, on_host(run(reference, shard_batch(mesh, batch))), groups)


@lru_cache(maxsize=8)
def _compiled(model: Model) -> Any:
    def logps(reference: Params, batch: Batch) -> jax.Array:
        return token_logps(model, reference, batch)

    return jax.jit(logps, compiler_options=ROUNDED)


def _by_response(batch: Batch, logp_RN: np.ndarray, groups: Sequence[Group]) -> Values:
    found: Values = {}
    K = batch.end_RGK.shape[2]
    for slot_N, logp_N, record_G in zip(batch.slot_RN, logp_RN, batch.record_RG, strict=True):
        for g, record in enumerate(record_G[record_G >= 0]):
            for k, key in enumerate(keys(groups[record])):
                found[key] = logp_N[slot_N == g * K + k]
    return found


def _check(
    groups: Sequence[Group],
    stored: Values,
    folder: epath.Path,
    tolerance: float,
    model: Model,
    reference: Params,
    mesh: jax.sharding.Mesh,
) -> None:
    for found in live(groups, model, reference, mesh):
        for key, logp_N in found.items():
            gap = float(np.abs(stored[key] - logp_N).max(initial=0.0))
            if not gap <= tolerance:
                raise BadInput(
                    f"{folder} holds log-probs that differ by {gap:.3g} from what the reference "
                    "says now: delete it, or set run.reference=live"
                )


# Files


def _stored(folder: epath.Path) -> Values:
    found: Values = {}
    for file in sorted(folder.glob("part-*.npz")) if folder.exists() else ():
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as part:
            ends = np.cumsum(part["length_B"])[:-1]
            values = np.split(part["logp_N"], ends)
            found |= dict(zip(map(bytes, part["key_BX"]), values, strict=True))
    return found


def _add(folder: epath.Path, part: Values) -> Values:
    """Write a part beside those that are there; named by its content, whoever writes it."""
    if jax.process_index() != 0:
        return part
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(b"".join(sorted(part))).hexdigest()[:16]
    beside = folder / f"{name}.tmp"
    with beside.open("wb") as file:
        np.savez(
            file,
            key_BX=np.frombuffer(b"".join(part), np.uint8).reshape(len(part), -1),
            length_B=np.array([len(logp_N) for logp_N in part.values()], np.int64),
            logp_N=np.concatenate(list(part.values())),
        )
    beside.replace(folder / f"part-{name}.npz")
    return part
