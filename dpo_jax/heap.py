"""How glibc holds the memory of this process, which matters where XLA runs on the CPU: it asks for
a step's temporaries anew in every step."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"  # read by glibc when a process starts, and never again
KEPT = 2**40  # bytes: all that is freed; beyond a threshold it would go back to the system
WANTED = {"hugetlb": 1, "mmap_threshold": KEPT, "trim_threshold": KEPT}


def tuned() -> None:
    """Begin this process again, under its own number, with its memory on huge pages where Linux
    grants them, and kept when it is freed; unless the environment tunes glibc already.

    Else the temporaries come page by page, as faults, in every step, and the pages are more than
    the processor has addresses of at hand; docs/performance.md has what that costs. Call it before
    anything that may not happen twice.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        settings = (f"glibc.malloc.{name}={value}" for name, value in WANTED.items())
        os.environ[TUNABLES] = ":".join(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
