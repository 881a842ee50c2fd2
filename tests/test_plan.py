"""Plans: bytes, flops, bytes moved and collectives by hand, on meshes of the CPU and for TPUs."""

import json
import sys
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny_runs import EXPERIMENT, SFT, snapshot, words

from dpo_jax import build, cli, losses
from dpo_jax.algorithms.policy import grpo
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reward import reward
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Experiment, Learned, Lora, Mesh, Optim, Run
from dpo_jax.models.transformer import UNROLLED, Config
from dpo_jax.parallel import make_mesh
from dpo_jax.plan import Plan, planned, plans, smallest, traced
from dpo_jax.plan.collectives import Sent, collectives
from dpo_jax.plan.devices import Target, topology
from dpo_jax.plan.products import Work, products
from dpo_jax.plan.traced import read
from dpo_jax.structs import BadInput

V, D, L, H, J, E, F = 32, 8, 3, 2, 1, 4, 16
LAYER = D * H * E + 2 * D * J * E + H * E * D + 3 * D * F  # weights of a layer's matrices
WEIGHTS = V * D + L * (LAYER + 2 * D) + D
ROWS, T = 8, 64
ASSUMED = "assumed, a row for every group of data.groups"
DPO = Experiment(
    name="planned",
    model=Config(V, D, L, H, J, E, F),
    data=Data("missing.jsonl", "missing", groups=ROWS, row_tokens=T),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=10),
)
FSDP = replace(DPO, run=replace(DPO.run, mesh=Mesh(1, -1)))
ALL = make_mesh()


@lru_cache
def plan(experiment: Experiment, devices: int = 8) -> Plan:
    """The plan on CPU devices that have 10 MB, of 1 Gflop/s and 1 MB/s."""
    target = Target("cpus", jax.devices()[:devices], 10**7, 1e6, 1e9)
    return planned(experiment, target, read(experiment, None))


def step(experiment: Experiment, **options: Any) -> traced.Step:
    return traced.step(experiment, ALL, read(experiment, options.get("rows")), **options)


def flops(experiment: Experiment, blocks: int = 1) -> float:
    """Of all devices together."""
    made = step(experiment)
    return 8 * products(made.traced.jaxpr, made.of_batch, dict(ALL.shape), blocks).flops


def layers(passes: float, T: int = T) -> float:
    """Flops of the layers' matrices."""
    return passes * L * 2 * ROWS * T * LAYER


def attention(products: int, pairs: int) -> float:
    """Flops of products of queries and keys that see each other in so many pairs a row."""
    return products * L * 2 * ROWS * H * pairs * E


def head(passes: int, T: int = T) -> float:
    return passes * 2 * ROWS * T * V * D


def angles(passes: int, T: int = T) -> float:
    """Positions times the frequencies of RoPE."""
    return passes * 2 * ROWS * T * E / 2


# Bytes


