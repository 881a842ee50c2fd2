"""How long a DPO step takes, everything inside the clock.

    python scripts/bench.py --policy DIR --reference DIR --pairs FILE.jsonl [--batch 8]
        [--microbatches 1] [--cached-reference] [--json OUT]

DIR: folders of Hugging Face. FILE: a pair of token ids a line, under prompt, chosen and rejected,
taken in the order of the file. float32, beta 0.1, AdamW at 1e-5, the reference computed in the
step; with --cached-reference its log-probs are found before the clock and written to a temporary
folder, and the step holds no reference. The clock runs over what the training loop does in a step:
the batch is packed on the host, sent to the device, the update dispatched, and the loss of the step
before it read. The shapes are those of a run of 1000 steps, all compiled before; the first two
steps are not counted. Tokens are those of both sequences, the prompt counted twice.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax import heap, losses, optim, parallel, refcache
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.loader import Loader
from dpo_jax.feed import Feed
from dpo_jax.models import hf
from dpo_jax.structs import BadInput, Batch, Group, Model, Params, TrainState
from dpo_jax.train import jit_update

WARM = 2  # steps before the clock counts
LONG = 4  # longest pairs a row has room for: longer rows fill better
PLANNED = 1000  # steps of the run whose shapes are compiled: a short one would have fewer


class InOrder(Loader):
    """Batches in the order of the file, as the peers take them."""

    def indices(self, step: int) -> np.ndarray:
        places = np.arange(step * self.step_groups, (step + 1) * self.step_groups)
        return places % len(self.groups)


class Work(NamedTuple):
    """What is trained: the policy, what stands still beside it, and the pairs."""

    model: Model
    params: Params
    frozen: dict[str, Params]
    groups: list[Group]
    reference_s: float  # seconds in which the reference was asked; 0 where the step asks it


class Timing(NamedTuple):
    """What a run of steps says."""

    loader: Loader
    loss_B: list[float]
    wall_B: np.ndarray  # seconds of every step
    cpu_B: np.ndarray  # seconds of this process, which others on the machine stretch less
    batch_B: np.ndarray  # seconds in which the batch of a step was made on the host
    waited_B: np.ndarray  # those in which the device may have stood still for it
    reference_s: float
    compile_s: float
    arrays: int  # bytes of all arrays between steps: weights, moments, a reference, a batch
    temporaries: int  # bytes that the largest program holds beside its arguments
    programs: int


def read_ids(option: str, path: str, names: Sequence[str]) -> list[list[np.ndarray]]:
    """Of every line of a file the token ids under `names`. Raises BadInput by file and line."""
    rows = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise BadInput(f"{option} {path}: {error.strerror}; give a JSON Lines file") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append([np.asarray(row[name], np.int32) for name in names])
            if any(ids.ndim != 1 for ids in rows[-1]):
                raise TypeError("not a flat list")
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{option} {path} line {number}: {error!r}; a line holds lists of token ids under "
                + ", ".join(names)
            ) from None
    if not rows:
        raise BadInput(f"{option} {path}: no lines; give token ids under {', '.join(names)}")
    return rows


def prepared(
    policy: str, reference: str, groups: list[Group], mesh: jax.sharding.Mesh, cached: bool
) -> Work:
    """Both models from their folders; where the reference is cached, its log-probs alone."""
    model, params, config = hf.load(policy, sharding=mesh)
    _, anchor, other = hf.load(reference, sharding=mesh)
    if other.V != config.V:
        raise BadInput(f"--reference {reference}: {other.V} tokens, the policy has {config.V}")
    if not cached:
        return Work(model, params, {"reference": anchor}, groups, 0.0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        groups = refcache.filled(
            groups,
            model=model,
            reference=anchor,
            dtype="float32",
            home=epath.Path(home),
            mesh=mesh,
        )
    return Work(model, params, {}, groups, time.perf_counter() - start)


def timed(
    prepare: Callable[[jax.sharding.Mesh], Work],
    loader_of: Callable[[list[Group]], Loader],
    steps: int,
    microbatches: int = 1,
) -> Timing:
    """Train for so many steps, on a mesh of all devices."""
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        model, params, frozen, groups, reference_s = prepare(mesh)
        loader = loader_of(groups)
        algorithm = preference(model, loss=partial(losses.dpo, beta=0.1))
        tx = optim.adamw(1e-5)
        key = jax.random.key(0)
        params, memory = algorithm.init(key, params, {})
        state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params), memory, jnp.int32(0))
        places = parallel.shardings(mesh, state)
        state = jax.device_put(state, places)
        update = jit_update(algorithm, tx, places, microbatches)
        start, programs = time.perf_counter(), {}

        def ready(batch: Batch) -> Any:
            shape = (*batch.tokens_RT.shape, *batch.target_RN.shape, *batch.end_RGK.shape)
            if shape not in programs:
                programs[shape] = update.lower(state, frozen, batch, key).compile()
            return programs[shape]

        for shape in loader.ladder:
            ready(parallel.shard_batch(mesh, loader.example(shape)))
        compile_s, values, loss_B = time.perf_counter() - start, None, []
        feed, fed = Feed(lambda step: parallel.shard_batch(mesh, loader.batch(step))), []
        marks = [(time.perf_counter(), time.process_time())]
        for step in range(steps):
            batch = feed.batch(step, state.skipped)
            fed.append((feed.took, feed.waited))
            state, now = ready(batch)(state, frozen, batch, key)
            if values is not None:
                loss_B.append(float(values["loss"]))
            values = now
            marks.append((time.perf_counter(), time.process_time()))
        loss_B.append(float(now["loss"]))
        arrays = sum(array.nbytes for array in jax.live_arrays())
    wall_B, cpu_B = np.diff(np.array(marks), axis=0).T
    batch_B, waited_B = np.array(fed).T
    held = [each for program in programs.values() if (each := program.memory_analysis())]
    temporaries = max((each.temp_size_in_bytes for each in held), default=0)
    before, memory = (reference_s, compile_s), (arrays, temporaries)
    seconds = (wall_B, cpu_B, batch_B, waited_B)
    return Timing(loader, loss_B, *seconds, *before, *memory, len(programs))


def record(found: Timing, cached: bool) -> dict[str, Any]:
    """The keys of the JSON file."""
    loader = found.loader
    counted = slice(min(WARM, len(found.wall_B) - 1), None)
    pairs = [[loader.groups[b] for b in loader.indices(i)] for i in range(len(found.wall_B))]
    token_B = np.array([sum(g.tokens + len(g.prompt) for g in groups) for groups in pairs])
    return {
        "loss_first": found.loss_B[0],
        "loss_last": found.loss_B[-1],
        "step_s": float(np.median(found.wall_B[counted])),
        "step_cpu_s": float(np.median(found.cpu_B[counted])),
        "tokens_per_second": float(np.median((token_B / found.wall_B)[counted])),
        "batch_s": float(np.median(found.batch_B[counted])),
        "data_wait_share": float(found.waited_B[counted].sum() / found.wall_B[counted].sum()),
        "reference": "cached" if cached else "live",
        "reference_s": found.reference_s,
        "compile_s": found.compile_s,
        "peak_rss_mb": peak_mb(),
        "arrays_mb": found.arrays / 2**20,
        "temporaries_mb": found.temporaries / 2**20,
        "steps": len(found.wall_B) - counted.start,
        "programs": found.programs,
        "programs_at_start": len(loader.ladder),
        "rows": [f"{shape.rows}x{shape.tokens}" for shape in loader.ladder],
        "fill": loader.fill,
        "load": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "commit": commit(),
    }


def peak_mb() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def hardware() -> str:
    """The device, and how many processors where it is one."""
    device = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {device}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} processors, {names[0] if names else device}"


def commit() -> str:
    """The commit of this checkout, with + where files were changed since."""
    home = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def show(found: dict[str, Any]) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", show_header=False)
    for name, value in found.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    Console().print(table)


def told(
    measured: Callable[[], dict[str, Any]], out: str | None, show: Callable[..., None] = show
) -> None:
    """Print what was measured, and write it to `out`. Unusable input is one line on stderr and exit
    status 2."""
    try:
        found = measured()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(found)
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--reference", required=True, metavar="DIR")
    parser.add_argument("--pairs", required=True, metavar="FILE.jsonl")
    parser.add_argument("--batch", type=int, default=8, metavar="PAIRS", help="of a step")
    parser.add_argument(
        "--cached-reference", action="store_true", help="its log-probs are found before the clock"
    )
    parser.add_argument("--steps", type=int, help="by default the file once")
    parser.add_argument("--row-tokens", type=int, help=f"by default {LONG} times the longest pair")
    parser.add_argument(
        "--microbatches", type=int, default=1, metavar="N", help="parts of a step, one by one"
    )
    parser.add_argument("--json", metavar="OUT")
    given = parser.parse_args()
    told(partial(measured, given), given.json)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """The record of a run of steps. Raises BadInput."""
    rows = read_ids("--pairs", given.pairs, ("prompt", "chosen", "rejected"))
    groups = [Group(prompt, responses) for prompt, *responses in rows]
    loader_of = partial(
        InOrder,
        step_groups=given.batch,
        row_tokens=given.row_tokens or LONG * max(group.tokens for group in groups),
        seed=0,
        steps=PLANNED,
        rows_multiple=jax.device_count() * given.microbatches,
    )
    steps = given.steps or max(1, len(groups) // given.batch)
    cached = given.cached_reference
    prepare = partial(prepared, given.policy, given.reference, groups, cached=cached)
    return record(timed(prepare, loader_of, steps, given.microbatches), cached)


if __name__ == "__main__":
    heap.tuned()
    main()
