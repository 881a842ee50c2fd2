"""The rules of the house that can be read off the source: who imports whom, how long things get.

Each rule yields complaints as text; the last test feeds every rule a file that breaks it.
"""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "dpo_jax"

# Bottom up: a name imports the lines above its own, and itself.
LAYERS = (
    {"structs", "heap"},
    {"losses", "data", "parallel"},
    {"models", "worlds"},
    {"head"},
    {"logprobs"},
    {"sampling", "optim", "checkpoint", "metrics", "agreement"},
    {"refcache"},
    {"algorithms"},
    {"functions"},
    {"values"},
    {"override"},
    {"description"},
    {"experiment", "evaluate"},
    {"rundir", "smoke"},
    {"parts", "offload"},
    {"learned"},
    {"labelling"},
    {"build"},
    {"member", "feed", "signals"},
    {"train"},
    {"together"},
    {
        "frontier",
        "sweep",
        "plan",
        "check",
        "inspect_data",
        "score",
        "export",
        "report",
        "reliability",
    },
    {"commands", "usage"},
    {"cli"},
    {"experiments", "scripts"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NEVER = {("models", "losses"), ("models", "data")}  # where they meet is algorithms/
OPEN_TO_LOSSES = {"jax", "chex"}
HEAVY = {
    *("transformers", "tensorflow_datasets", "matplotlib", "orbax", "pyarrow", "tensorboardX"),
    *("rich", "tensorflow", "torch", "wandb", "grain", "datasets", "array_record"),
}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FILE_LINES, FUNCTION_LINES = 400, 60


class Import(NamedTuple):
    """One imported name with its line; `top` where importing the file runs it."""

    name: str
    line: int
    top: bool


class Source(NamedTuple):
    """A file of the repository: its path from the root, its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        """The name that the layers know the file by; "" for the package's own doors."""
        parts = self.path.with_suffix("").parts
        if parts[0] != PACKAGE:
            return parts[0]
        return "" if parts[1].startswith("__") else parts[1]


def source(path: str, text: str) -> Source:
    return Source(Path(path), text, ast.parse(text, path))


def sources(*folders: str) -> list[Source]:
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [source(str(path.relative_to(REPOSITORY)), path.read_text()) for path in paths]


def imports(file: Source) -> list[Import]:
    """Every import of a file as absolute dotted names, `from a import b` as a.b."""
    package = file.path.with_suffix("").parts[:-1]
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.extend(Import(f"{stem}.{alias.name}", node.lineno, top) for alias in node.names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            top = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            top = False
        for child in ast.iter_child_nodes(node):
            visit(child, top)

    visit(file.tree, True)
    return found


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def layers(file: Source) -> Iterator[str]:
    """A layer imports those before it; names inside braces do not import each other."""
    if file.layer and file.layer not in LEVEL:
        yield f"{file.path}: {file.layer} stands in no layer; give it one in {__file__}"
        return
    if not file.layer:
        return
    for item in imports(file):
        first, *rest = item.name.split(".")
        other = rest[0] if first == PACKAGE and rest else first
        if first == PACKAGE and other not in LEVEL:
            if file.layer not in LAYERS[-1]:
                yield f"{file.path}:{item.line}: {item.name} is in no layer; import a file by name"
        elif first != PACKAGE and first not in LAYERS[-1]:
            continue
        elif other != file.layer and (
            LEVEL[other] >= LEVEL[file.layer] or (file.layer, other) in NEVER
        ):
            yield f"{file.path}:{item.line}: {file.layer} may not import {other}"


def losses_are_alone(file: Source) -> Iterator[str]:
    """A loss sees arrays: no model, data, numpy or optimiser, only jax, chex and the structs."""
    for item in imports(file) if file.layer == "losses" else ():
        first = item.name.split(".")[0]
        if first not in OPEN_TO_LOSSES | {PACKAGE} | sys.stdlib_module_names:
            yield f"{file.path}:{item.line}: losses may not import {first}"


def fences(file: Source) -> Iterator[str]:
    """Linen stays in models/, Orbax in checkpoint.py, NNX out; a bare flax would open them all."""
    for item in imports(file):
        where = f"{file.path}:{item.line}"
        if item.name == "flax":
            yield f"{where}: say which part of flax: from flax import struct"
        if within(item.name, "flax.nnx"):
            yield f"{where}: flax.nnx is not used here"
        if within(item.name, "flax.linen") and file.layer != "models":
            yield f"{where}: only models/ imports flax.linen"
        if within(item.name, "orbax") and file.layer != "checkpoint":
            yield f"{where}: only checkpoint.py imports orbax"


def heavy_imports_wait(file: Source) -> Iterator[str]:
    """What takes long to import is imported by the function that needs it."""
    for item in imports(file) if file.layer != "scripts" else ():
        if item.top and item.name.split(".")[0] in HEAVY:
            yield f"{file.path}:{item.line}: import {item.name} inside the function that needs it"


def nothing_is_unpickled(file: Source) -> Iterator[str]:
    """A file that can run code when it is read is not data."""
    for item in imports(file):
        if item.name.split(".")[0] in UNPICKLERS:
            yield f"{file.path}:{item.line}: {item.name} runs what it reads"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{file.path}:{node.lineno}: allow_pickle runs what it reads"


@functools.cache
def dependencies() -> set[str]:
    """The import names of what pyproject.toml lists, extras included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("-", "_") for line in lines}
    installed = packages_distributions().items()
    return names | {
        module
        for module, owners in installed
        if any(owner.lower().replace("-", "_") in names for owner in owners)
    }


def names_are_free(file: Source) -> Iterator[str]:
    """No file or folder is named like a dependency or a standard module."""
    parts = [part for part in file.path.with_suffix("").parts if not part.startswith("__")]
    for part in set(parts) & (dependencies() | sys.stdlib_module_names):
        yield f"{file.path}: {part} is the name of a dependency or a standard module"


def sizes(file: Source) -> Iterator[str]:
    """A file is read in one sitting, a function on one screen."""
    length = len(file.text.splitlines())
    if length > FILE_LINES:
        yield f"{file.path}: {length} lines, more than {FILE_LINES}"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                where = f"{file.path}:{node.lineno}"
                yield f"{where}: {node.name} has {length} lines, more than {FUNCTION_LINES}"


LIBRARY = (PACKAGE,)
CODE = (PACKAGE, "experiments", "scripts")
RULES = {
    layers: CODE,
    losses_are_alone: LIBRARY,
    fences: CODE,
    heavy_imports_wait: CODE,
    nothing_is_unpickled: (*CODE, "tests"),
    names_are_free: (*CODE, "tests"),
    sizes: LIBRARY,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    files = sources(*RULES[rule])
    assert files
    complaints = [text for file in files for text in rule(file)]
    assert not complaints, "\n".join(complaints)


def test_import_is_light():
    """The main job and the command load nothing heavy beyond what jax, flax and optax load."""
    code = "import sys, jax, optax, chex, flax.linen; before = set(sys.modules)\n"
    code += "import dpo_jax.cli, dpo_jax.frontier\n"
    code += f"print(*({HEAVY!r} & (set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


BROKEN = [
    (layers, "dpo_jax/losses/pairs.py", "from dpo_jax.data import packing"),
    (layers, "dpo_jax/losses/pairs.py", "from ..models import transformer"),
    (layers, "dpo_jax/logprobs.py", "def f():\n    from dpo_jax import sampling"),
    (layers, "dpo_jax/optim.py", "import dpo_jax.metrics"),
    (layers, "dpo_jax/models/transformer.py", "from dpo_jax import losses"),
    (layers, "dpo_jax/models/transformer.py", "from dpo_jax.data.packing import pack"),
    (layers, "dpo_jax/train.py", "from dpo_jax import run"),
    (layers, "dpo_jax/train.py", "import dpo_jax"),
    (layers, "dpo_jax/frontier.py", "from experiments import sentiment_dpo"),
    (layers, "experiments/a.py", "from scripts import bench"),
    (layers, "dpo_jax/helpers.py", ""),
    (losses_are_alone, "dpo_jax/losses/pairs.py", "import numpy as np"),
    (losses_are_alone, "dpo_jax/losses/pairs.py", "from flax import struct"),
    (fences, "dpo_jax/logprobs.py", "from flax import linen as nn"),
    (fences, "dpo_jax/models/lora.py", "import flax"),
    (fences, "dpo_jax/models/lora.py", "def f():\n    from flax import nnx"),
    (fences, "dpo_jax/train.py", "def f():\n    import orbax.checkpoint.v1 as ocp"),
    (heavy_imports_wait, "dpo_jax/checkpoint.py", "from orbax.checkpoint import v1"),
    (heavy_imports_wait, "dpo_jax/metrics.py", "class A:\n    from rich import print"),
    (nothing_is_unpickled, "dpo_jax/train.py", "def f():\n    from pickle import loads"),
    (nothing_is_unpickled, "tests/test_a.py", "np.load(path, allow_pickle=True)"),
    (names_are_free, "dpo_jax/data/json.py", ""),
    (names_are_free, "dpo_jax/orbax/a.py", ""),
    (names_are_free, "experiments/tensorflow_datasets.py", ""),
    (sizes, "dpo_jax/a.py", "\n" * (FILE_LINES + 1)),
    (sizes, "dpo_jax/a.py", "class A:\n    def f(self):\n" + "        pass\n" * FUNCTION_LINES),
]
SOUND = [
    (
        layers,
        "dpo_jax/losses/pairs.py",
        "from . import ranking\nfrom dpo_jax import structs",
    ),
    (layers, "dpo_jax/losses/pairs.py", "from .ranking import hinge\nfrom .. import structs"),
    (layers, "dpo_jax/cli.py", "import dpo_jax.structs\nfrom dpo_jax import train, losses"),
    (layers, "dpo_jax/__init__.py", "from dpo_jax.train import run"),
    (layers, "experiments/a.py", "from dpo_jax import run\nfrom experiments import b"),
    (losses_are_alone, "dpo_jax/losses/pairs.py", "import math, chex, jax.numpy as jnp"),
    (fences, "dpo_jax/models/transformer.py", "from flax import linen, struct"),
    (heavy_imports_wait, "dpo_jax/checkpoint.py", "def f():\n    import orbax.checkpoint"),
    (heavy_imports_wait, "dpo_jax/a.py", "if TYPE_CHECKING:\n    import transformers"),
    (nothing_is_unpickled, "tests/test_a.py", "np.load(path, allow_pickle=False)"),
    (names_are_free, "dpo_jax/__init__.py", ""),
    (sizes, "dpo_jax/a.py", "def f():\n" + "    pass\n" * (FUNCTION_LINES - 1)),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_broken_file_is_caught(rule, path, text):
    assert len(list(rule(source(path, text)))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), SOUND)
def test_sound_file_passes(rule, path, text):
    assert list(rule(source(path, text))) == []
