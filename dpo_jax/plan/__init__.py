"""What a train step needs of devices that need not be here: memory, work, time at the least.

The step is the run's own, on a mesh of the devices of a TPU topology or of those here, compiled
ahead of time from shapes: no weights are read or made. Memory is the compiler's; flops and bytes
moved are counted over the program (`products`); collectives are those of the compiled text.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax

from dpo_jax import parallel
from dpo_jax.experiment import Experiment
from dpo_jax.models.schedule import block_of
from dpo_jax.plan import devices
from dpo_jax.plan.collectives import Sent, collectives
from dpo_jax.plan.devices import Target
from dpo_jax.plan.products import Work, products
from dpo_jax.plan.traced import Data, Step, read, step
from dpo_jax.structs import BadInput

_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (  # what XLA for TPUs says of a step that does not fit
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """A step on one kind of devices; bytes, flops and seconds of one device.

    held: what stays there from step to step by role, and the batch. hosted: what stays in the
    memory of its host, by role. needed: the most that is there
    at once, None where the compiler does not say. temporaries: the part of it that is not `held`,
    activations and gradients among it; None where the step does not fit. memory, peak, bandwidth:
    of the device, None = not known. sent: collectives by kind, None where it does not fit or XLA
    does not say.
    """

    name: str
    kind: str
    devices: int
    mesh: Mapping[str, int]
    rows: int  # of one update, on all devices
    row_tokens: int
    notes: Sequence[str]
    held: Mapping[str, int]
    hosted: Mapping[str, int]
    needed: int | None
    temporaries: int | None
    memory: int | None
    work: Work
    peak: float | None
    bandwidth: float | None
    sent: Mapping[str, Sent] | None
    fits: bool

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that products and memory take, by what takes it."""
        found = {"compute": (self.work.flops, self.peak)}
        found["memory"] = (self.work.bytes, self.bandwidth)
        return {bound: amount / rate for bound, (amount, rate) in found.items() if rate}

    @property
    def total_memory(self) -> int:
        """Bytes of all devices together, 0 where it is not known."""
        return self.devices * (self.memory or 0)

    def record(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        sent = self.sent and {kind: each._asdict() for kind, each in self.sent.items()}
        return asdict(self) | {
            "work": self.work._asdict(),
            "sent": sent,
            "seconds": self.seconds,
        }


def plans(
    experiment: Experiment, topologies: Sequence[str] = (), *, rows: int | None = None
) -> list[Plan]:
    """A plan for every topology, or for the devices here where there is none.

    rows: of the batch, in place of those of the data. Raises: BadInput for a name that is no
    topology, a mesh that does not divide its devices, and what `train.run` refuses.
    """
    if rows is not None and rows < 1:
        raise BadInput(f"--rows {rows}: give 1 or more")
    for name in topologies:
        devices.check(name)
    targets = [devices.topology(name) for name in topologies] or [devices.local()]
    for target in targets:
        _mesh(experiment, target)  # all are refused before one is compiled
    data = read(experiment, rows)
    return [planned(experiment, target, data, rows) for target in targets]


def smallest(found: Sequence[Plan]) -> Plan | None:
    """Of the plans that fit the one whose devices have the least memory together."""
    fitting = [plan for plan in found if plan.fits]
    return min(fitting, key=lambda plan: (plan.total_memory, plan.devices), default=None)


def _mesh(experiment: Experiment, target: Target) -> jax.sharding.Mesh:
    try:
        return parallel.make_mesh(**asdict(experiment.run.mesh), devices=target.devices)
    except BadInput as error:
        raise BadInput(f"{target.name}: {error}") from None


def planned(experiment: Experiment, target: Target, data: Data, rows: int | None = None) -> Plan:
    """The plan for devices of one kind, of a batch that `data` or `rows` gives."""
    mesh = _mesh(experiment, target)
    made = step(experiment, mesh, data, rows=rows, memory=target.memory)
    with jax.set_mesh(mesh):
        blocks = -(-made.row_tokens // block_of(made.row_tokens))
        work = products(made.traced.jaxpr, made.of_batch, dict(mesh.shape), blocks)
        work += Work(bytes=made.moved)
        needed, memory, program = _compiled(made, target)
    if needed is not None:
        needed += made.held["rewards"]  # they lie there, and are no argument of an update
    spare = None if needed is None or memory is None else memory - needed
    notes = [*made.notes]
    return Plan(
        name=target.name,
        kind=target.kind,
        devices=len(target.devices),
        mesh=dict(mesh.shape),
        rows=made.rows,
        row_tokens=made.row_tokens,
        notes=notes,
        held=made.held,
        hosted=made.hosted,
        needed=needed,
        temporaries=None if program is None or needed is None else needed - sum(made.held.values()),
        memory=memory,
        work=work,
        peak=target.peak,
        bandwidth=target.bandwidth,
        sent=None if program is None else _sent(program, notes),
        fits=program is not None and (spare is None or spare >= 0),
    )


class _Compiled(NamedTuple):
    """What the compiler says. needed: bytes on a device, memory: bytes that it has, None = not
    known. program: None where it does not fit."""

    needed: int | None
    memory: int | None
    program: Any


def _compiled(made: Step, target: Target) -> _Compiled:
    memory = target.memory
    try:
        with nullcontext() if target.devices[0] in jax.local_devices() else _unkept():
            compiled = made.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = next(filter(None, (form.search(str(error)) for form in _USED)), None)
        if used is None:
            return _Compiled(None, memory, None)
        needed, room = (int(float(used[i]) * _UNITS[used[i + 1]]) for i in (1, 3))
        return _Compiled(needed, room, None)
    said = compiled.memory_analysis()
    if said is None:
        return _Compiled(None, memory, compiled)
    needed = said.argument_size_in_bytes + said.temp_size_in_bytes
    needed += said.output_size_in_bytes - said.alias_size_in_bytes
    needed += said.generated_code_size_in_bytes
    return _Compiled(needed, memory, compiled)


@contextmanager
def _unkept() -> Iterator[None]:
    """Without the compilation cache, which cannot read programs for devices that are not here."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _sent(program: Any, notes: list[str]) -> dict[str, Sent] | None:
    """The collectives of a compiled program; None, and a note, where XLA cannot write it."""
    try:
        return collectives(program.as_text())
    except jax.errors.JaxRuntimeError as error:  # jax 0.10.2 fails at some programs for a v5p
        notes.append(f"collectives are not known: {str(error).splitlines()[0]}")
        return None
