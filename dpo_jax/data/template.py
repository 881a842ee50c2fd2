"""Records to groups of token ids.

Texts: prompt and responses are tokenised apart, so that no token crosses the border, and text never
makes control tokens: what reads like one in the data is split like any other text. The prompt
starts with BOS, or EOS where the tokenizer has no BOS; a whole response ends with EOS, a cut one
does not. Conversations are written by the tokenizer's chat template, see `conversations`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.data.conversations import Chat, Tokens
from dpo_jax.data.faults import Fault, listed
from dpo_jax.data.layouts import ASSISTANT, Part, is_conversation
from dpo_jax.data.tokens import Ids, encoded, end_id, start_id
from dpo_jax.structs import BadInput, Group

EMPTY, TOO_LONG = "empty response", "too long"
CUT = ("prompts cut", "responses cut")  # reasons that count records which are kept
FORMS = {
    0: "a prompt alone stands in prompt",
    1: "text to imitate stands in prompt and completion",
    2: "a pair stands in prompt, chosen and rejected",
}
FIELDS = ("label", "scores", "soft_label", "margin")  # optional fields that a group takes over


def tokenize(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    row_tokens: int,
    truncation: str = "drop",
    responses: int | None = None,
    on_bad: str = "stop",
) -> tuple[list[Group], dict[str, int]]:
    """(groups, counts): records of `sources.read` as groups that fit a row, and what became of
    the others.

    tokenizer: a fast tokenizer of transformers. truncation, for a group longer than row_tokens:
    "drop" it, keep the end of the "prompt", or cut the ends of the longest "response"s. responses:
    the K the algorithm needs, None for any. on_bad: "stop" at a conversation that the chat template
    cannot write, or "skip" and count it. counts by reason: dropped for "template", "empty
    response", "equal responses", "too long", "empty after truncation", "equal after truncation";
    kept with "prompts cut", "responses cut". `Group.record` is the index in records.
    Errors: BadInput for another K, a field or criterion that only some records have, no usable
    record.
    """
    if truncation not in ("drop", "prompt", "response"):
        raise BadInput(f"data.truncation={truncation!r}; it must be drop, prompt or response")
    _check(records, responses)
    groups: list[Group] = []
    counts: Counter[str] = Counter()
    criteria = tuple(records[0].get("criteria", ()))
    longest = 0
    for index, (record, found) in enumerate(zip(records, _read(records, tokenizer), strict=True)):
        if isinstance(found, Fault):
            empty = any(map(_is_empty, record["responses"]))
            if on_bad == "stop" and not empty:
                raise found
            counts[EMPTY if empty else found.reason] += 1
            continue
        size = len(found.prompt) + sum(map(len, found.responses))
        parts = _fitted(found, row_tokens, truncation)
        reason = _fault(record, parts, cut=size > row_tokens)
        if reason:
            counts[reason] += 1
            longest = max(longest, size if reason == TOO_LONG else 0)
        elif parts is not None:
            groups.append(_group(record, index, parts, criteria))
            if size > row_tokens:
                counts[CUT[truncation == "response"]] += 1
    if not groups:
        raise BadInput(_nothing_left(records, counts, row_tokens, longest))
    return groups, dict(counts)


def encode_prompt(prompt: Part, tokenizer: Any) -> Ids:
    """The ids of a prompt. Never empty. Errors: BadInput for one that the template cannot write."""
    return encode_prompts([{"prompt": prompt, "responses": [], "where": "prompt"}], tokenizer)[0]


def encode_prompts(records: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Ids]:
    """The ids of the prompts of records in one call, which is faster."""
    found = _read([{**record, "responses": []} for record in records], tokenizer)
    for each in found:
        if isinstance(each, Fault):
            raise each
    return [each.prompt for each in found if isinstance(each, Tokens)]


def encode_texts(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]], tokenizer: Any
) -> list[Group]:
    """The groups of prompts of records and texts as their responses, of which none is dropped or
    cut: an empty one is its end alone. Errors: BadInput for what cannot be written."""
    end = np.array([response_end([r["prompt"] for r in records], tokenizer)], np.int32)
    found = _read([_answered(*each) for each in zip(records, texts, strict=True)], tokenizer)
    groups = []
    for record, each in enumerate(found):
        if isinstance(each, Fault):
            raise each
        answers = [ids if len(ids) else end for ids in each.responses]
        groups.append(Group(each.prompt, answers, record=record))
    return groups


def _answered(record: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The record with texts as its responses, in the form of its prompt."""
    talk = is_conversation(record["prompt"])
    answers = [[{"role": ASSISTANT, "content": text}] if talk else text for text in texts]
    return {"where": "a prompt", **record, "responses": answers}


def response_end(prompts: Sequence[Part], tokenizer: Any) -> int:
    """The token that ends a response to such prompts: EOS, or what the chat template writes."""
    chat = bool(prompts) and is_conversation(prompts[0])
    return Chat(tokenizer).end() if chat else end_id(tokenizer)


def _read(records: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Tokens | Fault]:
    """The tokens of every record: BOS and prompt, responses and EOS, or by the chat template."""
    talks = [is_conversation(record["prompt"]) for record in records]
    texts = [record for record, talk in zip(records, talks, strict=True) if not talk]
    chats = [record for record, talk in zip(records, talks, strict=True) if talk]
    of_texts = iter(_of_texts(texts, tokenizer))
    of_chats = iter(Chat(tokenizer).tokens(chats) if chats else ())
    return [next(of_chats if talk else of_texts) for talk in talks]


