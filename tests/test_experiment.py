"""Experiments as values: overrides, listing, descriptions, digests."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import functions, losses, optim, values
from dpo_jax.data import criteria, views
from dpo_jax.experiment import (
    Data,
    Experiment,
    Mesh,
    Optim,
    Run,
    Sampled,
    describe,
    digest,
    options,
    override,
    variations,
)
from dpo_jax.structs import BadInput
from dpo_jax.worlds import sentiment


@dataclass(frozen=True)
class Decoder:
    D: int
    dtype: str = "float32"
    window: int | None = None
    widths: tuple[int, ...] = (1, 2)


def algorithm(model, *, loss, share: float = 0.5, notes=None):
    """Stands in for an algorithm: values are never called by what is tested here."""


def sum_of(tokens, slots=None, *, scale=2):
    """A plug whose second argument is an input, not an option."""


def records(n, seed=0):
    """A source."""


def reward(found, responses):
    """A reward."""


def annotator(scores, rng, *, temperature: float = 1.0):
    """An annotator."""


def tilted(scored, *, beta: float, tilt: float, margin=0.5):
    """A loss with two required keywords."""


def rampant(scored, **anything):
    """A loss that takes every keyword."""


@lru_cache
def tokenizer():
    """A tokenizer behind a cache."""


SFT = Experiment(
    name="sft",
    model=Decoder(D=8),
    data=Data(source=partial(records, n=10), tokenizer=tokenizer),
    algorithm=partial(algorithm, loss=sum_of),
    optim=Optim(learning_rate=1e-3, schedule=optim.cosine),
    run=Run(steps=100),
)
DPO = Experiment(
    name="dpo",
    parent=SFT,
    data=Data(
        source=Sampled(SFT, partial(records, n=3), (reward,), annotator), tokenizer="some/folder"
    ),
    algorithm=partial(algorithm, loss=partial(losses.dpo, beta=0.1)),
    optim=Optim(learning_rate=1e-4),
    run=Run(steps=10),
)


def at(value, path: str):
    return dict(options(value))[path]


# Overrides


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("run.steps", "20", 20),
        ("run.steps", "2e3", 2000),
        ("run.steps", 7, 7),
        ("run.dir", "/tmp/a b", "/tmp/a b"),
        ("run.dir", "/tmp/a,b", "/tmp/a,b"),
        ("run.dir", "'None'", "None"),
        ("run.dir", "None", None),
        ("run.mesh.fsdp", "-1", -1),
        ("run.dtype", "bfloat16", "bfloat16"),
        ("run.profile", "3:5", "3:5"),
        ("optim.learning_rate", "1", 1.0),
        ("optim.learning_rate", ".03", 0.03),
        ("optim.clip", "none", None),
        ("optim.optimizer", "optim.rmsprop", optim.rmsprop),
        ("optim.optimizer", "dpo_jax.optim.rmsprop", optim.rmsprop),
        ("optim.optimizer.b2", "0.95", 0.95),
        ("data.truncation", "prompt", "prompt"),
        ("data.source.prompts.n", "5", 5),
        ("data.source.prompts.seed", "5", 5),
        ("data.source.annotator.temperature", "2", 2.0),
        ("algorithm.loss.beta", "1", 1.0),
        ("algorithm.loss.reference_free", "TRUE", True),
        ("algorithm.loss.label_smoothing", "0.1", 0.1),
        ("algorithm.loss.divergence", "losses.forward_kl", losses.forward_kl),
        ("algorithm.loss.divergence", losses.forward_kl, losses.forward_kl),
        ("algorithm.share", "1e-1", 0.1),
        ("algorithm.notes", "(1, 'a,b')", (1, "a,b")),
        ("parent.model.D", "16", 16),
        ("parent.model.window", "None", None),
        ("parent.model.widths", "(4,)", (4,)),
        ("parent.model.widths", [4, 5], (4, 5)),
        ("parent.model.widths", "()", ()),
        ("evaluation.prompts", "prompts.jsonl", "prompts.jsonl"),
        ("parent.algorithm.loss.scale", "0.5", 0.5),
    ],
)
def test_an_override_changes_one_option(path, text, value):
    changed = override(DPO, {path: text})
    found = at(changed, path)
    assert found == value
    assert type(found) is type(value)
    # and nothing else: put back, it is the experiment it was
    before = at(DPO, path)
    assert override(changed, {path: before}) == DPO


def test_a_part_can_be_replaced_as_a_whole():
    changed = override(DPO, {"run.mesh": Mesh(tensor=2), "run.mesh.fsdp": "4"})
    assert changed.run.mesh == Mesh(tensor=2, fsdp=4)


def test_functions_in_a_tuple():
    name = f"({__name__}:reward, worlds.sentiment.legal)"
    changed = override(DPO, {"evaluation.prompts": "p.jsonl", "evaluation.rewards": name})
    assert changed.evaluation.rewards == (reward, sentiment.legal)
    shown = values.show(changed.evaluation.rewards)
    assert override(changed, {"evaluation.rewards": shown}) == changed


def test_the_weights_of_criteria_are_options_of_an_arrangement():
    weighed = partial(criteria.order, helpfulness=0.7, safety=0.3)
    start = replace(DPO, data=replace(DPO.data, arrange=weighed))
    found = {path: now for path, now in options(start) if path.startswith("data.arrange")}
    assert found == {
        "data.arrange": weighed,
        "data.arrange.helpfulness": 0.7,
        "data.arrange.safety": 0.3,
    }
    changed = override(start, {"data.arrange.safety": "1"})
    assert changed.data.arrange.keywords == {"helpfulness": 0.7, "safety": 1.0}
    assert changed == replace(
        DPO, data=replace(DPO.data, arrange=partial(criteria.order, safety=1, helpfulness=0.7))
    )
    more = override(start, {"data.arrange.honesty": "0.5"})  # any name may be a criterion
    assert at(more, "data.arrange.honesty") == 0.5
    assert len({digest(each) for each in (DPO, start, changed, more)}) == 4
    described = describe(start)["data"]["arrange"]
    assert described == {
        "function": "dpo_jax.data.criteria:order",
        "helpfulness": 0.7,
        "safety": 0.3,
    }
    with pytest.raises(BadInput, match=r"data\.arrange\.safety=high: expected float"):
        override(start, {"data.arrange.safety": "high"})


def test_an_arrangement_is_named_on_the_command_line():
    changed = override(DPO, {"data.arrange": "data.views.pairs"})
    assert changed.data.arrange is views.pairs
    assert override(changed, {"data.arrange": "None"}) == DPO
    words = {"data.arrange": "data.criteria.margins", "data.arrange.by": "safety"}
    changed = override(DPO, words | {"data.arrange.helpfulness": "0.5"})
    assert changed.data.arrange.keywords == {"by": "safety", "helpfulness": 0.5}


def test_an_empty_override_is_the_same_value():
    assert override(DPO, {}) == DPO


@pytest.mark.parametrize("value", [SFT, DPO], ids=lambda value: value.name)
def test_every_option_reads_back_what_is_shown(value):
    whole = ("parent", "data.source", "data.source.parent", "parent.model", "model")
    paths = [(path, now) for path, now in options(value) if path not in whole]
    assert len(paths) > 40
    for path, now in paths:
        if path == "algorithm" or path.endswith(("prompts", "loss")) or "evaluation." in path:
            continue
        text = functions.name(now) if callable(now) else values.show(now)
        assert override(value, {path: text}) == value, path


def test_a_function_keeps_the_keywords_that_both_share():
    start = override(DPO, {"algorithm.loss.label_smoothing": 0.1, "algorithm.loss.beta": 0.3})
    changed = override(start, {"algorithm.loss": "losses.ipo"})
    assert changed.algorithm.keywords["loss"].func is losses.ipo
    assert changed.algorithm.keywords["loss"].keywords == {"beta": 0.3}
    exact = override(start, {"algorithm.loss": partial(losses.ipo, beta=5.0)})
    assert exact.algorithm.keywords["loss"].keywords == {"beta": 5.0}


milder = partial(tilted, beta=0.01)  # tilt is left open


def test_a_named_setting_keeps_what_it_requires():
    start = override(DPO, {"algorithm.loss": partial(tilted, beta=0.3, tilt=2.0, margin=0.7)})
    changed = override(start, {"algorithm.loss": f"{__name__}:milder"})
    assert changed.algorithm.keywords["loss"].keywords == {"beta": 0.01, "tilt": 2.0}
    with pytest.raises(BadInput, match=r"requires algorithm\.loss\.tilt"):
        override(start, {"algorithm.loss": milder})


def test_keywords_apply_to_the_new_function_in_any_order():
    first = override(DPO, {"algorithm.loss.length_norm": "false", "algorithm.loss": "losses.ipo"})
    second = override(DPO, {"algorithm.loss": "losses.ipo", "algorithm.loss.length_norm": "false"})
    assert first == second
    assert at(first, "algorithm.loss.length_norm") is False


def test_missing_keywords_are_named_and_can_be_set_beside():
    name = f"{__name__}:tilted"
    with pytest.raises(BadInput, match=r"tilted.*algorithm\.loss\.tilt=VALUE"):
        override(DPO, {"algorithm.loss": name})
    changed = override(DPO, {"algorithm.loss": name, "algorithm.loss.tilt": "2"})
    assert changed.algorithm.keywords["loss"].keywords == {"beta": 0.1, "tilt": 2.0}


def test_any_keyword_goes_where_a_function_takes_any():
    changed = override(DPO, {"algorithm.loss": rampant, "algorithm.loss.new": "(1, 2)"})
    assert at(changed, "algorithm.loss.new") == (1, 2)


def test_parent_and_its_twin_change_together():
    changed = override(DPO, {"parent.run.steps": "5"})
    assert changed.parent.run.steps == 5
    assert changed.data.source.parent == changed.parent
    assert override(changed, {"parent.run.steps": 100}) == DPO


def test_the_twin_can_be_changed_apart():
    changed = override(DPO, {"parent.run.steps": "5", "data.source.parent.run.seed": "3"})
    assert (changed.parent.run.steps, changed.parent.run.seed) == (5, 0)
    assert (changed.data.source.parent.run.steps, changed.data.source.parent.run.seed) == (5, 3)


def test_a_grandparent_changes_wherever_it_stands():
    top = replace(DPO, name="top", parent=DPO, data=SFT.data)
    changed = override(top, {"parent.parent.optim.learning_rate": "0.5"})
    assert changed.parent.parent.optim.learning_rate == 0.5
    assert changed.parent.data.source.parent == changed.parent.parent


def test_a_parent_can_be_a_path_and_its_twin_follows():
    changed = override(DPO, {"parent": "runs/other"})
    assert changed.parent == changed.data.source.parent == "runs/other"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"run.stepz": 1}, ["run.stepz", "nearest is run.steps", "microbatches"]),
        ({"algorithm.loss.betta": 1}, ["nearest is algorithm.loss.beta", "losses.dpo"]),
        ({"beta": 1}, ["nearest is algorithm.loss.beta"]),
        ({"model.D": 1}, ["nearest is parent.model.D"]),
        ({"optim.schedule.final": 0.1}, ["optim.constant"]),
        ({"optim.schedule.warmup": 1}, ["no effect", "optim.warmup"]),
        ({"run.steps.x": 1}, ["run.steps is 10"]),
        ({"evaluation.source.n": 1}, ["evaluation.source is None"]),
        ({"evaluation.samples": 2}, ["evaluation.prompts is None"]),
        ({"data.source.rewards.found": 1}, ["data.source.rewards is (", "without options"]),
        ({"data.source.rewards": "()"}, ["Sampled.rewards=()", "one or more functions"]),
        ({"data.source.rewards": (reward, reward)}, ["a name of its own"]),
        ({"data.source.rewards": (partial(reward),)}, ["not partial"]),
        ({"data.source.rewards": reward}, ["data.source.rewards", "a tuple of a function"]),
        ({"data.arrange.safety": 1}, ["data.arrange is None"]),
        ({"data.arrange": "data.criteria.margins"}, ["data.arrange.by=VALUE"]),
        ({"data.arrange": "data.views.pair"}, ["nearest is data.views.pairs"]),
        ({"parent.algorithm.loss.slots": 1}, ["has scale"]),
        ({"data.tokenizer.x": 1}, ["the path 'some/folder'"]),
        ({"run.steps": "many"}, ["run.steps=many", "expected int", "now 10"]),
        ({"run.steps": "1.5"}, ["expected int"]),
        ({"run.steps": 1.0}, ["expected int"]),
        ({"run.steps": True}, ["expected int"]),
        ({"run.steps": "0"}, ["1 or more"]),
        ({"run.dir": 3}, ["expected str or None", "int"]),
        ({"run.profile": "5"}, ["FIRST:END"]),
        ({"run.profile": "5:10"}, ["10 steps"]),
        ({"optim.learning_rate": "nan"}, ["expected float"]),
        ({"algorithm.loss.beta": "high"}, ["expected", "float"]),
        ({"algorithm.loss.reference_free": "1"}, ["expected bool"]),
        ({"data.truncation": "cut"}, ["'drop' or 'prompt' or 'response'"]),
        ({"data.truncation": "drop,prompt"}, ["one value", "frontier"]),
        ({"algorithm.loss.beta": ".03,.1"}, ["algorithm.loss.beta=.03,.1", "frontier"]),
        ({"algorithm.loss.beta": [0.03, 0.1]}, ["0.03,0.1", "frontier"]),
        ({"parent.model.widths": "(1,x)"}, ["a tuple of int"]),
        ({"algorithm.loss": "losses.ipp"}, ["nearest is losses.ipo"]),
        ({"algorithm.loss": "ipp"}, ["nearest is losses.ipo"]),
        ({"algorithm.loss": "losses"}, ["plackett_luce"]),
        ({"algorithm.loss": "no.module:here"}, ["no module 'no.module'"]),
        ({"algorithm.loss": f"{__name__}:tilt"}, ["nearest is tilted"]),
        ({"algorithm.loss": "gone/far.py:loss"}, ["no file gone/far.py"]),
        ({"optim.optimizer": "runs/checkpoint"}, ["runs/checkpoint", "not in dpo_jax"]),
        ({"parent": None}, ["neither a model nor a parent"]),
        ({"model": Decoder(D=4)}, ["beside its parent"]),
        ({"name": "a/b"}, ["name=a/b"]),
        ({"run..steps": 1}, ["run..steps"]),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides, said):
    with pytest.raises(BadInput) as caught:
        override(
            replace(DPO, data=replace(DPO.data, source="x")) if "parent" in overrides else DPO,
            overrides,
        )
    assert "\n" not in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_options_of_a_parent_that_is_a_path_are_refused():
    with pytest.raises(BadInput, match=r"parent\.run.*the path 'runs/sft'"):
        override(override(DPO, {"parent": "runs/sft"}), {"parent.run.steps": 3})
    with pytest.raises(BadInput, match="which is the path 'runs/sft'"):
        override(override(DPO, {"parent": "runs/sft"}), {"model.D": 3})


def test_wrong_types_are_refused_where_the_value_is_made():
    many: Any = "many"
    with pytest.raises(BadInput, match=r"Run\.steps=many: expected int"):
        Run(steps=many)
    assert Optim(learning_rate=1).learning_rate == 1.0


def test_variations_are_all_combinations():
    assert variations({"a": ".1,.2", "b": "(1,2)", "c": [losses.dpo, losses.ipo], "d": 3}) == [
        {"a": ".1", "b": "(1,2)", "c": losses.dpo, "d": 3},
        {"a": ".1", "b": "(1,2)", "c": losses.ipo, "d": 3},
        {"a": ".2", "b": "(1,2)", "c": losses.dpo, "d": 3},
        {"a": ".2", "b": "(1,2)", "c": losses.ipo, "d": 3},
    ]
    assert variations({"dir": "'a,b'"}) == [{"dir": "'a,b'"}]
    assert variations({}) == [{}]


# Listing


def test_options_list_defaults_and_leave_out_inputs():
    found = dict(options(DPO))
    assert found["algorithm.loss.beta"] == 0.1
    assert found["algorithm.loss.label_smoothing"] == 0.0  # the function's own default
    assert found["optim.optimizer.b1"] == 0.9
    assert found["data.source.prompts.seed"] == 0
    assert found["parent.model.D"] == 8
    inputs = ["algorithm.model", "optim.optimizer.learning_rate", "optim.schedule.warmup"]
    assert not found.keys() & {*inputs, "parent.algorithm.loss.slots", "run.mesh", "optim"}
    assert not [path for path in found if path.startswith("data.source.parent.")]  # the twin


# Descriptions and digests


def test_description_is_json_and_spells_defaults_out():
    described = describe(DPO)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    loss = described["algorithm"]["loss"]
    assert loss["function"] == "dpo_jax.losses.pairs:dpo"
    assert loss["label_smoothing"] == 0.0
    assert loss["divergence"] == "dpo_jax.losses.divergence:reverse_kl"
    assert described["parent"]["model"] == {
        "class": describe(Decoder(D=8))["class"],
        **{"D": 8, "dtype": "float32", "window": None, "widths": [1, 2]},
    }
    assert described["data"]["source"]["prompts"]["n"] == 3


def test_equal_by_value():
    again = replace(DPO, algorithm=partial(algorithm, loss=partial(losses.dpo, beta=0.1)))
    spelt = partial(algorithm, loss=partial(losses.dpo, beta=0.1, label_smoothing=0))
    assert DPO == again == replace(DPO, algorithm=spelt)
    assert hash(DPO) == hash(again) == hash(replace(DPO, algorithm=spelt))
    assert DPO != override(DPO, {"algorithm.loss.beta": 0.2})
    assert DPO.optim != DPO.run


def test_digest_ignores_what_changes_no_parameter_and_nothing_else():
    cosmetic = {
        "run.dir": "x",
        "run.keep": 9,
        "run.profile": "2:4",
        "run.save_every": 3,
        "run.eval_every": 3,
        "run.log_every": 3,
        "run.microbatches": 2,
        "run.mesh.fsdp": 2,
        "run.remat": "full",
        "run.offload": "both",
    }
    for path, value in cosmetic.items():
        assert digest(override(DPO, {path: value})) == digest(DPO), path
        assert digest(override(DPO, {f"parent.{path}": value})) == digest(DPO), path
    numbers = [
        (path, now)
        for path, now in options(DPO)
        if isinstance(now, int | float) and path.removeprefix("parent.") not in cosmetic
        if "mesh" not in path and "evaluation" not in path
    ]
    assert len(numbers) > 30
    found = [
        digest(override(DPO, {path: (not now) if isinstance(now, bool) else now + 1}))
        for path, now in numbers
    ]
    assert len({*found, digest(DPO)}) == len(numbers) + 1


def test_digest_without_options():
    other = override(DPO, {"run.steps": 50, "parent.run.steps": 7})
    assert digest(other) != digest(DPO)
    assert digest(other, without=("run.steps",)) == digest(DPO, without=("run.steps",))
    assert digest(other, without=("run.steps",)) != digest(DPO)


def test_functions_without_a_name_differ_by_what_they_do():
    first, second, third = lambda s: s, lambda s: s + 1, lambda s: s
    assert describe(first) == describe(third) != describe(second)


def test_what_has_no_lasting_description_is_refused():
    with pytest.raises(BadInput, match=r"algorithm\.notes: object has no lasting description"):
        describe(override(DPO, {"algorithm.notes": object()}))


def test_a_default_without_description_goes_by_its_type():
    def hidden(scored, *, mark=sys):
        """Its default cannot be written down, but it is part of the code."""

    assert describe(hidden)["mark"] == "module"
    with pytest.raises(BadInput, match="mark: module has no lasting description"):
        describe(partial(hidden, mark=os))


def test_code_digest_changes_with_the_source(tmp_path):
    code = (
        "import shutil, sys\n"
        "from pathlib import Path\n"
        f"shutil.copytree({str(Path(functions.__file__).parent)!r}, 'dpo_jax')\n"
        "sys.path.insert(0, str(Path.cwd()))\n"
        "from dpo_jax.description import code_digest\n"
        "print(code_digest())\n"
        "Path('dpo_jax/losses/door.py').open('a').write('# more')\n"
        "print(code_digest())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    before, after = run.stdout.split()
    assert before != after
    assert len(before) == len(after) == 8
