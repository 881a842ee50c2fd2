"""Whether a loss has its keywords, checked when the algorithm is made, and whether it can use its
data, checked on the host before anything is packed."""

from collections.abc import Callable
from inspect import signature

from dpo_jax import losses
from dpo_jax.data import views
from dpo_jax.data.criteria import TOTAL
from dpo_jax.losses.needs import Needs, name_of, parts_of
from dpo_jax.structs import BadInput, Group

COLUMNS = {  # a field of Scored, and the field of a group it comes from
    "score_BKC": "scores",
    "label_B": "label",
    "soft_label_B": "soft_label",
    "margin_B": "margin",
}
REMEDIES = {
    "scores": "give every record scores",
    "label": "give records a label, or data.arrange=data.views.unpaired makes them of pairs",
    "soft_label": "give records one, or data.arrange=data.criteria.soft_labels makes it of scores",
    "margin": "give records one, or data.arrange=data.criteria.margins makes it of scores",
}

LEFT_OUT = {"label": "", "soft_label": ", as data.arrange=data.criteria.without_ties does"}


def takes(loss: Callable) -> str:
    """The name of what a loss takes first: `scored`, or score_BK where it is one of scores."""
    return next(iter(signature(parts_of(loss)[0]).parameters), "")


def check_keywords(loss: Callable, given: tuple[str, ...] = ()) -> None:
    """BadInput for a keyword that a loss does not have, and for one that it lacks.

    given: the keywords that the algorithm gives.
    """
    if isinstance(loss, losses.Mix):
        for _, term in losses.terms(loss):
            check_keywords(term, given)
        return
    function, keywords = parts_of(loss)
    _, *parameters = signature(function).parameters.values()
    named = [
        each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    unknown = [name for name in keywords if name not in named]
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        takes = ", ".join(named) or "none"
        raise BadInput(f"loss {name_of(loss)} has no keyword {unknown[0]}: it takes {takes}")
    missing = [name for name in named if name not in keywords and name not in given]
    if missing:
        raise BadInput(f"loss {name_of(loss)} requires {', '.join(missing)}: give it by `partial`")
    if callable(keywords.get("loss")):
        check_keywords(keywords["loss"], given)


def suitable(
    loss: Callable, needs: Needs, groups: list[Group], row_tokens: int | None = None
) -> list[Group]:
    """The groups as the loss wants them: beside partners, which still fit a row, where it reads
    some, and as they are otherwise.

    Errors: BadInput, naming loss and data, for another number of responses, a column that is
    missing, labels that the loss would not read, and criteria that nothing weighs into one.
    """
    name = name_of(loss)
    for group in groups:
        _check_responses(name, needs.responses, group)
        _check_columns(name, needs, group)
    return views.partnered(groups, row_tokens) if needs.partner else groups


def _check_responses(name: str, wanted: int | None, group: Group) -> None:
    found = len(group.responses)
    if found == wanted or (wanted is None and found):
        return
    if not found:
        remedy = "give every record its responses"
    elif found == 1:
        remedy = "take a loss of single responses (`dpo-jax losses` lists them)"
    elif wanted == 1:
        remedy = "data.arrange=data.views.unpaired makes them"
    else:
        remedy = "data.arrange=data.views.pairs makes them, or take a loss of lists"
    reads = {None: "reads responses", 1: "reads 1 response"}.get(
        wanted, f"compares {wanted} responses"
    )
    raise BadInput(
        f"loss {name} {reads}, the data has {found} a prompt (record {group.record}): {remedy}"
    )


def _check_columns(name: str, needs: Needs, group: Group) -> None:
    for field, column in COLUMNS.items():
        given, wanted = getattr(group, column) is not None, field in needs.fields
        if wanted and not given:
            raise BadInput(f"loss {name} reads {column}, the data has none: {REMEDIES[column]}")
        if given and not wanted and column in ("label", "soft_label"):
            raise BadInput(
                f"the data has a {column} on every record, which loss {name} does not read: take "
                f"a loss that does (`dpo-jax losses` lists them) or leave {column} out"
                f"{LEFT_OUT[column]}"
            )
    if "score_BKC" in needs.fields and len(group.criteria) > 1 and TOTAL not in group.criteria:
        raise BadInput(
            f"loss {name} reads one score a response, the data has {', '.join(group.criteria)}: "
            "data.arrange=data.criteria.order weighs them into one"
        )
