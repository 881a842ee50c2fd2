"""How many new tokens a second a policy draws, prompts and all inside the clock.

    python scripts/bench_sampling.py --policy DIR --prompts FILE.jsonl [--n 1] [--max-tokens 64]
        [--batch 16] [--json OUT]

DIR: a folder of Hugging Face. FILE: token ids under prompt, a prompt a line; the first --batch of
them are answered, --n times each. float32, temperature 1, no cuts. EOS stands beyond the vocabulary
and is never drawn, so every response has its full length. The clock runs over a call of
`dpo_jax.sampling.sample`: prompts are padded and read once, whatever n is, tokens and their
log-probs come back to the host. The first call compiles and does not count.
"""

import argparse
import os
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from bench import commit, hardware, peak_mb, read_ids, told

from dpo_jax import heap, parallel, sampling
from dpo_jax.models import hf
from dpo_jax.structs import BadInput


class Timing(NamedTuple):
    """What a run of calls says."""

    tokens: int  # drawn in one call
    first_s: float  # seconds of the call that compiles
    wall_B: np.ndarray  # seconds of every later call
    cpu_B: np.ndarray  # seconds of this process


def timed(
    policy: str, prompts: list[np.ndarray], *, n: int, max_tokens: int, repeats: int
) -> Timing:
    """Answer the prompts once to compile and then so many times, on a mesh of all devices."""
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        model, params, config = hf.load(policy, sharding=mesh)
        largest = max(int(prompt.max(initial=0)) for prompt in prompts)
        if largest >= config.V:
            raise BadInput(f"--prompts: id {largest}, but --policy {policy} has {config.V} tokens")

        def call(number: int) -> int:
            drawn = sampling.sample(
                model,
                params,
                prompts,
                key=jax.random.key(number),
                eos=config.V,
                n=n,
                max_tokens=max_tokens,
            )
            return sum(len(ids) for responses in drawn.responses for ids in responses)

        marks = [(time.perf_counter(), time.process_time())]
        for number in range(repeats + 1):
            tokens = call(number)
            marks.append((time.perf_counter(), time.process_time()))
    wall_B, cpu_B = np.diff(np.array(marks), axis=0).T
    return Timing(tokens, float(wall_B[0]), wall_B[1:], cpu_B[1:])


def record(found: Timing, given: argparse.Namespace) -> dict[str, Any]:
    """The keys of the JSON file."""
    call_s = float(np.median(found.wall_B))
    return {
        "new_tokens_per_second": found.tokens / call_s,
        "new_tokens_per_second_best": found.tokens / float(found.wall_B.min()),
        "step_s": call_s / given.max_tokens,
        "call_s": call_s,
        "call_cpu_s": float(np.median(found.cpu_B)),
        "compile_s": found.first_s - call_s,
        "peak_rss_mb": peak_mb(),
        "new_tokens": found.tokens,
        "prompts": given.batch,
        "n": given.n,
        "max_tokens": given.max_tokens,
        "repeats": given.repeats,
        "load": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl")
    parser.add_argument("--n", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every response")
    parser.add_argument("--batch", type=int, default=16, metavar="PROMPTS", help="of a call")
    parser.add_argument("--repeats", type=int, default=7, metavar="CALLS", help="that count")
    parser.add_argument("--json", metavar="OUT")
    given = parser.parse_args()
    told(partial(measured, given), given.json)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The record of several calls. Raises BadInput."""
    if min(given.batch, given.repeats) < 1:
        raise BadInput("--batch and --repeats must be at least 1")
    rows = read_ids("--prompts", given.prompts, ("prompt",))
    if len(rows) < given.batch:
        raise BadInput(
            f"--prompts {given.prompts}: {len(rows)} prompts, --batch {given.batch}; give more "
            "lines or a smaller batch"
        )
    prompts = [prompt for (prompt,) in rows[: given.batch]]
    options = {"n": given.n, "max_tokens": given.max_tokens, "repeats": given.repeats}
    return record(timed(given.policy, prompts, **options), given)


if __name__ == "__main__":
    heap.tuned()
    main()
