"""Loops whose length data decide, in plans: they count as often as they may turn."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.parallel import make_mesh
from dpo_jax.plan.collectives import Sent, collectives
from dpo_jax.plan.products import products


def turned(turn, x, count):
    """x after `count` turns, of which there are five at the most."""

    def left(state):
        return (state[0] < count) & (state[0] < 5)

    return jax.lax.while_loop(left, lambda state: (state[0] + 1, turn(state[1])), (0, x))[1]


def test_products():
    turn = partial(turned, lambda x_RD: x_RD @ jnp.ones((16, 16)))
    program = jax.make_jaxpr(turn)(jnp.zeros((4, 16)), 3)
    found = products(program, [True, True], {}, blocks=1)
    assert found.flops == 5 * 2 * 4 * 16 * 16


def test_collectives():
    place, mesh = PartitionSpec("data"), make_mesh()
    own = jax.shard_map(
        partial(turned, lambda x: 0.1 * jax.lax.psum(x, "data")),
        mesh=mesh,
        in_specs=(place, PartitionSpec()),
        out_specs=place,
        check_vma=False,
    )
    text = jax.jit(own).lower(jnp.zeros(16), 3).compile().as_text()
    assert collectives(text or "") == {"all-reduce": Sent(5, 5 * 2 * 4)}
