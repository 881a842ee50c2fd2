"""Log-probs of the reference from disk: the values of a live pass, and runs that cannot tell."""

from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiny import MODEL, groups
from tiny_runs import CLOCK, EXPERIMENT, SFT, rows

import dpo_jax
from dpo_jax import losses, refcache
from dpo_jax.algorithms.sft import sft
from dpo_jax.data import views
from dpo_jax.data.packing import pack
from dpo_jax.experiment import digest, override
from dpo_jax.logprobs import naive_token_logps
from dpo_jax.parallel import make_mesh, shardings
from dpo_jax.structs import BadInput

PARAMS = MODEL.init(jax.random.key(0))
MESH = make_mesh(devices=jax.devices()[:1])
PATH = "algorithm.loss"
ORDER = (
    "accuracies",
    "ties",
)  # of rewards that are all 0 before the first update, rounding decides


def filled(groups, home, params=PARAMS):
    return refcache.filled(
        groups, model=MODEL, reference=params, dtype="float32", home=epath.Path(home), mesh=MESH
    )


def files(home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(home).rglob("*") if path.is_file()}


# Values


def test_they_are_those_of_the_naive_pass_whatever_the_rows(tmp_path):
    rng = np.random.default_rng(0)
    given = [
        replace(group, scored=[rng.random(len(ids)) < 0.7 for ids in group.responses])
        for group in groups(9, responses=3)
    ]
    found = filled(given, tmp_path)
    batch = pack(found, row_tokens=64)
    naive_RN = naive_token_logps(MODEL, PARAMS, batch)
    assert batch.ref_logp_RN is not None and batch.ref_logp_RN.shape == batch.slot_RN.shape
    np.testing.assert_allclose(batch.ref_logp_RN, naive_RN, atol=2e-6)
    for group in found:
        counts = [int(mask.sum()) for mask in group.scored or ()]
        assert [len(logp_N) for logp_N in group.ref_logps or ()] == counts


def test_a_response_is_known_by_its_content_whatever_stands_beside_it(tmp_path):
    given = groups(4, responses=3)
    whole = filled(given, tmp_path)
    before = files(tmp_path)
    parts = [
        replace(group, responses=[group.responses[k] for k in places], record=7)
        for group in reversed(given)
        for places in ((2, 0), (1,))
    ]
    again = filled(parts, tmp_path)
    assert files(tmp_path) == before  # nothing was asked again
    for group, source in zip(again[::2], reversed(whole), strict=True):
        assert group.ref_logps is not None and source.ref_logps is not None
        np.testing.assert_array_equal(group.ref_logps[0], source.ref_logps[2])
    keys = {key for group in given for key in refcache.keys(group)}
    assert len(keys) == 12
    moved = replace(given[0], prompt=given[0].prompt[:-1] if len(given[0].prompt) > 1 else [3, 4])
    masked = replace(given[0], scored=[np.arange(len(x)) > 0 for x in given[0].responses])
    for other in (moved, masked):
        assert not keys & set(refcache.keys(other))


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(refcache, "TOKENS", 1)  # a part a batch
    monkeypatch.setattr(refcache, "STEP_TOKENS", 32)
    given = groups(12)
    first = filled(given, tmp_path)
    parts = sorted(Path(tmp_path).rglob("part-*.npz"))
    assert len(parts) > 2
    before = files(tmp_path)
    parts[1].unlink()
    (parts[0].parent / "x.tmp").write_bytes(b"half")  # what a killed process leaves
    asked = []
    answer = refcache.live

    def counted(groups, *others):
        asked.append(len(groups))
        return answer(groups, *others)

    monkeypatch.setattr(refcache, "live", counted)
    again = filled(given, tmp_path)
    assert 0 < asked[-1] < 12 and asked[0] <= refcache.CHECKED
    for group, other in zip(first, again, strict=True):
        for x, y in zip(group.ref_logps or (), other.ref_logps or (), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)
    assert before.keys() - {parts[1].name} <= files(tmp_path).keys()


