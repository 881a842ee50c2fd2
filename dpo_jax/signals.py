"""Signals that end a run at the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list it gives; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()  # elsewhere Python forbids it
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
