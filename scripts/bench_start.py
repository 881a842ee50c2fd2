"""How long from the start of a process to the end of its first optimiser step.

    python scripts/bench_start.py --policy DIR --pairs FILE.jsonl [--batch 8] [--starts 5]
        [--tokenizer transformers] [--whole] [--json OUT]

DIR: a folder of Hugging Face. FILE: a pair of token ids a line, under prompt, chosen and rejected.
A start is `dpo-jax train` in a process of its own: an experiment of 1000 steps of DPO whose parent
is DIR, on texts of FILE's ids that a tokenizer reads. --tokenizer transformers: a folder of words,
read with AutoTokenizer; ids: a function of the experiment that reads numbers, so that transformers
is not imported. It ends when its first line of metrics is there, with --whole when the second is,
which waits until the other shapes of rows are compiled (second_s). cold: with an empty compilation
cache; warm: with the one that the cold start before left. They alternate; a first pair of starts
does not count, for it writes bytecode. Medians of seconds and of processor seconds, which other
work on the machine stretches less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
PHASES = ("interpreter", "imports", "materials", "setup", "compilation", "step")
CONTROLS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}

EXPERIMENT = """
from functools import partial

from dpo_jax import losses
from dpo_jax.algorithms.preference import preference
from dpo_jax.experiment import Data, Experiment, Optim, Run


