"""The one loop: batch, collect, measure, split, objective, update, metrics.

`run(experiment)` makes what is missing (parents, sampled data), trains, and returns the weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from dpo_jax import build, heap, metrics, offload, optim, parts, rundir
from dpo_jax.data.packing import pack
from dpo_jax.experiment import Experiment
from dpo_jax.feed import Feed
from dpo_jax.logprobs import ROUNDED
from dpo_jax.member import Member, Result, finished
from dpo_jax.models import attention
from dpo_jax.parallel import abstract, on_host, shard_batch, shardings
from dpo_jax.signals import interruptible
from dpo_jax.structs import Algorithm, Batch, Group, Metrics, Params, TrainState

SKIPS = 10  # consecutive updates without a finite gradient after which a run stops


def make_update(
    algorithm: Algorithm, tx: optax.GradientTransformation, *, microbatches: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One optimizer step as a pure function (state, frozen, batch, key) -> (state, metrics).

    A fused algorithm completes the batch in the same program. Weights are final before the split,
    so gradients and metrics of microbatches add up. A step whose gradient is not finite leaves
    parameters and moments as they were and is counted. What the optimizer keeps is fetched from
    where it lies when there is a gradient.
    """
    gradient = jax.grad(algorithm.objective, has_aux=True)

    def update(state: TrainState, frozen: Params, batch: Batch, key: jax.Array):
        memory = state.memory
        if algorithm.fused:
            batch, memory = algorithm.collect(state, frozen, batch, key)
            batch = algorithm.measure(batch)

        def value(part: Batch):
            return gradient(state.params, frozen, memory, part, key)

        if microbatches == 1:
            grads, values = value(batch)
        else:
            parts = split(batch, microbatches)
            zero = jax.eval_shape(value, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)

            def add(total, part: Batch):
                return jax.tree.map(jnp.add, total, value(part)), None

            (grads, values), _ = jax.lax.scan(add, zero, parts)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)

        def moved(opt_state: Any) -> tuple[Params, Any]:
            updates, opt_state = tx.update(grads, opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        params, opt_state = offload.applied(moved, finite, state.params, state.opt_state)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        changed = {"params": params, "opt_state": opt_state, "memory": memory}
        state = replace(state, step=state.step + 1, skipped=skipped, **changed)
        return state, values | {"grad_norm": norm, "skipped": skipped}

    return update


def jit_update(
    algorithm: Algorithm, tx: optax.GradientTransformation, places: TrainState, microbatches: int
) -> Any:
    """`make_update` as it runs: the state is given away, the new one lies where `places` says."""
    update = make_update(algorithm, tx, microbatches=microbatches)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, None), compiler_options=ROUNDED)


def split(batch: Batch, parts: int) -> Batch:
    """Every row array as (parts, R / parts, ...), a share of each device's rows in every part."""
    shared = batch.shared
    rows = replace(batch, shared={})
    cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), rows)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *jnp.shape(x))), shared)
    return replace(cut, shared=copies)


def run(experiment: Experiment, *, directory: str | None = None) -> Result:
    """Train an experiment and return it; a finished run is read back, a broken one resumed.

    directory: where it writes; run.dir by default, runs/<name>-<digest> without either. Parents
    and sampled data are made when missing, under runs/.
    Raises: BadInput for input that cannot be used; SystemExit 143 or 130 after SIGTERM or SIGINT,
    with a checkpoint saved.
    """
    mesh = parts.mesh(experiment)
    done = finished(experiment, mesh, directory)
    if done is not None:
        return done
    materials = build.materials(experiment, run)
    with jax.set_mesh(mesh):
        member = Member(experiment, build.setup(experiment, mesh, materials), directory)
        loop([member], Stepper)
    return member.result()


