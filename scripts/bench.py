"""How long a DPO step takes, everything inside the clock.

    python scripts/bench.py --policy DIR --reference DIR --pairs FILE.jsonl [--batch 8] [--json OUT]

DIR: folders of Hugging Face. FILE: a pair of token ids a line, under prompt, chosen and rejected,
taken in the order of the file. float32, beta 0.1, AdamW at 1e-5, the reference computed in the
step. The clock runs over what the training loop does in a step: the batch is packed on the host,
sent to the device, the update dispatched, and the loss of the step before it read. The shapes are
those of a run of 1000 steps, all compiled before; the first two steps are not counted. Tokens are
those of both sequences, the prompt counted twice.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses, optim, parallel
from dpo_jax.algorithms.preference import preference
from dpo_jax.data.loader import Loader
from dpo_jax.logprobs import ROUNDED
from dpo_jax.models import hf
from dpo_jax.structs import BadInput, Batch, Group, TrainState
from dpo_jax.train import make_update

WARM = 2  # steps before the clock counts
PLANNED = 1000  # steps of the run whose shapes are compiled: a short one would have fewer


class InOrder(Loader):
    """Batches in the order of the file, as the peers take them."""

    def indices(self, step: int) -> np.ndarray:
        places = np.arange(step * self.step_groups, (step + 1) * self.step_groups)
        return places % len(self.groups)


class Timing(NamedTuple):
    """What a run of steps says."""

    loss_B: list[float]
    wall_B: np.ndarray  # seconds of every step
    cpu_B: np.ndarray  # seconds of this process, which others on the machine stretch less
    compile_s: float
    temporaries: int  # bytes that the largest program holds beside its arguments
    programs: int


def read_pairs(path: str) -> list[Group]:
    """The pairs of a file as groups. Raises BadInput by file and line."""
    groups = []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise BadInput(f"--pairs {path}: {error.strerror}; give a JSON Lines file") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            ids = [np.asarray(row[name], np.int32) for name in ("prompt", "chosen", "rejected")]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"--pairs {path} line {number}: {error!r}; a line holds lists of token ids under "
                "prompt, chosen and rejected"
            ) from None
        groups.append(Group(ids[0], ids[1:]))
    return groups


def timed(policy: str, reference: str, loader: Loader, steps: int) -> Timing:
    """Train for so many steps, on a mesh of all devices."""
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        model, params, config = hf.load(policy, sharding=mesh)
        _, anchor, other = hf.load(reference, sharding=mesh)
        if other.V != config.V:
            raise BadInput(f"--reference {reference}: {other.V} tokens, the policy has {config.V}")
        algorithm = preference(model, loss=partial(losses.dpo, beta=0.1))
        tx = optim.adamw(1e-5)
        key = jax.random.key(0)
        params, memory = algorithm.init(key, params, {})
        state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params), memory, jnp.int32(0))
        places = parallel.shardings(mesh, state)
        state, frozen = jax.device_put(state, places), {"reference": anchor}
        update = jax.jit(
            make_update(algorithm, tx),
            donate_argnums=0,
            out_shardings=(places, None),
            compiler_options=ROUNDED,
        )
        start, programs = time.perf_counter(), {}

        def ready(batch: Batch) -> Any:
            shape = (*batch.tokens_RT.shape, *batch.target_RN.shape, *batch.end_RGK.shape)
            if shape not in programs:
                programs[shape] = update.lower(state, frozen, batch, key).compile()
            return programs[shape]

        for shape in loader.ladder:
            ready(parallel.shard_batch(mesh, loader.example(shape)))
        compile_s, values, loss_B = time.perf_counter() - start, None, []
        marks = [(time.perf_counter(), time.process_time())]
        for step in range(steps):
            batch = parallel.shard_batch(mesh, loader.batch(step))
            state, now = ready(batch)(state, frozen, batch, key)
            if values is not None:
                loss_B.append(float(values["loss"]))
            values = now
            marks.append((time.perf_counter(), time.process_time()))
        loss_B.append(float(now["loss"]))
    wall_B, cpu_B = np.diff(np.array(marks), axis=0).T
    held = [program.memory_analysis() for program in programs.values()]
    temporaries = max((each.temp_size_in_bytes for each in held if each), default=0)
    return Timing(loss_B, wall_B, cpu_B, compile_s, temporaries, len(programs))


def record(loader: Loader, found: Timing) -> dict[str, Any]:
    """The keys of the JSON file."""
    counted = slice(min(WARM, len(found.wall_B) - 1), None)
    pairs = [[loader.groups[b] for b in loader.indices(i)] for i in range(len(found.wall_B))]
    token_B = np.array([sum(g.tokens + len(g.prompt) for g in groups) for groups in pairs])
    return {
        "loss_first": found.loss_B[0],
        "loss_last": found.loss_B[-1],
        "step_s": float(np.median(found.wall_B[counted])),
        "step_cpu_s": float(np.median(found.cpu_B[counted])),
        "tokens_per_second": float(np.median((token_B / found.wall_B)[counted])),
        "compile_s": found.compile_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--reference", required=True, metavar="DIR")
    parser.add_argument("--pairs", required=True, metavar="FILE.jsonl")
    parser.add_argument("--batch", type=int, default=8, metavar="PAIRS", help="of a step")
    parser.add_argument("--steps", type=int, help="by default the file once")
    parser.add_argument("--row-tokens", type=int, help="by default twice the longest pair")
    parser.add_argument("--json", metavar="OUT")
    given = parser.parse_args()
    try:
        groups = read_pairs(given.pairs)
        loader = InOrder(
            groups,
            step_groups=given.batch,
            row_tokens=given.row_tokens or 2 * max((group.tokens for group in groups), default=1),
            seed=0,
            steps=PLANNED,
            rows_multiple=jax.device_count(),
        )
        steps = given.steps or max(1, len(groups) // given.batch)
        found = record(loader, timed(given.policy, given.reference, loader, steps))
    except BadInput as error:
        print(f"bench.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    show(found)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
