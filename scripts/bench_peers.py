"""dpo_jax, TRL and Tunix alternately on the same token ids: medians, and ratios to ours.

    python scripts/bench_peers.py --trl-python DIR/bin/python --tunix-python DIR/bin/python
        [--size S] [--rounds 3] [--steps 10] [--what live cached sampling] [--work DIR] [--json OUT]

Each peer has a virtual environment of its own: torch, trl, datasets and accelerate; google-tunix
and what it needs. Their scripts lie in `bench` of $DPO_JAX_SHARED, or of ../shared, and are copied
to --work, where make_data.py draws the token ids and the models once (it needs torch). live: DPO
steps that ask the reference; cached: its log-probs are found before; sampling: 16 prompts, 64 new
tokens. All on the CPU. A round runs every system once, so that what disturbs the machine disturbs
all. A ratio is ours / theirs within a round; its median is shown, with the least and the largest. A
system that cannot run is left out with the reason.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
from bench import WARM, commit, hardware, told

from dpo_jax.structs import BadInput

HOME = Path(__file__).resolve().parent
PROMPTS, NEW_TOKENS = 16, 64  # of the item of sampling, in bench_gen.py too
PACKAGES = {"trl": ("trl", "torch", "transformers"), "tunix": ("google-tunix", "jax")}
SCRIPTS = {
    "trl": ("bench_trl.py", "bench_gen.py", "quiet.py", "make_data.py"),
    "tunix": ("bench_tunix.py", "bench_gen.py", "quiet.py", "make_data.py"),
}


class System(NamedTuple):
    """One line of the table: what runs it ("ours", "trl" or "tunix"), its script and its words."""

    name: str
    owner: str
    words: str


WHAT = {
    "live": (
        System("dpo_jax", "ours", "bench.py"),
        System("TRL float32", "trl", "bench_trl.py --mode fp32"),
        System("TRL bfloat16", "trl", "bench_trl.py --mode bf16"),
        System("Tunix", "tunix", "bench_tunix.py --mode default"),
        System("Tunix, pads of each batch", "tunix", "bench_tunix.py --mode tight"),
    ),
    "cached": (
        System("dpo_jax", "ours", "bench.py --cached-reference"),
        System("TRL float32", "trl", "bench_trl.py --mode fp32_pre"),
        System("TRL bfloat16", "trl", "bench_trl.py --mode bf16_pre"),
        System("Tunix, values from outside", "tunix", "bench_tunix.py --mode pre"),
    ),
    "sampling": (
        System("dpo_jax", "ours", "bench_sampling.py"),
        System("transformers", "trl", "bench_gen.py hf {size}"),
        System("transformers, static cache", "trl", "bench_gen.py hf {size} static"),
        System("Tunix", "tunix", "bench_gen.py tunix {size}"),
    ),
}


def versions(owner: str, python: str | None) -> dict[str, str]:
    """What an interpreter has of a peer. Raises BadInput with the reason why it cannot run it."""
    if python is None:
        raise BadInput(f"no --{owner}-python")
    code = "import json, sys; from importlib.metadata import version\n"
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    try:
        return json.loads(_output([python, "-c", code, *PACKAGES[owner]], Path.cwd()))
    except OSError as error:
        raise BadInput(f"--{owner}-python {python}: {error.strerror}") from None


def copied(owner: str, work: Path) -> None:
    """A peer's scripts in the work folder, which they take their data from."""
    shared = Path(os.environ.get("DPO_JAX_SHARED", HOME.parent.parent / "shared")) / "bench"
    work.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS[owner]:
        if not (shared / name).exists():
            raise BadInput(f"{shared / name} is not there; DPO_JAX_SHARED names its folder")
        shutil.copyfile(shared / name, work / name)


def item(work: Path, size: str, torch_python: str | None) -> None:
    """The token ids and the models in the work folder, drawn where they are missing."""
    wanted = [work / "data" / f"{size}.jsonl", work / f"model_{size}", work / f"ref_{size}"]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing and torch_python is None:
        raise BadInput(f"{', '.join(missing)} missing; --trl-python makes them with make_data.py")
    if missing:
        _output([torch_python, "make_data.py"], work)


def command(system: System, python: str, given: argparse.Namespace) -> list[str]:
    """The words that run a system once; ours writes its record to ours.json."""
    work, size = Path(given.work).absolute(), given.size
    script, *words = system.words.format(size=size).split()
    if system.owner != "ours":
        train = [] if script == "bench_gen.py" else ["--size", size, "--steps", str(given.steps)]
        return [python, script, *words, *train]
    policy, data = ["--policy", f"{work}/model_{size}"], f"{work}/data/{size}.jsonl"
    out = ["--json", f"{work}/ours.json"]
    if script == "bench_sampling.py":
        counts = ["--batch", str(PROMPTS), "--max-tokens", str(NEW_TOKENS)]
        return [python, str(HOME / script), *words, *policy, "--prompts", data, *counts, *out]
    pairs = ["--reference", f"{work}/ref_{size}", "--pairs", data]
    steps = ["--steps", str(given.steps + WARM)]
    return [python, str(HOME / script), *words, *policy, *pairs, *steps, *out]


