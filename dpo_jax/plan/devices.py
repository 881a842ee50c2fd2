"""The devices that a step is planned for: those of a TPU topology, without one, or those here."""

import difflib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from dpo_jax import metrics
from dpo_jax.structs import BadInput

# by the name of a generation: a topology of it, and what libtpu calls one jax device for each chip
GENERATIONS = {
    "v4": ("v4:2x2x4", "megacore"),
    "v5e": ("v5e:4x4", "default"),
    "v5p": ("v5p:2x2x4", "megacore"),
    "v6e": ("v6e:4x4", "default"),
    "tpu7x": ("tpu7x:2x2x4", "default"),  # two devices a chip
}
_SHAPE = re.compile(r"\d+(x\d+){1,2}")
# libtpu looks for the TPUs of this machine and says on stderr that there are none
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it takes a lock that only a TPU wants
}


class Target(NamedTuple):
    """Devices, all of a kind; what is not known of one of them is None.

    memory: its bytes. peak: flop/s, bandwidth: bytes a second of its memory.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None
    bandwidth: float | None
    peak: float | None

    @property
    def kind(self) -> str:
        """What jax calls a device."""
        return self.devices[0].device_kind


def check(name: str) -> None:
    """Raises BadInput for what is not GENERATION:AxB or AxBxC in chips, as v5e:4x4."""
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS or not _SHAPE.fullmatch(shape):
        raise BadInput(f"--topology {name}: {_remedy(generation, shape)}")


def topology(name: str) -> Target:
    """The devices of a TPU topology. Raises: BadInput as `check`, and where libtpu is missing."""
    check(name)
    generation, _, shape = name.partition(":")
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput(
            f"--topology {name} wants libtpu, the compiler for TPUs, which runs without one: "
            "pip install 'dpo-jax[plan]'"
        )
    from jax.experimental import topologies

    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chip_config_name": GENERATIONS[generation][1]}
    if set(shape) <= set("1x"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # four where it is not said
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, NotImplementedError) as error:  # libtpu's word on shapes
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error)
        raise BadInput(f"--topology {name}: {reason}; {_remedy(generation, shape)}") from None
    kind = found.devices[0].device_kind
    return Target(name, found.devices, *metrics.listed_memory(kind), metrics.listed_peak(kind))


def _remedy(generation: str, shape: str) -> str:
    """The nearest name that is one."""
    names = {known: example for known, (example, _) in GENERATIONS.items()}
    near = names.get(generation)
    if near is None:
        # those of as many axes with the shape that was meant
        axes = shape.count("x") if _SHAPE.fullmatch(shape) else -1
        alike = [
            f"{known}:{shape}" if example.count("x", example.index(":")) == axes else example
            for known, example in names.items()
        ]
        (near,) = difflib.get_close_matches(f"{generation}:{shape}", alike, 1, 0.0)
    known = ", ".join(names.values())
    return f"nearest is {near}; write a generation and its chips, as in {known}"


def local() -> Target:
    """The devices here; the peak of kinds that are not listed is measured."""
    devices = jax.devices()
    kind = devices[0].device_kind
    listed, bandwidth = metrics.listed_memory(kind)
    peak = metrics.peak_flops()[0] / len(devices)  # virtual CPU devices share one machine
    name = f"{len(devices)} x {kind}, here"
    return Target(name, devices, metrics.local_memory() or listed, bandwidth, peak)
