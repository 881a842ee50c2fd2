"""Conversations to token ids and masks by the chat template of a tokenizer.

The template says all: `transformers` renders it, nothing is added to what it writes. The prompt is
the conversation up to a response with the template's generation prompt, and must be how every
whole conversation begins; the rest is the response. Of a response the turns of the assistant are
scored, with the token that ends them; what users and tools say between them is context. Where the
template marks those turns with {% generation %} that is what counts, else what the rendered
conversation gains with every turn.

A response ends with the control token that the template writes last (what stands blank behind it
is cut), or with EOS where it writes none. Text makes no control tokens: what reads like one inside
a message is tokenised as text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dpo_jax.data.faults import Fault
from dpo_jax.data.layouts import ASSISTANT, Messages
from dpo_jax.data.tokens import PAUSES, Ids, controls_of, encoded, end_id, side_by_side, start_id
from dpo_jax.structs import BadInput

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHOWN = 24  # characters around the place where two renderings part
REMEDY = "give another in data.template"

SPOKEN = ("prompt", "responses", "tools", "chat_template_kwargs")  # what a template reads

Span = tuple[int, int]


class Tokens(NamedTuple):
    """One record: int32 ids, and per response which of its tokens count."""

    prompt: Ids
    responses: list[Ids]
    scored: list[np.ndarray]


@dataclass(frozen=True)
class Rendered:
    """One record as text: the prompt, and per response the whole conversation with the places
    [start, end) of it that are scored, all behind the prompt.

    pause: a character that parts what would read like a control token, None where there is none.
    """

    prompt: str
    wholes: list[str]
    spans: list[list[Span]]
    pause: str | None

    def cuts(self, k: int) -> list[int]:
        """Where whole k is cut: behind the prompt, at every border of a span, at its end."""
        borders = {place for span in self.spans[k] for place in span}
        return sorted({len(self.prompt), *borders, len(self.wholes[k])})


def chat_template(source: str | Callable[[], str]) -> str:
    """A chat template: its text, that of a file of the path, or what a function returns.

    Errors: BadInput for a file that is not there and a text that is no Jinja.
    """
    text = source() if callable(source) else source
    if "{" not in text:
        path = epath.Path(text)
        if not path.exists() or path.is_dir():
            raise BadInput(f"data.template={text}: no such file; give a Jinja text or a file of it")
        text = path.read_text()
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # reads it and writes nothing
    except TemplateSyntaxError as error:
        reason = f"{error.message} in line {error.lineno}"
        raise BadInput(f"data.template: not a Jinja template ({reason})") from None
    return text


class Chat:
    """A tokenizer with its chat template. Errors: BadInput where it has none."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput(
                "the data holds conversations and the tokenizer has no chat template; give one in"
                " data.template"
            )
        self.tokenizer = tokenizer
        self.controls = controls_of(tokenizer)

    def tokens(self, records: Sequence[Mapping[str, Any]]) -> list[Tokens | Fault]:
        """The tokens of records whose prompts are conversations, or what is wrong with them."""
        found: list[Rendered | Fault] = []
        for record in records:
            try:
                found.append(self.rendered(record))
            except Fault as fault:
                found.append(fault)
        ids = self._ids_of([each for each in found if isinstance(each, Rendered)])
        return [each if isinstance(each, Fault) else self._assembled(each, ids) for each in found]

    def end(self) -> int:
        """The token that ends a turn of the assistant."""
        turns = [{"role": role, "content": "a"} for role in ("user", ASSISTANT)]
        record = {"prompt": turns[:1], "responses": [turns[1:]], "where": "the chat template"}
        (found,) = self.tokens([record])
        return end_id(self.tokenizer) if isinstance(found, Fault) else int(found.responses[0][-1])

    # To text

    def rendered(self, record: Mapping[str, Any]) -> Rendered:
        """The texts of a record. Errors: Fault where the template cannot write or part them."""
        where, pause = record["where"], self._pause(record)
        prompt, responses = (self._paused(record[name], pause) for name in ("prompt", "responses"))
        asked = _Asked(
            where,
            self._paused(record.get("tools"), pause),
            self._paused(record.get("chat_template_kwargs", {}), pause),
        )
        start = self._text(prompt, asked, generation=True)
        wholes, spans = [], []
        for response in responses:
            whole, turns = self._whole([*prompt, *response], asked)
            self._check_begins(whole, start, where)
            if turns is None:
                turns = list(self._turns(prompt, response, start, whole, asked))
            behind = [(max(a, len(start)), b) for a, b in turns if b > len(start)]
            if not any(whole[a:b].strip() for a, b in behind):
                message = f"{where}: the chat template marks no turn of the assistant"
                raise Fault("template", f"{message} behind the prompt; {REMEDY}")
            wholes.append(whole)
            spans.append(behind)
        return Rendered(start, wholes, spans, pause)

    def _pause(self, record: Mapping[str, Any]) -> str | None:
        """A character that stands nowhere in the record, where some text needs one."""
        texts = list(_texts([record.get(name) for name in SPOKEN]))
        if not any(self.controls.reads_like.search(text) for text in texts):
            return None
        return next(mark for mark in PAUSES if not any(mark in text for text in texts))

    def _paused(self, value: Any, pause: str | None) -> Any:
        """The value with a pause behind the first character of all that reads like a control."""
        if pause is None or value is None:
            return value
        if isinstance(value, str):
            return self.controls.reads_like.sub(lambda m: m[0][0] + pause + m[0][1:], value)
        if isinstance(value, Mapping):
            return {name: self._paused(each, pause) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._paused(each, pause) for each in value]
        return value

    def _text(self, messages: Messages, asked: "_Asked", *, generation: bool = False) -> str:
        return self._whole(messages, asked, generation=generation)[0]

    def _whole(
        self, messages: Messages, asked: "_Asked", *, generation: bool = False
    ) -> tuple[str, list[Span] | None]:
        """What the template writes, and the turns that it marks (None where it marks none)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            template = self.tokenizer.get_chat_template(tools=asked.tools)
            options = {"tools": asked.tools, "add_generation_prompt": generation, **asked.options}
            if generation or not GENERATION.search(template):
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
                return text, None
            found: Any = render_jinja_template(
                [messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **(self.tokenizer.special_tokens_map | options),
            )
        except Exception as error:  # a template is a program and raises what it likes
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            message = f"{asked.where}: the chat template cannot write the conversation ({reason})"
            raise Fault("template", f"{message}; {REMEDY}") from error
        (text,), (turns,) = found
        return text, list(turns)

    def _turns(
        self, prompt: Messages, response: Messages, start: str, whole: str, asked: "_Asked"
    ) -> Iterator[Span]:
        """The turns of the assistant: what each adds to the conversation before it."""
        for i, message in enumerate(response):
            if message["role"] != ASSISTANT:
                continue
            until = [*prompt, *response[: i + 1]]
            before = self._text(until[:-1], asked, generation=True) if i else start
            after = self._text(until, asked) if i + 1 < len(response) else whole
            for part in (before, after):
                self._check_begins(whole, part, asked.where)
            yield len(before), len(after)

    def _check_begins(self, whole: str, part: str, where: str) -> None:
        """Fault where the whole conversation does not begin with a part of it."""
        if whole.startswith(part):
            return
        place = next(i for i, (a, b) in enumerate(zip(part, f"{whole}\0", strict=False)) if a != b)
        first, second = encoded([part, whole], self.tokenizer, controls=True)
        shorter = min(len(first), len(second))
        differing = np.flatnonzero(first[:shorter] != second[:shorter])
        token = differing[0] if len(differing) else shorter
        around = slice(max(0, place - SHOWN), place + SHOWN)
        here, there = (
            text[around].translate(dict.fromkeys(map(ord, PAUSES))) for text in (part, whole)
        )
        raise Fault(
            "template",
            f"{where}: the chat template writes a conversation otherwise when more follows: from"
            f" token {token} on {here!r} becomes {there!r}; {REMEDY}, or one that marks the"
            " assistant's turns with {% generation %}",
        )

    # To tokens

    def _ids_of(self, records: Sequence[Rendered]) -> dict[str, Ids]:
        """The ids of every whole conversation and of every part that it is cut at."""
        texts = dict.fromkeys(
            text
            for each in records
            if each.pause is None
            for text in (
                each.prompt,
                *(t for k in range(len(each.wholes)) for t in _begun(each, k)),
            )
        )
        return dict(zip(texts, encoded([*texts], self.tokenizer, controls=True), strict=True))

    def _assembled(self, each: Rendered, ids: Mapping[str, Ids]) -> Tokens:
        """The tokens of a record; `ids` holds those of its texts if they have no pause."""
        prompt = self._prompt(each, ids)
        bos = self.tokenizer.bos_token_id
        if bos is not None and prompt[:2].tolist() == [bos, bos]:
            raise BadInput(f"the chat template writes BOS twice; {REMEDY}")
        if not len(prompt):
            prompt = np.array([start_id(self.tokenizer)], np.int32)
        pairs = [self._response(each, k, ids) for k in range(len(each.wholes))]
        return Tokens(prompt, [answer for answer, _ in pairs], [mask for _, mask in pairs])

    def _response(self, each: Rendered, k: int, ids: Mapping[str, Ids]) -> tuple[Ids, np.ndarray]:
        """(ids, which of them count) of response k, up to the last that counts."""
        spans, cuts = set(each.spans[k]), each.cuts(k)
        pieces = self._pieces(each, k, ids)
        counts = [any(a <= i and j <= b for a, b in spans) for i, j in pairwise(cuts)]
        masks = [np.zeros(len(piece), bool) for piece in pieces]
        for i, (piece, counted) in enumerate(zip(pieces, counts, strict=True)):
            if not counted:
                continue
            end = self._end(piece)
            masks[i][:end] = True
            behind = pieces[i + 1][:1] if i + 1 < len(pieces) else piece[:0]
            if not self._is_control(piece[end - 1 : end]).any() and self._is_control(behind).any():
                masks[i + 1][0] = True  # the template ends the turn outside of what it marks
        answer, scored = np.concatenate(pieces), np.concatenate(masks)
        last = int(np.flatnonzero(scored).max(initial=-1)) + 1
        answer, scored = answer[:last], scored[:last]
        if not self._is_control(answer[-1:]).all():
            answer = np.append(answer, np.int32(end_id(self.tokenizer)))
            scored = np.append(scored, True)
        return answer, scored

    def _pieces(self, each: Rendered, k: int, ids: Mapping[str, Ids]) -> list[Ids]:
        """The ids of response k, cut at its turns.

        Those of the whole conversation, where no token of it crosses a cut; else its pieces side
        by side, so that no token does.
        """
        whole, cuts = each.wholes[k], each.cuts(k)
        if each.pause is None:
            *begun, tokens = (ids[text] for text in _begun(each, k))
            if all(np.array_equal(tokens[: len(part)], part) for part in begun):
                places = [*map(len, begun), len(tokens)]
                return [tokens[i:j] for i, j in pairwise(places)]
        return self._side_by_side([whole[i:j] for i, j in pairwise([0, *cuts])], each.pause)[1:]

    def _prompt(self, each: Rendered, ids: Mapping[str, Ids]) -> Ids:
        if each.pause is None:
            return ids[each.prompt]
        return self._side_by_side([each.prompt], each.pause)[0]

    def _side_by_side(self, pieces: Sequence[str], pause: str | None) -> list[Ids]:
        """The ids of pieces of a conversation that may hold pauses themselves."""
        inner = [piece.split(pause) if pause else [piece] for piece in pieces]
        flat = iter(side_by_side([*chain(*inner)], self.tokenizer, controls=True))
        return [np.concatenate([next(flat) for _ in parts]) for parts in inner]

    def _end(self, piece: Ids) -> int:
        """Behind the last control token of a turn if only blanks follow it, else its length."""
        controls = np.flatnonzero(self._is_control(piece))
        if len(controls):
            end = int(controls[-1]) + 1
            if not self.tokenizer.decode(piece[end:].tolist()).strip():
                return end
        return len(piece)

    def _is_control(self, ids: Ids) -> np.ndarray:
        return np.isin(ids, self.controls.ids)


class _Asked(NamedTuple):
    """What a template gets beside the messages, and the record that messages name."""

    where: str
    tools: Any
    options: Mapping[str, Any]


def _begun(each: Rendered, k: int) -> list[str]:
    """Whole k up to every cut of it; the last is all of it."""
    return [each.wholes[k][:cut] for cut in each.cuts(k)]


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