def loop(members: Sequence[Member], stepper: Callable[..., Any]) -> None:
    """Train the members to their end, all in the same steps; each writes as if it were alone.

    stepper: (members, states, step reached) -> Stepper. Their options of `run` differ in the seed
    at most. Raises SystemExit after SIGTERM or SIGINT, with checkpoints saved.
    """
    heap.relieved()
    first, options = members[0], members[0].experiment.run
    attends = attention.in_use(options.dtype)
    states, start = _restored(members)
    rehearse(first.setup, states[0])
    steps = stepper(members, states, start)
    for member in members:
        member.claim()
    _announce(members, start, attends)
    with ExitStack() as open_files, interruptible() as signalled:
        writers = [open_files.enter_context(_writer(member, members, start)) for member in members]
        if start == options.steps:  # it was broken between its last checkpoint and the seal
            for i, member in enumerate(members):
                member.measure(start, steps.state(i))
        if start == 0 and options.eval_every:
            _evaluate(members, writers, steps, 0)
        for step in range(start, options.steps):
            _profile(options.profile, start, step, first.home)
            advanced = steps.advance(step)
            _push(members, writers, advanced, step, steps.feed.waited)
            if step == start:
                _warm_up(members, writers, steps)
            done = step + 1 == options.steps
            if done or _due(options.eval_every, step + 1):
                _evaluate(members, writers, steps, step + 1)
            if signalled or done or _due(options.save_every, step + 1):
                for i, (member, writer) in enumerate(zip(members, writers, strict=True)):
                    with writer.paused():
                        member.checkpoints.save(step + 1, steps.state(i))
            if signalled:
                for member in members:
                    member.checkpoints.wait()
                homes = ", ".join(str(member.home) for member in members)
                rundir.say(f"{homes}: stopped at step {step + 1}; the same command resumes")
                raise SystemExit(128 + signalled[0])
    for i, member in enumerate(members):
        member.seal(steps.state(i))


def _restored(members: Sequence[Member]) -> tuple[list[TrainState], int]:
    """The states at the newest step that all members have, or before the first."""
    fresh = [member.start() for member in members]
    if not all(member.checkpoints.steps() for member in members):
        return fresh, 0
    wanted = [
        abstract(member.setup.mesh, state, member.setup.host)
        for member, state in zip(members, fresh, strict=True)
    ]
    found = [m.checkpoints.restore(like) for m, like in zip(members, wanted, strict=True)]
    start = min(step for _, step in found)
    return [
        state if step == start else member.checkpoints.restore(like, start)[0]
        for member, like, (state, step) in zip(members, wanted, found, strict=True)
    ], start


def _announce(members: Sequence[Member], start: int, attends: str) -> None:
    home, setup = members[0].home, members[0].setup
    if len(members) > 1:
        rundir.say(f"{home} and {len(members) - 1} more train together")
    if start:
        rundir.say(f"{home}: resumed at step {start}")
    _, source = metrics.peak_flops()
    rundir.say(f"{home}: {setup.loader.describe()}")
    backend = jax.default_backend()
    rundir.say(f"{home}: attention {attends} on {backend}; peak {source}")
    kept = jax.config.jax_compilation_cache_dir or "memory alone"  # type: ignore[attr-defined]
    rundir.say(f"{home}: compiled programs are kept in {kept}")


def _writer(member: Member, members: Sequence[Member], start: int) -> metrics.Writer:
    """The writer of a member; the first of several shows the progress of all."""
    others = len(members) - 1
    options, name = member.experiment.run, member.experiment.name
    return metrics.Writer(
        member.home,
        total=options.steps,
        every=options.log_every,
        start=start,
        peak=metrics.peak_flops()[0],
        progress=member is members[0],
        title=f"{name} and {others} more" if others else name,
    )


