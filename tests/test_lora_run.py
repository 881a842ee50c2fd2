"""Whole runs that train adapters: what is stored, where they start, what their children get."""

import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import relative_error
from tiny_runs import SFT, rows, timeless, words

import dpo_jax
from dpo_jax import build, losses, parts, score
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.reference import soft_update
from dpo_jax.algorithms.reward import reward
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import Data, Evaluation, Experiment, Lora, Optim, Run
from dpo_jax.export import export
from dpo_jax.member import Member
from dpo_jax.models import hf
from dpo_jax.models.hf_adapter import load_adapter, save_adapter
from dpo_jax.models.lora import merged
from dpo_jax.structs import BadInput
from dpo_jax.together import run_all
from dpo_jax.train import Result
from dpo_jax.worlds import sentiment

LORA = Lora(rank=3, alpha=6.0)
LN2 = pytest.approx(np.log(2), abs=1e-6)


def pairs() -> Iterator[dict[str, str]]:
    """Each review preferred to the next one's end."""
    found = sentiment.reviews(n=40, seed=1)
    for one, other in pairwise(found):
        yield {
            "prompt": one["prompt"],
            "chosen": one["responses"][0],
            "rejected": other["responses"][0],
        }


TUNED = replace(SFT, name="tuned", model=None, parent=SFT, lora=LORA, run=Run(steps=5))
DPO = Experiment(
    name="dpo",
    parent=TUNED,
    lora=LORA,
    data=Data(source=pairs, tokenizer=sentiment.tokenizer, groups=4, row_tokens=96),
    algorithm=partial(preference, loss=partial(losses.dpo, beta=0.5)),
    optim=Optim(learning_rate=0.01, ema=0.5),
    run=Run(steps=4, save_every=2, keep=3),
    evaluation=Evaluation(
        source=pairs,
        prompts=partial(sentiment.prompts, n=2, seed=5),
        rewards=(words,),
        max_tokens=4,
    ),
)
SHORT = replace(DPO, run=Run(steps=1), evaluation=Evaluation(), optim=Optim(learning_rate=0.01))


MOVING = replace(
    SHORT,
    name="moving",
    algorithm=partial(DPO.algorithm, reference=partial(soft_update, alpha=1.0, every=2)),
    run=Run(steps=4),
)


@pytest.fixture(scope="module")
def tuned(place: Path) -> Result:
    return dpo_jax.run(TUNED)


@pytest.fixture(scope="module")
def dpo(tuned: Result) -> Result:
    return dpo_jax.run(replace(DPO, run=replace(DPO.run, eval_every=4)))


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(one), jax.device_get(other)))


def sealed(result: Result) -> set[str]:
    """What the weights of a run hold, by the first word of its path."""
    return {name.split("/")[0] for name in Checkpoints(result.directory / "weights").leaves()}


def test_the_base_stays_and_is_not_stored(tuned):
    """Gradients, moments and checkpoints are those of the adapters."""
    assert same(tuned.params["base"], dpo_jax.run(SFT).params)
    assert np.any(tuned.params["lora"]["layers"]["q_b_ZHE"])
    assert sealed(tuned) == {"lora"}
    shape = jax.tree.map(lambda x: x.shape, tuned.params["lora"]["layers"])
    stored = Checkpoints(tuned.directory / "checkpoints").leaves()
    arrays = [(name, text) for name, text in stored.items() if "[]" not in text]
    assert len(arrays) == 3 * len(shape)  # parameters and two moments
    for name, text in arrays:
        assert text == f"float32[{','.join(map(str, shape[name.split('/')[-1]]))}]"


def test_a_run_goes_on_from_the_adapters_of_its_parent(dpo, tuned):
    lines = rows(dpo.directory)
    assert next(row["loss"] for row in lines if "loss" in row) == LN2
    before, after = (row for row in lines if "eval_loss" in row)
    assert before["eval_loss"] == LN2
    assert before["eval_samples/kl"] == pytest.approx(0, abs=1e-6)
    assert after["eval_loss"] != LN2 and after["eval_samples/kl"] > 1e-4
    assert same(dpo.params["base"], tuned.params["base"])
    assert not same(dpo.params["lora"], tuned.params["lora"])
    assert dpo.metrics["eval_loss"] == after["eval_loss"]


