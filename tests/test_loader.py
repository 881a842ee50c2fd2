"""Batches: pure in (seed, step), every group once an epoch, few shapes that are well filled."""

import jax
import numpy as np
import pytest

from dpo_jax.data.loader import LADDER, Loader, alike, sequential
from dpo_jax.structs import BadInput, Batch, Group


def lognormal(rng: np.random.Generator, count: int, mean: float, sigma: float, low: int):
    """Lengths from `low` to 256 with the given mean after clipping."""
    normal, centre = rng.standard_normal(count), np.log(mean)
    for _ in range(50):
        length = np.clip(np.exp(centre + sigma * normal).round(), low, 256).astype(int)
        centre += np.log(mean / length.mean())
    return length


def pairs(count: int, *, seed: int = 0) -> list[Group]:
    """Pairs with prompts of 192 and responses of 128 tokens in the mean."""
    rng = np.random.default_rng(seed)
    prompt = lognormal(rng, count, 192, 0.4, 24)
    answers = [lognormal(rng, count, 128, 0.6, 8) for _ in range(2)]
    return [
        Group(np.ones(p, np.int32), [np.ones(a, np.int32), np.ones(b, np.int32)])
        for p, a, b in zip(prompt, *answers, strict=True)
    ]


def small(count: int, *, most: int = 5) -> list[Group]:
    rng = np.random.default_rng(count)
    return [
        Group(np.full(rng.integers(1, most), 1 + b), [np.full(rng.integers(1, most), 1 + b)] * 2)
        for b in range(count)
    ]


def records(batch: Batch) -> list[int]:
    return batch.record_RG[batch.record_RG >= 0].tolist()


def shape(batch: Batch) -> tuple[int, ...]:
    return (*batch.tokens_RT.shape, batch.target_RN.shape[1], *batch.end_RGK.shape[1:])


def test_a_batch_depends_on_seed_and_step_alone():
    groups, options = small(23), {"step_groups": 4, "row_tokens": 32, "steps": 40}
    fresh = Loader(groups, seed=3, **options)
    used = Loader(groups, seed=3, **options)
    for step in (39, 0, 12, 8, 7):
        used.batch(step)
    jax.tree.map(np.testing.assert_array_equal, fresh.batch(7), used.batch(7))


@pytest.mark.parametrize("step_groups", [3, 4, 10, 25])
def test_every_group_comes_once_an_epoch_though_steps_straddle(step_groups: int):
    """10 groups, steps of 3, 4, 10 and 25: the flat order splits into permutations of ten."""
    loader = Loader(small(10), step_groups=step_groups, row_tokens=32, seed=0, steps=20)
    taken = [int(b) for step in range(20) for b in loader.indices(step)]
    epochs = [taken[start : start + 10] for start in range(0, len(taken) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    for step in range(20):
        assert sorted(records(loader.batch(step))) == sorted(loader.indices(step).tolist())


def test_seeds_differ():
    first, second = (
        Loader(small(30), step_groups=8, row_tokens=32, seed=seed, steps=4) for seed in (0, 1)
    )
    assert [*first.indices(0)] != [*second.indices(0)]


def test_the_record_of_a_group_is_kept():
    groups = [Group(np.array([1]), [np.array([2])], record=record) for record in (70, 50, None)]
    batch = Loader(groups, step_groups=3, row_tokens=8, seed=0, steps=1).batch(0)
    assert sorted(records(batch)) == [2, 50, 70]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("step_groups", "row_tokens"), [(8, 1024), (8, 2048), (64, 2048)])
def test_shapes_come_from_the_ladder(step_groups: int, row_tokens: int, multiple: int):
    loader = Loader(
        pairs(1000),
        step_groups=step_groups,
        row_tokens=row_tokens,
        seed=0,
        steps=120,
        rows_multiple=multiple,
    )
    seen = {shape(loader.batch(step)) for step in range(120)}
    assert seen == set(loader.ladder) and len(loader.ladder) <= LADDER
    assert all(rung.rows % multiple == 0 and rung.tokens <= row_tokens for rung in loader.ladder)


@pytest.mark.parametrize(("step_groups", "row_tokens", "least"), [(8, 1792, 0.9), (64, 2048, 0.94)])
def test_rows_are_filled(step_groups: int, row_tokens: int, least: float):
    """Rows of four mean groups and more; measured on the batches, not only foretold."""
    groups = pairs(4096)
    loader = Loader(groups, step_groups=step_groups, row_tokens=row_tokens, seed=0, steps=1000)
    batches = [loader.batch(step) for step in range(0, 1000, 4)]
    real = sum(groups[b].tokens for batch in batches for b in records(batch))
    fill = real / sum(batch.tokens_RT.size for batch in batches)
    assert fill > least and abs(fill - loader.fill) < 0.015
    assert f"{loader.fill:.1%} of the places hold tokens" in loader.describe()


def test_a_step_that_no_shape_holds_gets_its_own():
    """Three long groups among 3000 short ones: the simulation of 256 steps may not meet them."""
    groups = small(3000)
    long = Group(np.ones(30, np.int32), [np.ones(1, np.int32)] * 2)
    groups[7:10] = [long] * 3
    loader = Loader(groups, step_groups=2, row_tokens=32, seed=1, steps=3000)
    alone = []
    for step in range(1500):  # one epoch
        batch = loader.batch(step)
        assert sorted(records(batch)) == sorted(loader.indices(step).tolist())
        alone += [] if shape(batch) in set(loader.ladder) else [records(batch)]
    assert alone and all({7, 8, 9} & set(record) for record in alone)


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("multiple", [1, 2])
def test_sequential_takes_every_group_once_in_order(count: int, multiple: int):
    groups = small(count)
    batches = list(sequential(groups, step_groups=4, row_tokens=24, rows_multiple=multiple))
    assert len(batches) == -(-count // 4) and len({shape(batch) for batch in batches}) == 1
    assert all(len(batch.tokens_RT) % multiple == 0 for batch in batches)
    taken = [sorted(records(batch)) for batch in batches]
    assert [b for batch in taken for b in batch] == list(range(count))
    for batch in batches:
        assert (batch.weight_RG[batch.record_RG < 0] == 0).all()
        assert batch.weight_RG.sum() == len(records(batch))


def test_unusable_options_are_said():
    options = {"step_groups": 2, "row_tokens": 8, "seed": 0, "steps": 1}
    with pytest.raises(BadInput, match="no groups"):
        Loader([], **options)
    with pytest.raises(BadInput, match="step_groups=0"):
        Loader(small(3), **(options | {"step_groups": 0}))
    with pytest.raises(BadInput, match="seed=-1"):
        Loader(small(3), **(options | {"seed": -1}))
    long = Group(np.ones(7, np.int32), [np.ones(4, np.int32)])
    with pytest.raises(BadInput, match=r"group 3 takes 11 tokens .*row_tokens=11 would do"):
        sequential([*small(3, most=3), long], step_groups=2, row_tokens=8)


def test_loaders_with_other_seeds_give_batches_of_one_shape():
    """Each holds its own groups, and few shapes are met on the way."""
    groups, options = small(40, most=9), {"step_groups": 6, "row_tokens": 40, "steps": 30}
    loaders = [Loader(groups, seed=seed, **options) for seed in range(3)]
    met = set()
    for step in range(30):
        batches = alike(loaders, step)
        assert len({shape(batch) for batch in batches}) == 1
        met.add(shape(batches[0]))
        for batch, loader in zip(batches, loaders, strict=True):
            assert sorted(records(batch)) == sorted(loader.indices(step).tolist())
    assert len(met) <= max(len(loader.ladder) for loader in loaders)
