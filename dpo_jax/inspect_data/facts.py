"""What the model will see of an experiment's data, as plain values.

The records are read, tokenised, arranged and packed by the functions that training uses. Data that
is sampled from a parent is read where it was made before; nothing is made.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax import build, labelling, parts, train
from dpo_jax.data import template
from dpo_jax.data.conversations import GENERATION
from dpo_jax.experiment import Experiment, Sampled
from dpo_jax.inspect_data import packed
from dpo_jax.inspect_data.doubts import Evidence, Key, doubts, length_share, written
from dpo_jax.inspect_data.packed import Batches
from dpo_jax.inspect_data.responses import masks, own, places
from dpo_jax.inspect_data.tokens_shown import Token, Vocabulary
from dpo_jax.structs import Algorithm, BadInput, Group
from dpo_jax.values import show

ROWS = 3  # groups shown of each role
TRAINING, HELD_OUT = "data.source", "evaluation.source"


@dataclass(frozen=True)
class Part:
    """A prompt or a response. rank: 1 for the best response to 0 for the worst, else None."""

    name: str
    rank: float | None
    tokens: tuple[Token, ...]
    notes: tuple[str, ...]

    @property
    def scored(self) -> int:
        """Tokens that count."""
        return sum(token.scored for token in self.tokens)


@dataclass(frozen=True)
class Shown:
    """One group with its tokens. where: the place of its record; said: its label, margin, ..."""

    record: int
    where: str
    said: tuple[str, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of all prompts, of all responses of one place, or of whole groups."""

    name: str
    rank: float | None
    tokens: np.ndarray

    @property
    def summary(self) -> dict[str, float]:
        """Least, median, mean, 95th percentile and most."""
        middle, high = np.percentile(self.tokens, (50, 95))
        return {
            "least": float(self.tokens.min()),
            "median": float(middle),
            "mean": float(self.tokens.mean()),
            "95%": float(high),
            "most": float(self.tokens.max()),
        }


@dataclass(frozen=True, eq=False)
class Role:
    """What one source gives. rows: raw ones that were read; records, groups: those left at the end.

    skipped, dropped, repaired: counts by reason, while rows were read, while they became groups,
    and of those kept with a part cut off. arranged: what each function left, of how many records.
    ends: the tokens that end a response; unended: responses that end otherwise. longer: share of
    the groups whose best response is longer than the worst, with that of equal length.
    """

    name: str
    source: str
    rows: int
    records: int
    groups: int
    responses: int
    skipped: Mapping[str, int]
    dropped: Mapping[str, int]
    repaired: Mapping[str, int]
    arranged: tuple[tuple[str, int, int], ...]
    lengths: tuple[Lengths, ...]
    batches: Batches
    ends: tuple[str, ...]
    unended: int
    longer: tuple[float, float, int] | None
    doubts: tuple[str, ...]
    shown: tuple[Shown, ...]


@dataclass(frozen=True, eq=False)
class Inspection:
    """All of it. options: what decides how records are read, by name; template: how conversations
    are written, None where none are."""

    name: str
    options: tuple[tuple[str, str], ...]
    template: str | None
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class _Readers:
    experiment: Experiment
    tokenizer: Any
    algorithm: Algorithm
    vocabulary: Vocabulary
    shards: int


def inspection(
    experiment: Experiment, *, rows: int = ROWS, record: int | None = None
) -> Inspection:
    """What the model will see of data.source and of evaluation.source, with the tokens of `rows`
    groups of each: those of the first batch. record: show this one of data.source in their place.

    Errors: BadInput as training raises it before its first step; for sampled data that is not made
    yet; for a record that is not there or was left out.
    """
    if rows < 0:
        raise BadInput(f"--rows={rows}: it must not be negative")
    tokenizer, algorithm = build.readers(experiment)
    shards, note = packed.shards(experiment)
    readers = _Readers(experiment, tokenizer, algorithm, Vocabulary(tokenizer), shards)
    training, keys = _role(readers, TRAINING, experiment.data.source, rows, record=record)
    roles = [training]
    if experiment.evaluation.source is not None:
        wanted = 0 if record is not None else rows
        source = experiment.evaluation.source
        roles.append(_role(readers, HELD_OUT, source, wanted, others=keys)[0])
    return Inspection(
        name=experiment.name,
        options=(*_options(readers), *([("devices", note)] if note else [])),
        template=written(tokenizer),
        roles=tuple(roles),
    )