OTHERS = {
    "new adapters": {"parent": SFT},
    "other adapters": {"lora": Lora(2, 2.0, ("q", "v"))},
    "all weights": {"lora": None},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_first_loss_is_that_of_policy_and_reference_alike(tuned, name):
    """Adapters that do not go on are merged into the base."""
    chosen = replace(SHORT, **OTHERS[name])
    result = dpo_jax.run(replace(chosen, name=name.replace(" ", "-")))
    assert next(row["loss"] for row in rows(result.directory) if "loss" in row) == LN2
    if chosen.lora is None:
        assert sealed(result) >= {"layers", "embed_VD"}
    else:
        expected = tuned.params["base"] if chosen.parent is SFT else merged(tuned.params, LORA)
        assert same(result.params["base"], expected)
        assert sealed(result) == {"lora"}


def test_the_base_is_held_once(tuned):
    mesh, materials = parts.mesh(DPO), build.materials(DPO, dpo_jax.run)
    assert materials.params is not None
    shape = materials.params["base"]["embed_VD"].shape
    with jax.set_mesh(mesh):
        gc.collect()
        held = sum(x.shape == shape for x in jax.live_arrays())
        setup = build.setup(DPO, mesh, materials)
        state = Member(DPO, setup, "elsewhere").start()
        gc.collect()
        assert sum(x.shape == shape for x in jax.live_arrays()) == held
        fresh = build.setup(
            replace(DPO, parent=SFT),
            mesh,
            replace(materials, params={"base": materials.params["base"]}),
        )
    assert setup.frozen.keys() == {"base", "reference"}
    assert same(setup.frozen["reference"], {"lora": tuned.params["lora"]})
    assert setup.start is setup.frozen["reference"]
    assert fresh.frozen["reference"] == {} and fresh.params.keys() == {"lora"}
    own, base = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state, setup.frozen["base"])
    )
    assert own < 5 * sum(leaf.nbytes for leaf in jax.tree.leaves(setup.params)) < 5 * base
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.frozen["base"]))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(setup.params))
    assert setup.flops_per_token == 2 * (3 * count + 4 * adapters)


def test_broken_and_resumed_equals_never_broken(dpo, tuned):
    whole = dpo_jax.run(DPO, directory="broken")
    for name in ("result.json", "weights", "checkpoints/4", "samples.jsonl"):
        path = Path("broken") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = dpo_jax.run(DPO, directory="broken")
    assert same(again.params, whole.params)
    assert same(again.params, dpo.params)
    losses_of = [row["loss"] for row in timeless("broken") if "loss" in row]
    assert losses_of == [row["loss"] for row in timeless(dpo.directory) if "loss" in row]


def test_a_finished_run_is_read_back_with_the_base_of_its_parent(dpo, tuned):
    again = dpo_jax.run(replace(DPO, run=replace(DPO.run, eval_every=4)))
    assert same(again.params, dpo.params)
    tuned.directory.rename("aside")
    try:
        with pytest.raises(BadInput, match="adapters to the weights of runs/tuned"):
            dpo_jax.run(replace(DPO, run=replace(DPO.run, eval_every=4)))
    finally:
        Path("aside").rename(tuned.directory)


def test_a_directory_can_be_the_parent(dpo, tuned):
    """Its record says what its adapters are and where their base lies."""
    home = str(dpo.directory)
    stored = json.loads((Path(home) / "experiment.json").read_text())
    assert stored["base"] == str(tuned.directory)
    found = parts.stored(DPO, home)
    assert found.lora == LORA and same(found.params, dpo.params)
    plain = parts.inherited(replace(DPO, parent=home, lora=None), found)
    assert same(plain, merged(dpo.params, LORA))


def test_a_moving_reference_is_one_of_adapters(tuned):
    """The hard update after two steps puts the third where the first was."""
    result = dpo_jax.run(MOVING)
    found = [row["loss"] for row in rows(result.directory) if "loss" in row]
    assert found[0] == LN2 and found[2] == LN2
    assert found[1] != LN2 and found[3] != LN2
    leaves = Checkpoints(result.directory / "checkpoints").leaves()
    moved = [name for name in leaves if "memory" in name]
    assert moved and all("reference/lora" in name for name in moved)