def measured(system: System, python: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run of a system under the names of our records. Raises BadInput where it fails."""
    work = Path(given.work).absolute()
    text = _output(command(system, python, given), work)
    if system.owner == "ours":
        found = json.loads((work / "ours.json").read_text())
        found.setdefault("tokens_per_second", found.get("new_tokens_per_second"))
    else:
        try:
            theirs = json.loads((text.strip().splitlines() or [""])[-1])
        except ValueError:
            raise BadInput("its last line is not a record") from None
        drawn = "new_tok_s" in theirs
        found = {
            "tokens_per_second": theirs["new_tok_s" if drawn else "tok_s"],
            "step_s": theirs["step_s"] / (NEW_TOKENS if drawn else 1),
            "peak_rss_mb": theirs["rss_mb"],
            "loss_first": None if drawn else theirs["losses"][0],
        }
    names = ("tokens_per_second", "step_s", "peak_rss_mb", "loss_first")
    return {name: found.get(name) for name in names}


def _output(words: Sequence[str | None], where: Path) -> str:
    """What a command prints. Raises BadInput with its last word where it fails."""
    own = {"PYTHONPATH", "JAX_COMPILATION_CACHE_DIR"}  # peers have other packages
    environment = {name: text for name, text in os.environ.items() if name not in own}
    environment["JAX_PLATFORMS"] = "cpu"
    if words[0] == sys.executable:  # this checkout, whatever is installed
        environment["PYTHONPATH"] = str(HOME.parent)
    done = subprocess.run(
        [str(word) for word in words], cwd=where, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise BadInput(f"exit {done.returncode}: {last}")
    return done.stdout


def alternated(
    what: str, pythons: dict[str, str], given: argparse.Namespace, skipped: list[dict[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """The runs of every system, a round after the other; one that fails runs no more."""
    runs: dict[str, list[dict[str, Any]]] = {}
    active = [system for system in WHAT[what] if system.owner in pythons]
    for number in range(given.rounds):
        for system in list(active):
            print(f"{what}, round {number + 1}: {system.name}", file=sys.stderr)
            try:
                found = measured(system, pythons[system.owner], given)
            except BadInput as error:
                if system.owner == "ours":
                    raise BadInput(f"{what}, dpo_jax: {error}") from None
                skipped.append({"what": what, "system": system.name, "reason": str(error)})
                active.remove(system)
                continue
            runs.setdefault(system.name, []).append(found)
    return runs


def lines(what: str, runs: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A line of the table for each system, ours first: medians, and ratios within a round."""
    ours = runs["dpo_jax"]
    for name, theirs in runs.items():
        paired = list(zip(ours, theirs, strict=False))  # a system that failed has fewer rounds
        speed = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in paired]
        memory = [one["peak_rss_mb"] / other["peak_rss_mb"] for one, other in paired]
        yield {
            "what": what,
            "system": name,
            "tokens_per_second": median(run["tokens_per_second"] for run in theirs),
            "step_s": median(run["step_s"] for run in theirs),
            "peak_rss_mb": median(run["peak_rss_mb"] for run in theirs),
            "loss_first": theirs[0]["loss_first"],
            "speed_ratio": median(speed),
            "speed_ratios": speed,
            "memory_ratio": median(memory),
            "runs": theirs,
        }


def show(found: dict[str, Any]) -> None:
    """The record as a table, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    heads = ("what", "system", "tokens/s", "step s", "peak MB", "first loss", "speed", "memory")
    table = Table(*heads, caption="speed, memory: ours / theirs")
    for line in found["systems"]:
        low, high = min(line["speed_ratios"]), max(line["speed_ratios"])
        loss = line["loss_first"]
        table.add_row(
            line["what"],
            line["system"],
            f"{line['tokens_per_second']:.0f}",
            f"{line['step_s']:.3g}",
            f"{line['peak_rss_mb']:.0f}",
            "" if loss is None else f"{loss:.6f}",
            f"{line['speed_ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{line['memory_ratio']:.2f}",
        )
    console = Console()
    console.print(table)
    for line in found["skipped"]:
        console.print(f"left out: {line['what']}, {line['system']}: {line['reason']}", markup=False)


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Run everything. Raises BadInput where ours cannot run."""
    if min(given.rounds, given.steps) < 1:
        raise BadInput("--rounds and --steps must be at least 1")
    asked = {"trl": given.trl_python, "tunix": given.tunix_python}
    work, pythons, has, skipped = Path(given.work), {"ours": sys.executable}, {}, []
    for owner, python in asked.items():
        try:
            has[owner] = versions(owner, python)
            copied(owner, work)
            pythons[owner] = python
        except BadInput as error:
            skipped.append({"what": "all", "system": owner, "reason": str(error)})
    item(work, given.size, pythons.get("trl"))
    systems = []
    for what in given.what:
        systems += lines(what, alternated(what, pythons, given, skipped))
    return {
        "size": given.size,
        "rounds": given.rounds,
        "steps": given.steps,
        "systems": systems,
        "skipped": skipped,
        "versions": has,
        "load": round(os.getloadavg()[0], 1),
        "hardware": hardware(),
        "commit": commit(),
    }


def interpreter(path: str) -> str:
    """An absolute path that still goes through the links of a virtual environment."""
    return str(Path(path).absolute())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl-python", type=interpreter, metavar="PYTHON")
    parser.add_argument("--tunix-python", type=interpreter, metavar="PYTHON")
    parser.add_argument("--size", choices=("S", "M"), default="S", help="of the item")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every system")
    parser.add_argument("--steps", type=int, default=10, help="that count in a run of training")
    parser.add_argument("--what", nargs="+", choices=tuple(WHAT), default=list(WHAT))
    parser.add_argument("--work", default="runs/peers", metavar="DIR", help="data and models")
    parser.add_argument("--json", metavar="OUT")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    told(partial(compared, given), given.json, show)


if __name__ == "__main__":
    main()