def test_values_that_are_not_the_reference_s_are_refused(tmp_path):
    given = groups(3)
    filled(given, tmp_path)
    (part,) = Path(tmp_path).rglob("part-*.npz")
    with np.load(part) as stored:
        columns = dict(stored)
    columns["logp_N"][0] += 0.1
    np.savez(part, **columns)
    with pytest.raises(BadInput, match=r"differ by 0\.1 .*delete it, or set run.reference=live"):
        filled(given, tmp_path)


def test_the_fingerprint_is_that_of_the_bits():
    own = refcache.fingerprint(PARAMS, "float32")
    assert own != refcache.fingerprint(PARAMS, "bfloat16")
    name = next(iter(PARAMS))
    bits = np.asarray(jax.tree.leaves(PARAMS[name])[0]).copy()
    flipped = bits.view(np.uint32)
    flipped.ravel()[5] ^= 1
    swapped = bits.copy().ravel()
    swapped[[0, 1]] = swapped[[1, 0]]
    tree = jax.tree.structure(PARAMS[name])
    rest = jax.tree.leaves(PARAMS[name])[1:]
    for changed in (flipped.view(np.float32), swapped.reshape(bits.shape)):
        other = {**PARAMS, name: jax.tree.unflatten(tree, [jnp.asarray(changed), *rest])}
        assert refcache.fingerprint(other, "float32") != own
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert len(refcache.fingerprint(half, "bfloat16")) == 8
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(PARAMS, shardings(mesh, PARAMS))
    assert refcache.fingerprint(placed, "float32") == own


# Runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("refcache")
    with chdir(folder):
        dpo_jax.run(SFT)
        yield folder


def trained(name: str, reference: str, **changes):
    return dpo_jax.run(
        override(EXPERIMENT, {"run.reference": reference, **changes}), directory=name
    )


@pytest.mark.parametrize(
    "loss",
    [
        partial(losses.dpo, beta=0.5),
        partial(losses.kto, beta=0.5),  # reads partners, and a statistic of the step
        losses.mix((1.0, partial(losses.ipo, beta=0.5)), (0.5, partial(losses.nll, per="token"))),
    ],
    ids=["dpo", "kto", "mix"],
)
def test_a_run_cannot_tell(place, loss):
    changes = {PATH: loss, "run.steps": 3}
    if "kto" in str(loss):
        changes |= {"data.arrange": views.unpaired}
    name = str(abs(hash(str(loss))))
    live = trained(f"live{name}", "live", **changes)
    cached = trained(f"cached{name}", "cached", **changes)
    assert live.held["reference"] > 0 and cached.held["reference"] == 0
    assert digest(live.experiment) == digest(cached.experiment)
    for row, other in zip(rows(f"live{name}"), rows(f"cached{name}"), strict=True):
        assert row.keys() == other.keys()
        unsure = {name for name in row if name.endswith(ORDER)} if row["step"] < 2 else set()
        for metric in set(row) - {*CLOCK, *unsure}:
            assert other[metric] == pytest.approx(row[metric], rel=2e-4, abs=2e-5), metric


def test_the_first_loss_is_ln_2(place):
    trained("first", "cached", **{"run.steps": 1})
    assert rows("first")[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {PATH: partial(losses.simpo, beta=2.0, gamma=0.5)},
        {"algorithm": sft},
    ],
    ids=["no reference", "no preference"],
)
def test_what_has_no_reference_to_keep_is_refused(place, changes):
    with pytest.raises(BadInput, match=r"run.reference=cached: .* take run.reference=live"):
        trained("refused", "cached", **changes)
    assert not Path("refused").exists()


def test_it_is_live_where_a_device_says_nothing_of_its_memory(place):
    result = trained("auto", "auto", **{"run.steps": 1})
    assert result.held["reference"] > 0
