"""The layouts of rows that are read, each as a prompt and its responses, best to worst.

    prompt, chosen, rejected    a pair
    chosen, rejected            a pair that begins with its prompt
    prompt, completion          text to imitate, or an unpaired judgement with a label
    prompt, responses           a list, best to worst, or with scores in any order
    prompt                      a prompt to sample on
    text                        a completion of nothing
    messages                    a conversation whose assistant turns are imitated

A prompt or response is text, or a conversation: a list of messages with role and content (or from
and value), which stays one. An answer in text to a prompt of messages is one turn of the assistant.
A pair without a prompt is parted where its conversations part, which must be at a turn of the
assistant; a dialogue of Anthropic's HH at its last "\\n\\nAssistant:"; other text before the first
word that differs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.data.faults import Fault, kind, missing, text, wrong

Messages = list[dict[str, Any]]
Part = str | Messages  # a prompt or a response

FORMS = (
    "a record needs prompt, chosen and rejected, or chosen and rejected, or prompt and responses,"
    " or prompt and completion, or messages, or prompt alone, or text alone"
)
PAIR = "a pair needs prompt, chosen, rejected, or a prompt inside chosen and rejected"
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
SHAREGPT = {"human": "user", "gpt": ASSISTANT}  # its names for roles
HH_BEGINS, HH_ANSWER = "\n\nHuman:", "\n\nAssistant:"
KNOWN = (
    *("prompt", "chosen", "rejected", "completion", "responses", "text", "messages"),
    *("label", "soft_label", "margin", "weight", "scores", "tools"),
)
PAIR_SCORES = ("score_chosen", "score_rejected")  # how UltraFeedback writes the scores of a pair
CONTEXT: dict[str, Any] = {"tools": list | tuple, "chat_template_kwargs": dict}  # field: its type


class Parts(NamedTuple):
    """What a layout holds, and the fields it came from."""

    prompt: Part
    responses: list[Any]  # of Part, all of the prompt's kind
    used: tuple[str, ...]


def fields(
    row: Mapping[str, Any],
    *,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    completion: str | None = None,
    responses: str | None = None,
    text: str | None = None,
    messages: str | None = None,
    label: str | None = None,
    scores: str | None = None,
    tools: str | None = None,
) -> dict[str, Any]:
    """The row with its columns under the names that layouts know; for `Data.layout`.

    A known name that is not given is left out, even where the row has such a column.
    """
    given = {name: column for name, column in locals().items() if name != "row" and column}
    absent = [column for column in given.values() if column not in row]
    if absent:
        raise KeyError(f"no column {absent[0]}; there is {', '.join(map(str, row))}")
    others = {n: value for n, value in row.items() if n not in KNOWN and n not in given.values()}
    return others | {name: row[column] for name, column in given.items()}


def parts(raw: Mapping[str, Any], where: str) -> Parts:
    """Prompt and responses by the first layout that fits. Errors: Fault."""
    _check_in_scope(raw, where)
    if "responses" in raw:
        return _list(raw, where)
    if "chosen" in raw or "rejected" in raw:
        return _pair(raw, where)
    if "completion" in raw:
        answer = _response(raw["completion"], "completion", where)
        prompt = _prompt(_need(raw, "prompt", where, FORMS), where)
        return Parts(prompt, _answers(prompt, {"completion": answer}, where), ("completion",))
    if "text" in raw and "prompt" not in raw:
        return Parts("", [text(raw["text"], "text", where)], ("text",))
    if ("messages" in raw or "conversations" in raw) and "prompt" not in raw:
        return _monologue(raw, where)
    return Parts(_prompt(_need(raw, "prompt", where, FORMS), where), [], ())


def context(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a chat template reads beside the messages: `tools` (a list of JSON schemas, or their
    text) and `chat_template_kwargs`, where the row has them. Errors: Fault.
    """
    found: dict[str, Any] = {}
    for name, form in CONTEXT.items():
        value = raw.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise wrong(value, name, where, "JSON") from None
        if value and not isinstance(value, form):
            raise wrong(value, name, where, "an object" if form is dict else "a list of tools")
        found |= {name: _without_nulls(value)} if value else {}
    return found


def is_conversation(part: Any) -> bool:
    """Whether a prompt or response is a list of messages."""
    return isinstance(part, list | tuple) and bool(part) and isinstance(part[0], Mapping)


