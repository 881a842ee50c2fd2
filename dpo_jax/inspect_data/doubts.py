"""What in the data deserves a second look, each as one line of text.

None of it stops a run: what does is BadInput where the data is read.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dpo_jax.data.conversations import GENERATION
from dpo_jax.data.layouts import is_conversation, plain
from dpo_jax.data.template import response_end
from dpo_jax.data.tokens import controls_of
from dpo_jax.inspect_data.responses import is_partnered, masks, own
from dpo_jax.structs import Group

BIASED = 0.6  # of the pairs have the chosen response longer, or shorter
SURE = 3.0  # standard errors
Key = tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The groups of one role, the records they come from, and the tokenizer.

    others: keys of the groups of training, where these are held out. templated: whether the
    experiment gives a chat template.
    """

    groups: Sequence[Group]
    records: Sequence[Mapping[str, Any]]
    tokenizer: Any
    others: Collection[Key] = ()
    templated: bool = False

    @cached_property
    def talks(self) -> list[bool]:
        """Per group, whether its record is a conversation."""
        known = [is_conversation(record["prompt"]) for record in self.records]
        return [group.record is not None and known[group.record] for group in self.groups]

    @cached_property
    def ends(self) -> dict[bool, int]:
        """The token that ends a response to a text (False) and of a conversation (True)."""
        prompts = {is_conversation(record["prompt"]): record["prompt"] for record in self.records}
        return {talk: response_end([each], self.tokenizer) for talk, each in prompts.items()}

    @cached_property
    def unended(self) -> int:
        """Responses that do not end with that token."""
        return sum(
            int(ids[-1]) != self.ends[talk]
            for group, talk in zip(self.groups, self.talks, strict=True)
            for ids in own(group)
        )

    @cached_property
    def keys(self) -> list[Key]:
        """Per group what tells it from another: the bytes of its prompt and of its responses."""
        return [
            (group.prompt.tobytes(), *(ids.tobytes() for ids in own(group)))
            for group in self.groups
        ]

    def said(self, count: int, what: str = "groups") -> str:
        """A count of groups, with the share it is."""
        return f"{count} of {len(self.groups)} {what}"

    def name(self, token: int | None) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))


