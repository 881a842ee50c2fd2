"""Lines one step late and strict, resumed equal to unbroken, events, progress, throughput."""

import importlib
import json
import os
import pty
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import metrics
from dpo_jax.metrics import Writer
from dpo_jax.structs import BadInput


def rows(folder: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def writer(folder: Path, total: int = 10, **options: Any) -> Writer:
    quiet: dict[str, Any] = {"tensorboard": False, "progress": False}
    return Writer(folder, total=total, **(quiet | options))


def scalars(step: int) -> dict[str, jax.Array]:
    return {"loss": jnp.float32(1.0 / step), "grad_norm": jnp.float32(step)}


def test_a_push_writes_the_push_before(tmp_path):
    with writer(tmp_path) as log:
        for step in (1, 2, 3):
            log.push(step, scalars(step))
            assert [row["step"] for row in rows(tmp_path)] == list(range(1, step))
    assert rows(tmp_path)[2] == {"step": 3, "grad_norm": 3.0, "loss": float(np.float32(1 / 3))}


def test_a_push_does_not_wait_for_its_own_step(tmp_path):
    @jax.jit
    def slow(x):
        turned = jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ x), x)
        return {"loss": turned.sum()}

    x = jnp.full((600, 600), 1e-3)
    jax.block_until_ready(slow(x))  # compiled
    with writer(tmp_path) as log:
        log.push(1, scalars(1))
        running = slow(x)
        log.push(2, running)
        assert not running["loss"].is_ready()
        assert [row["step"] for row in rows(tmp_path)] == [1]
        log.push(3, scalars(3))
        assert running["loss"].is_ready()


def test_lines_are_strict_json_with_the_step_first_and_names_sorted(tmp_path):
    with writer(tmp_path) as log:
        log.push(
            1,
            {
                "z": jnp.float32(np.nan),
                "a": jnp.float32(np.inf),
                "rewards/chosen": jnp.float32(0.5),
                "count": jnp.int32(3),
            },
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": null, "count": 3, "rewards/chosen": 0.5, "z": null}\n'


def test_every_keeps_the_first_the_multiples_and_the_last(tmp_path):
    with writer(tmp_path, total=11, every=4) as log:
        for step in range(1, 12):
            log.push(step, scalars(step))
    assert [row["step"] for row in rows(tmp_path)] == [1, 4, 8, 11]


def test_tables_come_at_once_and_after_the_pending_line(tmp_path):
    with writer(tmp_path) as log:
        log.push(1, scalars(1))
        log.table(1, {"eval_loss": 0.25, "eval_count": 7})
        assert list(rows(tmp_path)[1].items()) == [
            ("step", 1),
            ("eval_count", 7),
            ("eval_loss", 0.25),
        ]
        assert rows(tmp_path)[0]["loss"] == 1.0


def test_a_resumed_run_has_the_lines_of_an_unbroken_one(tmp_path):
    def run(folder, numbers, start=0, killed=False):
        path = folder / "metrics.jsonl"
        with writer(folder, start=start) as log:
            for step in numbers:
                log.push(step, scalars(step))
                if step in (3, 6):
                    log.flush()  # where the checkpoints are
            left = path.read_bytes()
        if killed:
            path.write_bytes(left)  # as it was before the orderly end

    run(tmp_path / "whole", range(1, 11))
    run(tmp_path / "broken", range(1, 6), killed=True)  # at 5 with line 5 pending, saved at 3
    assert [row["step"] for row in rows(tmp_path / "broken")] == [1, 2, 3, 4]
    run(tmp_path / "broken", range(4, 7), start=3, killed=True)  # again, saved at 6
    run(tmp_path / "broken", range(7, 11), start=6)
    whole, broken = (tmp_path / name / "metrics.jsonl" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in broken.parent.iterdir()) == ["metrics.jsonl"]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    for _ in range(2):
        with writer(tmp_path) as log:
            log.push(1, scalars(1))
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    writer(tmp_path, start=2).close()
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot ours\n{"step": 2}\n')
    with pytest.raises(BadInput, match=r"metrics\.jsonl:2"):
        writer(tmp_path, start=2)
    assert path.read_text() == '{"step": 1}\nnot ours\n{"step": 2}\n'


def test_throughput_is_tokens_over_the_time_between_lines(tmp_path):
    with writer(tmp_path, total=5, every=2, peak=1e4) as log:
        for step in range(1, 6):
            log.push(step, scalars(step), tokens=100, flops=500.0)
            time.sleep(0.05)
            if step == 3:
                with log.paused():
                    time.sleep(1.5)  # an evaluation
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 4, 5]
    for row in found:
        # 100 tokens in 50 ms or a little more, with one step in a line or two; 130 with the pause
        assert 250 < row["tokens_per_second"] <= 2000
        # 5 flops a token, 1e4 flop/s would be an mfu of 1
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 5 / 1e4)


def test_the_share_of_waiting_is_of_the_time_between_lines(tmp_path):
    """What was waited while the clock stood counts as little as that time does."""
    with writer(tmp_path, total=4) as log:
        for step in range(1, 5):
            log.push(step, scalars(step), tokens=100, waited=0.02)
            time.sleep(0.1)
            if step == 2:
                with log.paused():
                    pass
    first, paused, third, last = (row["data_wait_share"] for row in rows(tmp_path))
    for share in (first, third):  # 20 of 100 ms or a little more
        assert 0.02 < share <= 0.2
    assert paused == last == 0  # nothing was dispatched behind them on the clock


