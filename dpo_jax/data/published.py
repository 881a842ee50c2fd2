"""Rows of published data sets that stand in no common layout; for `Data.layout`.

Where only columns have other names, `layouts.fields` does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.data.layouts import ASSISTANT, Messages

PROMPTER = {"prompter": "user"}  # Open Assistant's name for a role


def pandalm(row: Mapping[str, Any]) -> dict[str, Any]:
    """PandaLM's test set, Wang et al. 2306.05087: two responses and the judgements of three.

    Each annotator is a criterion: 1 for the better response, 0 for the other, 1/2 for both where
    it is a tie. So data.arrange=data.criteria.votes makes soft labels of them, and
    (data.criteria.votes, data.criteria.without_ties) pairs by majority.
    """
    scores = {
        name: [{0: 0.5, 1: 1.0, 2: 0.0}[vote], {0: 0.5, 1: 0.0, 2: 1.0}[vote]]
        for name, vote in row.items()
        if name.startswith("annotator")
    }
    prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    responses = [row["response1"], row["response2"]]
    return {"prompt": prompt, "responses": responses, "scores": scores, "idx": row["idx"]}


def blimp(row: Mapping[str, Any]) -> dict[str, Any]:
    """BLiMP's minimal pairs, Warstadt et al. 1912.00582: whole sentences as answers to nothing, so
    that SFT on the good ones learns all of their words.
    """
    return {"prompt": "", "chosen": row["sentence_good"], "rejected": row["sentence_bad"]}


def oasst_tree(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A tree of Open Assistant, Koepf et al. 2304.07327: a list for every message of a user that
    has two ranked replies or more, with the conversation up to it as the prompt.
    """
    return list(_ranked(row["prompt"], []))


def _ranked(node: Mapping[str, Any], before: Messages) -> Iterator[dict[str, Any]]:
    role = PROMPTER.get(node["role"], node["role"])
    until = [*before, {"role": role, "content": node["text"]}]
    replies = [reply for reply in node["replies"] if reply.get("rank") is not None]
    if role != ASSISTANT and len(replies) > 1:
        ranked = sorted(replies, key=lambda reply: reply["rank"])
        yield {"prompt": until, "responses": [reply["text"] for reply in ranked]}
    for reply in node["replies"]:
        yield from _ranked(reply, until)
