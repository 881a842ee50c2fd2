"""The command `dpo-jax`: reads its arguments, loads an experiment, calls what does the work.

Unusable input is one line on stderr and exit status 2.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from dpo_jax.structs import BadInput
from dpo_jax.usage import COMMANDS, FLAGS, LOSSES, READERS, WHAT, WORDS


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are BadInput."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    # transformers tells on stderr that it found no PyTorch, which nothing here wants
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return command(list(sys.argv[1:] if argv is None else argv))
    except BadInput as error:
        line = " ".join(str(error).splitlines())
        print(f"dpo-jax: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def command(argv: list[str]) -> int:
    """Parse the arguments and call the subcommand. Raises BadInput."""
    about = "Preference alignment in JAX; `dpo-jax train EXPERIMENT --help` lists its options."
    parser = Parser(prog="dpo-jax", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        inner = commands.add_parser(
            name, help=purpose, description=purpose, add_help=False, allow_abbrev=False
        )
        inner.add_argument("experiment", nargs="?", help=WHAT.get(name, "a file or a module name"))
        more = WORDS.get(name, [])
        words = " ".join([*(word for word, _ in more), "option=value"])
        said = "; ".join([*(about for _, about in more), "dotted.path=value of the experiment"])
        inner.add_argument("words", nargs="*", metavar=words, help=said)
        for flag, options in FLAGS.get(name, {}).items():
            inner.add_argument(flag, **options)
        inner.add_argument(
            "-h", "--help", action="store_true", help="list the options, those of an experiment too"
        )
    about_losses = commands.add_parser("losses", help=LOSSES, description=LOSSES)
    about_losses.add_argument("what", nargs="?", choices=("table", "kl"), default="table")
    names = (*COMMANDS, "losses")
    if argv and argv[0] not in (*names, "-h", "--help"):
        raise BadInput(f"no command {argv[0]!r}{_nearest(argv[0], names)}")
    arguments, rest = parser.parse_known_args(argv)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        path = flags[0].lstrip("-")
        known = [*FLAGS.get(arguments.command, {}), "--help"]
        wanted = f"; write {path} without dashes" if "=" in path else _nearest(flags[0], known)
        raise BadInput(f"no argument {flags[0]!r}{wanted}")
    if arguments.command == "losses":
        return _losses(arguments.what)
    if arguments.experiment is None:
        if not arguments.help:
            raise BadInput(f"{arguments.command}: name an experiment, a file path or a module name")
        commands.choices[arguments.command].print_help()
        return 0
    arguments.words += rest
    return _run(arguments, commands.choices[arguments.command])


def parted(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(overrides, the other words): an override is dotted.path=value. Raises as parse_overrides."""
    given = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
    return parse_overrides(given), [word for word in words if word not in given]


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`path=value` words as a dict. Raises BadInput for another word and for a path given twice."""
    overrides: dict[str, str] = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals or not path:
            raise BadInput(f"{word!r} is no override: write dotted.path=value")
        if path in overrides:
            raise BadInput(f"{path} is given twice, {overrides[path]} and {value}: give it once")
        overrides[path] = value
    return overrides


def _keep_compilations() -> None:
    """Compiled programs outlive the process, small ones too, of which a start has dozens; unless
    the environment says where or how."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    wanted = {
        "jax_compilation_cache_dir": os.path.join(cache, "dpo_jax", "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in wanted.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from dpo_jax import experiment

    _keep_compilations()
    name, where = arguments.command, arguments.experiment
    overrides, others = parted(arguments.words)
    if name not in WORDS and others:
        parse_overrides(others)  # refuses them
    if arguments.help:
        chosen = experiment.override(experiment.load(where).EXPERIMENT, overrides)
        print(listing(name, where, chosen, parser.format_help() if name in FLAGS else ""))
    elif name == "inspect":
        _inspect(arguments, overrides)
    elif name == "plan":
        _plan(arguments, overrides)
    elif name in READERS:
        from dpo_jax import commands

        getattr(commands, name)(arguments, overrides, others)
    else:
        module = experiment.load(where)
        {"train": _train, "frontier": _frontier, "sweep": _sweep}[name](module, overrides)
    return 0


def listing(name: str, where: str, experiment: Any, usage: str = "") -> str:
    """Usage, and every option of an experiment with its value, a line each."""
    from dpo_jax.experiment import options
    from dpo_jax.values import show

    found = options(experiment)
    width = max(len(path) for path, _ in found)
    # a function's keywords follow on lines of their own
    names = [getattr(value, "func", value) for _, value in found]
    lines = [f"  {path:<{width}} = {show(n)}" for (path, _), n in zip(found, names, strict=True)]
    short = f"usage: dpo-jax {name} {where} [option=value ...]\n\n{COMMANDS[name]}\n"
    return "\n".join([usage or short, "options:", *lines])


def _train(module: ModuleType, overrides: dict[str, str]) -> None:
    from dpo_jax import train
    from dpo_jax.experiment import override

    train.run(override(module.EXPERIMENT, overrides))


def _frontier(module: ModuleType, overrides: dict[str, str]) -> None:
    from dpo_jax import frontier

    directory = overrides.pop("run.dir", None) or module.EXPERIMENT.run.dir
    name = module.EXPERIMENT.name
    members = frontier_members(module, overrides)
    frontier.frontier(members, directory=directory or f"runs/{name}", name=name)


def _inspect(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from etils import epath

    from dpo_jax import experiment, rundir
    from dpo_jax.inspect_data import facts, page, terminal

    chosen = experiment.override(experiment.load(arguments.experiment).EXPERIMENT, overrides)
    file = epath.Path(arguments.html) if arguments.html else page.place(rundir.place(chosen))
    found = facts.inspection(chosen, rows=arguments.rows, record=arguments.record)
    page.write(found, file)
    terminal.show(found, ids=arguments.ids, whole=arguments.record is not None)
    print(f"page: {file}")


def _plan(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from dpo_jax import experiment, rundir
    from dpo_jax.plan import plans, show

    chosen = experiment.override(experiment.load(arguments.experiment).EXPERIMENT, overrides)
    file = rundir.new_file(arguments.json)
    names = [] if arguments.topology is None else arguments.topology.split(",")
    found = plans(chosen, [name.strip() for name in names], rows=arguments.rows)
    if file is not None:
        rundir.write(file, show.record(chosen.name, found))
    show.table(chosen.name, found)


def _losses(what: str) -> int:
    from dpo_jax import losses
    from dpo_jax.worlds import kl_table

    print(losses.table() if what == "table" else kl_table.text())
    return 0


def _sweep(module: ModuleType, overrides: dict[str, str]) -> None:
    from dpo_jax import sweep

    directory = overrides.pop("run.dir", None)
    chosen = sweep_of(module, overrides)
    sweep.sweep(chosen, directory=directory or f"runs/{chosen.name}")


def sweep_of(module: ModuleType, overrides: dict[str, str]) -> Any:
    """The Sweep of a module with overrides: EXPERIMENT for every combination of lists of values,
    else SWEEP's members. Raises BadInput where there are not two different runs."""
    from dpo_jax.experiment import Sweep, override, variations

    own, chosen = getattr(module, "SWEEP", None), variations(overrides)
    base = own.members if own is not None and len(chosen) == 1 else (module.EXPERIMENT,)
    members = tuple(override(each, {**new, "run.dir": None}) for new in chosen for each in base)
    if len(set(members)) < len(members) or len(members) < 2:
        raise BadInput(
            f"a sweep compares several runs, these are {len(set(members))}: give options several "
            "values, as algorithm.loss.beta=.03,.1,.3 run.seed=0,1,2, or the module a SWEEP"
        )
    if own is not None and len(chosen) == 1:
        return Sweep(own.name, members, own.x, own.y)
    rewards = module.EXPERIMENT.evaluation.rewards
    sampled = bool(rewards and module.EXPERIMENT.evaluation.prompts)
    y = f"eval_samples/{rewards[0].__name__}" if sampled else "eval_rewards/accuracies"
    x = "eval_samples/kl" if sampled else "eval_loss"
    return Sweep(f"{module.EXPERIMENT.name}_sweep", members, x, y)


def frontier_members(module: ModuleType, overrides: dict[str, str]) -> tuple[Any, ...]:
    """The experiments of a frontier: EXPERIMENT for every value of a list, else FRONTIER.

    Their `run.dir` is None, the frontier gives each its place. Raises BadInput where there are not
    two different ones.
    """
    from dpo_jax.experiment import override, variations

    chosen = variations(overrides)
    base = getattr(module, "FRONTIER", ()) if len(chosen) == 1 else (module.EXPERIMENT,)
    members = tuple(override(each, {**new, "run.dir": None}) for new in chosen for each in base)
    if len(set(members)) < len(members) or len(members) < 2:
        raise BadInput(
            f"a frontier compares several runs, these are {len(set(members))}: give an option "
            "several values, as algorithm.loss.beta=.03,.1,.3, or the module a FRONTIER"
        )
    return members


def _nearest(word: str, candidates: Any) -> str:
    close = difflib.get_close_matches(word, list(candidates), 1, 0.4)
    names = ", ".join(candidates)
    return f"; nearest is {close[0]}" if close else f"; there are: {names}"
