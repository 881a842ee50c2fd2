"""Small runs that differ only in numbers, trained together in one compiled program.

The letter M counts them. What differs (beta, label smoothing, learning rate, seed) is an argument
of the program, and the algorithm is built inside the mapped function; every run writes its own
directory, as if it were alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import build, optim, parallel, parts, rundir
from dpo_jax.data.loader import alike
from dpo_jax.experiment import Experiment, canonical, describe, options, with_numbers
from dpo_jax.feed import Feed
from dpo_jax.logprobs import ROUNDED
from dpo_jax.member import Member, Result, finished
from dpo_jax.structs import BadInput, Batch, Metrics, TrainState
from dpo_jax.train import loop, make_update, run

NOT_COMPARED = {"name": "", "run.seed": 0, "run.dir": None}  # members differ in them freely
AT_ONCE = {"cpu": 1}  # members that one operation spans; all where a backend is not named
Numbers = dict[str, float]


def run_all(
    members: Sequence[Experiment], directories: Sequence[str | None] | None = None
) -> list[Result]:
    """Every member trained, or read back; those that can share a program are trained together.

    directories: where each writes, as in `train.run`.
    Errors: as `train.run`; BadInput where an algorithm needs the value of a number while it is
    compiled, and so cannot share a program.
    """
    homes = directories or [None] * len(members)
    results: dict[int, Result] = {}
    for places in programs(members):
        missing = []
        for i in places:
            done = finished(members[i], parts.mesh(members[i]), homes[i])
            results |= {} if done is None else {i: done}
            missing += [i] if done is None else []
        pairs = [(members[i], homes[i]) for i in missing]
        # states of several runs are one array, which has no place in the memory of the host
        alone = len(pairs) < 2 or members[places[0]].run.offload != "none"
        trained = [run(each, directory=home) for each, home in pairs] if alone else _together(pairs)
        results |= dict(zip(missing, trained, strict=True))
    return [results[i] for i in range(len(members))]


def programs(members: Sequence[Experiment]) -> list[list[int]]:
    """The places of the members, parted by program, in order of their first member."""
    listed, eligible = _numbers(members)
    parted: dict[str, list[int]] = {}
    for i, (member, found) in enumerate(zip(members, listed, strict=True)):
        same = dict.fromkeys(eligible & found.keys(), 0.0) | NOT_COMPARED
        parted.setdefault(canonical(describe(with_numbers(member, same))), []).append(i)
    return list(parted.values())


def differing(members: Sequence[Experiment]) -> list[Numbers]:
    """The numbers of each member that are not the same in all of them, by dotted path."""
    listed, eligible = _numbers(members)
    paths = [path for path in sorted(eligible) if len({found[path] for found in listed}) > 1]
    return [{path: float(found[path]) for path in paths} for found in listed]


def _numbers(members: Sequence[Experiment]) -> tuple[list[dict[str, Any]], set[str]]:
    """The options of each member, and the paths of those that a compiled program can take."""
    listed = [dict(options(member)) for member in members]
    floats = {path for found in listed for path, now in found.items() if type(now) is float}
    rates = {"optim.learning_rate"}
    return listed, {path for path in floats if path.startswith("algorithm.") or path in rates}


def _together(pairs: Sequence[tuple[Experiment, str | None]]) -> list[Result]:
    """Train runs of one program, none of which is finished."""
    experiments = [experiment for experiment, _ in pairs]
    first, numbers = experiments[0], differing(experiments)
    if jax.device_count() > 1:
        rundir.say(f"{first.name}: runs that train together use one device of those that are there")
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    materials = build.materials(first, run)
    with jax.set_mesh(mesh):
        setup = build.setup(first, mesh, materials)
        if not setup.algorithm.fused:
            return [run(each, directory=home) for each, home in pairs]
        members = [
            Member(each, build.reseeded(setup, each, materials, own), home, own)
            for (each, home), own in zip(pairs, numbers, strict=True)
        ]
        try:
            loop(members, Together)
        except jax.errors.ConcretizationTypeError as error:
            raise BadInput(
                f"{first.name}: the value of one of {', '.join(numbers[0])} is needed while the "
                f"step is compiled, train these runs one by one ({str(error).splitlines()[0]})"
            ) from error
    return [member.result() for member in members]


class Together:
    """The steps of M runs; it owns their states, stacked, which every update gives away."""

    def __init__(self, members: Sequence[Member], states: Sequence[TrainState], start: int):
        self.members, self.setup = members, members[0].setup
        self.loaders = [member.setup.loader for member in members]
        self.one_data = len({member.experiment.run.seed for member in members}) == 1
        self.keys_M = jax.vmap(jax.random.key)(
            jnp.array([member.experiment.run.seed for member in members], jnp.uint32)
        )
        self.feed = Feed(self._packed)
        self.numbers_M = _stacked([member.numbers for member in members])
        self._states_M = _stacked(states)
        update = _program(members[0], self.one_data)
        self.update = jax.jit(update, donate_argnums=1, compiler_options=ROUNDED)
        self.parts = jax.jit(lambda tree_M: [_part(tree_M, i) for i in range(len(members))])

    def warm_up(self) -> int:
        """Nothing: a shape is compiled when it comes."""
        return 0

    def state(self, i: int) -> TrainState:
        """The state of member i."""
        return _part(self._states_M, i)

    def advance(self, step: int) -> list[tuple[Metrics, int]]:
        """Dispatch one step of every member: its metrics, on the device, and its tokens."""
        host, batch = self.feed.batch(step, self._states_M.skipped)
        self._states_M, values_M = self.update(
            self.numbers_M, self._states_M, self.setup.frozen, batch, self.keys_M, step
        )
        tokens = [build.real_tokens(each) for each in host]
        tokens = tokens * len(self.members) if self.one_data else tokens
        return list(zip(self.parts(values_M), tokens, strict=True))

    def _packed(self, step: int) -> tuple[list[Batch], Batch]:
        """The batches of a step on the host, and as the step takes them."""
        host = [self.loaders[0].batch(step)] if self.one_data else alike(self.loaders, step)
        return host, jax.tree.map(jnp.asarray, host[0]) if self.one_data else _stacked(host)


def _program(member: Member, one_data: bool) -> Callable[..., tuple[TrainState, Metrics]]:
    """One step of all members as a function of stacked numbers, states and batches."""
    experiment, model = member.experiment, member.setup.model
    microbatches = experiment.run.microbatches

    def update(numbers_M, states_M, frozen, batch: Batch, keys_M, step):
        def one(numbers, state, key, *own):
            changed = with_numbers(experiment, numbers)
            tx = optim.transformation(changed.optim, member.steps)
            advance = make_update(changed.algorithm(model), tx, microbatches=microbatches)
            return advance(state, frozen, *(own or (batch,)), jax.random.fold_in(key, step))

        mapped = (numbers_M, states_M, keys_M) + (() if one_data else (batch,))
        at_once = AT_ONCE.get(jax.default_backend())
        if at_once is None:
            return jax.vmap(one)(*mapped)
        # a batched product of small matrices is slower on a CPU than one after the other
        return jax.lax.map(lambda each: one(*each), mapped, batch_size=at_once)

    return update


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)


def _part(tree_M: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree_M)
