"""The matrix products of a step, counted over its program before XLA sees it.

XLA's own count takes the body of a loop once, and sees nothing of what a Pallas kernel does. Here
every product counts as often as the loops around it turn:

    flops = 2 x elements of the result x places that are summed over
    bytes = both operands and the result, as if what stands between products cost nothing

An array that depends on the batch lies on a device with its share of the rows, weights lie there
whole along the data axes (fsdp gathers them), and the tensor axis divides both. A product of two
arrays of the batch that sums over the rows gives a gradient, which is whole like the weights.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

ROWS = ("data", "fsdp")  # mesh axes that part the rows


class Work(NamedTuple):
    """What one device does in a step."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Any) -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, turns: float) -> "Work":
        """The work of so many turns."""
        return Work(self.flops * turns, self.bytes * turns)


class Counting(NamedTuple):
    """How much of an array lies on a device, and how often loops turn whose length data decide."""

    mesh: dict[str, int]  # axes that the compiler parts arrays along, not those a shard_map did
    blocks: int

    @property
    def turns(self) -> float:
        """How often a loop turns over the blocks of keys that a block of queries sees, on average:
        as if every row were one group. Its condition names no number; one that does counts so
        often, as if every token were scored."""
        return (self.blocks + 1) / 2

    def share(self, of_rows: bool) -> int:
        """The number of devices that share an array, and a product."""
        axes = (*ROWS, "tensor") if of_rows else ("tensor",)
        return int(np.prod([self.mesh.get(axis, 1) for axis in axes]))


Found = tuple[Work, list[bool]]  # and which outputs depend on the batch


def products(
    program: core.ClosedJaxpr, batch: Sequence[bool], mesh: dict[str, int], blocks: int
) -> Work:
    """The work of a traced program on one device.

    batch: which of its inputs come from the batch. mesh: sizes of the axes. blocks: in which
    attention walks over a row.
    """
    return _counted(program.jaxpr, list(batch), Counting(mesh, blocks))[0]


def _counted(program: Any, inputs: list[bool], how: Counting) -> Found:
    """program: a Jaxpr; inputs: which of its arguments depend on the batch."""
    of_rows = dict(zip(program.invars, inputs, strict=True))

    def depends(variable: Any) -> bool:
        return not isinstance(variable, core.Literal) and of_rows.get(variable, False)

    total = Work()
    for equation in program.eqns:
        given = [depends(x) for x in equation.invars]
        found, outputs = _equation(equation, given, how)
        total += found
        of_rows |= dict(zip(equation.outvars, outputs, strict=True))
    return total, [depends(x) for x in program.outvars]


def _equation(equation: Any, given: list[bool], how: Counting) -> Found:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation, given, how)
    if name == "scan":
        consts, carried = params["num_consts"], params["num_carry"]
        work, outputs = _loop(_open(params["jaxpr"]), given, how, slice(consts, consts + carried))
        return work.times(params["length"]), outputs
    if name == "while":
        own = given[params["cond_nconsts"] :]
        consts = params["body_nconsts"]
        work, outputs = _loop(_open(params["body_jaxpr"]), own, how, slice(consts, len(own)))
        most = _most(_open(params["cond_jaxpr"]))
        return work.times(how.turns if most is None else most), outputs
    if name == "cond":
        ways = [_counted(_open(way), given[1:], how) for way in params["branches"]]
        outputs = zip(*(outputs for _, outputs in ways), strict=True)
        return max(work for work, _ in ways), [any(each) for each in outputs]
    if name == "pallas_call":
        return _kernel(equation, given, how)
    if name == "shard_map":
        left = {k: n for k, n in how.mesh.items() if k not in params["newly_manual_axes"]}
        how = how._replace(mesh=left)
    inner = [_open(x) for x in params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
    whole = [x for x in inner if len(x.invars) == len(given)]
    if whole and len(whole[0].outvars) == len(equation.outvars):
        return _counted(whole[0], given, how)
    return Work(), [any(given)] * len(equation.outvars)


def _loop(body: Any, given: list[bool], how: Counting, carried: slice) -> Found:
    """One turn of a body that gives back what it carries first, once it is settled what of that
    depends on the batch."""
    given = list(given)
    while True:
        work, outputs = _counted(body, given, how)
        before = given[carried]
        after = [x or y for x, y in zip(before, outputs, strict=False)]
        if after == before:
            return work, outputs
        given[carried] = after


def _most(condition: Any) -> int | None:
    """How often a loop turns that counts from 0, where its condition says below which number."""
    compared = [x.invars[1] for x in condition.eqns if x.primitive.name == "lt"]
    found = [int(limit.val) for limit in compared if isinstance(limit, core.Literal)]
    return min(found, default=None)


def _product(equation: Any, given: list[bool], how: Counting) -> Found:
    (summed, _), (parallel, _) = equation.params["dimension_numbers"]
    left, right = (x.aval for x in equation.invars)
    (result,) = (x.aval for x in equation.outvars)
    over_rows = all(given) and not parallel
    flops = 2.0 * result.size * int(np.prod([left.shape[axis] for axis in summed]))
    sides = ((left, given[0]), (right, given[1]), (result, any(given) and not over_rows))
    moved = sum(x.size * x.dtype.itemsize / how.share(of_rows) for x, of_rows in sides)
    return Work(flops / how.share(any(given)), moved), [sides[2][1]]


def _kernel(equation: Any, given: list[bool], how: Counting) -> Found:
    """A kernel keeps what lies between its products on the chip; a grid whose length data decide
    has a step for each pair of blocks."""
    program, steps = equation.params["jaxpr"], equation.params["grid_mapping"].grid
    work, _ = _counted(program, [False] * len(program.invars), how._replace(mesh={}))
    turns = [n if isinstance(n, int) else how.blocks * how.turns for n in steps]
    arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
    moved = sum(x.size * x.dtype.itemsize for x in arrays if x.shape)
    flops = work.flops * float(np.prod(turns))
    return Work(flops, moved), [any(given)] * len(equation.outvars)


def _open(program: Any) -> Any:
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program
