"""How this process holds its memory, which matters where XLA runs on the CPU: it asks glibc for a
step's temporaries anew in every step, and Linux for several regions for every program."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"  # read by glibc when a process starts, and never again
KEPT = 2**40  # bytes: all that is freed; beyond a threshold it would go back to the system
WANTED = {"hugetlb": 1, "mmap_threshold": KEPT, "trim_threshold": KEPT}
REGIONS = Path("/proc/self/maps")  # of this process, a line each
GRANTED = Path("/proc/sys/vm/max_map_count")  # how many a process may have


def tuned() -> None:
    """Begin this process again, under its own number, with its memory on huge pages where Linux
    grants them, and kept when it is freed; unless the environment tunes glibc already.

    Else the temporaries come page by page, as faults, in every step, and the pages are more than
    the processor has addresses of at hand; docs/performance.md has what that costs. Call it before
    anything that may not happen twice.
    """
    _spare_libtpu()
    if sys.platform == "linux" and TUNABLES not in os.environ:
        settings = (f"glibc.malloc.{name}={value}" for name, value in WANTED.items())
        os.environ[TUNABLES] = ":".join(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _spare_libtpu() -> None:
    """Keep jax from loading libtpu, which is installed to compile as well, where it has no TPU to
    drive: 100 MB, and lines on stderr. jax_plugins are for devices of other kinds."""
    here = any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists()
    if find_spec("libtpu") and not here and not find_spec("jax_plugins"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def relieved() -> bool:
    """Let go of every compiled program where this process has a quarter of the regions of memory
    that Linux grants it; whether that was so. What is called again is compiled again.

    JAX keeps the programs of a run that is over, some 500 regions of 65,530 for a small one. With
    none left XLA dies of a segmentation fault, in the middle of a long sweep. Three quarters are
    room for what is compiled until the next look.
    """
    if not (REGIONS.exists() and GRANTED.exists()):
        return False
    with REGIONS.open() as regions:
        full = sum(1 for _ in regions) > int(GRANTED.read_text()) // 4
    if full:
        import jax

        jax.clear_caches()
    return full
