"""Batches for the device, and how long it had nothing to do for want of one."""

import time
from collections.abc import Callable
from typing import Any


class Feed:
    """The batches of a run; each is made while the device works on the step before it.

    make: step -> what the step takes, on its way to the device.
    took: seconds that the last batch was being made. waited: those in which the device may have
    stood still for it: all, where it had finished the step before by the time the batch was there,
    else none.
    """

    def __init__(self, make: Callable[[int], Any]):
        self._make = make
        self.took = self.waited = 0.0

    def batch(self, step: int, before: Any) -> Any:
        """The batch of a step; `before`: an array of jax that the step before it makes."""
        start = time.perf_counter()
        made = self._make(step)
        self.took = time.perf_counter() - start
        self.waited = self.took if before.is_ready() else 0.0
        return made
