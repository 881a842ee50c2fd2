"""One of several processes of a short run of RL: `python one_process.py NUMBER COUNT PORT OUT`.

Each has one virtual CPU device; the first writes what was sampled and the weights to OUT.
"""

import os
import sys
from dataclasses import replace

import jax

number, count, port, out = sys.argv[1:]
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))

import numpy as np  # noqa: E402
import online  # noqa: E402
import optax  # noqa: E402

from dpo_jax import losses  # noqa: E402
from dpo_jax.algorithms.policy import rloo  # noqa: E402
from dpo_jax.parallel import make_mesh, on_host, shardings  # noqa: E402
from dpo_jax.train import make_update  # noqa: E402

STEPS = 2


def main() -> None:
    mesh = make_mesh(fsdp=int(count), data=1)
    algorithm = rloo(
        online.MODEL,
        rewards=(online.truth,),
        max_tokens=online.STEPS,
        kl=losses.kl_exact,
        kl_target=0.1,
        n=4,
    )
    bound = online.bound(algorithm, mesh=mesh, rows=2, row_tokens=16)
    tx = optax.sgd(1.0)
    state = online.started(bound)
    state = replace(state, opt_state=tx.init(state.params))
    update, measure = jax.jit(make_update(bound, tx)), jax.jit(bound.measure)
    seen = {}
    with jax.set_mesh(mesh):
        state, frozen = (
            jax.device_put(tree, shardings(mesh, tree))
            for tree in jax.device_get((state, online.FROZEN))
        )
        for step in range(STEPS):
            key = jax.random.key(step)
            batch, memory = bound.collect(state, frozen, online.asked(step=step), key)
            state = replace(state, memory=jax.device_put(memory, shardings(mesh, memory)))
            state, metrics = update(state, frozen, measure(batch), key)
            rows = on_host(batch)
            seen |= {f"tokens{step}": rows.tokens_RT, f"advantage{step}": rows.advantage_RN}
            seen |= {f"{name}{step}": x for name, x in on_host(metrics).items()}
    leaves = jax.tree.leaves(on_host((state.params, state.memory)))
    seen |= {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
    if jax.process_index() == 0:
        np.savez(out, **seen)


main()