def _push(
    members: Sequence[Member],
    writers: Sequence[metrics.Writer],
    advanced: Sequence[tuple[Metrics, int]],
    step: int,
    waited: float,
) -> None:
    """Hand the metrics of a dispatched step to the writers, which read those of the one before."""
    for member, writer, (values, tokens) in zip(members, writers, advanced, strict=True):
        values |= {"learning_rate": member.rate(step * member.updates)}
        flops = tokens * member.setup.flops_per_token
        read = writer.push(step + 1, values, tokens=tokens, flops=flops, waited=waited)
        if read.get("skipped", 0) >= SKIPS:
            raise FloatingPointError(
                f"{member.home}: the gradient was not finite in {SKIPS} steps in a row up to {step}"
            )


def _warm_up(members: Sequence[Member], writers: Sequence[metrics.Writer], steps: Any) -> None:
    """Behind the first step, while the clocks stand: what it has not compiled of the rest."""
    with ExitStack() as standing:
        for writer in writers:
            standing.enter_context(writer.paused())
        begun = time.monotonic()
        if count := steps.warm_up():
            took = f"{time.monotonic() - begun:.1f} s"
            rundir.say(f"{members[0].home}: {count} more shapes compiled in {took}")


def _evaluate(
    members: Sequence[Member], writers: Sequence[metrics.Writer], steps: Any, step: int
) -> None:
    """One line of metrics and the samples of every member."""
    for i, (member, writer) in enumerate(zip(members, writers, strict=True)):
        with writer.paused():
            member.measure(step, steps.state(i))
        writer.table(step, member.last)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def rehearse(setup: build.Setup, state: TrainState) -> None:
    """Traces an evaluation, as compiling traces a step: data that the algorithm cannot use is
    refused before anything is written. What samples on the host is not traced."""
    algorithm, key = setup.algorithm, jax.random.key(0)

    def value(state: TrainState, frozen: Params, batch: Batch):
        batch, memory = algorithm.collect(state, frozen, batch, key)
        return algorithm.objective(state.params, frozen, memory, algorithm.measure(batch), key)

    for batch in setup.held_out[:1] if algorithm.fused else ():
        jax.eval_shape(value, state, setup.frozen, batch)


class Stepper:
    """The steps of one run; it owns the state, which every update gives away.

    The shape of the first step is compiled before it, so that faults show before anything is
    written; the others of the ladder behind it, by `warm_up`; another one when it comes.
    """

    def __init__(self, members: Sequence[Member], states: Sequence[TrainState], start: int):
        (self.member,), (self._state,) = members, states
        experiment, setup = self.member.experiment, self.member.setup
        self.algorithm, self.setup = setup.algorithm, setup
        self.feed = Feed(self._packed)
        tx = optim.transformation(experiment.optim, self.member.steps)
        places = shardings(setup.mesh, self._state, setup.host)
        self.update = jit_update(self.algorithm, tx, places, experiment.run.microbatches)
        self.measure = jax.jit(self.algorithm.measure)
        self.compiled: dict[tuple[int, ...], Callable[..., tuple[TrainState, Metrics]]] = {}
        if self.algorithm.fused:
            _, batch = self._packed(start)
            self.ready(batch, jax.random.key(0))

    def warm_up(self) -> int:
        """Compile the update for what is left of the ladder: how many shapes."""
        before = len(self.compiled)
        for shape in self.setup.loader.ladder if self.algorithm.fused else ():
            example = shard_batch(self.setup.mesh, self.setup.loader.example(shape))
            self.ready(example, jax.random.key(0))
        return len(self.compiled) - before

    def state(self, i: int) -> TrainState:
        """The state of member i, there being one."""
        return self._state

    def advance(self, step: int) -> list[tuple[Metrics, int]]:
        """Dispatch one step: its metrics, still on the device, and how many tokens it had."""
        host, batch = self.feed.batch(step, self._state.skipped)
        key = jax.random.fold_in(jax.random.key(self.member.experiment.run.seed), step)
        if self.algorithm.fused:
            frozen = self.setup.frozen
            self._state, values = self.ready(batch, key)(self._state, frozen, batch, key)
            return [(values, build.real_tokens(host))]
        return [self._collected(host, key)]

    def _packed(self, step: int) -> tuple[Batch, Batch]:
        """The batch of a step on the host, and as the step takes it."""
        host = self.setup.loader.batch(step)
        return host, shard_batch(self.setup.mesh, host) if self.algorithm.fused else host

    def _collected(self, host: Batch, key: jax.Array) -> tuple[dict[str, Any], int]:
        """A step whose batch is made on the host: the means of its updates, and what the batch
        says of itself."""
        frozen = self.setup.frozen
        batch, memory = self.algorithm.collect(self._state, frozen, host, key)
        memory = jax.device_put(memory, shardings(self.setup.mesh, memory))
        state, total, values = replace(self._state, memory=memory), {}, {}
        following = state.step + 1  # a step of the loop, however many updates it makes
        pieces = [self.measure(part) for part in _minibatches(batch, self.algorithm.minibatches)]
        for part in pieces * self.algorithm.passes:
            state, values = self.ready(part, key)(state, frozen, part, key)
            total = {name: total.get(name, 0.0) + value for name, value in values.items()}
        updates = self.algorithm.passes * len(pieces)
        means = {name: value / updates for name, value in total.items()}
        self._state = replace(state, step=following)
        means["skipped"] = values["skipped"]  # counted on from update to update
        return {**means, **batch.shared}, build.real_tokens(on_host(batch))

    def ready(self, batch: Batch, key: jax.Array) -> Callable:
        """The update compiled for the shapes of a batch."""
        shape = (*batch.tokens_RT.shape, *batch.target_RN.shape, *batch.end_RGK.shape)
        if shape not in self.compiled:
            lowered = self.update.lower(self._state, self.setup.frozen, batch, key)
            self.compiled[shape] = lowered.compile()
        return self.compiled[shape]