def written(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer, of several the one for conversations without tools."""
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def doubts(evidence: Evidence) -> tuple[str, ...]:
    """All that holds of the data, a line each."""
    return tuple(line for doubt in DOUBTS for line in doubt(evidence))


def _bos_twice(e: Evidence) -> Iterator[str]:
    bos = e.tokenizer.bos_token_id
    if bos is None:
        return
    found = sum(any(_adjacent(group.prompt, ids, bos) for ids in own(group)) for group in e.groups)
    if found:
        yield (
            f"{e.said(found)} hold BOS ({e.name(bos)}) twice in a row: leave it out of the data, "
            "a prompt begins with one"
        )


def _adjacent(prompt: np.ndarray, response: np.ndarray, token: int) -> bool:
    here = np.concatenate([prompt, response]) == token
    return bool((here[1:] & here[:-1]).any())


def _both_write_bos(e: Evidence) -> Iterator[str]:
    bos = e.tokenizer.bos_token_id
    first = next((g.prompt for g, talk in zip(e.groups, e.talks, strict=True) if talk), None)
    if bos is None or first is None or first[0] != bos:
        return
    if bos in e.tokenizer("")["input_ids"][:1]:
        yield (
            f"the tokenizer and the chat template both write BOS ({e.name(bos)}); here the "
            "template's alone counts, but who tokenizes a rendered conversation elsewhere gets "
            "two: use add_special_tokens=False there"
        )


def _no_bos(e: Evidence) -> Iterator[str]:
    bos = e.tokenizer.bos_token_id
    found = 0 if bos is None else sum(int(group.prompt[0]) != bos for group in e.groups)
    if found:
        yield (
            f"{e.said(found, 'prompts')} begin without BOS, the tokenizer has {e.name(bos)}: "
            "the chat template writes none"
        )


def _end(e: Evidence) -> Iterator[str]:
    for talk, end in e.ends.items():
        groups = [g for g, t in zip(e.groups, e.talks, strict=True) if t == talk]
        # a partner ends like the others
        pairs = ((ids, mask) for g in groups for ids, mask in zip(own(g), masks(g), strict=False))
        scored = any((ids[mask] == end).any() for ids, mask in pairs)
        if groups and not scored:
            yield f"{e.name(end)} is never scored: the model does not learn to end a response"
        if groups and scored and end != e.tokenizer.eos_token_id:
            yield (
                f"conversations end with {e.name(end)}, the tokenizer's EOS is "
                f"{e.name(e.tokenizer.eos_token_id)}: samplers elsewhere must stop at the former"
            )
    if e.unended:
        total = sum(len(own(group)) for group in e.groups)
        ends = " or ".join(e.name(end) for end in e.ends.values())
        yield f"{e.unended} of {total} responses do not end with {ends}: they are cut"


def _alike(e: Evidence) -> Iterator[str]:
    same = sum(len(set(key[1:])) < len(key[1:]) for key in e.keys)
    if same:
        yield f"{e.said(same)} hold responses that are identical"
    count = Counter(e.keys)
    repeated = len(e.keys) - len(count)
    if repeated:
        yield f"{e.said(repeated)} repeat an earlier one token by token"
    turned = sum(
        count[(key[0], key[2], key[1])] > 0 for key in e.keys if len(key) == 3 and key[1] != key[2]
    )
    if turned:
        yield f"{e.said(turned, 'pairs')} stand the other way round too, with chosen and rejected"
    labels: dict[Key, set[float | None]] = {}
    for key, group in zip(e.keys, e.groups, strict=True):
        labels.setdefault(key, set()).add(group.label)
    both = sum(len(labels[key]) > 1 for key in e.keys)
    if both:
        yield f"{e.said(both)} stand with the other label too, desirable and undesirable"
    known = set(e.others)
    leaked = sum(key in known for key in e.keys)
    if leaked:
        yield f"{e.said(leaked)} stand in data.source too: they are not held out"


def _template(e: Evidence) -> Iterator[str]:
    if e.templated and not any(e.talks):
        yield "data.template is not used: no record is a conversation, texts are tokenized as such"
    if any(e.talks) and not GENERATION.search(written(e.tokenizer) or ""):
        yield (
            "the chat template does not mark the assistant's turns ({% generation %}): scored is "
            "what each turn adds to the conversation before it"
        )


def _reads_like_controls(e: Evidence) -> Iterator[str]:
    reads_like = controls_of(e.tokenizer).reads_like
    names: Counter[str] = Counter()
    found = 0
    for record in e.records:
        texts = map(plain, (record["prompt"], *record["responses"]))
        here = {name for text in texts for name in reads_like.findall(text)}
        found, names = found + bool(here), names + Counter(here)
    if found:
        common = ", ".join(name for name, _ in names.most_common(3))
        yield (
            f"{found} of {len(e.records)} records hold text that reads like a control token "
            f"({common}); it stays text"
        )


def _unknown(e: Evidence) -> Iterator[str]:
    unknown = e.tokenizer.unk_token_id
    if unknown is None or unknown in (e.tokenizer.bos_token_id, e.tokenizer.eos_token_id):
        return
    parts = [ids for group in e.groups for ids in (group.prompt, *own(group))]
    every = np.concatenate(parts)
    found = int(np.count_nonzero(every == unknown))
    if found:
        yield f"{found} of {len(every)} tokens are {e.name(unknown)}: the tokenizer cannot say them"


def length_share(groups: Sequence[Group]) -> tuple[float, float, int] | None:
    """(share of groups whose best response is longer in tokens than the worst, share of equal
    length, how many groups); None where no group has two responses of its own."""
    pairs = [g.responses for g in groups if len(g.responses) > 1 and not is_partnered(g)]
    if not pairs:
        return None
    longer = np.sign([len(responses[0]) - len(responses[-1]) for responses in pairs])
    return float((longer > 0).mean()), float((longer == 0).mean()), len(pairs)


def _biased(e: Evidence) -> Iterator[str]:
    found = length_share(e.groups)
    if found is None:
        return
    longer, equal, count = found
    unequal = (1 - equal) * count
    share = longer * count / unequal if unequal else 0.5
    if max(share, 1 - share) >= BIASED and abs(share - 0.5) > SURE * 0.5 / np.sqrt(unequal):
        better = "longer" if share > 0.5 else "shorter"
        yield (
            f"the better response is the {better} one in {max(share, 1 - share):.0%} of the "
            f"{unequal:.0f} groups whose lengths differ: a loss may learn length alone"
        )


DOUBTS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    *(_bos_twice, _both_write_bos, _no_bos, _end, _alike, _template, _reads_like_controls),
    *(_unknown, _biased),
)
