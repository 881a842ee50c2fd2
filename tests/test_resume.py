"""Killed and resumed is never killed; a directory is not given to another run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import relative_error
from tiny_runs import EXPERIMENT, FUSE, SFT, rows, snapshot, timeless

import dpo_jax
from dpo_jax import cli
from dpo_jax.checkpoint import Checkpoints
from dpo_jax.experiment import Experiment, load, override
from dpo_jax.structs import BadInput
from dpo_jax.train import Result

HERE = Path(__file__).parent
SAVING = replace(EXPERIMENT, run=replace(EXPERIMENT.run, save_every=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of this module; its runs/ are shared."""
    folder = tmp_path_factory.mktemp("resumed")
    with chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Result:
    return dpo_jax.run(SAVING, directory="unbroken")


def light(calls: int, number: int) -> None:
    """Send the process a signal after as many evaluations (at steps 0, 2, 4 and 6) went well."""
    Path(FUSE).write_text(f"{calls} {int(number)}")


def assert_same(one: Result, other: Result) -> None:
    """The same parameters bit for bit, the same metrics, the same samples."""
    assert relative_error(one.params, other.params) == 0
    assert one.metrics == other.metrics
    assert timeless(one.directory) == timeless(other.directory)
    assert rows(one.directory, "samples.jsonl") == rows(other.directory, "samples.jsonl")


@pytest.mark.parametrize(
    ("calls", "number", "status", "step"),
    [(1, signal.SIGTERM, 143, 2), (2, signal.SIGINT, 130, 4), (3, signal.SIGTERM, 143, 6)],
)
def test_a_signal_saves_and_the_same_command_resumes(unbroken, capsys, calls, number, status, step):
    """At the last step too, where all that was missing is the seal."""
    home = f"signal{calls}"
    light(calls, number)
    with pytest.raises(SystemExit) as leaving:
        dpo_jax.run(EXPERIMENT, directory=home)  # which saves at its end only
    assert leaving.value.code == status
    assert Checkpoints(f"{home}/checkpoints").steps() == [step]
    assert not Path(home, "result.json").exists()
    assert f"{home}: stopped at step {step}" in capsys.readouterr().err
    resumed = dpo_jax.run(EXPERIMENT, directory=home)
    assert f"{home}: resumed at step {step}" in capsys.readouterr().err
    assert_same(resumed, unbroken)