def _of_texts(records: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Tokens]:
    if not records:
        return []
    start = start_id(tokenizer)
    prompts = encoded([record["prompt"] for record in records], tokenizer)
    bodies = iter(encoded([text for r in records for text in r["responses"]], tokenizer))
    found = []
    for record, ids in zip(records, prompts, strict=True):
        prompt = ids if start in ids[:1] else np.append(np.int32(start), ids)
        answers = [_ended(next(bodies), tokenizer) for _ in record["responses"]]
        found.append(Tokens(prompt, answers, [np.ones(len(ids), bool) for ids in answers]))
    return found


def _ended(ids: Ids, tokenizer: Any) -> Ids:
    """The response with EOS behind it; none for an empty text, which is no response."""
    end = end_id(tokenizer)
    return ids if len(ids) == 0 or end in ids[-1:] else np.append(ids, np.int32(end))


def _fitted(found: Tokens, row_tokens: int, truncation: str) -> Tokens | None:
    """The tokens cut to a row; None where `truncation` cannot do that."""
    prompt, answers, scored = found
    lengths = [len(ids) for ids in answers]
    if len(prompt) + sum(lengths) <= row_tokens:
        return found
    room = row_tokens - sum(lengths) - 1
    if truncation == "prompt" and room >= 1:  # what starts a prompt stays, then at least one token
        return found._replace(prompt=np.append(prompt[:1], prompt[-room:]))
    room = row_tokens - len(prompt)
    if truncation == "response" and room >= 0:
        longest = _level(lengths, room)
        return Tokens(prompt, [ids[:longest] for ids in answers], [x[:longest] for x in scored])
    return None


def _level(lengths: Sequence[int], room: int) -> int:
    """The largest length to cut to such that sum(min(length, level)) <= room."""
    for left, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        if length * left > room:
            return room // left
        room -= length
    return max(lengths, default=0)


def _fault(record: Mapping[str, Any], parts: Tokens | None, *, cut: bool) -> str | None:
    """Why the content of a record cannot be used; None where it can."""
    if any(map(_is_empty, record["responses"])):
        return EMPTY
    if parts is None:
        return TOO_LONG
    if not all(scored.any() for scored in parts.scored):
        return "empty after truncation" if cut else EMPTY
    if len({ids.tobytes() for ids in parts.responses}) < len(parts.responses):
        return "equal after truncation" if cut else "equal responses"
    return None


def _is_empty(response: Part) -> bool:
    """Whether a response says nothing: blank text, or turns of the assistant without any."""
    if isinstance(response, str):
        return not response.strip()
    turns = [message for message in response if message["role"] == ASSISTANT]
    return not any(m.get("content", "").strip() or m.get("tool_calls") for m in turns)


def _group(
    record: Mapping[str, Any], index: int, parts: Tokens, criteria: tuple[str, ...]
) -> Group:
    """The group of one record, its scores in the order of `criteria`."""
    scores = record.get("scores")
    if scores is not None:
        scores = np.asarray(scores, np.float32).reshape(len(parts.responses), -1)
        if criteria:
            scores = scores[:, [record["criteria"].index(name) for name in criteria]]
    return Group(
        prompt=parts.prompt,
        responses=parts.responses,
        scored=None if all(mask.all() for mask in parts.scored) else parts.scored,
        scores=scores,
        label=record.get("label"),
        soft_label=record.get("soft_label"),
        margin=record.get("margin"),
        weight=record.get("weight", 1.0),
        record=index,
        criteria=criteria,
    )


def _check(records: Sequence[Mapping[str, Any]], responses: int | None) -> None:
    """All records have the K that is needed, the same optional fields and the same criteria."""
    if not records:
        raise BadInput("no records to tokenize; data.source is empty")
    names = sorted(records[0].get("criteria", ()))
    for record in records:
        count = len(record["responses"])
        if responses is not None and count != responses:
            raise BadInput(
                f"{record['where']}: the record has {_counted(count)}, the algorithm needs"
                f" {responses}; {FORMS.get(responses, 'give it that many, best to worst')}"
            )
        odd = [name for name in FIELDS if (name in record) != (name in records[0])]
        if odd:
            with_it, without = (record, records[0]) if odd[0] in record else (records[0], record)
            raise BadInput(
                f'{without["where"]}: field "{odd[0]}" is missing, {with_it["where"]} has it;'
                f" give it to all records or to none"
            )
        if sorted(record.get("criteria", ())) != names:
            here, there = (", ".join(each.get("criteria", ())) for each in (record, records[0]))
            raise BadInput(
                f'{record["where"]}: field "scores" has the criteria {here or "without names"},'
                f" {records[0]['where']} has {there or 'such without names'}; give all records the"
                f" same"
            )


def _counted(count: int) -> str:
    return "1 response" if count == 1 else f"{count or 'no'} responses"


def _nothing_left(
    records: Sequence[Mapping[str, Any]], dropped: Counter[str], row_tokens: int, longest: int
) -> str:
    reasons = listed(dropped)
    advice = ""
    if longest:
        advice = f"; the longest takes {longest} tokens and a row has {row_tokens}"
        advice += f"; row_tokens={longest} would do"
    return f"{records[0]['where']}: none of {len(records)} records can be used ({reasons}){advice}"
