"""What every test runs under; the environment is set before anything imports jax.

8 virtual CPU devices, no implicit rank promotion, no network, compiled programs kept between runs.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest


def compilation_cache() -> Path:
    """A folder per user that outlives the run; a temporary one where home cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "dpo_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="dpo_jax_xla_"))


def installed(name: str) -> str | None:
    """The version of a package, None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


LIBTPU = installed("libtpu")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Level 0 halves the time spent compiling and the older emitters take a third off what is left;
# results agree to float32 rounding. XLA aborts on a flag it does not know, and libtpu has an XLA of
# its own that reads the same variable: the second only where it was tried.
OLDER = version("jaxlib").startswith("0.10.") and (LIBTPU or "0.0.42").startswith("0.0.42")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if OLDER else []),
    ]
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("GLIBC_TUNABLES", "")  # set, so that no script under test begins twice

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `accelerator` on a machine (or with JAX_PLATFORMS=cpu) without one."""
    marked = [item for item in items if item.get_closest_marker("accelerator")]
    if not marked:
        return
    import jax

    if jax.default_backend() == "cpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; jax runs on the CPU"))


@pytest.fixture(scope="module", autouse=True)
def relief() -> None:
    """A process that runs hundreds of tests would run out of regions of memory."""
    from dpo_jax import heap

    heap.relieved()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def libtpu() -> None:
    """For tests that compile for TPUs, which needs none of them."""
    if LIBTPU is None:
        pytest.skip("libtpu is not installed: the extra test has it on Linux x86_64")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and recorded results that does not travel with the repository."""
    folder = Path(os.environ.get("DPO_JAX_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set DPO_JAX_SHARED to the folder that holds it")
    return folder


def golden(shared: Path, name: str) -> Any:
    """A JSON file of recorded values."""
    return json.loads((shared / "golden" / name).read_text())


@pytest.fixture(scope="session")
def oracles(shared: Path) -> dict[str, Any]:
    """Values and gradients of losses, recorded by running other implementations in float64."""
    return golden(shared, "loss_oracles.json")


@pytest.fixture(scope="session")
def closed_forms(shared: Path) -> dict[str, Any]:
    """Values that can be written down, by name."""
    return {entry["name"]: entry["value"] for entry in golden(shared, "closed_forms.json")}


@pytest.fixture(scope="session")
def vectors(shared: Path) -> dict[str, dict[str, Any]]:
    """Inputs and outputs of other projects' tests, by name."""
    return {entry["name"]: entry for entry in golden(shared, "peer_vectors.json")["vectors"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of a module whose tests share its runs/."""
    folder = tmp_path_factory.mktemp("runs")
    with chdir(folder):
        yield folder
