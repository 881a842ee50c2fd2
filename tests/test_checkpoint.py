"""Whole or not there: round trips over meshes, damage of every kind, kills in file operations."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpo_jax.checkpoint import Checkpoints
from dpo_jax.structs import BadInput, TrainState

OPTIMIZER = optax.adamw(1e-3, weight_decay=0.0)


def train_state(seed: int = 0, **more: Any) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"q_DHE": jnp.asarray(rng.normal(size=(8, 4, 2)), jnp.float32)},
        "embed_VD": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
        "norm_D": jnp.asarray(rng.normal(size=8), jnp.float32),
    }
    return TrainState(
        step=jnp.int32(seed),
        params=params,
        opt_state=OPTIMIZER.init(params),
        memory={"mean": jnp.float32(rng.normal()), "empty": None} | more,
        skipped=jnp.int32(0),
    )


def placed(state: TrainState, shape: tuple[int, ...]) -> TrainState:
    """The state on a mesh of this shape, its first dimensions split where they divide."""
    axes = ("data", "fsdp", "tensor")
    count = int(np.prod(shape))
    mesh = jax.make_mesh(
        shape, axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count]
    )
    names = ("fsdp", "tensor")

    def place(leaf):
        spec = [name for name, size in zip(names, leaf.shape, strict=False) if size % 2 == 0]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_same_bits(state: Any, expected: Any) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


def saved(folder: Path, *steps: int, keep: int = 5) -> Checkpoints:
    store = Checkpoints(folder, keep=keep)
    for step in steps:
        store.save(step, train_state(step))
    store.wait()
    return store


def restored(store: Checkpoints) -> int:
    """The step that is restored, after its content was compared."""
    state, step = store.restore(abstract(train_state()))
    assert_same_bits(state, train_state(step))
    return step


def test_round_trip_over_meshes_is_bitwise(tmp_path):
    store = Checkpoints(tmp_path)
    state = train_state(1)
    for step, mesh in enumerate([(1, 1, 1), (2, 2, 2), (1, 1, 1)], 1):
        target = placed(state, mesh)
        if step == 1:
            store.save(step, target)
            continue
        state, found = store.restore(abstract(target))
        assert found == step - 1
        assert_same_bits(state, train_state(1))
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == wanted.sharding
        store.save(step, state)
    assert "tensor" in str(placed(state, (2, 2, 2)).params["layers"]["q_DHE"].sharding.spec)
    store.wait()


def test_leaves_without_a_sharding_go_to_the_first_device(tmp_path):
    store = saved(tmp_path, 1)
    state, _ = store.restore(jax.eval_shape(train_state))
    assert_same_bits(state, train_state(1))
    assert state.params["norm_D"].devices() == {jax.devices()[0]}


def test_quick_saves_lose_nothing_and_the_state_may_be_donated(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def update(x):
        return {"w": x["w"] * 1.5 + 1.0}

    store = Checkpoints(tmp_path, keep=5)
    x, history = {"w": jnp.ones((500, 1000))}, {}
    for step in range(1, 5):
        history[step] = {"w": np.array(x["w"], copy=True)}
        store.save(step, x)
        x = update(update(x))  # overwrites the buffers that were just saved
    store.wait()
    assert store.steps() == [1, 2, 3, 4]
    for step, wanted in history.items():
        assert_same_bits(store.restore(abstract(x), step)[0], wanted)


def test_the_newest_are_kept(tmp_path):
    store = saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert store.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    assert restored(store) == 4
    assert restored(Checkpoints(tmp_path)) == 4


def test_a_run_that_went_back_keeps_its_own(tmp_path):
    saved(tmp_path, 4, 6)
    store = saved(tmp_path, 5, keep=1)
    assert store.steps() == [5, 6]  # 4 went, not 5 for the sake of 6


def test_a_step_saved_again_is_replaced(tmp_path):
    store = saved(tmp_path, 1, 2)
    store.save(2, train_state(7))
    store.wait()
    assert_same_bits(store.restore(abstract(train_state()))[0], train_state(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_empty_and_copied_directories_are_no_steps(tmp_path):
    store = saved(tmp_path, 1, 2)
    (tmp_path / "3").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "99")
    (tmp_path / "notes").mkdir()
    assert store.steps() == [1, 2]
    assert restored(store) == 2
    store.save(3, train_state(3))
    store.wait()
    assert restored(store) == 3
    assert (tmp_path / "99").exists()


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_to_any_file_falls_back_and_says_so(tmp_path, capsys, damage):
    saved(tmp_path / "whole", 1, 2)
    store = Checkpoints(tmp_path / "run")
    files = every_file(tmp_path / "whole" / "2")
    assert len(files) > 5
    for file in files:
        if file.stat().st_size == 0 and damage is not Path.unlink:
            continue
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        damage(tmp_path / "run" / file.relative_to(tmp_path / "whole"))
        assert restored(store) == 1, file
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: left out checkpoint {tmp_path}/run/2: "), file
        reason = line.split(": ", 2)[2]
        assert file.name in reason or (file.name, damage) == ("manifest.json", Path.unlink)


def test_a_sound_checkpoint_is_restored_without_a_word(tmp_path, capfd):
    assert restored(saved(tmp_path, 1)) == 1
    assert capfd.readouterr() == ("", "")


def test_training_over_a_damaged_step_makes_it_whole(tmp_path, capsys):
    store = saved(tmp_path, 1, 2)
    flip(max(every_file(tmp_path / "2" / "state"), key=lambda path: path.stat().st_size))
    assert restored(store) == 1
    assert "its content was changed" in capsys.readouterr().err
    store.save(2, train_state(2))
    store.wait()
    assert restored(store) == 2
    assert capsys.readouterr().err == ""


def test_without_a_usable_checkpoint_the_reasons_are_given(tmp_path):
    with pytest.raises(BadInput, match="no usable checkpoint"):
        Checkpoints(tmp_path / "none").restore(abstract(train_state()))
    assert not (tmp_path / "none").exists()
    store = saved(tmp_path, 1, 2)
    with pytest.raises(BadInput, match=r"checkpoint of step 7.*\[1, 2\]"):
        store.restore(abstract(train_state()), step=7)
    for step in (1, 2):
        cut(tmp_path / str(step) / "state" / "state" / "manifest.ocdbt")
    with pytest.raises(BadInput, match=r"2: .*manifest\.ocdbt has .*1: .*manifest\.ocdbt has"):
        store.restore(abstract(train_state()))
    with pytest.raises(BadInput, match=r"step 2.*manifest\.ocdbt"):
        store.restore(abstract(train_state()), step=2)


def altered(name: str, **changes: Any) -> Any:
    """The abstract state with one parameter replaced by another of that shape or dtype."""
    target = abstract(train_state())
    leaf = target.params[name]
    values = {"shape": leaf.shape, "dtype": leaf.dtype, "sharding": leaf.sharding} | changes
    return target.replace(params=target.params | {name: jax.ShapeDtypeStruct(**values)})


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (altered("norm_D", shape=(9,)), r"params/norm_D is float32\[8\] in it and float32\[9\]"),
        (altered("embed_VD", shape=(8, 16)), r"params/embed_VD is bfloat16\[16,8\] .*\[8,16\]"),
        (altered("embed_VD", dtype=jnp.float32), r"params/embed_VD is bfloat16.* float32"),
        (altered("norm_D", dtype=jnp.bfloat16), r"params/norm_D is float32.* bfloat16"),
        (abstract(train_state(extra=jnp.zeros(2))), r"it lacks memory/extra float32\[2\]"),
        (abstract(train_state()).replace(memory={}), r"it holds memory/mean float32\[\]"),
        ({"layers": abstract(train_state()).params}, r"\(and \d+ more\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_leaf(tmp_path, target, says):
    with pytest.raises(BadInput, match="checkpoint of another model.*" + says):
        saved(tmp_path, 1).restore(target)


def test_what_is_no_array_and_keeping_none_are_refused(tmp_path):
    with pytest.raises(TypeError, match="memory/count"):
        Checkpoints(tmp_path).save(1, train_state(count=3))
    with pytest.raises(BadInput, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_changed_manifest_is_not_believed(tmp_path, capsys):
    store = saved(tmp_path, 1, 2)
    path = tmp_path / "2" / "manifest.json"
    path.write_text(path.read_text().replace("float32[8]", "float32[9]"))
    assert restored(store) == 1  # and not a checkpoint of another model
    assert "manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("next_call", ["wait", "save"])
def test_an_error_in_the_background_surfaces_in_the_next_call(tmp_path, next_call):
    store = saved(tmp_path, 1)
    (tmp_path / "2.old").write_text("in the way")
    store.save(2, train_state(2))
    with pytest.raises(OSError, match=r"2\.old"):
        store.wait() if next_call == "wait" else store.save(3, train_state(3))
    assert restored(store) == 2


def test_relative_directories_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path("runs/x"), 1)
    assert json.loads((tmp_path / "runs/x/1/manifest.json").read_text())["manifest"]["step"] == 1


# A process that forks before jax starts its threads; each child is killed by itself at a file
# operation of the save, counted from the moment that `first` was safely there.
KILLED = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from orbax.checkpoint import v1
from dpo_jax.checkpoint import Checkpoints

def run(folder, first, second, point):
    store = Checkpoints(folder, keep=1)
    store.save(first, {"w": jnp.full((64, 64), 1.0)})
    store.wait()
    seen = []
    def die(event, arguments):
        if event.split(".")[0] in ("open", "os", "shutil") and arguments:
            if folder in str(arguments[0]):
                seen.append(event)
                if len(seen) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    store.save(second, {"w": jnp.full((64, 64), 2.0)})
    store.wait()

root, first, second = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for point in map(int, sys.argv[4:]):
    child = os.fork()
    if child == 0:
        run(f"{root}/{point}", first, second, point)
        os._exit(0)
    print(point, os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize(
    ("second", "points"),
    [
        # where Orbax 0.12 makes directories, writes, renames; where we hash, seal, remove
        (2, (1, 3, 8, 18, 37, 41, 43, 1000)),
        (1, (1, 3, 8, 20, 41, 1000)),  # the same step again, and it is the only one
    ],
)
def test_killed_in_any_file_operation_a_checkpoint_stands(tmp_path, repository, second, points):
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), "1", str(second), *map(str, points)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    ends = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert ends[:4] == [9] * 4 and set(ends) == {0, 9} and ends[-1] == 0  # 9: killed, 0: saved
    target = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    found = {}
    for point in points:
        store = Checkpoints(tmp_path / str(point), keep=1)
        state, step = store.restore(target)
        found[point] = float(state["w"][0, 0])
        assert np.all(state["w"] == found[point])
        assert step == (second if found[point] == 2.0 else 1)
        store.save(second, {"w": jnp.full((64, 64), 3.0)})
        store.wait()
        state, step = store.restore(target)
        assert step == second and np.all(state["w"] == 3.0)
        assert [path.name for path in (tmp_path / str(point)).iterdir()] == [str(second)]
    # early kills leave the first checkpoint, late ones the second
    assert found[points[0]] == 1.0 and found[points[-1]] == 2.0
    assert list(found.values()) == sorted(found.values())
