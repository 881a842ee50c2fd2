"""Functions as values: the keywords they leave open, their names, and files of the user's.

A function gets its inputs by position; its hyperparameters are keywords, set with
`functools.partial`. Whatever is named here (a module, a file, a function) is BadInput where it is
missing or does not import.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from dpo_jax.structs import BadInput

HOUSE = "dpo_jax"
UNSET = inspect.Parameter.empty  # the value of a keyword that has none yet
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def unwrap(value: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """(function, bound positional arguments, bound keywords) of a function or a partial."""
    if isinstance(value, partial):
        return value.func, value.args, dict(value.keywords)
    return value, (), {}


def keywords(
    value: Callable[..., Any], inputs: int | None = None, given: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The options of a function or a partial: name -> bound value, default or UNSET.

    inputs: how many arguments the caller passes by position; None where that is not known: then a
    positional parameter is an option only if it has a default other than None or is bound.
    given: keywords the caller passes, so no options.
    """
    function, args, bound = unwrap(value)
    if isinstance(function, type):
        return bound
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some builtins have no signature
        return bound
    found = {}
    for place, parameter in enumerate(parameters[len(args) :]):
        positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        if inputs is None:
            is_input = positional and parameter.default in (None, UNSET)
        else:
            is_input = positional and place < inputs
        if parameter.kind in _BY_NAME and not is_input and parameter.name not in given:
            found[parameter.name] = parameter.default
    return {**found, **bound}