def test_a_killed_process_is_resumed(unbroken, capsys):
    """SIGKILL in the evaluation at step 4, when the checkpoint of step 2 was sealed."""
    light(2, signal.SIGKILL)
    path = str(HERE / "tiny_runs.py")
    words = ["train", path, "run.dir=killed", "run.save_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    killed = subprocess.run(
        [sys.executable, "-m", "dpo_jax", *words], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("killed/result.json").exists()
    steps = Checkpoints("killed/checkpoints").steps()
    assert steps and steps[-1] in (2, 3)
    assert cli.main(words) == 0
    assert f"killed: resumed at step {steps[-1]}" in capsys.readouterr().err
    again = override(load(path).EXPERIMENT, {"run.dir": "killed", "run.save_every": 1})
    assert_same(dpo_jax.run(again), unbroken)


def test_more_steps_go_on_and_fewer_are_refused(unbroken, capsys):
    """Constant rates, so the longer run is the shorter one and then some."""
    shutil.copytree("unbroken", "longer")
    more = replace(SAVING, run=replace(SAVING.run, steps=8))
    resumed = dpo_jax.run(more, directory="longer")
    assert "longer: resumed at step 6" in capsys.readouterr().err
    assert_same(resumed, dpo_jax.run(more, directory="whole"))
    fewer = replace(SAVING, run=replace(SAVING.run, steps=4))
    before = snapshot("longer")
    with pytest.raises(BadInput, match=r"longer has done 8 steps, run.steps=4: give"):
        dpo_jax.run(fewer, directory="longer")
    assert snapshot("longer") == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("algorithm.loss.beta=0.3", "algorithm.loss.beta was 0.5, is 0.3"),
        ("data.groups=8", "data.groups was 4, is 8"),
        ("run.seed=1", "run.seed was 0, is 1"),
        ("algorithm.loss=losses.ipo", "algorithm.loss was "),
        ("parent.run.steps=31", "parent.run.steps was 30, is 31"),
        ("parent.optim.learning_rate=0.1", "parent.optim.learning_rate was 0.03, is 0.1"),
    ],
)
def test_a_directory_of_another_experiment_is_refused(unbroken, capsys, word, said):
    path = str(HERE / "tiny_runs.py")
    if not Path("own").exists():
        assert cli.main(["train", path, "run.dir=own"]) == 0
    capsys.readouterr()
    before = snapshot(".")
    assert cli.main(["train", path, "run.dir=own", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpo-jax: error: own holds another experiment (") and said in error
    assert "give another run.dir" in error and error.count("\n") == 1
    assert snapshot(".") == before


def test_a_directory_of_something_else_is_refused(place, capsys):
    Path("letters").mkdir()
    Path("letters/dear.txt").write_text("do not lose this")
    with pytest.raises(BadInput, match=r"letters holds no readable experiment.json"):
        dpo_jax.run(SFT, directory="letters")
    assert [path.name for path in Path("letters").iterdir()] == ["dear.txt"]


def from_file(**changes) -> Experiment:
    """SFT on a file, two steps."""
    data = replace(SFT.data, source="reviews.jsonl", groups=2)
    return replace(SFT, data=data, run=replace(SFT.run, steps=2, **changes))


def test_other_data_under_the_same_name_is_refused(place):
    texts = [{"prompt": "the film", "completion": f"was good . {end}"} for end in ("the", "a")]
    Path("reviews.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    dpo_jax.run(from_file(), directory="from_file")
    Path("from_file/result.json").unlink()
    Path("reviews.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts[::-1]))
    before = snapshot("from_file")
    with pytest.raises(BadInput, match=r"from_file was started on other data .*run.dir"):
        dpo_jax.run(from_file(), directory="from_file")
    assert snapshot("from_file") == before


def test_weights_and_checkpoints_of_another_model_are_refused(unbroken):
    parent = str(next(Path("runs").glob("sft-????????")))
    narrow = replace(SFT, model=replace(SFT.model, D=8), run=replace(SFT.run, steps=2))
    other = dpo_jax.run(narrow, directory="narrow")
    with pytest.raises(BadInput, match="experiment wider has a model beside its parent"):
        replace(SFT, name="wider", model=replace(SFT.model, D=24), parent=parent)
    same = dpo_jax.run(replace(EXPERIMENT, parent=parent), directory="by_path")  # its model is read
    assert relative_error(same.params, unbroken.params) == 0

    Path("by_path/result.json").unlink()
    shutil.rmtree("by_path/checkpoints")
    shutil.copytree(f"{other.directory}/checkpoints", "by_path/checkpoints")
    before = snapshot("by_path")
    with pytest.raises(BadInput, match=r"checkpoint of another model: opt_state/.*float32\[200,16"):
        dpo_jax.run(replace(EXPERIMENT, parent=parent), directory="by_path")
    assert snapshot("by_path") == before


def test_a_run_resumed_inside_the_profiler_window_is_traced_to_its_end(place):
    short = replace(SFT, run=replace(SFT.run, steps=5, save_every=1, keep=9))
    dpo_jax.run(short, directory="window")
    Path("window/result.json").unlink()
    for step in (3, 4, 5):
        shutil.rmtree(f"window/checkpoints/{step}")
    dpo_jax.run(replace(short, run=replace(short.run, profile="1:4")), directory="window")
    assert any(path.is_file() for path in Path("window/profile").rglob("*"))