def _role(
    readers: _Readers,
    name: str,
    source: Any,
    rows: int,
    *,
    record: int | None = None,
    others: Collection[Key] = (),
) -> tuple[Role, list[Key]]:
    """One role, and the keys of its groups."""
    experiment = readers.experiment

    if isinstance(source, Sampled) and not labelling.place(source).exists():
        raise BadInput(
            f"{name} is sampled from {show(source.parent)} and was not made yet "
            f"({labelling.place(source)}): `dpo-jax train` the experiment with these options makes "
            "it, before its first step"
        )
    records, skipped = build.counted_records(source, train.run, experiment.data)
    known = build.grouped(experiment, records, readers.tokenizer, readers.algorithm)
    groups = known.groups
    packing = packed.of_training if name == TRAINING else packed.of_evaluation
    batches = packing(experiment, groups, readers.shards)
    templated = experiment.data.template is not None
    evidence = Evidence(groups, records, readers.tokenizer, others, templated)
    some = [groups[b] for b in batches.first[:rows]]
    if record is not None:
        some = _of_record(readers, groups, records, record)
    cut = {why: count for why, count in known.counts.items() if why in template.CUT}
    found = Role(
        name=name,
        source=f"sampled from {show(source.parent)}"
        if isinstance(source, Sampled)
        else show(source),
        rows=len(records) + sum(skipped.values()),
        records=len({group.record for group in groups}),
        groups=len(groups),
        responses=sum(len(own(group)) for group in groups),
        skipped=skipped,
        dropped={why: count for why, count in known.counts.items() if why not in cut},
        repaired=cut,
        arranged=known.arranged,
        lengths=lengths(groups),
        batches=batches,
        ends=tuple(evidence.name(end) for end in evidence.ends.values()),
        unended=evidence.unended,
        longer=length_share(groups),
        doubts=doubts(evidence),
        shown=tuple(
            shown(group, records, readers.vocabulary, set(evidence.ends.values())) for group in some
        ),
    )
    return found, evidence.keys


def _of_record(
    readers: _Readers, groups: Sequence[Group], records: build.Records, record: int
) -> list[Group]:
    """The groups of a record. Errors: BadInput that says why it has none."""
    if not 0 <= record < len(records):
        raise BadInput(f"--record={record}: {TRAINING} has the records 0 to {len(records) - 1}")
    found = [group for group in groups if group.record == record]
    if not found:
        # alone it says why it is dropped, unless data.arrange did that
        build.grouped(readers.experiment, [records[record]], readers.tokenizer, readers.algorithm)
        raise BadInput(f"{records[record]['where']}: left out by data.arrange")
    return found


def lengths(groups: Sequence[Group]) -> tuple[Lengths, ...]:
    """Tokens of prompts, of responses by what they are, and of groups."""
    ranks: dict[str, float | None] = {}
    counts: dict[str, list[int]] = {}
    for group in groups:
        for place, ids in zip(places(group), group.responses, strict=True):
            ranks.setdefault(place.series, place.rank)
            counts.setdefault(place.series, []).append(len(ids))
    # best before worst, whichever group came first
    order = sorted(counts, key=lambda name: (ranks[name] is None, -(ranks[name] or 0.0)))
    return (
        Lengths("prompt", None, np.array([len(group.prompt) for group in groups])),
        *(Lengths(name, ranks[name], np.array(counts[name])) for name in order),
        Lengths("group", None, np.array([group.tokens for group in groups])),
    )


def shown(
    group: Group, records: build.Records, vocabulary: Vocabulary, ends: Collection[int]
) -> Shown:
    """A group with its tokens as text; `ends` are the tokens that end a response."""
    assert group.record is not None, "template.tokenize numbers the groups"
    pieces = [
        Part("prompt", None, vocabulary.tokens(group.prompt, [False] * len(group.prompt)), ())
    ]
    named = zip(places(group), group.responses, masks(group), strict=True)
    for k, (place, ids, mask) in enumerate(named):
        tokens = vocabulary.tokens(ids, mask)
        cut = () if int(ids[-1]) in ends else ("has no end",)
        pieces.append(Part(place.name, place.rank, tokens, (*_scores(group, k), *cut)))
    values = {name: getattr(group, name) for name in ("label", "soft_label", "margin")}
    values |= {"weight": None if group.weight == 1.0 else group.weight}
    return Shown(
        record=group.record,
        where=records[group.record]["where"],
        said=tuple(f"{name} {value:.4g}" for name, value in values.items() if value is not None),
        parts=tuple(pieces),
    )


def _scores(group: Group, k: int) -> tuple[str, ...]:
    """The scores of response k, by their names."""
    if group.scores is None:
        return ()
    names = group.criteria or ("score",) * group.scores.shape[1]
    return tuple(f"{name} {s:.4g}" for name, s in zip(names, group.scores[k], strict=True))


def _options(readers: _Readers) -> list[tuple[str, str]]:
    experiment, tokenizer = readers.experiment, readers.tokenizer
    data, room = experiment.data, parts.config(experiment).V
    special = [
        f"{kind} {getattr(tokenizer, f'{kind}_token')} ({getattr(tokenizer, f'{kind}_token_id')})"
        for kind in ("bos", "eos", "pad", "unk")
        if getattr(tokenizer, f"{kind}_token_id") is not None
    ]
    found = {
        "tokenizer": f"{show(data.tokenizer)}, a {type(tokenizer).__name__}",
        "vocabulary": f"{len(tokenizer)}, of model.V={room}; {', '.join(special)}",
        "template": _template_said(experiment, written(tokenizer)),
        "algorithm": show(experiment.algorithm),
        "row_tokens": str(data.row_tokens),
        "groups a step": str(data.groups),
        "truncation": data.truncation,
        "on_bad": data.on_bad,
    }
    functions = {"layout": data.layout, "arrange": data.arrange}
    found |= {name: show(value) for name, value in functions.items() if value is not None}
    return list(found.items())


def _template_said(experiment: Experiment, template: str | None) -> str:
    if template is None:
        return "none"
    given = experiment.data.template
    name = "the tokenizer's own" if given is None else show(given)
    short = name if len(name) <= 60 and "\n" not in name else "given as text"
    marked = GENERATION.search(template)
    return f"{short}, {'marks' if marked else 'does not mark'} the assistant's turns"
