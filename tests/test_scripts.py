"""The shell scripts, run for real on a copy of the repository whose `.venv` records its calls.

Nothing is installed: the programs behind the scripts (python, pip, uv, dpo-jax) are stand-ins.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"]
TOOLS = ("basename", "bash", "cat", "chmod", "cmp", "dirname", "mkdir", "rm")

RECORD = """#!/bin/bash
printf '%s|' "$(basename "$0")" "$@" >>"$CALLS"
echo >>"$CALLS"
"""
# A Python whose `-m venv .venv` makes a `.venv` that records.
PYTHON = (
    RECORD
    + """
case "$*" in
    *venv*.venv) mkdir -p .venv/bin; cat "$0" >.venv/bin/python; chmod +x .venv/bin/python ;;
esac
"""
)
SHIM = "#!/bin/bash\necho 'pyenv: command not found' >&2\nexit 127\n"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Checkout:
    """A copy of the scripts at `root`, and a PATH that holds the shell's tools and nothing else."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.calls_file = folder / "a b", folder / "bin", folder / "calls"
        shutil.copytree(REPOSITORY / "scripts", self.root / "scripts")
        shutil.copytree(REPOSITORY / ".ci", self.root / ".ci")
        shutil.copy(REPOSITORY / "pyproject.toml", self.root)
        self.decoy = folder / "decoy"  # where `cd "a b/scripts"` would lead by CDPATH
        (self.decoy / "a b" / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        environment = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls_file),
            "CDPATH": str(self.decoy),
        }
        return subprocess.run(
            ["bash", f"{self.root.name}/{script}", *arguments],
            cwd=self.root.parent,
            env=environment,
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[list[str]]:
        """The recorded calls, without the ones that only ask a Python what it is."""
        lines = [line.rstrip("|").split("|") for line in self.calls_file.read_text().splitlines()]
        return [line for line in lines if line[1:2] not in (["-c"], ["--version"])]


@pytest.fixture
def checkout(tmp_path):
    """A checkout on which both scripts have installed before."""
    checkout = Checkout(tmp_path)
    for program in ("python", "dpo-jax"):
        executable(checkout.root / ".venv" / "bin" / program, RECORD)
    checkout.run("scripts/demo.sh")
    checkout.run("scripts/test.sh")
    return checkout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_demo_passes_its_arguments_on(checkout):
    run = checkout.run("scripts/demo.sh", "algorithm.loss.beta=.1,.3", "run.dir=a b")
    assert run.returncode == 0, run.stderr
    expected = ["dpo-jax", "frontier", "experiments/sentiment_dpo.py"]
    assert checkout.calls() == [[*expected, "algorithm.loss.beta=.1,.3", "run.dir=a b"]]
    assert "== dpo-jax frontier" in run.stdout


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_tests_alone_with_arguments_and_every_check_without(checkout, script):
    assert checkout.run(script, "-k", "losses or data").returncode == 0
    assert checkout.calls() == [["python", "-m", "pytest", "-k", "losses or data"]]
    assert checkout.run(script).returncode == 0
    *checks, tests = [call[2:] for call in checkout.calls()]
    assert checks == [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]]
    assert tests[0] == "pytest" and all(word.startswith("--") for word in tests[1:])


def test_failed_check_stops(checkout):
    executable(
        checkout.root / ".venv/bin/python", RECORD + 'case "$*" in *format*) exit 3;; esac\n'
    )
    assert checkout.run("scripts/test.sh").returncode == 3
    assert [call[2] for call in checkout.calls()] == ["ruff", "ruff"]


def test_installs_again_only_when_pyproject_changed(checkout):
    project = checkout.root / "pyproject.toml"
    project.write_text(project.read_text() + "\n# changed\n")
    run = checkout.run("scripts/test.sh", "-x")
    assert "== installing dpo-jax[test] into .venv with pip" in run.stdout
    install, test = checkout.calls()
    assert install[1:4] == ["-m", "pip", "install"] and install[-2:] == ["--editable", ".[test]"]
    assert test[1:] == ["-m", "pytest", "-x"]
    checkout.run("scripts/demo.sh")
    assert [call[0] for call in checkout.calls()] == ["dpo-jax"], "[test] holds what demo needs"


def test_failed_install_is_tried_again(checkout):
    (checkout.root / "pyproject.toml").write_text("# changed\n")
    executable(
        checkout.root / ".venv/bin/python", RECORD + 'case "$*" in *pip\\ *) exit 1;; esac\n'
    )
    for _ in range(2):
        assert checkout.run("scripts/demo.sh").returncode == 1
        assert [call[2:4] for call in checkout.calls()] == [["pip", "install"]]


def test_uses_uv_where_it_is_there(checkout):
    executable(checkout.bin / "uv", RECORD)
    (checkout.root / "pyproject.toml").write_text("# changed\n")
    run = checkout.run("scripts/demo.sh")
    assert run.returncode == 0 and "with uv" in run.stdout
    install, demo = checkout.calls()
    assert install[:3] == ["uv", "pip", "install"] and install[-2:] == ["--editable", "."]
    assert demo[0] == "dpo-jax"


def test_skips_a_shim_without_a_python_behind_it(tmp_path):
    checkout = Checkout(tmp_path)
    executable(checkout.bin / "python3.13", SHIM)
    executable(checkout.bin / "python3.12", PYTHON)
    run = checkout.run("scripts/test.sh", "-x")
    assert run.returncode == 0, run.stderr
    made, installed, tested = checkout.calls()
    assert made == ["python3.12", "-m", "venv", ".venv"]
    assert installed[2:4] == ["pip", "install"] and tested[2:] == ["pytest", "-x"]


def test_venv_without_pip_gets_it(checkout):
    (checkout.root / "pyproject.toml").write_text("# changed\n")
    no_pip = 'case "$*" in *"import pip"*) exit 1;; esac\n'
    executable(checkout.root / ".venv/bin/python", RECORD + no_pip)
    assert checkout.run("scripts/demo.sh").returncode == 0
    assert [call[2:3] for call in checkout.calls()][:2] == [["ensurepip"], ["pip"]]


def test_says_so_when_there_is_no_python(tmp_path):
    checkout = Checkout(tmp_path)
    executable(checkout.bin / "python3", SHIM)
    run = checkout.run("scripts/demo.sh")
    assert run.returncode == 1
    assert "no Python >= 3.11" in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (checkout.root / ".venv").exists()
