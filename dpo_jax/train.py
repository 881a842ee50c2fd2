"""The one loop: batch, collect, measure, split, objective, update, metrics.

`run(experiment)` makes what is missing (parents, sampled data), trains, and returns the weights.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from dpo_jax import build, evaluate, metrics, optim, rundir
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.data.packing import pack
from dpo_jax.experiment import Experiment
from dpo_jax.models.attention import attention
from dpo_jax.parallel import abstract, shard_batch, shardings
from dpo_jax.structs import Algorithm, Batch, Metrics, Model, Params, TrainState

SKIPS = 10  # consecutive updates without a finite gradient after which a run stops


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run: where it lies, its policy, and its last evaluation."""

    directory: epath.Path
    experiment: Experiment
    model: Model
    params: Params
    tokenizer: Any
    metrics: dict[str, float]


def make_update(
    algorithm: Algorithm, tx: optax.GradientTransformation, *, microbatches: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One optimizer step as a pure function (state, frozen, batch, key) -> (state, metrics).

    A fused algorithm completes the batch in the same program. Weights are final before the split,
    so gradients and metrics of microbatches add up. A step whose gradient is not finite leaves
    parameters and moments as they were and is counted.
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
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(norm)
        moved = replace(
            state, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        state = replace(kept, step=state.step + 1, memory=memory, skipped=skipped)
        return state, values | {"grad_norm": norm, "skipped": skipped}

    return update


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
    mesh, model = build.mesh(experiment), build.model(experiment)
    home = rundir.place(experiment, directory)
    rundir.check(experiment, home)
    last = rundir.result(experiment, home)
    if last is not None:
        rundir.say(f"{home}: finished before, reused")
        params = rundir.load_weights(home, model, mesh)
        return Result(home, experiment, model, params, build.tokenizer(experiment), last)
    materials = build.materials(experiment, run)
    with jax.set_mesh(mesh):
        setup = build.setup(experiment, mesh, materials)
        loop = _Loop(experiment, setup, home)
        digest = build.data_digest(setup.loader.groups)
        rundir.claim(experiment, home, build.config(experiment), digest)
        params, last = loop.run()
    return Result(home, experiment, model, params, setup.tokenizer, last)


class _Loop:
    """One run: the state and everything that a step touches."""

    def __init__(self, experiment: Experiment, setup: build.Setup, home: epath.Path):
        options, algorithm = experiment.run, setup.algorithm
        self.experiment, self.setup, self.home = experiment, setup, home
        self.updates = algorithm.passes * algorithm.minibatches  # optimizer updates a step
        tx = optim.transformation(experiment.optim, options.steps * self.updates)
        self.rate = jax.jit(optim.rate(experiment.optim, options.steps * self.updates))
        self.checkpoints = Checkpoints(home / "checkpoints", keep=options.keep)
        self.state, self.start = start_state(algorithm, tx, setup, options.seed), 0
        if self.checkpoints.steps():
            self.state, self.start = self.checkpoints.restore(abstract(setup.mesh, self.state))
        self.last: dict[str, float] = {}
        rehearse(setup, self.state)
        self.advance = Stepper(algorithm, tx, options.microbatches, setup, self.state)

    def run(self) -> tuple[Params, dict[str, float]]:
        """Steps to the end; returns the final weights and the last evaluation."""
        options, start = self.experiment.run, self.start
        peak, source = metrics.peak_flops()
        backend = jax.default_backend()
        if start:
            rundir.say(f"{self.home}: resumed at step {start}")
        rundir.say(f"{self.home}: {self.setup.loader.describe()}")
        rundir.say(f"{self.home}: attention {attention.__name__} on {backend}; peak {source}")
        writer = metrics.Writer(
            self.home,
            total=options.steps,
            every=options.log_every,
            start=start,
            peak=peak,
            title=self.experiment.name,
        )
        with writer, interruptible() as signalled:
            if start == options.steps:  # it was broken between its last checkpoint and the seal
                self.last = self.measured(start)
            if start == 0 and options.eval_every:
                self.evaluate(writer, 0)
            for step in range(start, options.steps):
                self.step(writer, step)
                done = step + 1 == options.steps
                if done or _due(options.eval_every, step + 1):
                    self.evaluate(writer, step + 1)
                if signalled or done or _due(options.save_every, step + 1):
                    with writer.paused():
                        self.checkpoints.save(step + 1, self.state)
                if signalled:
                    self.checkpoints.wait()
                    rundir.say(f"{self.home}: stopped at step {step + 1}; the same command resumes")
                    raise SystemExit(128 + signalled[0])
        self.checkpoints.wait()
        params = self.policy()
        rundir.seal(self.home, options.steps, params, self.last)
        return params, self.last

    def step(self, writer: metrics.Writer, step: int) -> None:
        """Dispatch one step; its metrics are read after the next one is dispatched."""
        _profile(self.experiment.run.profile, self.start, step, self.home)
        batch = self.setup.loader.batch(step)
        key = jax.random.fold_in(jax.random.key(self.experiment.run.seed), step)
        self.state, values = self.advance(self.state, batch, key)
        values |= {"learning_rate": self.rate(step * self.updates)}
        tokens = build.real_tokens(batch)
        read = writer.push(
            step + 1, values, tokens=tokens, flops=tokens * self.setup.flops_per_token
        )
        if read.get("skipped", 0) >= SKIPS:
            raise FloatingPointError(
                f"{self.home}: the gradient was not finite in {SKIPS} steps in a row up to {step}"
            )

    def policy(self) -> Params:
        """The weights that count: their moving average where optim.ema keeps one."""
        average = optim.averaged(self.state.opt_state)
        return self.state.params if average is None else average

    def evaluate(self, writer: metrics.Writer, step: int) -> None:
        """Held-out metrics and samples: one line of metrics, one line a sample."""
        with writer.paused():
            self.last = self.measured(step)
        writer.table(step, self.last)

    def measured(self, step: int) -> dict[str, float]:
        """The metrics of an evaluation; its samples are written."""
        setup, wanted = self.setup, self.experiment.evaluation
        state, values = replace(self.state, params=self.policy()), {}
        if setup.held_out:
            values |= evaluate.held_out(
                setup.algorithm, state, setup.frozen, setup.held_out, setup.mesh
            )
        if setup.prompts:
            drawn = evaluate.completions(
                setup.model,
                state.params,
                setup.frozen,
                setup.prompts,
                setup.tokenizer,
                rewards=wanted.rewards,
                mesh=setup.mesh,
                key=jax.random.fold_in(jax.random.key(self.experiment.run.seed), step),
                n=wanted.samples,
                max_tokens=wanted.max_tokens,
                temperature=wanted.temperature,
            )
            values |= drawn.metrics()
            metrics.append_rows(self.home / "samples.jsonl", step, drawn.rows(step))
        return {f"eval_{name}": value for name, value in values.items()}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def start_state(
    algorithm: Algorithm, tx: optax.GradientTransformation, setup: build.Setup, seed: int
) -> TrainState:
    """The state before the first step, every leaf on its shards."""
    key = jax.random.fold_in(jax.random.key(seed), 1)  # not the one that drew the weights
    params, memory = algorithm.init(key, setup.params, setup.frozen)
    places = shardings(setup.mesh, jax.eval_shape(tx.init, params))
    opt_state = jax.jit(tx.init, out_shardings=places)(params)
    state = TrainState(jnp.int32(0), params, opt_state, memory, jnp.int32(0))
    return jax.device_put(state, shardings(setup.mesh, state))


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
    """advance(state, host batch, key) -> (state, metrics), where the state is given away.

    Every shape of the ladder is compiled before the first step, another one when it comes.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        tx: optax.GradientTransformation,
        microbatches: int,
        setup: build.Setup,
        state: TrainState,
    ):
        self.algorithm, self.setup = algorithm, setup
        places = shardings(setup.mesh, state)
        update = make_update(algorithm, tx, microbatches=microbatches)
        self.update = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
        self.measure = jax.jit(algorithm.measure)
        self.compiled: dict[tuple[int, ...], Callable[..., tuple[TrainState, Metrics]]] = {}
        for shape in setup.loader.ladder if algorithm.fused else ():
            example = shard_batch(setup.mesh, setup.loader.example(shape))
            self.ready(state, example, jax.random.key(0))

    def ready(self, state: TrainState, batch: Batch, key: jax.Array) -> Callable:
        """The update compiled for the shapes of a batch."""
        shape = (*batch.tokens_RT.shape, *batch.target_RN.shape, *batch.end_RGK.shape)
        if shape not in self.compiled:
            lowered = self.update.lower(state, self.setup.frozen, batch, key)
            self.compiled[shape] = lowered.compile()
        return self.compiled[shape]

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array):
        batch, frozen = shard_batch(self.setup.mesh, batch), self.setup.frozen
        if self.algorithm.fused:
            return self.ready(state, batch, key)(state, frozen, batch, key)
        batch, memory = self.algorithm.collect(state, frozen, batch, key)
        state, whole, values = replace(state, memory=memory), self.measure(batch), {}
        following = state.step + 1  # a step of the loop, however many updates it makes
        for _ in range(self.algorithm.passes):
            for part in _minibatches(whole, self.algorithm.minibatches):
                state, values = self.ready(state, part, key)(state, frozen, part, key)
        return replace(state, step=following), values


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


def trace(experiment: Experiment) -> Metrics:
    """The metrics of one step as shapes, found without data, weights or compute.

    Traces init, collect, measure and objective of the experiment's algorithm over its model, on
    one row of one group of as many responses as the loss compares (2 where it does not say).
    """
    model = build.model(experiment)
    algorithm = experiment.algorithm(model)
    batch = pack([([1], [[1], [1]])], row_tokens=4)

    def step(params: Params, key: jax.Array) -> Metrics:
        frozen = {name: params for name in algorithm.frozen}
        trained, memory = algorithm.init(key, params, frozen)
        state = TrainState(jnp.int32(0), trained, None, memory, jnp.int32(0))
        whole, memory = algorithm.collect(state, frozen, batch, key)
        return algorithm.objective(trained, frozen, memory, algorithm.measure(whole), key)[1]

    key = jax.random.key(0)
    return jax.eval_shape(step, jax.eval_shape(model.init, key), key)
