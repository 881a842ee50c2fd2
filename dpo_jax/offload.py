"""What run.offload moves into the memory of the host: a run's frozen reference, and what its
optimizer keeps.

It lies there between steps; a step fetches it where it is used and writes back what changes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.experiment import Experiment, Run
from dpo_jax.parallel import HOST, away, copies, fetched, returned, shardings
from dpo_jax.structs import Array, BadInput, Params
from dpo_jax.values import show

# option -> names at the top of `frozen` and of a TrainState
NAMES = {
    "none": (),
    "reference": ("reference",),
    "optimizer": ("opt_state",),
    "both": ("reference", "opt_state"),
}


def check(run: Run, device: Any) -> None:
    """BadInput for a device that cannot reach the memory of its host, and for a reference that is
    not there to be moved."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if run.offload != "none" and HOST not in kinds:
        raise BadInput(
            f"run.offload={run.offload}: a device of the backend {device.platform} has the "
            f"memories {', '.join(kinds)}, {HOST} is not among them; take run.offload=none"
        )
    if run.reference == "cached" and "reference" in NAMES[run.offload]:
        raise BadInput(
            f"run.offload={run.offload}: run.reference=cached holds no reference that could be "
            "moved; leave one of them out"
        )


def names(experiment: Experiment, frozen: Mapping[str, Params]) -> tuple[str, ...]:
    """The names below which arrays lie in the memory of the host, for `parallel.shardings`.

    frozen: what the run holds frozen. Raises: BadInput where it has no reference to be moved.
    """
    option = experiment.run.offload
    if "reference" in NAMES[option] and not jax.tree.leaves(frozen.get("reference", {})):
        raise BadInput(
            f"run.offload={option}: {show(experiment.algorithm)} holds no frozen reference of its "
            f"own here; take run.offload={'optimizer' if option == 'both' else 'none'}"
        )
    return NAMES[option]


def placed(
    experiment: Experiment, mesh: jax.sharding.Mesh, frozen: Mapping[str, Params], kept: Params
) -> tuple[dict[str, Params], tuple[str, ...]]:
    """(frozen, names): what a run holds frozen, each where it belongs, and `names` of it.

    kept: the part that is copied, for the loop gives the policy's arrays away.
    """
    whole = {**frozen, **copies(kept)}
    host = names(experiment, whole)
    return jax.device_put(whole, shardings(mesh, whole, host)), host


def reference(run: Run) -> str:
    """run.reference; auto means live where the weights are to lie in the memory of the host."""
    auto = run.reference == "auto" and "reference" in NAMES[run.offload]
    return "live" if auto else run.reference


def applied(
    step: Callable[[Any], tuple[Params, Any]], good: Array, params: Params, opt_state: Any
) -> tuple[Params, Any]:
    """step(opt_state) -> (params, opt_state) where `good`, else both as they were: in a program.

    Of a state in the memory of the host, what belongs to one weight is fetched and written back
    before the next is, each in a branch of its own: out of a branch XLA moves no transfer, where
    else it would fetch all at once and early. Every turn traces the whole step for the sake of one
    weight; the compiler drops what the turn does not use.
    """
    leaves, structure = jax.tree.flatten(opt_state)
    weights, of_params = jax.tree.flatten(params)
    if not any(map(away, leaves)):
        moved = step(opt_state)
        kept = params, opt_state
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, kept)
    new = list(leaves)
    for turn, own in enumerate(_belonging(opt_state, params)):

        def one(mine: list[Any], turn: int = turn, own: list[int] = own) -> list[Any]:
            def stepped(_: jax.Array, mine: list[Any]) -> list[Any]:
                old = fetched(leaves)
                for i, x in zip(own, mine[1:], strict=True):
                    old[i] = x
                moved, state = map(jax.tree.leaves, step(structure.unflatten(old)))
                return [moved[turn], *(state[i] for i in own)]

            # What a loop carries is written where it lies: new moments take the place of old ones.
            # XLA would undo a loop that it knows to turn once.
            weight, *state = jax.lax.fori_loop(0, jnp.int32(good), stepped, fetched(mine))
            return [weight, *(returned(x, leaves[i]) for i, x in zip(own, state, strict=True))]

        mine = [weights[turn], *(leaves[i] for i in own)]
        weights[turn], *found = jax.lax.cond(good, one, lambda mine: mine, mine)
        for i, x in zip(own, found, strict=True):
            new[i] = x
    return of_params.unflatten(weights), structure.unflatten(new)


def _belonging(opt_state: Any, params: Params) -> list[list[int]]:
    """For every weight the leaves of the state whose paths end in its own; the first has those of
    no weight, as counters."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found: list[list[int]] = [[] for _ in paths]
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(opt_state)):
        ends = [turn for turn, own in enumerate(paths) if path[len(path) - len(own) :] == own]
        found[max(ends, key=lambda turn: len(paths[turn]), default=0)].append(i)
    return found