def plain(part: Part) -> str:
    """A prompt or response as text to show: a conversation as lines of `role: content`."""
    if isinstance(part, str):
        return part
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in part)


def _check_in_scope(raw: Mapping[str, Any], where: str) -> None:
    """Refuses what is not done here, by name."""
    if "completions" in raw and "labels" in raw:
        message = f'{where}: field "labels" marks steps: stepwise supervision is not supported'
        raise Fault("stepwise supervision", f"{message}; give one label for a completion")
    for name in ("images", "image"):
        if raw.get(name):
            raise Fault("images", f'{where}: field "{name}" holds images; only text is supported')


def _need(raw: Mapping[str, Any], name: str, where: str, form: str) -> Any:
    if name not in raw:
        raise missing(name, where, form)
    return raw[name]


def _prompt(value: Any, where: str) -> Part:
    """A prompt: text, or messages that the assistant answers."""
    if not is_conversation(value):
        return text(value, "prompt", where, "text or messages")
    found = messages(value, "prompt", where)
    if found[-1]["role"] == ASSISTANT:
        name = f"prompt[{len(found) - 1}]"
        message = f'{where}: field "{name}" is a turn of the assistant; it belongs to the response'
        raise Fault("roles", message)
    return found


def _response(value: Any, name: str, where: str) -> Part:
    """A response: text, or messages that end with the assistant's."""
    if not is_conversation(value):
        return text(value, name, where, "text or messages")
    found = messages(value, name, where)
    if found[-1]["role"] != ASSISTANT:
        last = f'field "{name}[{len(found) - 1}]" is a turn of {found[-1]["role"]}'
        raise Fault("roles", f"{where}: {last}; a response ends with the assistant's")
    return found


def _answers(prompt: Part, named: Mapping[str, Part], where: str) -> list[Part]:
    """The responses in the form of the prompt, without the prompt where they repeat it."""
    found: list[Part] = []
    for name, answer in named.items():
        if isinstance(prompt, str) and not isinstance(answer, str):
            message = f'{where}: field "{name}" is messages and "prompt" is text'
            raise Fault("mixed", f"{message}; give both as text or both as messages")
        if isinstance(prompt, str) or isinstance(answer, str):
            found.append(answer if isinstance(prompt, str) else _turn(str(answer)))
            continue
        if len(answer) > len(prompt) and answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        if answer[0]["role"] != ASSISTANT:
            message = f'{where}: field "{name}[0]" is a turn of {answer[0]["role"]}'
            raise Fault("roles", f"{message}; a response begins with the assistant's")
        found.append(answer)
    return found


def _turn(answer: str) -> Messages:
    return [{"role": ASSISTANT, "content": answer}]


def _list(raw: Mapping[str, Any], where: str) -> Parts:
    value = raw["responses"]
    if not isinstance(value, list | tuple) or not value:
        raise wrong(value, "responses", where, "a list of texts, best to worst")
    prompt = _prompt(_need(raw, "prompt", where, FORMS), where)
    names = [f"responses[{k}]" for k in range(len(value))]
    read = (_response(each, name, where) for each, name in zip(value, names, strict=True))
    answers = _answers(prompt, dict(zip(names, read, strict=True)), where)
    return Parts(prompt, answers, ("responses",))


def _pair(raw: Mapping[str, Any], where: str) -> Parts:
    used = ("chosen", "rejected")
    pair = [_response(_need(raw, name, where, PAIR), name, where) for name in used]
    if "prompt" in raw:
        prompt = _prompt(raw["prompt"], where)
        if not _repeats(prompt, pair):
            answers = _answers(prompt, dict(zip(used, pair, strict=True)), where)
            return Parts(prompt, answers, used)
    elif isinstance(pair[0], str) != isinstance(pair[1], str):
        message = f'{where}: field "rejected" is {kind(raw["rejected"])}'
        raise Fault("mixed", f'{message}, unlike "chosen"; give both as text or as messages')
    prompt, answers = _parted(pair[0], pair[1], where)
    return Parts(prompt, answers, used)


def _repeats(prompt: Part, pair: Sequence[Part]) -> bool:
    """Whether a prompt in text only repeats a turn that both conversations hold."""
    return isinstance(prompt, str) and all(
        not isinstance(side, str)
        and any(message.get("content", "").strip() == prompt.strip() for message in side[:-1])
        for side in pair
    )


