"""What a loss wants from the engine, declared beside the loss and read through `partial`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, overload

Loss = Callable[..., Any]
AnyLoss = TypeVar("AnyLoss", bound=Loss)


@dataclass(frozen=True)
class Needs:
    """What a loss needs; the defaults are those of an undeclared function.

    reference: log-probs under the reference. responses: K, None = any. coupled: a value depends
    on the other groups of the batch. memory: reads what changes from step to step.
    measure: the weights its values are summed under; "groups": weight_RG as the data gave them,
    "tokens": group b by the token measure of its first response. fields: further `Scored` fields.
    """

    reference: bool = True
    responses: int | None = 2
    coupled: bool = False
    memory: bool = False
    measure: str = "groups"
    fields: tuple[str, ...] = ()


@overload
def needs(loss: Loss, /) -> Needs: ...
@overload
def needs(*, rule: Callable[..., Needs]) -> Callable[[AnyLoss], AnyLoss]: ...
@overload
def needs(
    *,
    reference: bool = True,
    responses: int | None = 2,
    coupled: bool = False,
    memory: bool = False,
    measure: str = "groups",
    fields: tuple[str, ...] = (),
) -> Callable[[AnyLoss], AnyLoss]: ...


def needs(
    loss: Loss | None = None, /, *, rule: Callable[..., Needs] | None = None, **declared: Any
) -> Needs | Callable[[AnyLoss], AnyLoss]:
    """Read the needs of a loss, or declare them.

    `needs(loss) -> Needs` reads; a partial's keywords count. An undeclared function: `Needs()`.
    `@needs(reference=False, ...)` declares. `@needs(rule=f)` declares needs that depend on
    keywords: `f(**keywords) -> Needs` gets the loss's keywords, its defaults among them.
    """
    if loss is not None:
        return _read(loss)
    if rule is None:
        fixed = Needs(**declared)
        return partial(_declare, rule=lambda **_: fixed)
    return partial(_declare, rule=rule)


def _declare(function: AnyLoss, *, rule: Callable[..., Needs]) -> AnyLoss:
    vars(function)["needs"] = rule
    return function


def _read(loss: Loss) -> Needs:
    keywords: dict[str, Any] = {}
    while isinstance(loss, partial):
        keywords = {**loss.keywords, **keywords}  # the outer partial wins, as in a call
        loss = loss.func
    rule = getattr(loss, "needs", None)
    if rule is None:
        return Needs()
    return rule(**{**(getattr(loss, "__kwdefaults__", None) or {}), **keywords})
