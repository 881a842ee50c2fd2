"""The start: what it imports, what it compiles when, what it keeps of that."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
from test_layering import HEAVY
from tiny_runs import SFT

from dpo_jax import build, parts
from dpo_jax.member import Member
from dpo_jax.train import Stepper, run

KEPT = """
import jax, sys
from dpo_jax import cli
cli._keep_compilations()
jax.jit(lambda x: x + 1)(1)
print(jax.config.jax_compilation_cache_dir)
"""
NAMED = """
import sys
from dpo_jax import cli, train
assert cli.main(["train", "experiments/sentiment_dpo.py", "--help"]) == 0
print(*sys.modules)
"""


def python(code: str, **environment: str) -> list[str]:
    """The last line that a process prints, in words."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_compiled_programs_are_kept_however_small(tmp_path):
    (said,) = python(KEPT, XDG_CACHE_HOME=str(tmp_path))
    assert Path(said) == tmp_path / "dpo_jax" / "xla"
    assert [path for path in Path(said).iterdir() if "lambda" in path.name]


def test_the_environment_says_where_programs_are_kept(tmp_path):
    elsewhere = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "x")}
    assert python(KEPT, **elsewhere) == [str(tmp_path / "x")]
    assert not (tmp_path / "dpo_jax").exists()


def test_naming_an_experiment_imports_nothing_heavy(repository, monkeypatch):
    """Rich comes with flax.linen."""
    monkeypatch.chdir(repository)
    assert not (HEAVY - {"rich"}) & set(python(NAMED))


def test_the_first_shape_is_compiled_first_and_the_others_before_the_second_step():
    experiment = replace(SFT, run=replace(SFT.run, steps=2000))
    mesh = parts.mesh(experiment)
    with jax.set_mesh(mesh):
        member = Member(experiment, build.setup(experiment, mesh, build.materials(experiment, run)))
        stepper = Stepper([member], [member.start()], 0)
        ladder = member.setup.loader.ladder
        assert len(ladder) > 1 and len(stepper.compiled) == 1
        stepper.advance(0)
        assert len(stepper.compiled) == 1
        assert stepper.warm_up() == len(ladder) - 1
        assert stepper.warm_up() == 0
        compiled = list(stepper.compiled)
        for step in range(1, 40):
            stepper.advance(step)
    assert list(stepper.compiled) == compiled
