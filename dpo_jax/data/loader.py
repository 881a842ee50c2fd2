"""Batches as a pure function of (seed, step), in a few shapes that are known before the first step.

A step is a fixed number of groups. How many rows they need, and how long, changes from step to
step; every new shape costs a compilation and every padded place costs time. So the plans of the
steps are simulated first and a ladder of at most six shapes is fitted to them; a step takes the
smallest one that holds it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from dpo_jax.data.packing import Bins, Shape, arrangements, extent, lay_out, plan, scored_tokens
from dpo_jax.structs import BadInput, Batch, Group

Chunk = np.ndarray  # indices of the groups of one step

LADDER = 6  # shapes
SIMULATED = 256  # steps
COMPILATION = 5  # steps that one more shape must save, for it costs a compilation


class Loader:
    """Shuffled batches of `step_groups` groups; each epoch is a new permutation of all groups.

    Every group comes exactly once an epoch; a step may hold the end of one epoch and the start of
    the next. row_tokens bounds the row length, rows are a multiple of rows_multiple (data shards x
    microbatches). record_RG is `group.record`, or the index in `groups` where that is None.
    ladder: the shapes, smallest first. fill: real tokens / places of the rows, over the simulated
    steps.
    Errors: BadInput for no groups, a count below 1, or a group longer than row_tokens.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        step_groups: int,
        row_tokens: int,
        seed: int,
        steps: int,
        rows_multiple: int = 1,
    ):
        _check(groups, step_groups=step_groups, steps=steps, rows_multiple=rows_multiple)
        if seed < 0:
            raise BadInput(f"seed={seed}; it must not be negative")
        self.groups = groups
        self.step_groups = step_groups
        self.row_tokens = row_tokens
        self.seed = seed
        self.simulated = min(steps, SIMULATED)
        self._permutation = lru_cache(maxsize=4)(self._permuted)
        self._planner = _Planner(groups, row_tokens, rows_multiple)
        chosen = np.linspace(0, steps - 1, self.simulated).round().astype(int)
        chunks = [self.indices(int(step)) for step in chosen]
        gain = max(0.005, COMPILATION / steps)
        self.ladder, self.fill = self._planner.ladder(
            chunks, limit=LADDER, gain=gain, spare=steps > self.simulated
        )

    def batch(self, step: int, shape: Shape | None = None) -> Batch:
        """The packed groups of a step (numpy, raw weights), whatever was asked before.

        shape: one that they fit, in place of the smallest of the ladder.
        """
        ladder = self.ladder if shape is None else (shape,)
        return self._planner.batch(self.indices(step), ladder)

    def fits(self, step: int, shape: Shape) -> bool:
        """Whether a shape holds the groups of a step."""
        return any(_holds(shape, need) for need, _ in self._planner.needs(self.indices(step)))

    def smallest(self, step: int) -> Shape:
        """The shape that holds the groups of a step in as few rows as can be."""
        return self._planner.needs(self.indices(step))[0][0]

    def indices(self, step: int) -> np.ndarray:
        """Indices of the step's groups: its stretch of all epochs' permutations on one line."""
        places = np.arange(step * self.step_groups, (step + 1) * self.step_groups)
        epochs, within = np.divmod(places, len(self.groups))
        return np.concatenate(
            [self._permutation(int(epoch))[within[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    def example(self, shape: Shape) -> Batch:
        """One group in a batch of this shape, to compile for."""
        return lay_out([self.groups[0]], [[0]], shape, record_B=[0])

    def describe(self) -> str:
        """One line: groups a step, the ladder, the fill and what it was measured on."""
        shapes = ", ".join(f"{shape.rows}x{shape.tokens}" for shape in self.ladder)
        return (
            f"{len(self.groups)} groups, {self.step_groups} a step; rows x tokens: {shapes};"
            f" {self.fill:.1%} of the places hold tokens ({self.simulated} steps simulated)"
        )

    def _permuted(self, epoch: int) -> np.ndarray:
        # Raw bits sorted, because NumPy keeps only the bit streams the same between versions.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        return np.argsort(bits.random_raw(len(self.groups)), kind="stable")


def alike(loaders: Sequence[Loader], step: int) -> list[Batch]:
    """The batches of several loaders over the same groups at one step, all of one shape.

    Rung i of the common ladder holds what rung i of every own ladder does; the first that holds
    all of them is taken, else a shape made for them.
    """
    rungs = range(max(len(loader.ladder) for loader in loaders))
    common = [
        _widest([loader.ladder[min(i, len(loader.ladder) - 1)] for loader in loaders])
        for i in rungs
    ]
    fitting = (s for s in common if all(loader.fits(step, s) for loader in loaders))
    shape = next(fitting, None) or _widest([loader.smallest(step) for loader in loaders])
    return [loader.batch(step, shape) for loader in loaders]


def _widest(shapes: Sequence[Shape]) -> Shape:
    return Shape(*(max(counts) for counts in zip(*shapes, strict=True)))


def sequential(
    groups: Sequence[Group], *, step_groups: int, row_tokens: int, rows_multiple: int = 1
) -> Iterator[Batch]:
    """Every group exactly once, in order, in batches of one shape; the last one is padded.

    Empty slots have weight 0 and record -1. Errors as Loader.
    """
    _check(groups, step_groups=step_groups, steps=1, rows_multiple=rows_multiple)
    planner = _Planner(groups, row_tokens, rows_multiple)
    starts = range(0, len(groups), step_groups)
    chunks = [np.arange(start, min(start + step_groups, len(groups))) for start in starts]
    ladder, _ = planner.ladder(chunks, limit=1, gain=1.0, spare=False)
    return (planner.batch(chunk, ladder) for chunk in chunks)


class _Planner:
    """Plans for chunks of groups, and the ladder of shapes that holds them."""

    def __init__(self, groups: Sequence[Group], row_tokens: int, rows_multiple: int):
        self.groups = groups
        self.sizes = [group.tokens for group in groups]
        self.scored = [scored_tokens(group) for group in groups]
        self.row_tokens = row_tokens
        self.rows_multiple = rows_multiple
        self.responses = max([1, *(len(group.responses) for group in groups)])
        # Row lengths are multiples of a power of two, a 16th to a 32nd of the longest row.
        self.grain = max(8, 1 << max(0, row_tokens.bit_length() - 6))
        longest = int(np.argmax(self.sizes))
        if self.sizes[longest] > row_tokens:
            raise BadInput(
                f"group {longest} takes {self.sizes[longest]} tokens and data.row_tokens is"
                f" {row_tokens}; row_tokens={self.sizes[longest]} would do"
            )

    def batch(self, chunk: Chunk, ladder: Sequence[Shape]) -> Batch:
        """The chunk in the first shape of the ladder that holds it, else in a shape of its own."""
        needs = self.needs(chunk)
        pairs = ((shape, bins) for shape in ladder for need, bins in needs if _holds(shape, need))
        shape, bins = next(pairs, needs[0])
        groups = [self.groups[b] for b in chunk]
        own = [group.record for group in groups]
        records = [b if record is None else record for b, record in zip(chunk, own, strict=True)]
        return lay_out(groups, bins, shape, record_B=records)

    def needs(self, chunk: Chunk) -> list[tuple[Shape, Bins]]:
        """Ways to lay the chunk out: in as few rows as it can, then in more and shorter ones."""
        groups = [self.groups[b] for b in chunk]
        sizes, scored = [self.sizes[b] for b in chunk], [self.scored[b] for b in chunk]
        fewest = _up(len(plan(sizes, self.row_tokens)), self.rows_multiple)
        return [
            (self._rounded(extent(groups, bins), rows), bins)
            for rows in range(fewest, fewest + 3 * self.rows_multiple, self.rows_multiple)
            for bins in arrangements(sizes, scored, rows, self.row_tokens, self.grain)
        ]

    def ladder(
        self, chunks: Sequence[Chunk], *, limit: int, gain: float, spare: bool
    ) -> tuple[tuple[Shape, ...], float]:
        """(shapes, fill): at most `limit` shapes with little padding over the chunks.

        Each but the first saves at least `gain` of the cost. spare: the last is roomier than any
        chunk needs, for chunks that are not among these.
        """
        needs = [[need for need, _ in self.needs(chunk)] for chunk in chunks]
        options = sorted({need for several in needs for need in several})
        largest = Shape(*(max(count) for count in zip(*(n[0] for n in needs), strict=True)))
        options.append(self._roomier(largest, chunks) if spare else largest)
        option_O5 = np.array(options)
        fits_BO = np.stack([(option_O5 >= np.array(n)[:, None]).all(-1).any(0) for n in needs])
        cost_O = np.array([_cost(option) for option in options])
        cost_BO = np.where(fits_BO, cost_O, np.inf)
        chosen = _choose(cost_BO, [len(options) - 1] if spare else [], limit=limit, gain=gain)
        taken = set(np.array(chosen)[cost_BO[:, chosen].argmin(1)])
        chosen = sorted(taken | set(chosen if spare else []), key=lambda o: cost_O[o])
        place_B = option_O5[np.array(chosen)[cost_BO[:, chosen].argmin(1)], :2].prod(1)
        tokens = sum(self.sizes[b] for chunk in chunks for b in chunk)
        return tuple(options[o] for o in chosen), tokens / int(place_B.sum())

    def _roomier(self, shape: Shape, chunks: Sequence[Chunk]) -> Shape:
        """The shape with room for a tenth more tokens and scored tokens than any chunk has."""
        most = max(sum(self.sizes[b] for b in chunk) for chunk in chunks)
        rows = _up(-(-most * 11 // (10 * self.row_tokens)), self.rows_multiple)
        scored = min(_up(shape.scored * 11 // 10, self.grain), self.row_tokens)
        return Shape(
            max(shape.rows, rows), self.row_tokens, scored, shape.slots + 4, shape.responses
        )

    def _rounded(self, need: Shape, rows: int) -> Shape:
        """The need in whole grains, so that few shapes differ."""
        tokens = min(_up(need.tokens, self.grain), self.row_tokens)
        scored = min(_up(need.scored, self.grain // 2), tokens)
        return Shape(rows, tokens, scored, _up(need.slots, 4), self.responses)


def _choose(cost_BO: np.ndarray, fixed: list[int], *, limit: int, gain: float) -> list[int]:
    """Columns with a small mean over rows of the least chosen cost (inf = does not hold).

    Greedy, each column saving at least `gain`, then every choice is reconsidered given the others.
    """
    chosen = fixed or [int(cost_BO.mean(0).argmin())]
    best_B = cost_BO[:, chosen].min(1)
    while len(chosen) < limit:
        mean_O = np.minimum(best_B[:, None], cost_BO).mean(0)
        if mean_O.min() > (1 - gain) * best_B.mean():
            break
        chosen = [*chosen, int(mean_O.argmin())]
        for c in range(len(fixed), len(chosen)):
            others_B = cost_BO[:, chosen[:c] + chosen[c + 1 :]].min(1, initial=np.inf)
            chosen[c] = int(np.minimum(others_B[:, None], cost_BO).mean(0).argmin())
        best_B = cost_BO[:, chosen].min(1)
    return chosen


def _holds(shape: Shape, need: Shape) -> bool:
    return all(has >= wants for has, wants in zip(shape, need, strict=True))


def _cost(shape: Shape) -> float:
    """Time, in places of a row: a scored place costs about a quarter more, in the head."""
    return shape.rows * (shape.tokens + shape.scored / 4)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _check(groups: Sequence[Group], **counts: int) -> None:
    if not groups:
        raise BadInput("no groups to make batches of; data.source holds none that can be used")
    for name, count in counts.items():
        if count < 1:
            raise BadInput(f"{name}={count}; it must be at least 1")