def test_bytes_of_what_is_held():
    made = plan(DPO)
    count = 4  # bytes of a counter: Adam's, the schedule's
    held = {"policy": 4 * WEIGHTS, "reference": 4 * WEIGHTS, "optimizer": 8 * WEIGHTS + 2 * count}
    assert {role: made.held[role] for role in held} == held
    assert made.held["heads"] == made.held["memory"] == 0
    parted = plan(FSDP)  # every leaf has D, which 8 devices divide
    held = {role: size // 8 for role, size in held.items()} | {"optimizer": WEIGHTS + 2 * count}
    assert {role: parted.held[role] for role in held} == held


def test_what_is_needed_is_the_compilers():
    made = plan(DPO)
    assert made.needed is not None and made.temporaries is not None
    assert made.needed - made.temporaries == sum(made.held.values())
    # the gradient of the weights at the least, which is no argument and no result
    assert made.temporaries > 4 * WEIGHTS
    assert made.fits and made.needed < 10**7
    target = Target("small", jax.devices(), made.needed - 1, None, None)
    small = planned(DPO, target, read(DPO, None))
    assert not small.fits and small.seconds == {}
    assert smallest([small, made]) is made and smallest([small]) is None


def test_the_smallest_has_the_least_memory_together():
    one, many = plan(DPO, 1), plan(DPO)
    assert smallest([many, one]) is one
    assert smallest([many, replace(one, memory=9 * 10**7)]) is many


def test_adapters_and_a_cached_reference_hold_no_reference():
    tuned = replace(DPO, lora=Lora(2, 2.0, ("q", "v")))
    held = step(tuned).held
    factors = L * 2 * (2 * D + H * E + J * E)  # (D, rank) and (rank, out) of q and of v
    assert held["policy"] == 4 * (WEIGHTS + factors) and held["reference"] == 0
    assert held["optimizer"] == 2 * 4 * factors + 8
    cached = step(replace(DPO, run=replace(DPO.run, reference="cached")))
    assert cached.held["reference"] == 0 and any("cached" in note for note in cached.notes)


def test_a_reward_model_lies_beside_the_policy():
    judge = replace(DPO, name="judge", algorithm=partial(reward, loss=losses.bradley_terry))
    algorithm = partial(grpo, rewards=(Learned(judge),), n=4, max_tokens=16)
    made = step(replace(DPO, algorithm=algorithm))
    assert made.held["rewards"] == 4 * (WEIGHTS + D)


def test_auto_keeps_the_reference_where_there_is_room():
    # weights, gradient, two moments and the reference in 0.8 of the memory
    enough = 5 * 4 * WEIGHTS * 10 // 8
    assert step(DPO, memory=enough).held["reference"] == 4 * WEIGHTS
    assert step(DPO, memory=enough - 10).held["reference"] == 0


# Flops and bytes moved


def test_flops_of_a_step():
    # the reference forwards; the policy forwards and twice that backwards; the head again in
    # between. A row is one block: scores and sums forwards, five products backwards.
    expected = layers(1 + 3) + attention(2 + 2 + 5, T * T) + head(1 + 4) + angles(2)
    assert flops(DPO) == expected


def test_flops_of_blocks_are_those_of_one_group_a_row():
    long = replace(DPO, data=replace(DPO.data, row_tokens=256))
    pairs = 10 * 64 * 64  # of 4 x 4 blocks of 64 places, on a CPU, six are never seen
    expected = layers(4, 256) + attention(9, pairs) + head(5, 256) + angles(2, 256)
    assert flops(long, blocks=4) == expected


def test_flops_of_what_is_made_again():
    again = replace(DPO, run=replace(DPO.run, remat="full"))
    # but for the last product of a layer, which the way back does not read
    down = L * 2 * ROWS * T * D * F
    assert flops(again) - flops(DPO) == layers(1) - down + attention(2, T * T)
    cut = replace(DPO, run=replace(DPO.run, microbatches=2))
    doubled = replace(cut, data=replace(cut.data, groups=2 * ROWS))  # rows are shards x parts
    assert flops(doubled) == 2 * flops(DPO)


def test_a_cached_reference_saves_its_pass():
    cached = replace(DPO, run=replace(DPO.run, reference="cached"))
    saved = layers(1) + attention(2, T * T) + head(1) + angles(1)
    assert flops(DPO) - flops(cached) == saved


def test_products_in_loops_on_a_mesh():
    def loss(w_DD, x_RD):
        return jnp.sum(jax.lax.fori_loop(0, 3, lambda i, x_RD: jnp.tanh(x_RD @ w_DD), x_RD))

    R, D = 32, 16
    program = jax.make_jaxpr(jax.grad(loss))(jnp.zeros((D, D)), jnp.zeros((R, D)))
    found = products(program, [False, True], {"data": 2, "fsdp": 2, "tensor": 2}, blocks=1)
    # three turns of: forwards, slopes of x, slopes of w
    assert found.flops == 3 * 3 * 2 * R * D * D / 8
    # x is read or written six times and lies on eight devices, w three times and on two
    assert found.bytes == 3 * 4 * (6 * R * D / 8 + 3 * D * D / 2)


def test_the_optimizer_reads_and_writes_weights_and_moments():
    made = step(DPO)
    found = products(made.traced.jaxpr, made.of_batch, dict(ALL.shape), blocks=1)
    # weights, two moments and two counters both ways, gradients one
    assert plan(DPO).work.bytes - found.bytes == 2 * (3 * 4 * WEIGHTS + 2 * 4) + 4 * WEIGHTS


def test_products_in_loops_of_unknown_length():
    def walked(x_RD, count):
        return jax.lax.fori_loop(0, count, lambda i, x_RD: x_RD @ jnp.ones((16, 16)), x_RD)

    program = jax.make_jaxpr(walked)(jnp.zeros((4, 16)), 3)
    found = products(program, [True, False], {}, blocks=5)
    assert found.flops == 3 * 2 * 4 * 16 * 16  # five blocks: 1 + ... + 5 turns, 3 on average


def test_the_bound_is_what_takes_longest():
    made = replace(plan(DPO), work=Work(2e9, 1e6))
    assert made.seconds == {"compute": 2.0, "memory": 1.0}
    assert replace(made, bandwidth=None).seconds == {"compute": 2.0}


# Collectives


def test_weights_are_gathered_where_they_are_parted():
    assert plan(DPO, 1).sent == {}
    many = 1 + UNROLLED  # layers that run under a loop
    looped = plan(replace(FSDP, model=replace(DPO.model, L=many))).sent
    summed, parted = plan(DPO).sent, plan(FSDP).sent
    assert summed is not None and parted is not None and looped is not None
    assert summed.keys() == {"all-reduce"}
    assert summed["all-reduce"].bytes >= 4 * WEIGHTS  # the gradient
    # the layers' matrices for the reference, and for the policy there; a loop fetches them again
    # on the way back, where layers one after another still have them
    assert parted["all-gather"].bytes >= 2 * 4 * L * LAYER
    assert looped["all-gather"].bytes >= 3 * 4 * many * LAYER


def test_collectives_in_loops_count_once_a_turn():
    def summed(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: 0.1 * jax.lax.psum(x, "data"), x)

    place = PartitionSpec("data")
    own = jax.shard_map(summed, mesh=ALL, in_specs=place, out_specs=place, check_vma=False)
    text = jax.jit(own).lower(jnp.zeros(16)).compile().as_text()
    assert collectives(text or "") == {"all-reduce": Sent(5, 5 * 2 * 4)}


TEXT = """HloModule jit_update

%condition (param: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(6)
  %param = (s32[], bf16[8,4]) parameter(0)
  ROOT %lt = pred[] compare(%param, %constant.1), direction=LT
}

%begun (p: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%ended (p: bf16[2,4]) -> bf16[8,4] {
  %all-gather.2 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%body (param.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %start = (bf16[2,4], bf16[8,4]) fusion(%p), kind=kCustom, calls=%begun
  %done = bf16[8,4] fusion(%start), kind=kCustom, calls=%ended
  %send = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%q), channel_id=8
  %sent = f32[4] collective-permute-done(%send)
}

ENTRY %main (a: f32[3]) -> f32[3] {
  %while.1 = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body
  ROOT %all-reduce.1 = (f32[3], pred[5]) all-reduce(%a, %b), channel_id=9, to_apply=%add
}
"""


def test_what_a_tpu_splits_counts_once():
    assert collectives(TEXT) == {
        "all-gather": Sent(6, 6 * 8 * 4 * 2),
        "all-reduce": Sent(1, 3 * 4 + 5),
        "collective-permute": Sent(6, 6 * 4 * 4),
    }


# Where the batch comes from


def test_the_batch_is_the_largest_of_the_data(place):
    made = step(SFT)
    found = build.read_records("data.source", SFT.data.source, None)  # type: ignore[arg-type]
    groups = build.read_groups(SFT, "data.source", found, *build.readers(SFT))
    shape = max(build.loader(SFT, groups, 8).ladder, key=lambda each: each.rows * each.tokens)
    assert (made.rows, made.row_tokens) == shape[:2]
    assert made.traced.jaxpr.in_avals[made.of_batch.index(True)].shape == shape[:2]


def test_data_that_are_not_there_are_assumed(place):
    made = step(DPO)
    assert (made.rows, made.row_tokens) == (ROWS, T)
    assert any(note.startswith(ASSUMED) and "missing.jsonl" in note for note in made.notes)
    given = step(DPO, rows=9)
    assert given.rows == 16 and any("--rows" in note for note in given.notes)
    before = snapshot(place)
    unmade = step(EXPERIMENT)  # its pairs would be sampled from a run that is not there
    assert any("is not made yet" in note for note in unmade.notes)
    assert snapshot(place) == before


def test_an_update_of_what_is_sampled():
    algorithm = partial(grpo, rewards=(words,), n=4, max_tokens=16, minibatches=2, passes=3)
    made = step(replace(DPO, algorithm=algorithm))
    # a prompt of 1 leaves room for 3 of 4 responses of 16, so that groups take two rows each
    assert made.rows == 2 * ROWS // 2
    assert any("not part of the plan, a step updates 6 times" in note for note in made.notes)


# The command


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"topologies": ["v5:4x4"]}, "--topology v5:4x4: nearest is v5e:4x4"),
        ({"topologies": ["v5litepod:2x2"]}, "nearest is v5e:2x2"),
        ({"topologies": ["v5:2x2x2"]}, "nearest is v5p:2x2x2"),
        ({"topologies": ["v5e"]}, "nearest is v5e:4x4; write a generation and its chips"),
        ({"topologies": ["v5e:2x2", ""]}, "nearest is"),
        ({"rows": 0}, "--rows 0: give 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(given, said):
    with pytest.raises(BadInput, match=said):
        plans(DPO, **given)


def test_a_mesh_that_does_not_divide_is_refused():
    odd = replace(DPO, run=replace(DPO.run, mesh=Mesh(1, 3)))
    with pytest.raises(BadInput, match=r"8 x cpu, here: run.mesh.data=1, .* devices, 8"):
        plans(odd)


def test_a_reference_that_none_compares_with_is_refused():
    with pytest.raises(BadInput, match=r"run.reference=cached: .* take run.reference=live"):
        step(replace(DPO, algorithm=sft, run=replace(DPO.run, reference="cached")))


def test_a_missing_libtpu_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(BadInput, match=r"pip install 'dpo-jax\[plan\]'"):
        plans(DPO, ["v5e:2x2"])


MODULE = "from test_plan import DPO as EXPERIMENT\n"


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planned.py").write_text(MODULE)
    assert cli.main(["plan", "planned.py", "run.dtype=bfloat16", "--json", "plans.json"]) == 0
    out = capsys.readouterr().out
    for part in ("8 x cpu, here", "data=8", "optimizer", "all-reduce", "compute", ASSUMED):
        assert part in out
    whole = json.loads((tmp_path / "plans.json").read_text())
    (found,) = whole["plans"]
    assert whole["name"] == "planned" and found["held"]["reference"] == 4 * WEIGHTS
    assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and found["fits"]
    assert found["work"]["flops"] == flops(DPO) / 8
    assert cli.main(["plan", "planned.py", "--topology", "v9:4x4"]) == 2
    assert "--topology v9:4x4" in capsys.readouterr().err


# TPUs, without one


def test_a_list_of_topologies(libtpu):
    # weights, reference and two moments of 2^19 x 2048 alone are 16 GiB, the memory of a v5e
    wide = Config(V=2**19, D=2048, L=1, H=4, J=4, E=64, F=64)
    run = Run(10, mesh=Mesh(1, -1), dtype="bfloat16", remat="full", reference="live")
    large = replace(DPO, model=wide, run=run, data=replace(DPO.data, groups=4, row_tokens=128))
    one, four = plans(large, ["v5e:1x1", "v5e:2x2"], rows=4)
    assert one.devices == 1 and not one.fits and one.sent is None
    assert one.needed is not None and one.needed > sum(one.held.values()) > 16 * 2**30
    assert one.memory is not None and 15 * 2**30 < one.memory <= 16 * 2**30
    assert four.kind == "TPU v5 lite" and four.devices == 4 and four.fits
    assert four.sent is not None and four.sent["all-gather"].bytes > 2 * 2**19 * 2048
    assert four.peak == 197e12 and four.bandwidth == 819e9
    assert smallest([one, four]) is four


def test_what_lies_on_the_host_is_counted_apart_and_makes_room(libtpu):
    wide = Config(V=2**16, D=512, L=1, H=4, J=4, E=128, F=64, tied=False)
    run = Run(10, dtype="bfloat16", reference="live", offload="both")
    moved = replace(DPO, model=wide, run=run, data=replace(DPO.data, groups=4, row_tokens=128))
    here = replace(moved, run=replace(run, offload="none"))
    (there,), (none,) = (plans(each, ["v5e:1x1"]) for each in (moved, here))
    weights = none.held["policy"]
    assert none.held["reference"] == weights and not any(none.hosted.values())
    assert there.held["policy"] == weights and there.held["reference"] == 0
    assert there.held["optimizer"] == 2 * 4  # two counters
    assert there.hosted["reference"] == weights and there.hosted["policy"] == 0
    assert there.hosted["optimizer"] == 2 * weights
    # fetched all at once they would take what they took before
    assert there.needed is not None and none.needed is not None
    assert there.needed < none.needed - 0.9 * weights
    assert there.work == none.work


def test_a_tpu_is_planned_with_its_own_attention(libtpu):
    mesh = make_mesh(devices=topology("v5e:2x2").devices)
    made = traced.step(DPO, mesh, read(DPO, None))
    found = products(made.traced.jaxpr, made.of_batch, dict(mesh.shape), blocks=1)
    # a block is 128 places at the least; backwards three products for queries and four for keys
    expected = layers(4) + attention(2 + 2 + 7, 128 * 128) + head(5) + angles(2)
    assert 4 * found.flops == expected and "pallas_call" in str(made.traced.jaxpr)


@pytest.mark.parametrize(
    ("name", "said"),
    [("v5e:3x5", "nearest is v5e:4x4"), ("v5p:3x3x3", "nearest is v5p:2x2x4")],
)
def test_a_shape_that_libtpu_does_not_know(libtpu, name, said):
    with pytest.raises(BadInput, match=rf"--topology {name}: .*{said}"):
        plans(DPO, [name])
