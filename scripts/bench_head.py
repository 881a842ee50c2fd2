"""What the head costs: processor time of token log-probs and their gradient, and nothing else.

    python scripts/bench_head.py [--vocabulary 8192] [--width 256] [--rows 10] [--tokens 256]
        [--used 0.75] [--repeats 15]

A model of an embedding and an unembedding. Of `--tokens` scored places of a row the first `--used`
hold tokens. Repeats run one after the other; the first compiles and does not count.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import heap
from dpo_jax.logprobs import token_logps
from dpo_jax.structs import Batch, Model


def batch_of(rows: int, tokens: int, used: float, vocabulary: int) -> Batch:
    """Rows of one response each, of which so many tokens are there."""
    ids_RT = np.random.default_rng(0).integers(1, vocabulary, (rows, tokens)).astype(np.int32)
    places_RT = np.broadcast_to(np.arange(tokens, dtype=np.int32), ids_RT.shape)
    count = round(used * tokens)
    return Batch(
        tokens_RT=ids_RT,
        positions_RT=places_RT,
        until_RT=places_RT + 1,
        target_RN=np.roll(ids_RT, -1, axis=1),
        source_RN=places_RT,
        slot_RN=np.where(places_RT < count, 0, -1).astype(np.int32),
        end_RGK=np.full((rows, 1, 1), count - 1, np.int32),
        weight_RN=np.where(places_RT < count, 1.0, 0.0).astype(np.float32),
        weight_RG=np.ones((rows, 1), np.float32),
        record_RG=np.arange(rows, dtype=np.int32)[:, None],
    )


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, given in {"vocabulary": 8192, "width": 256, "rows": 10, "tokens": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=given)
    parser.add_argument("--used", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    batch = batch_of(given.rows, given.tokens, given.used, given.vocabulary)
    batch = jax.tree.map(jnp.asarray, batch)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        w_VD = jax.random.normal(key, (given.vocabulary, given.width))
        return {"embedding_VD": w_VD, "head_DV": w_VD.T / given.width**0.5}

    model = Model(
        init=init,
        hidden=lambda params, tokens_RT, *rest: (params["embedding_VD"][tokens_RT], None),
        unembed=lambda params, hidden_CD: hidden_CD @ params["head_DV"],
    )
    params = init(jax.random.key(0))

    def total(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        return jnp.sum(batch.weight_RN * token_logps(model, params, batch))

    step = jax.jit(jax.value_and_grad(total))
    marks = []
    for _ in range(given.repeats + 1):
        jax.block_until_ready(step(params, batch))
        marks.append((time.process_time(), time.perf_counter()))
    cpu_ms, wall_ms = 1e3 * np.median(np.diff(marks[1:], axis=0), axis=0)
    print(f"{given.used:.0%} used: processor {cpu_ms:.1f} ms, wall {wall_ms:.1f} ms, medians")


if __name__ == "__main__":
    heap.tuned()
    main()
