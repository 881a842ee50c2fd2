"""Options: the values inside a value, addressed by dotted path, listed, and replaced.

An option is a field of a frozen dataclass or a keyword of a function (`functools.partial` or its
own default), at any depth: `algorithm.loss.beta`; or an item of a tuple, by its place, where one
of its items has options: `algorithm.loss.terms.0.1.beta`. A declaration may add to its type, as in
`Annotated[int, {"least": 1}]`:
    least      the smallest number it takes
    inputs     a function: how many arguments its caller passes by position
    given      a function: {keyword its caller passes: the option that sets it}
    needs      the sibling without which it has no effect
    inherited  a value that comes from this sibling where it is None
    parent     True for a run that others start from: its twins elsewhere follow its overrides
    later      True for a field added later: descriptions, and so digests, leave out its default
"""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, get_args, get_origin

from dpo_jax import functions
from dpo_jax.functions import UNSET
from dpo_jax.structs import BadInput
from dpo_jax.values import conform, members, parse, show, spelled, split

_WHOLE = ""  # the key of a tree's own new value, beside those of its options
Tree = dict[str, Any]


@dataclass(frozen=True)
class Spot:
    """Where a value stands: its dotted path, its declared type, what its declaration adds."""

    path: str
    kind: Any = Any
    extra: Mapping[str, Any] = field(default_factory=dict)

    def inside(self, name: str) -> str:
        """The path of an option of the value."""
        return f"{self.path}.{name}" if self.path else name


def override(value: Any, overrides: Mapping[str, Any]) -> Any:
    """`value` with the options {dotted path: new value} replaced; text is read as its type wants.

    A function put in the place of another keeps the keywords that both share. Raises BadInput for
    an unknown option, a wrong type, a list of values, an option without effect, and a required
    keyword that is left without a value.
    """
    tree: Tree = {}
    for path, new in overrides.items():
        node = tree
        for part in path.split("."):
            if not part:
                raise BadInput(f"no option {path!r}: write dotted.path=value")
            node = node.setdefault(part, {})
        node[_WHOLE] = new
    changed = _applied(value, tree, Spot(""))
    present = dict(options(changed))
    missing = [path for path, now in present.items() if now is UNSET]
    if missing:
        holder = show(present[missing[0].rpartition(".")[0]])
        values = " ".join(f"{path}=VALUE" for path in missing)
        raise BadInput(f"{holder} requires {', '.join(missing)}: add {values}")
    return changed


def with_numbers(value: Any, numbers: Mapping[str, Any]) -> Any:
    """`value` with options that hold numbers replaced, {dotted path: number}, unchecked.

    The new ones may be traced arrays, which no declared type describes: for use inside a compiled
    function, on a value and on paths that `options` lists.
    """
    for path, number in numbers.items():
        name, _, rest = path.partition(".")
        old = _now(value, Spot("")).get(name)
        new = with_numbers(old, {rest: number}) if rest else number
        if isinstance(value, tuple):
            value = (*value[: int(name)], new, *value[int(name) + 1 :])
        elif is_record(value):
            value = copy(value)
            object.__setattr__(value, name, new)
        else:
            value = partial(value, **{name: new})
    return value


def options(value: Any, *, described: bool = False) -> list[tuple[str, Any]]:
    """Every option of a value as (dotted path, value); UNSET where a required keyword has none.

    A function stands before its keywords. The options of a parent's twin are left out.
    described: only those that its description holds.
    """
    return list(_listed(value, Spot(""), (), described))


def untouched(value: Any, name: str, spot: Spot) -> bool:
    """Whether a field was added later and has its default."""
    if not spot.extra.get("later"):
        return False
    return any(each.name == name and getattr(value, name) == each.default for each in fields(value))