def defaults(value: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a function, or of the function inside a partial."""
    try:
        parameters = inspect.signature(unwrap(value)[0]).parameters.values()
    except ValueError:
        return {}
    return {each.name: each.default for each in parameters if each.default is not UNSET}


def takes_any_keyword(value: Callable[..., Any]) -> bool:
    """Whether a function has `**keywords`, so that every name is an option."""
    try:
        parameters = inspect.signature(unwrap(value)[0]).parameters.values()
    except ValueError:
        return True
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def annotations(value: Any) -> dict[str, Any]:
    """Declared types of a dataclass's fields or a function's parameters; {} where unreadable."""
    target = type(value) if is_dataclass(value) or not callable(value) else unwrap(value)[0]
    try:
        return get_type_hints(inspect.unwrap(target), include_extras=True)
    except (NameError, TypeError):  # types imported for checkers only, and builtins
        return {}


def name(value: Callable[..., Any]) -> str:
    """The name that `named` reads back: `losses.ipo`, or `module:function` outside the house."""
    function = unwrap(value)[0]
    module, called = function_id(function)
    if not in_house(module):
        return f"{module}:{called}"
    parts = module.split(".")
    for end in range(1, len(parts)):  # the shortest module that exports it
        holder = sys.modules.get(".".join(parts[: end + 1]))
        if vars(holder or ModuleType("")).get(called) is function:
            return ".".join([*parts[1 : end + 1], called])
    return ".".join([*parts[1:], called])


def function_id(function: Callable[..., Any]) -> tuple[str, str]:
    """(module, qualified name); those of its class for an object that is called."""
    owner = function if hasattr(function, "__qualname__") else type(function)
    return owner.__module__, owner.__qualname__


def in_house(module: str) -> bool:
    """Whether a module belongs to this package."""
    return module == HOUSE or module.startswith(f"{HOUSE}.")


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The candidate most like `word`, None where none is at least `cutoff` alike."""
    return next(iter(difflib.get_close_matches(word, list(candidates), 1, cutoff)), None)


def named(text: str, beside: str = "") -> Any:
    """What `losses.ipo` (in dpo_jax), `module:function` or `path/to/file.py:function` names.

    beside: the name of the value it is to replace, for the suggestion when `text` is bare.
    """
    place, colon, attribute = text.rpartition(":")
    if not colon:
        return _in_house(text, beside)
    if not _DOTTED.fullmatch(attribute) or not (place.endswith(".py") or _DOTTED.fullmatch(place)):
        raise BadInput(
            f"{text!r} names no function: write module:function or path/file.py:function"
        )
    module = import_file(place) if place.endswith(".py") else import_named(place)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            close = nearest(part, _public(target))
            raise BadInput(f"{place} has no {attribute!r}" + f"; nearest is {close}" * bool(close))
        target = getattr(target, part)
    return target


def _in_house(text: str, beside: str) -> Any:
    target: Any = importlib.import_module(HOUSE)
    seen: list[str] = []
    for part in text.removeprefix(f"{HOUSE}.").split("."):
        found = _member(target, part)
        if found is UNSET:
            raise BadInput(f"{text!r} is not in {HOUSE}{_suggestion(part, seen, target, beside)}")
        target = found
        seen.append(part)
    if isinstance(target, ModuleType):  # algorithms.sft is a module, its function is meant
        inner = _member(target, seen[-1])
        if inner is UNSET:
            names = ", ".join(_public(target))
            raise BadInput(f"{text!r} is a module of {HOUSE}; name one of its functions: {names}")
        return inner
    return target


def _member(target: Any, part: str) -> Any:
    if not part.isidentifier() or part.startswith("_"):
        return UNSET
    if not hasattr(target, part) and part in _submodules(target):
        importlib.import_module(f"{target.__name__}.{part}")
    return getattr(target, part, UNSET)


def _submodules(target: Any) -> list[str]:
    return [found.name for found in pkgutil.iter_modules(getattr(target, "__path__", []))]


def _public(target: Any) -> list[str]:
    """The names a user may mean: what a module defines or exports, without what it imports."""
    if not isinstance(target, ModuleType):
        return [called for called in dir(target) if not called.startswith("_")]
    if hasattr(target, "__all__"):
        return sorted(target.__all__)
    own = [
        called
        for called, value in vars(target).items()
        if not called.startswith("_") and getattr(value, "__module__", None) == target.__name__
    ]
    return sorted({*own, *_submodules(target)})


def _suggestion(part: str, seen: list[str], target: Any, beside: str) -> str:
    if not seen and "." in beside and ":" not in beside:  # a bare name: look where the old one is
        space = beside.rpartition(".")[0]
        close = nearest(part, _public(_in_house_module(space)))
        return f"; nearest is {space}.{close}" * bool(close)
    close = nearest(part, _public(target))
    return f"; nearest is {'.'.join([*seen, close])}" if close else ""


def _in_house_module(space: str) -> ModuleType:
    return importlib.import_module(f"{HOUSE}.{space}")


def import_named(module: str) -> ModuleType:
    """Import `experiments.sentiment_dpo`; the working directory is on the path."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise BadInput(f"no module {module!r}{_near_file(module)}") from None
        raise _broken(error, module) from error
    except Exception as error:
        raise _broken(error, module) from error


def import_file(path: str) -> ModuleType:
    """Import a file as `folder.stem`, so that it and its siblings can import each other by it.

    The folder that holds its folder goes to the front of the path and its own folder to the end
    (a loss beside the experiment). `stem` alone where one of the two is no identifier or the name
    of the folder is taken by another package.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise BadInput(f"no file {path}{_near_file(path)}")
    folder = file.parent
    around, inside = str(folder.parent), str(folder)
    sys.path[:] = [around, *(entry for entry in sys.path if entry not in (around, inside)), inside]
    try:
        module = file.stem
        if file.stem.isidentifier() and folder.name.isidentifier() and _is_package(folder):
            module = f"{folder.name}.{file.stem}"
        _forget_others(module, file)
        found = importlib.import_module(module)
    except Exception as error:
        raise _broken(error, path) from error
    if not _is_at(found, file):
        raise BadInput(f"{path}: the module name {module!r} is taken by {found}; rename the file")
    return found


def _is_package(folder: Path) -> bool:
    """Whether the name of the folder imports the folder."""
    importlib.invalidate_caches()
    try:
        package = importlib.import_module(folder.name)
    except ImportError:
        return False
    return any(Path(entry).resolve() == folder for entry in getattr(package, "__path__", []))


def _forget_others(module: str, file: Path) -> None:
    """Drop modules of other folders that bear the name of this file or of one beside it."""
    prefix = module.rpartition(".")[0] or module
    for called, found in list(sys.modules.items()):
        beside = called == module or ("." in module and called.startswith(f"{prefix}."))
        source = getattr(found, "__file__", None)
        if beside and source and not _is_installed(source) and not _is_at(found, file.parent):
            del sys.modules[called]


def _is_at(module: ModuleType, place: Path) -> bool:
    """Whether a module is this file or lies in this folder."""
    source = getattr(module, "__file__", None)
    return source is not None and place in (Path(source).resolve(), *Path(source).resolve().parents)


def _is_installed(source: str) -> bool:
    """Whether a source file is of Python, of an installed package or of this one."""
    paths = sysconfig.get_paths()
    return source.startswith((paths["stdlib"], paths["purelib"], str(Path(__file__).parent), "<"))


def _near_file(text: str) -> str:
    """`; nearest is experiments/x.py`, looking where the text points and in experiments/."""
    wanted = Path(text if "/" in text or text.endswith(".py") else f"{text.replace('.', '/')}.py")
    folders = {wanted.parent, Path("experiments"), Path(".")}
    files = {str(file) for folder in folders if folder.is_dir() for file in folder.glob("*.py")}
    close = nearest(str(wanted), sorted(files))
    return f"; nearest is {close}" if close else ""


def _broken(error: Exception, what: str) -> BadInput:
    """BadInput that names the line of the user's own code at which an import failed."""
    if isinstance(error, SyntaxError):
        return BadInput(f"{error.filename}:{error.lineno}: {error.msg}")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else what
    kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
    return BadInput(f"{where}: {kind}{error}")
