"""The kernels for TPUs: their list, their values and gradients in interpret mode against `dense`,
and compiled for a v5e where libtpu is installed, without a TPU."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attended import drawn, live_by_force, rows, value_and_slopes
from tiny import relative_error

from dpo_jax import parallel
from dpo_jax.models import attention, attention_tpu, schedule, walk
from dpo_jax.models.attention_tpu import FIRST, KEY_AT, LAST, LIVE, QUERY_AT
from dpo_jax.plan.devices import QUIET


@pytest.fixture
def interpreted(monkeypatch):
    """The walk as it is on a TPU, its kernels interpreted."""
    ahead = partial(attention_tpu.forwards, interpret=True)
    back = partial(attention_tpu.backwards, interpret=True)
    way = walk.Way("pallas", ahead, back)
    monkeypatch.setattr(walk, "way", lambda: way)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("blocks", [(4, 4), (4, 12), (8, 4)])
def test_the_list_has_every_pair_once_and_says_where_its_blocks_begin_and_end(blocks, by_key):
    until_RT, _ = rows(8, 48, responses=2, seed=3)
    plan = schedule.schedule(jnp.asarray(until_RT), blocks)
    none = jnp.zeros(0)
    arrays = walk.Inputs(none, none, none, plan.keys_RXY, plan.count_RX, none, None, None)
    code_RP, steps = attention_tpu.pairs(arrays, blocks, by_key)
    live_RXY = live_by_force(until_RT, *blocks)
    assert int(steps) == live_RXY.sum(axis=(1, 2)).max()
    for code_P, live_XY in zip(np.asarray(code_RP), live_RXY, strict=True):
        walked, rest = code_P[: live_XY.sum()], code_P[live_XY.sum() :]
        x, y = walked >> QUERY_AT, (walked >> KEY_AT) % attention_tpu.BLOCKS
        major, minor = (y, x) if by_key else (x, y)
        expected = np.argwhere(live_XY.T if by_key else live_XY)
        np.testing.assert_array_equal(np.stack([major, minor], axis=1), expected)
        edges = np.flatnonzero(np.diff(major))
        np.testing.assert_array_equal(np.flatnonzero(walked & FIRST), [0, *(edges + 1)])
        np.testing.assert_array_equal(np.flatnonzero(walked & LAST), [*edges, len(walked) - 1])
        assert (walked & LIVE).all() and (rest == walked[-1] & ~15).all()


CASES = {
    "a head each": (256, (128, 128), (2, 2), {}),
    "groups, wide keys, window, cap": (512, (128, 256), (4, 1), {"window": 20, "softcap": 1.0}),
    "padded, wide queries, scale": (300, (256, 128), (4, 2), {"scale": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_dense_attention_in_value_and_gradient(case, interpreted):
    T, blocks, (H, J), options = CASES[case]
    until_RT, position_RT = map(jnp.asarray, rows(3, T, seed=1))
    options = options | {"positions": (position_RT, position_RT)}
    arrays = (*drawn(3, T, H, J, 32), until_RT)
    plan = schedule.schedule(until_RT, blocks)
    found = value_and_slopes(walk.walk, *arrays, plan=plan, **options)
    expected = value_and_slopes(attention.dense, *arrays, **options)
    assert relative_error(found, expected) < 3e-6


def test_in_bfloat16_they_round_as_the_walk_does(interpreted):
    until_RT = jnp.asarray(rows(2, 256)[0])
    truth = value_and_slopes(attention.dense, *drawn(2, 256, 4, 2, 32), until_RT)
    plan = schedule.schedule(until_RT, (128, 128))
    half = (*drawn(2, 256, 4, 2, 32, "bfloat16"), until_RT)
    found = value_and_slopes(walk.walk, *half, plan=plan)
    found = [x.astype(jnp.float32) for x in found]
    assert relative_error(found, list(truth)) < 1e-2


def test_on_a_mesh_they_take_their_own_rows_and_heads(interpreted):
    until_RT = jnp.asarray(rows(2, 256)[0])
    arrays = (*drawn(2, 256, 4, 2, 32), until_RT)
    plan = schedule.schedule(until_RT, (128, 128))
    expected = value_and_slopes(attention.dense, *arrays)
    with jax.set_mesh(parallel.make_mesh(1, 2, 2, devices=jax.devices()[:4])):
        found = value_and_slopes(walk.walk, *arrays, plan=plan)
        assert relative_error(found, expected) < 3e-6


AHEAD = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from dpo_jax.models import attention_tpu, schedule, walk

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = jax.sharding.Mesh(topology.devices[:1], ("x",))
place = NamedSharding(mesh, PartitionSpec())
walk.way = lambda: walk.Way("pallas", attention_tpu.forwards, attention_tpu.backwards)
schedule.sizes = lambda: schedule.SIZES["tpu"]

def step(q, k, v, slope, until_RT, options):
    out, back = jax.vjp(lambda q, k, v: walk.walk(q, k, v, until_RT, **options), q, k, v)
    return out, *back(slope)

for dtype, E, options in (
    ("bfloat16", 128, {}),
    ("float32", 64, {"window": 500, "softcap": 30.0}),
):
    shapes = [jax.ShapeDtypeStruct((2, 1000, h, E), dtype, sharding=place) for h in (8, 2, 2, 8)]
    until_RT = jax.ShapeDtypeStruct((2, 1000), jnp.int32, sharding=place)
    def near(*arrays, options=options):
        both = {"positions": (arrays[-1],) * 2} if "window" in options else {}
        return step(*arrays, options | both)
    compiled = jax.jit(near).lower(*shapes, until_RT).compile()
    print(compiled.as_text().count('custom_call_target="tpu_custom_call"'))
"""


def test_they_compile_for_a_v5e_without_one(libtpu, repository):
    done = subprocess.run(
        [sys.executable, "-c", AHEAD],
        env=os.environ | QUIET | {"JAX_PLATFORMS": "cpu"},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["3", "3"]  # forwards, for queries, for keys