def _parted(chosen: Part, rejected: Part, where: str) -> tuple[Part, list[Part]]:
    """(prompt, [chosen, rejected]) of a pair that begins with its prompt."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        chosen, rejected = str(chosen), str(rejected)
        if chosen.startswith(HH_BEGINS) and rejected.startswith(HH_BEGINS):
            return _parted_dialogues(chosen, rejected, where)
        return _parted_texts(chosen, rejected)
    shared = _common(chosen[:-1], rejected[:-1])
    pair: list[Part] = [chosen[shared:], rejected[shared:]]
    if {chosen[shared]["role"], rejected[shared]["role"]} != {ASSISTANT}:
        message = f"{where}: chosen and rejected part at message {shared}, which is no turn of"
        raise Fault("prompts differ", f"{message} the assistant in both", content=True)
    if not shared:
        message = f"{where}: chosen and rejected share no prompt; give one in prompt"
        raise Fault("prompts differ", message, content=True)
    return chosen[:shared], pair


def _parted_dialogues(chosen: str, rejected: str, where: str) -> tuple[Part, list[Part]]:
    """Each side after its own last marker; before it both must be the same."""
    cuts = [side.rfind(HH_ANSWER) + len(HH_ANSWER) for side in (chosen, rejected)]
    prompts = {side[:cut] for side, cut in zip((chosen, rejected), cuts, strict=True)}
    if len(prompts) > 1 or HH_ANSWER not in chosen:
        message = f"{where}: chosen and rejected differ before their last answer"
        raise Fault("prompts differ", message, content=True)
    return prompts.pop(), [chosen[cuts[0] :], rejected[cuts[1] :]]


def _parted_texts(chosen: str, rejected: str) -> tuple[Part, list[Part]]:
    """What both begin with, up to the blank before the first word that differs."""
    shared = _common(chosen, rejected)
    blanks = (i for i in range(shared - 1, 0, -1) if chosen[i].isspace())
    cut = next((i for i in blanks if not chosen[i - 1].isspace()), 0)
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items both begin with."""
    both = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(first), len(second)))


def _monologue(raw: Mapping[str, Any], where: str) -> Parts:
    """A conversation: all up to the assistant's first turn is the prompt of the rest."""
    name = "messages" if "messages" in raw else "conversations"
    if not is_conversation(raw[name]):
        raise wrong(raw[name], name, where, "a list of messages")
    whole = messages(raw[name], name, where)
    turns = [i for i, message in enumerate(whole) if message["role"] == ASSISTANT]
    if not turns or not turns[0]:
        found = f"begins with {whole[0]['role']}" if turns else "has no turn of the assistant"
        message = f'{where}: field "{name}" {found}'
        raise Fault("roles", f"{message}; its turns are imitated as answers to those before")
    return Parts(whole[: turns[0]], [whole[turns[0] : turns[-1] + 1]], (name,))


def messages(value: Sequence[Any], name: str, where: str) -> Messages:
    """Messages with role and content, as chat templates read them. Errors: Fault."""
    return [_message(each, f"{name}[{i}]", where) for i, each in enumerate(value)]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(value, name, where, "a message with role and content")
    found = _without_nulls(dict(value))
    role = found.pop("from", None) if "role" not in found else found["role"]
    content = found.pop("value", None) if "content" not in found else found["content"]
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise Fault(
            "roles", f'{where}: field "{name}.role" is {kind(role)}, none of {", ".join(ROLES)}'
        )
    if isinstance(content, list | tuple):
        content = _joined(content, f"{name}.content", where)
    if content is None and not found.get("tool_calls"):
        raise missing(f"{name}.content", where, "a message has role and content")
    if content is not None:
        found["content"] = text(content, f"{name}.content", where)
    return found | {"role": role}


def _joined(content: Sequence[Any], name: str, where: str) -> str:
    """The text of content that comes in pieces."""
    for i, piece in enumerate(content):
        if not isinstance(piece, Mapping) or piece.get("type") != "text":
            raise wrong(piece, f"{name}[{i}]", where, "a piece of text; only text is supported")
    return "".join(text(piece.get("text"), name, where) for piece in content)


def _without_nulls(value: Any) -> Any:
    """A message without its null fields, which columns of a table add."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list | tuple) else value