def variations(overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All combinations of options with lists of values (`.03,.1` or a Python list), in order.

    A comma in brackets or quotes does not part values.
    """
    choices = []
    for path, new in overrides.items():
        values = split(new) if isinstance(new, str) else new
        values = values if isinstance(values, list) else [new]
        choices.append([(path, value) for value in values])
    return [dict(combination) for combination in product(*choices)]


def check_field(value: Any, spot: Spot) -> Any:
    """The value of a declared option as its type wants it; BadInput for a wrong type or range."""
    try:
        value = conform(value, spot.kind)
    except ValueError:
        raise BadInput(
            f"{spot.path}={show(value)}: expected {spelled(spot.kind)}, "
            f"this is of type {type(value).__name__}"
        ) from None
    least = spot.extra.get("least")
    if least is not None and value is not None and value < least:
        raise BadInput(f"{spot.path}={show(value)}: give {least} or more")
    return value


def spots(value: Any, spot: Spot) -> dict[str, Spot]:
    """The places of a value's options: a dataclass's fields or a function's keywords."""
    kinds = functions.annotations(value)
    unbound = {} if is_record(value) or not callable(value) else functions.defaults(value)
    found = {}
    for name, now in _now(value, spot).items():
        kind, *extras = _annotated(kinds.get(name, _untyped(unbound.get(name, now))))
        merged = {key: item for extra in extras for key, item in extra.items()}
        found[name] = Spot(spot.inside(name), kind, merged)
    return found


def _annotated(kind: Any) -> tuple[Any, ...]:
    """(the type, what its declaration adds ...)."""
    return get_args(kind) if get_origin(kind) is Annotated else (kind,)


def _untyped(now: Any) -> Any:
    """The type that a keyword without annotation takes, by its default or present value."""
    if now is None or now is UNSET:
        return Any
    if callable(now) and not is_record(now):
        return Callable
    return int | float if type(now) is int else type(now)


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def _keywords(value: Any, spot: Spot) -> dict[str, Any]:
    given = tuple(spot.extra.get("given", ()))
    return functions.keywords(value, spot.extra.get("inputs"), given)


def _now(value: Any, spot: Spot) -> dict[str, Any]:
    """The present values of a value's options."""
    if is_record(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, tuple):
        opens = any(_now(item, Spot("")) for item in value)
        return {str(place): item for place, item in enumerate(value)} if opens else {}
    return _keywords(value, spot) if callable(value) and value is not UNSET else {}


# Listing


def _listed(
    value: Any, spot: Spot, parents: tuple[Any, ...], described: bool = False
) -> Iterator[tuple[str, Any]]:
    if spot.path and not (is_record(value) and members(spot.kind) == [type(value)]):
        yield spot.path, value
    if spot.extra.get("parent") and any(value == parent for parent in parents):
        return
    now, inner = _now(value, spot), spots(value, spot)
    parents = (*parents, *(now[name] for name in inner if inner[name].extra.get("parent")))
    for name, child in inner.items():
        if described and untouched(value, name, child):
            continue
        beside = parents[:-1] if child.extra.get("parent") else parents
        yield from _listed(now[name], child, beside, described)


# Replacing


def _applied(value: Any, tree: Tree, spot: Spot) -> Any:
    """`value` with its tree of overrides: the whole first, then the options of the new one."""
    if _WHOLE in tree:
        value = _assigned(value, tree[_WHOLE], spot)
    inner = {name: node for name, node in tree.items() if name != _WHOLE}
    if not inner:
        return value
    if is_record(value):
        return _with_fields(value, inner, spot)
    if callable(value) and value is not UNSET:
        return _with_keywords(value, inner, spot)
    if isinstance(value, tuple) and _now(value, spot):
        return _with_items(value, inner, spot)
    path = spot.inside(next(iter(inner)))
    raise BadInput(f"{path} has no effect: {spot.path} is {_described(value)}, without options")


def _with_fields(value: Any, tree: Tree, spot: Spot) -> Any:
    places, changes = spots(value, spot), {}
    for name in tree:
        if name not in places:
            raise _unknown(name, value, spot)
    for name, place in places.items():
        if place.extra.get("parent") and name in tree:
            old = getattr(value, name)
            changes[name] = _applied(old, tree.pop(name), place)
            others = {other: getattr(value, other) for other in places if other != name}
            changes |= {key: _follow(item, old, changes[name]) for key, item in others.items()}
    for name, node in tree.items():
        old = changes.get(name, getattr(value, name))
        if old is None and _WHOLE not in node and places[name].extra.get("inherited"):
            raise _inherited(value, name, next(iter(node)), places[name], spot)
        changes[name] = _applied(old, node, places[name])
    for name in tree:
        needed = places[name].extra.get("needs")
        if needed and changes.get(needed, getattr(value, needed)) is None:
            path = places[name].path
            raise BadInput(f"{path} has no effect: {spot.inside(needed)} is None; set that too")
    return replace(value, **changes)


def _with_keywords(value: Any, tree: Tree, spot: Spot) -> Any:
    places, now = spots(value, spot), _now(value, spot)
    changes = {}
    for name, node in tree.items():
        given = spot.extra.get("given", {})
        if name in given:
            raise BadInput(f"{spot.inside(name)} has no effect: set {given[name]} instead")
        if name not in places and not functions.takes_any_keyword(value):
            raise _unknown(name, value, spot)
        place = places.get(name, Spot(spot.inside(name)))
        changes[name] = _applied(now.get(name, UNSET), node, place)
    return partial(value, **changes)


def _with_items(value: tuple[Any, ...], tree: Tree, spot: Spot) -> tuple[Any, ...]:
    places, now = spots(value, spot), _now(value, spot)
    for name, node in tree.items():
        if name not in places:
            raise _unknown(name, value, spot)
        now[name] = _applied(now[name], node, places[name])
    return tuple(now.values())


def _assigned(old: Any, new: Any, spot: Spot) -> Any:
    """The new value of an option, read if it is text; a function keeps the old one's keywords.

    A partial says its own, one that is named (as algorithms.policy.rloo) keeps what it requires.
    """
    named = isinstance(new, str)
    if isinstance(new, str):
        new = _read(old, new, spot)
    elif isinstance(new, list) and not _takes(spot.kind, tuple, list):
        raise _list_of_values(spot.path, new)
    new = check_field(new, spot)
    both = callable(old) and callable(new) and old is not UNSET
    if both and not (is_record(old) or is_record(new)):
        bound, open_to = functions.unwrap(old)[2], _keywords(new, spot)
        if isinstance(new, partial):
            open_to = {name for name in open_to if named and open_to[name] is UNSET}
        kept = {name: bound[name] for name in bound if name in open_to}
        return partial(new, **kept) if kept else new
    return new


def _read(old: Any, text: str, spot: Spot) -> Any:
    known = callable(old) and not is_record(old) and old is not UNSET
    if len(split(text)) > 1 and not _takes(spot.kind, str):
        raise _list_of_values(spot.path, text)
    try:
        return parse(text, spot.kind, functions.name(old) if known else "")
    except BadInput as error:
        raise BadInput(f"{spot.path}={text}: {error}") from None
    except ValueError:
        now = "" if old is UNSET else f" (now {show(old)})"
        raise BadInput(f"{spot.path}={text}: expected {spelled(spot.kind)}{now}") from None


def _takes(kind: Any, *types: type) -> bool:
    return any(getattr(member, "__origin__", member) in types for member in members(kind))


def _list_of_values(path: str, values: Any) -> BadInput:
    text = values if isinstance(values, str) else ",".join(map(show, values))
    return BadInput(
        f"{path}={text}: one run takes one value; for several use `dpo-jax frontier` or "
        "`dpo-jax sweep` (a tuple stands in parentheses)"
    )


def _follow(value: Any, old: Any, new: Any) -> Any:
    """`value` with `new` in the place of every `old` that a field names as its parent."""
    if is_record(value):
        changes = {}
        for name, spot in spots(value, Spot("")).items():
            item = getattr(value, name)
            twin = spot.extra.get("parent") and type(item) is type(old) and item == old
            followed = new if twin else _follow(item, old, new)
            if followed is not item:
                changes[name] = followed
        return replace(value, **changes) if changes else value
    if isinstance(value, partial):
        bound = {name: _follow(item, old, new) for name, item in value.keywords.items()}
        same = all(bound[name] is item for name, item in value.keywords.items())
        return value if same else partial(value, **bound)
    if isinstance(value, tuple) and _now(value, Spot("")):
        items = tuple(_follow(item, old, new) for item in value)
        same = all(item is before for item, before in zip(items, value, strict=True))
        return value if same else items
    return value


# Messages


def _described(value: Any) -> str:
    if value is UNSET:
        return "not set yet"
    return f"the path {value!r}" if isinstance(value, str) else show(value)


def _unknown(name: str, value: Any, spot: Spot) -> BadInput:
    """Names the nearest option: a sibling that looks alike, else one of that name further down."""
    siblings = sorted(_now(value, spot))
    below = [path for path, _ in _listed(value, spot, ())]
    deep = [path for path in below if functions.nearest(name, [path.rpartition(".")[2]], 0.8)]
    close = functions.nearest(name, siblings, 0.0 if not deep else 0.6)
    best = spot.inside(close) if close else next(iter(deep), None)
    nearest = f"; nearest is {best}" if best else ""
    holder = f"{spot.path} ({show(value)})" if callable(value) else spot.path or show(value)
    return BadInput(
        f"no option {spot.inside(name)}{nearest} ({holder} has {', '.join(siblings) or 'none'})"
    )


def _inherited(value: Any, name: str, child: str, place: Spot, spot: Spot) -> BadInput:
    """An option on what comes from a parent: names the ancestor where it can be set."""
    source = place.extra["inherited"]
    ancestor, path = getattr(value, source), spot.inside(source)
    while is_record(ancestor) and getattr(ancestor, name) is None:
        ancestor, path = getattr(ancestor, source), f"{path}.{source}"
    wrong = f"{place.path}.{child} has no effect: {name} comes from {path}"
    if is_record(ancestor):
        return BadInput(f"{wrong}; nearest is {path}.{name}.{child}")
    return BadInput(f"{wrong}, which is {_described(ancestor)}")
