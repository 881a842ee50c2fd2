"""What a run tells while it runs: JSON lines, TensorBoard events, progress, throughput.

Metrics of a step are read one step late, when the next step is already dispatched, so that the
device never waits for the host. `step` is the number of updates done, 1 for the first.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax.structs import BadInput, Params

# Progress


@functools.cache
def _console():
    """One console for all bars: rich stacks those that run inside each other."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """Rate and time left: a bar where stderr is a terminal, else a plain line every tenth.

    `done` items of `total` were done before (a resumed run). A context manager.
    """

    def __init__(self, total: int, title: str, *, done: int = 0):
        self.total, self.title, self.done = total, title, done
        self._passed = deque([(time.monotonic(), done)], maxlen=100)  # the rate is over these
        self._bar = _bar(total, title, done) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` items more are done; `note` is shown behind rate and time left."""
        tenth = self._tenth()
        self.done += count
        self._passed.append((time.monotonic(), self.done))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, state=self._state(note))
        elif self._tenth() > tenth:
            print(f"{self.title}: {self.done}/{self.total}, {self._state(note)}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _tenth(self) -> int:
        return 10 * self.done // max(self.total, 1)

    def _state(self, note: str) -> str:
        (start, first), (now, done) = self._passed[0], self._passed[-1]
        rate = (done - first) / max(now - start, 1e-9)
        left = timedelta(seconds=round(max(self.total - done, 0) / max(rate, 1e-9)))
        return f"{rate:.3g}/s, {left} left" + (f", {note}" if note else "")


def _bar(total: int, title: str, done: int):
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[state]}"),
    )
    bar = rich.Progress(*columns, console=_console())
    bar.add_task(title, total=total, completed=done, state="")
    bar.start()
    return bar


def progress(items: Collection, title: str) -> Iterator:
    """The items, with their progress shown."""
    with Progress(len(items), title) as shown:
        for item in items:
            yield item
            shown.advance()


# Throughput

# Dense bfloat16 flop/s of one jax device, from the vendors' data sheets. A v2 or v3 device is half
# a chip, and so is a TPU7x device.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "V100": 125e12,
    "T4": 65e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "B200": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


# Memory of one jax device and how fast it is read, from Google's pages on each generation
# (docs.cloud.google.com/tpu/docs/v5e and so on).
GB, GIB = 1e9, 2**30
MEMORIES = {
    "TPU v4": (32 * GIB, 1200 * GB),
    "TPU v5": (95 * GIB, 2765 * GB),
    "TPU v5p": (95 * GIB, 2765 * GB),
    "TPU v5 lite": (16 * GIB, 819 * GB),
    "TPU v5e": (16 * GIB, 819 * GB),
    "TPU v6 lite": (32 * GIB, 1638 * GB),
    "TPU v6e": (32 * GIB, 1638 * GB),
    "TPU7x": (96 * GIB, 3690 * GB),
}


def flops_per_token(
    params: Params, *, L: int = 0, H: int = 0, E: int = 0, span: float = 0.0, passes: int = 3
) -> float:
    """Flops a token costs: passes * (2 * parameters + 4 * L * H * E * span).

    As in PaLM (2204.02311, appendix B), whose 6 N + 12 L H E T is passes=3: forward once, backward
    twice as much. A reference that is run too makes it 4, a forward pass alone is 1. `span`: keys
    that a token attends to, on average. Recomputation does not count.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return float(passes * (2 * parameters + 4 * L * H * E * span))


def listed_peak(kind: str) -> float | None:
    """The peak of one device of this kind: that of the longest name in it, None where none is."""
    return _listed(PEAKS, kind)


def listed_memory(kind: str) -> tuple[int | None, float | None]:
    """(bytes, bytes a second) of the memory of one device of this kind; None = not known."""
    return _listed(MEMORIES, kind) or (None, None)


def local_memory() -> int | None:
    """Bytes of the first device here; None where it does not say, as a CPU does not."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _listed(table: Mapping[str, Any], kind: str) -> Any:
    known = [name for name in table if name in kind]
    return table[max(known, key=len)] if known else None


def peak_flops() -> tuple[float, str]:
    """Flop/s of all devices together and where the number comes from, for `mfu`.

    Known TPUs and NVIDIA cards: the table of dense bfloat16 peaks. Else, the CPU among them, the
    best of a few square matrix products is measured; virtual CPU devices share one machine.
    """
    kind = jax.devices()[0].device_kind
    peak = listed_peak(kind)
    if peak is not None:
        return peak * jax.device_count(), f"{jax.device_count()} x {kind}, data sheet, bfloat16"
    on_cpu = jax.default_backend() == "cpu"
    dtype, devices = (jnp.float32, 1) if on_cpu else (jnp.bfloat16, jax.device_count())
    name = jnp.dtype(dtype).name
    return devices * _measured_flops(dtype), f"{devices} x {kind}, measured matmul, {name}"