def test_no_throughput_without_tokens_or_peak(tmp_path):
    with writer(tmp_path) as log:
        log.push(1, scalars(1), flops=1.0)
    assert set(rows(tmp_path)[0]) == {"step", "loss", "grad_norm"}


def test_closing_twice_is_harmless_and_an_error_loses_no_line(tmp_path):
    with pytest.raises(KeyError), writer(tmp_path) as log:
        log.push(1, scalars(1))
        raise KeyError
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def event_scalars(folder: Path) -> list[dict[tuple[str, int], float]]:
    """The scalars of every event file, read as TFRecords: length, its crc, the data, its crc."""
    from tensorboardX.record_writer import masked_crc32c

    proto = importlib.import_module(
        "tensorboardX.proto.event_pb2"
    )  # its names are made at run time
    files = []
    for path in sorted(folder.iterdir()):
        data, found = path.read_bytes(), {}
        while data:
            (length,), (crc,) = struct.unpack("Q", data[:8]), struct.unpack("I", data[8:12])
            assert crc == masked_crc32c(data[:8])
            event = proto.Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            if event.HasField("session_log"):
                found["start", event.step] = float(event.session_log.status)
            data = data[16 + length :]
        files.append(found)
    return files


def test_tensorboard_events_hold_the_lines_and_hide_what_was_dropped(tmp_path):
    with writer(tmp_path, tensorboard=True) as log:
        log.push(1, {"loss": jnp.float32(0.5), "rewards/chosen": jnp.float32(np.nan)})
        log.push(2, {"loss": jnp.float32(0.25)})
        log.table(2, {"eval_loss": 0.75})
    with writer(tmp_path, tensorboard=True, start=1) as log:
        log.push(2, {"loss": jnp.float32(0.125)})
    first, resumed = event_scalars(tmp_path / "tensorboard")
    start = 1.0  # SessionLog.START: TensorBoard drops earlier events from this step on
    assert first == {
        ("start", 1): start,
        ("loss", 1): 0.5,
        ("loss", 2): 0.25,
        ("eval_loss", 2): 0.75,
    }
    assert resumed == {("start", 2): start, ("loss", 2): 0.125}


def test_progress_without_a_terminal_is_a_line_every_tenth(tmp_path, capsys):
    with writer(tmp_path, total=40, progress=True, title="dpo") as log:
        for step in range(1, 41):
            log.push(step, scalars(step))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"dpo: {n}/40" for n in range(4, 41, 4)]
    assert all("/s, " in line and " left, loss 0." in line for line in lines)
    assert "0:00:00 left" in lines[-1] and lines[-1].endswith("loss 0.025")


def test_progress_of_a_resumed_run_goes_on(tmp_path, capsys):
    with writer(tmp_path, total=10, progress=True, start=8) as log:
        log.push(9, scalars(9))
        log.push(10, scalars(10))
    heads = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert heads == ["train: 9/10", "train: 10/10"]


def test_progress_over_items_yields_them(capsys):
    assert list(metrics.progress("abc", "spell")) == ["a", "b", "c"]
    assert "spell: 3/3" in capsys.readouterr().err


BAR = """
from dpo_jax import metrics
with metrics.Progress(3, "train") as outer:
    for item in range(3):
        for inner in metrics.progress(range(2), "sample"):
            pass
        outer.advance(note="loss 0.5")
"""


def test_progress_on_a_terminal_is_a_bar_also_inside_another(repository):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BAR],
        stderr=theirs,
        cwd=repository,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    text = seen.decode()
    assert process.wait() == 0, text
    for part in ("train", "3/3", "/s, ", "loss 0.5", "sample", "2/2", "━"):
        assert part in text


def test_flops_per_token_are_palms():
    # 2204.02311 appendix B: 6 N + 12 L H E T for a training step, a third of it for a forward pass
    params = {"q_DHE": jnp.zeros((4, 2, 3)), "norm_D": jnp.zeros(4)}
    assert metrics.flops_per_token(params, L=5, H=2, E=3, span=10) == 6 * 28 + 12 * 5 * 2 * 3 * 10
    assert metrics.flops_per_token(params, passes=1) == 2 * 28


def test_peak_of_the_cpu_is_measured_and_said():
    peak, source = metrics.peak_flops()
    assert "cpu" in source and "measured" in source and source.startswith("1 x")
    # reached by a matmul timed here; a busy machine has slowed either by seven
    x = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    reached = 2 * 1024**3 / min(seconds)
    assert reached / 20 < peak < reached * 20


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_the_longest_name_in_the_kind_counts(kind, peak):
    assert metrics.listed_peak(kind) == peak


def test_unknown_kinds_are_not_listed():
    assert metrics.listed_peak("cpu") is None
    assert metrics.listed_memory("cpu") == (None, None)


def test_memory_is_that_of_a_device():
    assert metrics.listed_memory("TPU v5 lite") == (16 * 2**30, 819e9)
    assert metrics.listed_memory("TPU v5") == (95 * 2**30, 2765e9)
    # two devices share the 192 GiB and 7.38 TB/s of a chip
    assert metrics.listed_memory("TPU7x") == (96 * 2**30, 3690e9)
    assert {name for name in metrics.MEMORIES if "TPU" in name} <= metrics.PEAKS.keys()
