"""The walk: its list of blocks against brute force, its values and gradients against `dense`, its
memory, what it does on a mesh, under vmap and rematerialisation, and the self-test."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attended import drawn, live_by_force, rows, value_and_slopes
from tiny import relative_error

from dpo_jax import parallel
from dpo_jax.data.packing import pack
from dpo_jax.models import attention, block, schedule, transformer, walk
from dpo_jax.models.schedule import Sizes
from dpo_jax.models.transformer import decoder


@pytest.mark.parametrize("blocks", [(4, 4), (4, 8), (8, 4), (6, 6), (3, 12), (48, 48)])
@pytest.mark.parametrize("responses", [0, 1, 2, 3, 5])
def test_the_schedule_lists_the_pairs_that_see_each_other_and_no_other(blocks, responses):
    """30 rows each: packed groups of so many responses, or (0) any `until` at all."""
    until_RT, _ = rows(30, 48, responses=responses, seed=sum(blocks))
    if responses == 0:
        rng = np.random.default_rng(blocks[0])
        until_RT = 1 + np.arange(48) + rng.geometric(0.15, (30, 48)) - 1
    plan = schedule.schedule(jnp.asarray(until_RT), blocks)
    live_RXY = live_by_force(until_RT, *blocks)
    np.testing.assert_array_equal(plan.count_RX, live_RXY.sum(axis=-1))
    for r, x in np.ndindex(*plan.count_RX.shape):
        walked = np.asarray(plan.keys_RXY)[r, x, : plan.count_RX[r, x]]
        np.testing.assert_array_equal(walked, np.flatnonzero(live_RXY[r, x]))


@pytest.mark.parametrize("T", [1, 7, 128, 129, 300, 4096, 5000])
def test_blocks_cut_a_row_evenly_and_fill_it_but_for_little(T):
    size = schedule.block_of(T)
    places = schedule.whole(T, (size, size))
    assert size == T if T <= schedule.sizes().row else size <= schedule.sizes().block
    assert T <= places < T + schedule.sizes().grain * (places // size)


CASES = {
    "one block of several rows": (24, None, (4, 2), {}),
    "blocks": (48, (8, 8), (4, 4), {}),
    "wide keys, padded, one key head": (45, (6, 12), (4, 1), {}),
    "wide queries, window": (45, (12, 4), (6, 2), {"window": 5}),
    "window that hides whole blocks of the list": (40, (8, 8), (2, 2), {"window": 2}),
    "cap and scale": (40, (8, 8), (4, 2), {"softcap": 0.7, "scale": 0.4}),
    "window and cap, one block": (24, None, (4, 2), {"window": 3, "softcap": 0.7}),
    "blocks of one place": (9, (1, 1), (2, 1), {"window": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_walk_is_dense_attention_in_value_and_gradient(case):
    T, blocks, (H, J), options = CASES[case]
    until_RT, position_RT = map(jnp.asarray, rows(3, T, seed=T))
    options = options | {"positions": (position_RT, position_RT)}
    arrays = (*drawn(3, T, H, J, 8), until_RT)
    plan = schedule.schedule(until_RT, blocks)
    found = value_and_slopes(walk.walk, *arrays, plan=plan, **options)
    expected = value_and_slopes(attention.dense, *arrays, **options)
    assert relative_error(found, expected) < 2e-6


def test_in_float64_they_agree_to_its_precision():
    until_RT, position_RT = map(jnp.asarray, rows(3, 40))
    options = {"positions": (position_RT, position_RT), "window": 6, "softcap": 2.0}
    with jax.enable_x64(True):
        arrays = (*drawn(3, 40, 4, 2, 8, "float64"), until_RT)
        plan = schedule.schedule(until_RT, (8, 8))
        found = value_and_slopes(walk.walk, *arrays, plan=plan, **options)
        expected = value_and_slopes(attention.dense, *arrays, **options)
        assert all(x.dtype == jnp.float64 for x in found)
        assert relative_error(found, expected) < 1e-13


def test_bfloat16_is_as_near_the_truth_as_dense_attention():
    until_RT = jnp.asarray(rows(3, 96)[0])
    truth = value_and_slopes(attention.dense, *drawn(3, 96, 4, 2, 16), until_RT)
    half = (*drawn(3, 96, 4, 2, 16, "bfloat16"), until_RT)
    plan = schedule.schedule(until_RT, (16, 32))
    found = value_and_slopes(walk.walk, *half, plan=plan)
    usual = value_and_slopes(attention.dense, *half)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    for x, other, true in zip(found, usual, truth, strict=True):
        assert relative_error(x.astype(jnp.float32), true) < 1e-2  # its own rounding: 2^-9 a value
        assert relative_error(x.astype(jnp.float32), true) < 1.1 * relative_error(
            other.astype(jnp.float32), true
        )


def test_far_scores_and_what_is_behind_them_stay_finite():
    """Scores of +-1e4: a key that is hidden must not win the maximum, nor make 0 / 0."""
    until_RT = jnp.asarray(rows(2, 48)[0])
    q, k, v, slope = drawn(2, 48, 2, 1, 8)
    arrays = (100 * q, 100 * k, v, slope, until_RT)
    plan = schedule.schedule(until_RT, (8, 8))
    found = value_and_slopes(walk.walk, *arrays, plan=plan)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in found)
    expected = value_and_slopes(attention.dense, *arrays)
    for x, other in ((found[0], expected[0]), (found[3], expected[3])):  # out, and slopes of v
        assert relative_error(x, other) < 1e-5


def test_several_rows_in_a_tile_change_nothing(monkeypatch):
    until_RT = jnp.asarray(rows(6, 24)[0])
    arrays = (*drawn(6, 24, 4, 2, 8), until_RT)
    found = []
    for scores in (1, 3 * 4 * 24 * 24, 2**30):  # one row, three, all
        monkeypatch.setitem(schedule.SIZES, "cpu", Sizes(64, 128, scores))
        found.append(value_and_slopes(walk.walk, *arrays))
    assert relative_error(found[0], found[2]) < 1e-6
    assert relative_error(found[1], found[2]) < 1e-6


def test_what_a_query_does_not_see_has_no_gradient():
    """Exactly: a key of another response gets nothing from this one."""
    until_RT = jnp.asarray([[8, 8, 8, 5, 5, 8, 8, 8]])  # a prompt of 3, responses of 2 and 3
    q, k, v, slope = drawn(1, 8, 2, 1, 4)
    slope = slope.at[:, :5].set(0).at[:, 5:].set(1)
    plan = schedule.schedule(until_RT, (2, 2))
    _, dq, dk, dv = value_and_slopes(walk.walk, q, k, v, slope, until_RT, plan=plan)
    for slopes in (dk, dv):
        assert not slopes[:, 3:5].any() and slopes[:, [0, 1, 2, 5, 6, 7]].all()
    assert not dq[:, :5].any()


def temporaries(way, R: int, T: int) -> float:
    """MiB of value and gradients, compiled and not run."""
    shapes = [jax.ShapeDtypeStruct((R, T, heads, 32), jnp.float32) for heads in (4, 2, 2, 4)]
    until_RT = jax.ShapeDtypeStruct((R, T), jnp.int32)
    compiled = jax.jit(partial(value_and_slopes, way)).lower(*shapes, until_RT).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20  # type: ignore[union-attr]


def test_memory_grows_with_the_length_of_a_row_and_not_with_its_square():
    short, long = temporaries(walk.walk, 1, 1024), temporaries(walk.walk, 1, 8192)
    assert long < 8.5 * short
    # queries, keys, values, their slopes and copies of them; dense holds 4 * 8192^2 scores, a GiB
    assert long < 40 < 1024 < temporaries(attention.dense, 1, 8192)


def shapes_on(mesh, R: int, T: int, H: int, J: int, E: int) -> list[jax.ShapeDtypeStruct]:
    """What `drawn` and `rows` give, as shapes that lie where a model on the mesh has them."""
    named = {"q_RTHE": (R, T, H, E), "k_RTJE": (R, T, J, E), "v_RTJE": (R, T, J, E)}
    named |= {"slope_RTHE": (R, T, H, E), "until_RT": (R, T)}
    kinds = {name: jnp.int32 if name == "until_RT" else jnp.float32 for name in named}
    tree = {name: jax.ShapeDtypeStruct(shape, kinds[name]) for name, shape in named.items()}
    placed = parallel.abstract(mesh, tree)
    return [placed[name] for name in named]


MOVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize(
    ("axes", "heads"),
    [((2, 2, 1), (4, 2)), ((1, 2, 2), (4, 2)), ((1, 1, 4), (8, 4)), ((1, 2, 2), (3, 1))],
)
def test_on_a_mesh_nothing_moves_and_nothing_changes(axes, heads):
    """Rows lie on data and fsdp, heads on tensor; those of the last case do not divide it."""
    mesh = parallel.make_mesh(*axes, devices=jax.devices()[:4])
    until_RT, position_RT = rows(4, 40)

    def both(way, *arrays):
        options = {"positions": (position_RT, position_RT), "window": jnp.int32(9)}
        plan = {"plan": schedule.schedule(arrays[-1], (8, 8))} if way is walk.walk else {}
        return value_and_slopes(way, *arrays, **options, **plan)

    H, J = heads
    arrays = (*drawn(4, 40, H, J, 8), jnp.asarray(until_RT))
    with jax.set_mesh(mesh):
        shapes = shapes_on(mesh, 4, 40, H, J, 8)
        compiled = jax.jit(partial(both, walk.walk)).lower(*shapes).compile()
        placed = jax.device_put(arrays, tuple(shape.sharding for shape in shapes))
        found = compiled(*placed)
    text = str(compiled.as_text())
    assert "while" in text and not [move for move in MOVES if f" {move}" in text]
    assert relative_error(found, both(attention.dense, *arrays)) < 2e-6


def test_members_of_a_vmap_are_more_rows():
    """Each with rows of its own: equal to one after the other, and no slice becomes a gather."""
    M, R, T = 3, 2, 40
    until_MRT = jnp.stack([jnp.asarray(rows(R, T, seed=m)[0]) for m in range(M)])
    q, k, v, slope = (x.reshape(M, R, *x.shape[1:]) for x in drawn(M * R, T, 4, 2, 8))

    def one(q, k, v, slope, until_RT):
        plan = schedule.schedule(until_RT, (8, 8))
        return value_and_slopes(walk.walk, q, k, v, slope, until_RT, plan=plan)

    compiled = jax.jit(jax.vmap(one)).lower(q, k, v, slope, until_MRT).compile()
    text = str(compiled.as_text())
    assert " gather(" not in text and " scatter(" not in text
    alone = jax.jit(one)
    each = [alone(q[m], k[m], v[m], slope[m], until_MRT[m]) for m in range(M)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    assert relative_error(compiled(q, k, v, slope, until_MRT), stacked) < 1e-6


def test_a_vmap_over_slopes_alone_gives_the_jacobian():
    until_RT = jnp.asarray(rows(2, 9)[0])
    q, k, v, _ = drawn(2, 9, 2, 1, 4)
    plan = schedule.schedule(until_RT, (4, 4))
    found, expected = (
        jax.jacrev(lambda v, way=way: way(q, k, v, until_RT)[:, -4:, 0, 0])(v)
        for way in (partial(walk.walk, plan=plan), attention.dense)
    )
    assert relative_error(found, expected) < 2e-6


WINDOWED = replace(tiny.CONFIG, L=3, windows=(5, 0), score_cap=3.0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_decoder_of_several_blocks_is_one_with_dense_attention(remat, monkeypatch):
    """Windows scanned with the layers, the schedule from outside of their loop, rematerialised."""
    batch = pack(tiny.groups(9, seed=4), row_tokens=48)
    params = decoder(WINDOWED).init(jax.random.key(0))
    slope_RTD = jax.random.normal(jax.random.key(1), (*batch.tokens_RT.shape, WINDOWED.D))

    def total(params):
        arrays = (batch.tokens_RT, batch.positions_RT, batch.until_RT)
        return jnp.sum(slope_RTD * decoder(WINDOWED, remat=remat).hidden(params, *arrays)[0])

    monkeypatch.setitem(schedule.SIZES, "cpu", Sizes(16, 16, 1))
    found = jax.jit(jax.value_and_grad(total))(params)
    monkeypatch.setattr(
        block, "attention", lambda *x, plan, **options: attention.dense(*x, **options)
    )
    assert relative_error(found, jax.jit(jax.value_and_grad(total))(params)) < 1e-5


def test_what_attention_made_is_kept_where_products_are(monkeypatch):
    """With remat=dots a step walks no more often than without; with full once more a layer."""
    monkeypatch.setitem(schedule.SIZES, "cpu", Sizes(16, 16, 1))
    monkeypatch.setattr(transformer, "UNROLLED", 0)  # all three a loop over the layers
    config = replace(tiny.CONFIG, L=2)
    ids_RT = jnp.ones((2, 32), jnp.int32)
    params = jax.eval_shape(decoder(config).init, jax.random.key(0))

    def walks(remat: str) -> int:
        model = decoder(config, remat=remat)
        total = lambda params: jnp.sum(model.hidden(params, ids_RT, ids_RT, ids_RT)[0])  # noqa: E731
        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return str(compiled.as_text()).count(" while(")

    assert walks("dots") == walks("none") < walks("full")


def test_a_cache_that_is_opened_with_a_long_prompt_holds_no_scores():
    """Less than an eighth of rows * heads * prompt * places of the cache, in float32."""
    model = decoder(replace(tiny.CONFIG, V=32))
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids_RT = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    opened = jax.jit(lambda params, ids: model.hidden(params, ids, ids, ids, 1100))
    used = opened.lower(params, ids_RT).compile().memory_analysis()
    assert used.temp_size_in_bytes < 8 * 4 * 1024 * 1100 * 4 / 8  # type: ignore[union-attr]


def leaking(q, k, v, until_RT, **options):
    """One key of the sibling before is seen by the first token of a response."""
    return attention.dense(q, k, v, until_RT + (until_RT % 7 == 0), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_finds_a_leak(dtype, monkeypatch):
    attention.self_test.cache_clear()
    attention.self_test(dtype)
    monkeypatch.setattr(attention, "attention", leaking)
    attention.self_test.cache_clear()
    with pytest.raises(RuntimeError, match=f"attention walk on cpu in {dtype} is off the dense"):
        attention.self_test(dtype)
    attention.self_test.cache_clear()


def test_an_accelerator_is_tested_before_it_is_used(monkeypatch):
    monkeypatch.setattr(attention, "attention", leaking)
    attention.self_test.cache_clear()
    assert attention.in_use("float32") == "walk"  # a CPU is what this suite tests
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match="attention walk on gpu in float32"):
        attention.in_use("float32")
    attention.self_test.cache_clear()
