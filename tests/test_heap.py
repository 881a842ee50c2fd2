"""How the memory of a process lies: on huge pages, and kept, from its start on."""

import json
import os
import platform
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import heap

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what is tuned is glibc, which is not here"
)
# a process that says how often it began, and what it is
BEGUN = """
import json, os, sys
with open(sys.argv[1], "a") as file:
    print(os.getpid(), file=file)
from dpo_jax import heap
heap.tuned()
print(json.dumps([sys.argv[1:], os.environ["GLIBC_TUNABLES"], sys.warnoptions, os.getpid()]))
"""
# one that takes 64 MiB, writes them and gives them back, twice, and counts the faults of each time
FAULTS = """
import ctypes, json, resource, sys
from dpo_jax import heap
if sys.argv[1] == "tuned":
    heap.tuned()
libc, size = ctypes.CDLL(None), 2**26
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
found = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc(size)
    libc.memset(place, 1, size)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    asked, inside = False, False
    for line in open("/proc/self/smaps"):
        word = line.split()[0]
        if "-" in word:
            first, last = (int(end, 16) for end in word.split("-"))
            inside = first <= place + size // 2 < last
        elif inside and word == "VmFlags:":
            asked = "hg" in line.split()
    libc.free(place)
print(json.dumps([found, asked]))
"""


def said(
    program: str,
    *words: str,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
):
    """What a process without tuned memory, begun with these words, prints as JSON."""
    plain = {name: value for name, value in os.environ.items() if name != heap.TUNABLES}
    command = [sys.executable, *before, "-c", program, *words]
    run = subprocess.run(command, env=plain | (environment or {}), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_process_begins_again_once_with_its_words_and_its_number(tmp_path):
    starts, words = tmp_path / "starts", ["two words", "--flag", "-W", "option='x y'"]
    before = ("-W", "error::DeprecationWarning")
    told, tunables, warnings, number = said(BEGUN, str(starts), *words, before=before)
    assert told == [str(starts), *words]
    assert warnings == ["error::DeprecationWarning"]
    assert starts.read_text().split() == [str(number)] * 2, "twice, under one number"
    assert "glibc.malloc.hugetlb=1" in tunables.split(":")


def test_what_the_environment_tunes_stays(tmp_path):
    starts = tmp_path / "starts"
    own = {heap.TUNABLES: "glibc.malloc.arena_max=1"}
    assert said(BEGUN, str(starts), environment=own)[1] == own[heap.TUNABLES]
    assert len(starts.read_text().split()) == 1


def test_the_command_says_the_same_with_and_without():
    plain = {name: value for name, value in os.environ.items() if name != heap.TUNABLES}
    told = []
    for environment in (plain, plain | {heap.TUNABLES: ""}):
        command = [sys.executable, "-m", "dpo_jax", "--help"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        told.append((run.returncode, run.stdout, run.stderr))
    assert told[0] == told[1] and told[0][0] == 0 and "dpo-jax" in told[0][1]


@pytest.mark.parametrize(("chosen", "platforms"), [(None, "cpu"), ("tpu,cpu", "tpu,cpu")])
def test_libtpu_is_not_loaded_where_there_is_no_tpu(libtpu, chosen, platforms):
    if Path("/dev/vfio").exists() or any(Path("/dev").glob("accel*")) or find_spec("jax_plugins"):
        pytest.skip("there may be a TPU here, or another device with a plugin")
    plain = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    program = "from dpo_jax import heap; heap.tuned(); import jax; print(jax.config.jax_platforms)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=plain | ({"JAX_PLATFORMS": chosen} if chosen else {}),
        capture_output=True,
        text=True,
    )
    assert (run.stdout.strip(), run.stderr) == (platforms, "")


def test_memory_is_kept_and_asks_for_huge_pages():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[madvise]" not in mode.read_text():
        pytest.skip("the kernel grants huge pages always or never, not where they are asked for")
    (first, second), asked = said(FAULTS, "plain")
    assert first > 10_000 and second > 10_000, "64 MiB in pages of 4 KiB, each time"
    assert not asked
    (first, second), asked = said(FAULTS, "tuned")
    assert second < 100, "what was freed came back without a fault"
    assert asked


def test_programs_are_let_go_before_their_regions_run_out(tmp_path, monkeypatch):
    def regions() -> int:
        return len(heap.REGIONS.read_text().splitlines())

    traced = []

    @partial(jax.jit, static_argnums=1)
    def scaled(x: jax.Array, times: int) -> jax.Array:
        traced.append(times)
        return x * times

    def called() -> None:
        for times in range(40):
            assert scaled(jnp.float32(3), times) == 3 * times

    before, granted = regions(), tmp_path / "granted"
    monkeypatch.setattr(heap, "GRANTED", granted)
    called()
    full = regions()
    assert full > before + 40, "a program has more than one"
    granted.write_text(f"{5 * full}\n")
    assert not heap.relieved()
    called()
    assert len(traced) == 40
    granted.write_text(f"{3 * full}\n")
    assert heap.relieved() and regions() < full - 40
    called()
    assert len(traced) == 80
    monkeypatch.setattr(heap, "REGIONS", tmp_path / "of another system")
    assert not heap.relieved()