def test_a_reward_model_has_its_head_beside_the_adapters(tuned, capsys):
    judge = replace(SHORT, name="judge", algorithm=reward)
    result = dpo_jax.run(judge)
    assert sealed(result) == {"lora", "reward_D"}
    assert same(dpo_jax.run(judge).params, result.params)
    child = replace(SHORT, name="child", parent=str(result.directory), algorithm=reward)
    found = parts.inherited(child, parts.stored(child, str(result.directory)))
    assert same(found, result.params)
    dpo_jax.run(replace(SHORT, name="student", parent=judge))
    assert "starts without reward_D of its parent" in capsys.readouterr().err


def test_runs_that_train_together_equal_those_alone(tuned):
    """On one device, where a run alone is spread over eight."""
    members = [
        replace(SHORT, run=Run(steps=3, seed=seed), optim=Optim(learning_rate=rate))
        for rate, seed in ((0.01, 0), (0.02, 4))
    ]
    members = [replace(member, parent=SFT, name="both") for member in members]
    for member, result in zip(members, run_all(members), strict=True):
        alone = dpo_jax.run(member, directory=f"alone{member.run.seed}")
        assert relative_error(result.params["lora"], alone.params["lora"]) < 1e-4
        assert same(result.params["base"], alone.params["base"])
        assert sealed(result) == {"lora"}


def test_a_base_without_a_parent_is_stored_with_its_adapters(place):
    """As in the small offline variant of an experiment, which starts from random weights."""
    alone = replace(SFT, name="alone", lora=LORA, run=Run(steps=2))
    result = dpo_jax.run(alone)
    assert sealed(result) == {"base", "lora"}
    drawn = parts.decoder(SFT.model).init(jax.random.key(0))
    assert relative_error(result.params["base"], drawn) < 1e-7  # other programs, other fusions
    assert same(dpo_jax.run(alone).params, result.params)
    found = parts.stored(DPO, str(result.directory))
    assert found.lora == LORA and same(found.params, result.params)


def test_an_adapter_of_peft_can_be_the_parent(tuned):
    config = replace(SFT.model, family="qwen3", qk_norm="head", P=64)
    model = parts.decoder(config, lora=LORA)
    whole = model.init(jax.random.key(1))
    own = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), whole["lora"])
    hf.save("foreign", config, whole["base"])
    save_adapter("adapted", config, LORA, {"lora": own}, base="foreign")
    chosen = replace(SHORT, name="foreign", parent="adapted")
    result = dpo_jax.run(replace(chosen, optim=Optim(learning_rate=0.0)))
    assert same(result.params, {"base": whole["base"], "lora": own})
    sentiment.tokenizer().save_pretrained("adapted")
    policy = parts.from_folder("adapted")
    assert same(policy.params, result.params)
    one_RT = np.ones((1, 1), np.int32)
    assert policy.model.hidden(policy.params, one_RT, one_RT, one_RT)[0].shape == (1, 1, config.D)
    assert next(row["loss"] for row in rows(result.directory) if "loss" in row) == LN2


def test_a_run_goes_out_merged_or_as_its_adapter(dpo, tuned):
    """And comes back; the base of the adapter is a run, which is exported beside it."""
    export(dpo, "merged")
    _, params, _ = hf.load("merged")
    assert same(params, merged(dpo.params, LORA))
    export(dpo, "alone-adapter", adapter=True)
    found, own = load_adapter("alone-adapter", SFT.model)
    assert found == LORA and same(own, dpo.params["lora"])
    assert not (Path("alone-adapter") / "config.json").exists()
    said = json.loads((Path("alone-adapter") / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] is None
    with pytest.raises(BadInput, match="--adapter: sft trains all weights; leave it out"):
        export(dpo_jax.run(SFT), "nothing", adapter=True)
    assert not Path("nothing").exists()


def test_a_run_is_scored_against_the_adapters_it_started_from(dpo):
    """Its implicit rewards are beta times what adapters changed; a moving reference's too."""
    reviews = list(pairs())[:4]
    for each, reference in ((dpo, None), (dpo_jax.run(MOVING), "moved")):
        judge = score.judge(each)
        assert judge.reference is not None
        began = judge.reference[1]["lora"]
        if reference is None:
            assert same(began, dpo_jax.run(TUNED).params["lora"])
        else:
            assert not same(began, dpo_jax.run(TUNED).params["lora"])
        assert same(judge.reference[1]["base"], each.params["base"])
        [row, *_] = score.scores(judge, partial(list, reviews))
        gaps = np.subtract(row["logps"], row["ref_logps"])
        np.testing.assert_allclose(row["scores"], 0.5 * gaps, rtol=1e-5, atol=1e-6)