class Ids:
    bos_token_id, eos_token_id, unk_token_id = 1, 2, 3
    added_tokens_decoder, all_special_ids, all_special_tokens = {{}}, [1, 2], ["<s>", "</s>"]

    def __len__(self):
        return {size}

    def __call__(self, texts, **options):
        return {{"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}}


EXPERIMENT = Experiment(
    name="start",
    parent={policy!r},
    data=Data(
        source={pairs!r}, tokenizer={tokenizer}, groups={batch}, row_tokens={row_tokens}
    ),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-5),
    run=Run(steps=1000),
)
"""


# Inside the process that starts


def marked(marks: str, argv: list[str]) -> None:
    """`dpo-jax ARGV`, which notes in a file when a phase ends and what jax says it compiled."""
    from dpo_jax import heap

    heap.tuned()  # as the command begins
    with open(marks, "w", buffering=1) as file:

        def mark(name: str, **more: float) -> None:
            said = {"name": name, "at": time.monotonic(), "cpu": time.process_time(), **more}
            file.write(json.dumps(said) + "\n")

        def ended(owner: Any, name: str, phase: str) -> None:
            function = getattr(owner, name)

            def called(*args: Any, **options: Any) -> Any:
                made = function(*args, **options)
                mark(phase)
                return made

            setattr(owner, name, called)

        mark("interpreter")
        import jax

        from dpo_jax import build, cli, train

        mark("imports")
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, duration_secs, **kwargs: mark(event, seconds=duration_secs)
        )
        ended(build, "materials", "materials")
        ended(build, "setup", "setup")
        ended(train.Stepper, "__init__", "compilation")
        cli.main(argv)


# Outside


def work(given: argparse.Namespace, home: Path) -> Path:
    """Writes pairs, tokenizer and experiment; the path of the experiment."""
    from bench import read_ids

    names = ("prompt", "chosen", "rejected")
    rows = read_ids("--pairs", given.pairs, names)
    size = json.loads((Path(given.policy) / "config.json").read_text())["vocab_size"]
    with (home / "pairs.jsonl").open("w") as file:
        for row in rows:
            texts = (" ".join(f"t{id}" for id in ids if id >= len(CONTROLS)) for ids in row)
            file.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")
    if given.tokenizer == "transformers":
        _write_tokenizer(size, home / "tokenizer")
    module = EXPERIMENT.format(
        size=size,
        policy=str(Path(given.policy).resolve()),
        pairs=str(home / "pairs.jsonl"),
        tokenizer="Ids" if given.tokenizer == "ids" else repr(str(home / "tokenizer")),
        batch=given.batch,
        row_tokens=2 * max(3 + sum(map(len, row)) for row in rows),
    )
    (home / "start.py").write_text(module)
    return home / "start.py"


def _write_tokenizer(size: int, folder: Path) -> None:
    """A folder of a tokenizer for words t4, t5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{id}": id for id in range(len(CONTROLS), size)}
    fast = Tokenizer(models.WordLevel(CONTROLS | words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **named).save_pretrained(str(folder))


def start(experiment: Path, cache: Path, number: int, whole: bool) -> dict[str, float]:
    """One start: seconds to the end of the first step, of the second where `whole`, and of the
    phases."""
    home = experiment.parent
    run, marks = home / f"run{number}", home / f"marks{number}"
    words = ["train", str(experiment), f"run.dir={run}"]
    left_out = ("PYTHONDONTWRITEBYTECODE", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: text for name, text in os.environ.items() if name not in left_out}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONPYCACHEPREFIX": str(home / "bytecode")}
    began = time.monotonic()
    with open(home / "said", "w") as said:
        process = subprocess.Popen(
            [sys.executable, __file__, "--inside", str(marks), *words],
            env=environment,
            stdout=said,
            stderr=said,
        )
        try:
            first, cpu = _line(process, run / "metrics.jsonl", 1)
            second = _line(process, run / "metrics.jsonl", 2)[0] if whole else None
        finally:
            process.kill()
            process.wait()
    found = {"first_s": first - began, "first_cpu_s": cpu}
    found |= {} if second is None else {"second_s": second - began}
    return found | _phases(marks, began, first, cpu)


def _line(process: subprocess.Popen, file: Path, count: int) -> tuple[float, float]:
    """When a file had so many lines, and the processor seconds of the process by then."""
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        if process.poll() is not None:
            said = (file.parent.parent / "said").read_text()
            raise SystemExit(f"the start failed:\n{said}")
        time.sleep(0.005)
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return time.monotonic(), sum(map(int, times)) / TICKS


def _phases(marks: Path, began: float, first: float, cpu: float) -> dict[str, float]:
    """Seconds and processor seconds of every phase, and of compilation over all of them."""
    lines = [json.loads(line) for line in marks.read_text().splitlines()]
    found, at, used = {}, began, 0.0
    ends = {each["name"]: (each["at"], each["cpu"]) for each in lines if each["name"] in PHASES}
    for phase, (end, total) in {**ends, "step": (first, cpu)}.items():
        found[f"{phase}_s"], found[f"{phase}_cpu_s"] = end - at, total - used
        at, used = end, total
    for event in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"):
        seconds = [
            each["seconds"] for each in lines if event in each["name"] and each["at"] <= first
        ]
        found[f"{event}_s"], found[f"{event}_count"] = sum(seconds), len(seconds)
    return found


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Medians over the starts. Raises BadInput."""
    from bench import commit, hardware

    kinds: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        experiment = work(given, Path(folder))
        for number in range(given.starts + 1):
            for kind, found in kinds.items():
                cache = Path(folder) / f"cache{number}"
                which = 2 * number + (kind == "warm")
                found.append(start(experiment, cache, which, given.whole))
    record: dict[str, Any] = {"tokenizer": given.tokenizer, "starts": given.starts}
    for kind, (_, *found) in kinds.items():
        record[kind] = {name: median(each[name] for each in found) for name in found[0]}
    load = round(os.getloadavg()[0], 1)
    return record | {"load": load, "hardware": hardware(), "commit": commit()}


def show(found: dict[str, Any]) -> None:
    """The record as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("seconds", "cold", "warm", title=f"tokenizer: {found['tokenizer']}")
    for name in found["cold"]:
        table.add_row(name, *(f"{found[kind][name]:.2f}" for kind in ("cold", "warm")))
    Console().print(table)


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        marked(sys.argv[2], sys.argv[3:])
        return
    from bench import told

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", required=True, metavar="DIR")
    parser.add_argument("--pairs", required=True, metavar="FILE.jsonl")
    parser.add_argument("--batch", type=int, default=8, metavar="PAIRS", help="of a step")
    parser.add_argument("--starts", type=int, default=5, help="of each kind")
    parser.add_argument("--tokenizer", choices=("transformers", "ids"), default="transformers")
    parser.add_argument("--whole", action="store_true", help="until the second step is done")
    parser.add_argument("--json", metavar="OUT")
    given = parser.parse_args()
    told(partial(measured, given), given.json, show)


if __name__ == "__main__":
    main()