def _minibatches(batch: Batch, parts: int) -> Iterator[Batch]:
    cut = split(batch, parts)
    for part in range(parts):
        yield jax.tree.map(lambda x, i=part: x[i], cut)


def _profile(window: str | None, start: int, step: int, home: epath.Path) -> None:
    """Open and close the profiler at the steps of run.profile, "first:last"; `start`: where this
    run, or its resumption inside the window, begins."""
    if window is None:
        return
    first, last = map(int, window.split(":"))
    if step == max(first, start) < last:
        jax.profiler.start_trace(str(home / "profile"))
    if start < last == step:
        jax.profiler.stop_trace()


def trace(experiment: Experiment) -> Metrics:
    """The metrics of one step as shapes, found without data, weights or compute.

    Traces init, collect, measure and objective of the experiment's algorithm over its model, on
    one row of one group of two responses that has every column a loss may read.
    """
    model = parts.model(experiment)
    algorithm = experiment.algorithm(model)
    ids, score = np.ones(1, np.int32), {"scores": np.zeros((2, 1)), "criteria": ("score",)}
    group = Group(ids, [ids, ids], label=1.0, soft_label=1.0, margin=0.0, **score)
    batch = pack([group], row_tokens=4)

    def step(params: Params, key: jax.Array) -> Metrics:
        trained, memory, frozen = parts.begun(algorithm, params, key)
        state = TrainState(jnp.int32(0), trained, None, memory, jnp.int32(0))
        if algorithm.online is not None:
            whole = with_columns(batch)
        else:
            whole, memory = algorithm.collect(state, frozen, batch, key)
        return algorithm.objective(trained, frozen, memory, algorithm.measure(whole), key)[1]

    key = jax.random.key(0)
    return jax.eval_shape(step, jax.eval_shape(model.init, key), key)


def with_columns(batch: Batch) -> Batch:
    """The batch with the columns of a rollout, for their shapes."""
    names = ("old_logp_RN", "ref_logp_RN", "advantage_RN", "return_RN", "value_RN")
    return replace(batch, **dict.fromkeys(names, np.zeros_like(batch.weight_RN)))