@functools.cache
def _measured_flops(dtype: Any, width: int = 1024) -> float:
    square = jnp.ones((width, width), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


# The writer


def _number(value: Any) -> float | int | None:
    """A host number; None, which is JSON's null, where it is not finite."""
    number = np.asarray(value).item()
    return number if math.isfinite(number) else None


def _trim(path: epath.Path, start: int) -> None:
    """Drop the lines after step `start`, and a last line that a kill cut short; atomically."""
    if not path.exists():
        return
    text = path.read_text()
    lines = text.splitlines()
    kept = []
    for place, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if place < len(lines):
                raise BadInput(
                    f"{path}:{place}: not a line of this run; move the file away"
                ) from None
            continue
        if step <= start:
            kept.append(line + "\n")
    if "".join(kept) != text:
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(kept))
        beside.replace(path)


def append_rows(path: epath.Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append the rows of a step as JSON lines; what a killed run wrote at or after it goes."""
    if jax.process_index() == 0:
        _trim(path, step - 1)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


class Writer:
    """Writes the metrics of a run of `total` steps, `start` of them done, to `directory`.

    metrics.jsonl: one strict JSON object a line, `step` first, then the names sorted; what is not
    finite is null. tensorboard/: the same as event files (without the nulls). Lines after `start`,
    left by a run that was killed behind its last checkpoint, are dropped, so a resumed run has the
    lines of an unbroken one. `every`: steps between lines (the first and the last always).
    `peak`: flop/s that count as mfu 1. Only the first process writes, all of them wait. A context
    manager.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        total: int,
        every: int = 1,
        start: int = 0,
        peak: float | None = None,
        tensorboard: bool = True,
        progress: bool = True,
        title: str = "train",
    ):
        self.total, self.every, self.peak = total, every, peak
        self._pending: tuple | None = None
        self._since: float | None = None  # the clock; None while it stands
        self._seconds = self._waited = self._tokens = self._flops = 0.0  # since the last line
        self._note = ""
        self._read: Mapping[str, Any] = {}
        self._lines = self._events = self._progress = None
        if jax.process_index() == 0:
            folder = epath.Path(directory)
            folder.mkdir(parents=True, exist_ok=True)
            _trim(folder / "metrics.jsonl", start or -1)  # a run without a checkpoint starts anew
            self._lines = (folder / "metrics.jsonl").open("a")
            self._events = _events(folder / "tensorboard", start) if tensorboard else None
            self._progress = Progress(total, title, done=start) if progress else None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def push(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        tokens: int = 0,
        flops: float = 0.0,
        waited: float = 0.0,
    ) -> Mapping[str, Any]:
        """Take the device scalars of `step`, just dispatched; wait for and write the push before.

        Returns what was read last, the host values of an earlier step ({} before the second push).

        `tokens` and `flops` of the step become tokens_per_second and mfu: their sums over the
        steps since the last line, over the time these took. The clock starts with the first push
        (its compilation does not count) and runs from read to read. `waited`: seconds before this
        dispatch in which the device lacked a batch; data_wait_share is their share of the time.
        """
        self._waited += 0.0 if self._since is None else waited
        self.flush()
        if self._since is None:
            self._since = time.perf_counter()
        self._pending = (step, metrics, tokens, flops)
        return self._read

    def flush(self) -> None:
        """Wait for and write the last push. A must before a checkpoint of its step is saved:
        otherwise a run that is killed then and resumed there lacks the line."""
        if self._pending is None or self._since is None:
            return
        (step, metrics, tokens, flops), self._pending = self._pending, None
        self._read = values = jax.device_get(dict(metrics))
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._tokens += tokens
        self._flops += flops
        if step == 1 or step % self.every == 0 or step == self.total:
            self._write(step, values | self._throughput())
            self._seconds = self._waited = self._tokens = self._flops = 0.0
        if self._progress is not None:
            self._progress.advance(step - self._progress.done, self._note)

    def table(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write host metrics (an evaluation's, their names as given) at once, after the pending."""
        self.flush()
        self._write(step, metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Flush, then let the clock stand: an evaluation or a save counts against no step."""
        self.flush()
        yield
        self._since = None

    def close(self) -> None:
        """Write what is pending and close the files; more than once does no harm."""
        try:
            self.flush()
        finally:
            for sink in (self._lines, self._events, self._progress):
                if sink is not None:
                    sink.close()
            self._lines = self._events = self._progress = None

    def _throughput(self) -> dict[str, float]:
        found = {}
        if self._tokens:
            found["tokens_per_second"] = self._tokens / max(self._seconds, 1e-9)
            found["data_wait_share"] = self._waited / max(self._seconds, 1e-9)
        if self._flops and self.peak:
            found["mfu"] = self._flops / max(self._seconds, 1e-9) / self.peak
        return found

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._lines is None:
            return
        row = {"step": int(step)} | {name: _number(values[name]) for name in sorted(values)}
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if self._events is not None and name != "step" and value is not None:
                self._events.add_scalar(name, value, step)
        if row.get("loss") is not None:
            self._note = f"loss {row['loss']:.4g}"


def _events(folder: epath.Path, start: int):
    """A TensorBoard writer that hides what an earlier run wrote after step `start`."""
    from tensorboardX import SummaryWriter

    # files are named by the second they start in: the suffix keeps a resumed run's own
    return SummaryWriter(
        os.fspath(folder), purge_step=start + 1, filename_suffix=f".from{start}", flush_secs=10
    )
