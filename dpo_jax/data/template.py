"""Records of text to groups of token ids.

Prompt and responses are tokenised apart, so that no token crosses the border, and text never
makes control tokens: what reads like one in the data is split like any other text. The prompt
starts with BOS, or EOS where the tokenizer has no BOS; a whole response ends with EOS, a cut one
does not.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.structs import BadInput, Group

TOO_LONG = "too long"
FORMS = {
    0: "a prompt alone stands in prompt",
    1: "text to imitate stands in prompt and completion",
    2: "a pair stands in prompt, chosen and rejected",
}
FIELDS = ("label", "scores", "soft_label", "margin")  # optional fields that a group takes over

Ids = np.ndarray  # int32, one text


def tokenize(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    row_tokens: int,
    truncation: str = "drop",
    responses: int | None = None,
) -> tuple[list[Group], dict[str, int]]:
    """(groups, dropped): records of `sources.read` as groups that fit a row, and why others do not.

    tokenizer: a fast tokenizer of transformers. truncation, for a group longer than row_tokens:
    "drop" it, keep the end of the "prompt", or cut the ends of the longest "response"s. responses:
    the K the algorithm needs, None for any. dropped counts by reason: "empty response", "equal
    responses", "too long", "empty after truncation", "equal after truncation". `Group.record` is
    the index in records.
    Errors: BadInput for another K, a field or criterion that only some records have, no usable
    record.
    """
    if truncation not in ("drop", "prompt", "response"):
        raise BadInput(f"data.truncation={truncation!r}; it must be drop, prompt or response")
    _check(records, responses)
    prompts = encode_prompts([record["prompt"] for record in records], tokenizer)
    bodies = iter(_encoded([text for r in records for text in r["responses"]], tokenizer))
    end = _marker(tokenizer.eos_token_id, "EOS token; set tokenizer.eos_token")
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    criteria = tuple(records[0].get("criteria", ()))
    longest = 0
    for index, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        answers = [_ended(next(bodies), end) for _ in record["responses"]]
        size = len(prompt) + sum(map(len, answers))
        parts = _fitted(prompt, answers, row_tokens, truncation)
        reason = _fault(record, parts, cut=size > row_tokens)
        if reason:
            dropped[reason] += 1
            longest = max(longest, size if reason == TOO_LONG else 0)
        elif parts is not None:
            groups.append(_group(record, index, *parts, criteria))
    if not groups:
        raise BadInput(_nothing_left(records, dropped, row_tokens, longest))
    return groups, dict(dropped)


def encode_prompt(text: str, tokenizer: Any) -> Ids:
    """The ids of a prompt: BOS (EOS where there is no BOS) once, then the text. Never empty."""
    return encode_prompts([text], tokenizer)[0]


def encode_prompts(texts: Sequence[str], tokenizer: Any) -> list[Ids]:
    """`encode_prompt` of many texts in one call, which is faster."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = _marker(first, "BOS and no EOS token to start a prompt with; set tokenizer.bos_token")
    encoded = _encoded(texts, tokenizer)
    return [ids if start in ids[:1] else np.append(np.int32(start), ids) for ids in encoded]


def _encoded(texts: Sequence[str], tokenizer: Any) -> list[Ids]:
    """The ids of the texts alone; special tokens are neither added nor read from the text."""
    if not texts:
        return []
    try:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
    except Exception as error:  # tokenizers raises no narrower one
        if len(texts) > 1:  # find the text
            return [_encoded([text], tokenizer)[0] for text in texts]
        raise BadInput(f"the tokenizer cannot read the text {texts[0][:60]!r} ({error})") from error
    return [np.array(ids, np.int32) for ids in encoded["input_ids"]]


def _marker(token: int | None, missing: str) -> int:
    if token is None:
        raise BadInput(f"the tokenizer has no {missing}")
    return token


def _ended(ids: Ids, end: int) -> Ids:
    """The response with EOS behind it; none for an empty text, which is no response."""
    return ids if len(ids) == 0 or end in ids[-1:] else np.append(ids, np.int32(end))


def _fitted(
    prompt: Ids, answers: list[Ids], row_tokens: int, truncation: str
) -> tuple[Ids, list[Ids]] | None:
    """(prompt, responses) cut to a row; None where `truncation` cannot do that."""
    lengths = [len(ids) for ids in answers]
    if len(prompt) + sum(lengths) <= row_tokens:
        return prompt, answers
    room = row_tokens - sum(lengths) - 1
    if truncation == "prompt" and room >= 1:  # what starts a prompt stays, then at least one token
        return np.append(prompt[:1], prompt[-room:]), answers
    room = row_tokens - len(prompt)
    if truncation == "response" and room >= 0:
        longest = _level(lengths, room)
        return prompt, [ids[:longest] for ids in answers]
    return None


def _level(lengths: Sequence[int], room: int) -> int:
    """The largest length to cut to such that sum(min(length, level)) <= room."""
    for left, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        if length * left > room:
            return room // left
        room -= length
    return max(lengths, default=0)


def _fault(
    record: Mapping[str, Any], parts: tuple[Ids, list[Ids]] | None, *, cut: bool
) -> str | None:
    """Why the content of a record cannot be used; None where it can."""
    if any(not text.strip() for text in record["responses"]):
        return "empty response"
    if parts is None:
        return TOO_LONG
    answers = parts[1]
    if any(len(ids) == 0 for ids in answers):
        return "empty after truncation" if cut else "empty response"
    if len({ids.tobytes() for ids in answers}) < len(answers):
        return "equal after truncation" if cut else "equal responses"
    return None


def _group(
    record: Mapping[str, Any],
    index: int,
    prompt: Ids,
    answers: list[Ids],
    criteria: tuple[str, ...],
) -> Group:
    """The group of one record, its scores in the order of `criteria`."""
    scores = record.get("scores")
    if scores is not None:
        scores = np.asarray(scores, np.float32).reshape(len(answers), -1)
        if criteria:
            scores = scores[:, [record["criteria"].index(name) for name in criteria]]
    return Group(
        prompt=prompt,
        responses=answers,
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
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    advice = ""
    if longest:
        advice = f"; the longest takes {longest} tokens and a row has {row_tokens}"
        advice += f"; row_tokens={longest} would do"
    return f"{records[0]['where']}: none of {len(records)} records can be used ({reasons}){advice}"
