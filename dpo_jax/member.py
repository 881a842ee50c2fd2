"""A run: what it is made of, where it writes, and what it is worth when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from dpo_jax import build, evaluate, metrics, optim, parts, rundir
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import Experiment
from dpo_jax.parallel import fetched, shardings
from dpo_jax.structs import Algorithm, Model, Params, TrainState, join


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run: where it lies, its policy, its last evaluation, and the bytes it held while
    it trained, by role (`held`)."""

    directory: epath.Path
    experiment: Experiment
    model: Model
    params: Params
    tokenizer: Any
    metrics: dict[str, float]
    held: Mapping[str, int] = field(default_factory=dict)


def finished(
    experiment: Experiment, mesh: jax.sharding.Mesh, directory: str | None = None
) -> Result | None:
    """A run that was finished before, its weights on the mesh; None where there is none.

    Raises: BadInput where its directory holds something else.
    """
    home = rundir.place(experiment, directory)
    rundir.check(experiment, home)
    stored = rundir.result(experiment, home)
    if stored is None:
        return None
    rundir.say(f"{home}: finished before, reused")
    return Result(
        home,
        experiment,
        parts.model(experiment),
        parts.finished(experiment, home, mesh),
        parts.tokenizer(experiment),
        stored["metrics"],
        stored.get("bytes", {}),
    )


class Member:
    """One run of the loop: what it is made of, where it writes, what it was last worth.

    numbers: options of the experiment that the compiled step takes as arguments, by dotted path.
    """

    def __init__(
        self,
        experiment: Experiment,
        setup: build.Setup,
        directory: str | None = None,
        numbers: dict[str, Any] | None = None,
    ):
        options, algorithm = experiment.run, setup.algorithm
        self.experiment, self.setup, self.numbers = experiment, setup, numbers or {}
        self.home = rundir.place(experiment, directory)
        self.updates = algorithm.passes * algorithm.minibatches  # optimizer updates a step
        self.steps = options.steps * self.updates
        self.rate = jax.jit(optim.rate(experiment.optim, self.steps))
        self.checkpoints = Checkpoints(self.home / "checkpoints", keep=options.keep)
        self.params: Params = None
        self.last: dict[str, float] = {}
        self.held: dict[str, int] = {}

    def start(self) -> TrainState:
        """The state before the first step."""
        tx = optim.transformation(self.experiment.optim, self.steps)
        return start_state(self.setup.algorithm, tx, self.setup, self.experiment.run.seed)

    def claim(self) -> None:
        """Make the directory this run's."""
        digest = build.data_digest(self.setup.loader.groups)
        rundir.claim(self.experiment, self.home, parts.config(self.experiment), digest)

    def measure(self, step: int, state: TrainState) -> None:
        """Held-out metrics and samples become `last`; the samples are written."""
        setup, wanted, values = self.setup, self.experiment.evaluation, {}
        state = replace(state, params=policy(state))
        if setup.held_out:
            values |= evaluate.held_out(
                setup.bind, self.numbers, state, setup.frozen, setup.held_out, setup.mesh
            )
        if setup.prompts:
            start = {} if setup.start is None else {"reference": setup.start}
            drawn = evaluate.completions(
                setup.model,
                state.params,
                {**setup.frozen, **start},
                setup.prompts,
                setup.tokenizer,
                rewards=setup.rewards,
                mesh=setup.mesh,
                key=jax.random.fold_in(jax.random.key(self.experiment.run.seed), step),
                **wanted.drawing,
            )
            values |= drawn.metrics()
            metrics.append_rows(self.home / "samples.jsonl", step, drawn.rows(step))
        self.last = {f"eval_{name}": value for name, value in values.items()}

    def seal(self, state: TrainState) -> None:
        """Finish the run with the weights that count."""
        self.checkpoints.wait()
        trained, experiment, setup = policy(state), self.experiment, self.setup
        self.params = join(trained, setup.frozen)
        own = self.params if experiment.parent is None else trained
        self.held = held(setup.model, state, setup.frozen, setup.judges)
        said = {"metrics": self.last, "bytes": self.held}
        rundir.seal(self.home, experiment.run.steps, own, said)

    def result(self) -> Result:
        """The finished run."""
        setup = self.setup
        policy = setup.model, self.params, setup.tokenizer
        return Result(self.home, self.experiment, *policy, self.last, self.held)


def policy(state: TrainState) -> Params:
    """The weights that count: their moving average where optim.ema keeps one."""
    average = optim.averaged(state.opt_state)
    return state.params if average is None else jax.jit(fetched)(average)


def held(
    model: Model, state: TrainState, frozen: Mapping[str, Params], judges: Params
) -> dict[str, int]:
    """Bytes of the arrays that a run holds from step to step, on all devices and the host together,
    copies on several of them counted once.

    policy: the decoder's weights, the frozen base of adapters too. heads: what is trained beside
    them: a value head or critic, the head of a reward. reference, optimizer; rewards: the models
    that score samples; memory: what else is kept, as a moving reference.
    """
    found = roles(model, state, frozen, judges)
    return {role: sum(x.nbytes for x in jax.tree.leaves(tree)) for role, tree in found.items()}


def roles(
    model: Model, state: TrainState, frozen: Mapping[str, Params], judges: Params
) -> dict[str, Any]:
    """What a run holds from step to step, by role, as `held` names them."""
    own = jax.eval_shape(model.init, jax.random.key(0)).keys()
    decoder = {name: x for name, x in state.params.items() if name in own}
    return {
        "policy": (decoder, frozen.get("base", {})),
        "heads": {name: x for name, x in state.params.items() if name not in own},
        "reference": frozen.get("reference", {}),
        "rewards": judges,
        "optimizer": state.opt_state,
        "memory": state.memory,
    }


def start_state(
    algorithm: Algorithm, tx: optax.GradientTransformation, setup: build.Setup, seed: int
) -> TrainState:
    """The state before the first step, every leaf on its shards."""
    key = jax.random.fold_in(jax.random.key(seed), 1)  # not the one that drew the weights
    params, memory = algorithm.init(key, setup.params, setup.frozen)
    opt_state = jax.eval_shape(tx.init, params)
    state = TrainState(jnp.int32(0), params, opt_state, memory, jnp.int32(0))
    places = shardings(setup.mesh, state, setup.host)
    opt_state = jax.jit(tx.init, out_shardings=places.opt_state)(params)
    return jax.device_put(replace(state, opt_state=opt_state), places)
