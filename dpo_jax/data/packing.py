"""Whole groups in rows of a fixed length, the prompt once and every response behind it.

Query q sees key k when k <= q < until[k]. A prompt token's `until` is the end of its group, a
response token's the end of its response, a padding token sees itself alone. So every response
sees its prompt, no response sees a sibling, and no group sees another.

A part is a prompt or a response; the arrays named part_* run over all parts in row order, those
named flat_* over all real tokens in the same order.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.structs import BadInput, Batch, Group

Bins = list[list[int]]  # per row, the indices of the groups that stand in it
Item = Group | tuple[Sequence[int] | np.ndarray, Sequence[Sequence[int] | np.ndarray]]


class Shape(NamedTuple):
    """What a compiled step depends on: R rows of T tokens, N scored, G slots, K responses."""

    rows: int
    tokens: int
    scored: int
    slots: int
    responses: int


def pack(
    groups: Sequence[Item],
    *,
    row_tokens: int,
    rows: int | None = None,
    scored: int | None = None,
    slots: int | None = None,
    responses: int | None = None,
) -> Batch:
    """Pack groups into a Batch of numpy arrays.

    groups: `Group` or (prompt_ids, [response_ids, ...]). rows, scored (N), slots (G) and
    responses (K) are as many as needed where None, at least 1. The weights are raw: the weight of
    the group, in weight_RG once and in weight_RN on each of its scored tokens. record_RG is the
    index in `groups`.
    Errors: BadInput for a group that does not fit a row or a count that is too small; it names
    the value that would do.
    """
    if row_tokens < 1 or (rows is not None and rows < 1):
        raise BadInput(f"row_tokens={row_tokens}, rows={rows}: both must be at least 1")
    members = [_group(item, b) for b, item in enumerate(groups)]
    size_B = [group.tokens for group in members]
    _check_sizes(members, size_B, row_tokens)
    scored_B = [scored_tokens(group) for group in members]
    if rows is None:
        bins = plan(size_B, row_tokens)
    else:
        bins = next(arrangements(size_B, scored_B, rows, row_tokens), None)
    if bins is None:
        raise BadInput(
            f"{len(members)} groups of {sum(size_B)} tokens do not fit {rows} rows of {row_tokens}"
            f" tokens; row_tokens={_row_tokens_for(size_B, scored_B, rows or 1)} would do"
        )
    need = extent(members, bins)
    given = {"scored": scored, "slots": slots, "responses": responses}
    for name, value in given.items():
        if value is not None and value < getattr(need, name):
            raise BadInput(f"{name}={value} is too small; {name}={getattr(need, name)} would do")
    chosen = {name: value for name, value in given.items() if value is not None}
    shape = need._replace(rows=rows or need.rows, tokens=row_tokens, **chosen)
    return lay_out(members, bins, shape, record_B=range(len(members)))


def plan(lengths: Sequence[int], row_tokens: int) -> Bins:
    """Rows of group indices, as few as best-fit decreasing finds; the order is that of `lengths`.

    Errors: BadInput when a length exceeds row_tokens.
    """
    spaces: list[tuple[int, int]] = []  # (free places, row), sorted: the tightest fit is a bisect
    bins: Bins = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        if lengths[b] > row_tokens:
            raise BadInput(
                f"group {b} takes {lengths[b]} tokens and a row has {row_tokens};"
                f" row_tokens={max(lengths)} would do"
            )
        fitting = bisect_left(spaces, (lengths[b], -1))
        if fitting == len(spaces):
            free, row = row_tokens, len(bins)
            bins.append([])
        else:
            free, row = spaces.pop(fitting)
        bins[row].append(b)
        insort(spaces, (free - lengths[b], row))
    return sorted(sorted(row) for row in bins)


def spread(lengths: Sequence[int], scored: Sequence[int], rows: int) -> Bins:
    """At most `rows` rows, even in tokens and in scored tokens, for both cost time.

    The largest group first, each to the row where the worse of its two shares stays least.
    """
    share_B2 = np.stack([lengths, scored], 1) / np.maximum(np.sum([lengths, scored], 1), 1)
    tokens_R, scored_R = np.zeros(rows), np.zeros(rows)
    bins: Bins = [[] for _ in range(rows)]
    for b in np.argsort(-share_B2.max(1), kind="stable").tolist():
        row = int(np.maximum(tokens_R + share_B2[b, 0], scored_R + share_B2[b, 1]).argmin())
        tokens_R[row] += share_B2[b, 0]
        scored_R[row] += share_B2[b, 1]
        bins[row].append(b)
    return sorted(sorted(row) for row in bins if row)


def tight(lengths: Sequence[int], rows: int, row_tokens: int, grain: int) -> Bins | None:
    """Best-fit decreasing in the shortest rows, in grains, of which `rows` do; None if none do."""
    least = max(max(lengths, default=0), -(-sum(lengths) // rows))
    for tokens in range(-(-least // grain) * grain, row_tokens + grain, grain):
        bins = plan(lengths, min(tokens, row_tokens))
        if len(bins) <= rows:
            return bins
    return None


def arrangements(
    lengths: Sequence[int], scored: Sequence[int], rows: int, row_tokens: int, grain: int = 1
) -> Iterator[Bins]:
    """Ways to use at most `rows` rows of at most row_tokens, the most even first; maybe none."""
    if sum(lengths) > rows * row_tokens or max(lengths, default=0) > row_tokens:
        return
    bins = spread(lengths, scored, rows)
    if all(sum(lengths[b] for b in row) <= row_tokens for row in bins):
        yield bins
    bins = tight(lengths, rows, row_tokens, grain)
    if bins is not None:
        yield bins


def extent(groups: Sequence[Group], bins: Bins) -> Shape:
    """The smallest Shape that holds the groups as planned; every count is at least 1."""
    scored_B = [scored_tokens(group) for group in groups]
    return Shape(
        rows=max(1, len(bins)),
        tokens=max((sum(groups[b].tokens for b in row) for row in bins), default=1),
        scored=max([1, *(sum(scored_B[b] for b in row) for row in bins)]),
        slots=max([1, *(len(row) for row in bins)]),
        responses=max([1, *(len(group.responses) for group in groups)]),
    )


def scored_tokens(group: Group) -> int:
    """Tokens of the group that reach the head."""
    if group.scored is None:
        return sum(len(response) for response in group.responses)
    return sum(int(np.count_nonzero(scored)) for scored in group.scored)


def lay_out(groups: Sequence[Group], bins: Bins, shape: Shape, *, record_B: Sequence[int]) -> Batch:
    """The Batch of `shape` with the groups where `bins` says; record_B names them in record_RG."""
    R, T, N, G, K = shape
    order = [b for row in bins for b in row]
    members = [groups[b] for b in order]
    row_B = np.repeat(np.arange(len(bins), dtype=np.int32), [len(row) for row in bins])
    slot_B = np.concatenate([np.arange(0), *(np.arange(len(row)) for row in bins)])
    weight_B = np.array([group.weight for group in members], np.float32)
    parts = _Parts(members, row_B, R)

    tokens_RT, positions_RT = np.zeros((R, T), np.int32), np.zeros((R, T), np.int32)
    until_RT = np.tile(np.arange(1, T + 1, dtype=np.int32), (R, 1))  # padding sees itself alone
    at = parts.flat_row * T + parts.flat_place  # a row-major index: one gather instead of two
    tokens_RT.ravel()[at] = parts.flat_token
    positions_RT.ravel()[at] = parts.flat_position
    until_RT.ravel()[at] = np.repeat(parts.part_until, parts.part_length)

    target_RN, source_RN = np.zeros((R, N), np.int32), np.zeros((R, N), np.int32)
    slot_RN, weight_RN = np.full((R, N), -1, np.int32), np.zeros((R, N), np.float32)
    row, part = parts.flat_row[parts.scored], parts.flat_part[parts.scored]
    scored_R = np.bincount(row, minlength=R)
    before_R = np.cumsum(scored_R) - scored_R
    at = row * N + np.arange(len(row)) - before_R[row]  # the columns count from 0 in every row
    target_RN.ravel()[at] = parts.flat_token[parts.scored]
    source_RN.ravel()[at] = parts.flat_source[parts.scored]
    slot_RN.ravel()[at] = (slot_B[parts.part_group] * K + parts.part_k)[part]
    weight_RN.ravel()[at] = weight_B[parts.part_group][part]

    ref_logp_RN = _ref_logps(members, at, shape)

    end_RGK = np.full((R, G, K), -1, np.int32)
    answers = np.flatnonzero(parts.part_k >= 0)
    group = parts.part_group[answers]
    end_RGK[row_B[group], slot_B[group], parts.part_k[answers]] = parts.part_stop[answers] - 1
    weight_RG, record_RG = np.zeros((R, G), np.float32), np.full((R, G), -1, np.int32)
    weight_RG[row_B, slot_B] = weight_B
    record_RG[row_B, slot_B] = np.array([record_B[b] for b in order], np.int32)
    return Batch(
        tokens_RT=tokens_RT,
        positions_RT=positions_RT,
        until_RT=until_RT,
        target_RN=target_RN,
        source_RN=source_RN,
        slot_RN=slot_RN,
        end_RGK=end_RGK,
        weight_RN=weight_RN,
        weight_RG=weight_RG,
        record_RG=record_RG,
        score_RGKC=_scores(members, row_B, slot_B, shape),
        label_RG=_column(members, "label", row_B, slot_B, shape),
        soft_label_RG=_column(members, "soft_label", row_B, slot_B, shape),
        margin_RG=_column(members, "margin", row_B, slot_B, shape),
        ref_logp_RN=ref_logp_RN,
        criteria=members[0].criteria if members else (),
    )


def taken(x_RGK: np.ndarray, batch: Batch) -> Iterator[tuple[int, np.ndarray]]:
    """(record, x_K) of every group of a batch on the host, for the responses that it has."""
    there_RG = np.asarray(batch.record_RG) >= 0
    columns = (np.asarray(x)[there_RG] for x in (batch.record_RG, x_RGK, batch.end_RGK))
    for record, x_K, end_K in zip(*columns, strict=True):
        yield int(record), x_K[end_K >= 0]


class _Parts:
    """Where every part and every token stands; groups in row order, row_B the row of each."""

    def __init__(self, groups: Sequence[Group], row_B: np.ndarray, rows: int):
        parts = [ids for group in groups for ids in (group.prompt, *group.responses)]
        part_length = np.array([len(ids) for ids in parts], np.int32)
        parts_B = np.array([1 + len(group.responses) for group in groups], np.int32)
        first_B = np.cumsum(parts_B) - parts_B  # the part that is the group's prompt
        part_group = np.repeat(np.arange(len(groups)), parts_B)
        part_k = np.arange(len(parts)) - np.repeat(first_B, parts_B) - 1  # -1 = prompt
        part_row = row_B[part_group]

        part_after = np.cumsum(part_length, dtype=np.int32)  # in the line of all tokens
        tokens_R = np.bincount(part_row, weights=part_length, minlength=rows).astype(np.int32)
        part_stop = part_after - (np.cumsum(tokens_R, dtype=np.int32) - tokens_R)[part_row]
        part_until = part_stop.copy()
        part_until[first_B] = part_stop[first_B + parts_B - 1]
        part_position = np.where(part_k < 0, 0, part_length[first_B][part_group])

        def flat(part_value: np.ndarray) -> np.ndarray:
            return np.repeat(part_value.astype(np.int32), part_length)

        line = np.arange(int(part_length.sum()), dtype=np.int32)
        start = part_after - part_length
        self.part_group, self.part_k, self.part_length = part_group, part_k, part_length
        self.part_stop, self.part_until = part_stop, part_until
        self.flat_part = flat(np.arange(len(parts)))
        self.flat_row = flat(part_row)
        self.flat_place = line + flat(part_stop - part_after)
        self.flat_position = line + flat(part_position - start)
        # A response's first token is predicted by the prompt's last, which its siblings share.
        self.flat_source = self.flat_place - 1
        self.flat_source[start] = part_stop[first_B][part_group] - 1
        self.flat_token = np.concatenate([np.zeros(0, np.int32), *parts])
        if self.flat_token.dtype.kind not in "iu" or self.flat_token.min(initial=0) < 0:
            raise BadInput("token ids must be integers that are not negative")
        scored = flat(part_k) >= 0
        if any(group.scored is not None for group in groups):
            scored &= np.concatenate([mask for group in groups for mask in _masks(group)])
        self.scored = np.flatnonzero(scored)


def _masks(group: Group) -> list[np.ndarray]:
    """One mask a part: nothing of the prompt (all True, its k excludes it), `scored` behind it."""
    answers = group.scored or [np.ones(len(ids), bool) for ids in group.responses]
    return [np.ones(len(group.prompt), bool), *(np.asarray(mask, bool) for mask in answers)]


def _column(
    groups: Sequence[Group], name: str, row_B: np.ndarray, slot_B: np.ndarray, shape: Shape
) -> np.ndarray | None:
    """A number of every group as an array RG with 0 in empty slots; None where no group has it."""
    values = [getattr(group, name) for group in groups]
    given = sum(value is not None for value in values)
    if not given:
        return None
    if given < len(values):
        raise BadInput(f"{given} of {len(values)} groups have a {name}; give it to all or to none")
    column_RG = np.zeros((shape.rows, shape.slots), np.float32)
    column_RG[row_B, slot_B] = values
    return column_RG


def _scores(
    groups: Sequence[Group], row_B: np.ndarray, slot_B: np.ndarray, shape: Shape
) -> np.ndarray | None:
    """The scores (K, C) of every group as an array RGKC, 0 where there is no such response."""
    scores = [group.scores for group in groups if group.scores is not None]
    named = {group.criteria for group in groups}
    counts = {score.shape[1] for score in scores} | {len(names) for names in named if names}
    if (scores and len(scores) < len(groups)) or len(named) > 1 or len(counts) > 1:
        raise BadInput("scores must be given to all groups, with the same criteria, or to none")
    if not scores:
        return None
    R, _, _, G, K = shape
    score_RGKC = np.zeros((R, G, K, scores[0].shape[1]), np.float32)
    for r, g, score in zip(row_B, slot_B, scores, strict=True):
        score_RGKC[r, g, : len(score)] = score
    return score_RGKC


def _ref_logps(groups: Sequence[Group], at: np.ndarray, shape: Shape) -> np.ndarray | None:
    """What the reference said of the scored tokens, 0 elsewhere; None where it was not asked."""
    known = [logp_N for group in groups for logp_N in group.ref_logps or ()]
    if not known:
        return None
    values = np.concatenate(known)
    if len(values) != len(at):
        raise BadInput(
            f"{len(values)} reference log-probs for {len(at)} scored tokens; give every group "
            "those of all its responses, or none"
        )
    ref_logp_RN = np.zeros((shape.rows, shape.scored), values.dtype)
    ref_logp_RN.ravel()[at] = values
    return ref_logp_RN


def _group(item: Item, b: int) -> Group:
    """`item` as a Group whose parts hold at least one token and whose fields agree with them."""
    if isinstance(item, Group):
        group = item
    else:
        prompt, responses = item
        group = Group(np.asarray(prompt), [np.asarray(response) for response in responses])
    lengths = [len(response) for response in group.responses]
    if len(group.prompt) == 0:
        raise BadInput(f"group {b}: the prompt is empty; it starts with BOS, or EOS where none is")
    if 0 in lengths:
        raise BadInput(f"group {b}: response {lengths.index(0)} is empty; leave it out")
    if group.scored is not None and [len(mask) for mask in group.scored] != lengths:
        raise BadInput(f"group {b}: `scored` must hold one mask as long as each response")
    if group.scores is not None and (group.scores.ndim != 2 or len(group.scores) != len(lengths)):
        raise BadInput(
            f"group {b}: scores of shape {group.scores.shape} for {len(lengths)} responses;"
            f" the shape must be (responses, criteria)"
        )
    return group


def _check_sizes(groups: Sequence[Group], size_B: Sequence[int], row_tokens: int) -> None:
    for b, size in enumerate(size_B):
        if size > row_tokens:
            answers = " + ".join(str(len(response)) for response in groups[b].responses)
            raise BadInput(
                f"group {b} takes {size} tokens (prompt {len(groups[b].prompt)}, responses"
                f" {answers}) and a row has {row_tokens}; row_tokens={max(size_B)} would do"
            )


def _row_tokens_for(size_B: Sequence[int], scored_B: Sequence[int], rows: int) -> int:
    """A row length for which an arrangement finds room in `rows` rows."""
    row_tokens = max(*size_B, -(-sum(size_B) // rows))
    while not any(True for _ in arrangements(size_B, scored_B, rows, row_tokens)):
        row_tokens += 1 + row_tokens // 64
    return row_tokens
