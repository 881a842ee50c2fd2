"""What a loss wants from the engine, declared beside the loss and read through `partial`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, TypeVar, overload

from dpo_jax.structs import Array, BadInput, Scored

Loss = Callable[..., Any]
AnyLoss = TypeVar("AnyLoss", bound=Loss)


class Statistic(NamedTuple):
    """A scalar of the whole step, found under the current policy before the step is split.

    field: the scalar field of `Scored` it fills. value: Scored -> x_B, averaged over the groups by
    their weights, without gradient. keep: None = the mean over this step; otherwise the mean over
    all steps so far, 1.0 = every step counts the same, below 1 = the decay of a moving average.
    partner: value wants, as a second response, that of another prompt.
    """

    field: str
    value: Callable[[Scored], Array]
    keep: float | None = None
    partner: bool = False


@dataclass(frozen=True)
class Needs:
    """What a loss needs; the defaults are those of an undeclared function.

    reference: log-probs under the reference. responses: K, None = any. coupled: a value depends
    on the other groups of the batch. measure: the weights its values are summed under; "groups":
    weight_RG as the data gave them, "tokens": group b by the token measure of its first response.
    fields: further `Scored` fields. statistics: scalars of the whole step; those with `keep` make
    the train state's memory.
    """

    reference: bool = True
    responses: int | None = 2
    coupled: bool = False
    measure: str = "groups"
    fields: tuple[str, ...] = ()
    statistics: tuple[Statistic, ...] = ()

    @property
    def memory(self) -> bool:
        """Whether it reads what changes from step to step."""
        return any(statistic.keep is not None for statistic in self.statistics)

    @property
    def partner(self) -> bool:
        """Whether every response wants that of another prompt beside it."""
        return any(statistic.partner for statistic in self.statistics)


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
    measure: str = "groups",
    fields: tuple[str, ...] = (),
    statistics: tuple[Statistic, ...] = (),
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


def together(parts: list[Needs], name: str) -> Needs:
    """The needs of a loss made of others. Raises BadInput where they want different K."""
    counts = {part.responses for part in parts if part.responses is not None}
    if len(counts) > 1:
        wanted = " and ".join(map(str, sorted(counts)))
        raise BadInput(f"losses.{name}: its losses want {wanted} responses; take losses of one K")
    statistics = {each.field: each for part in parts for each in part.statistics}
    return Needs(
        reference=any(part.reference for part in parts),
        responses=next(iter(counts), None),
        coupled=any(part.coupled for part in parts),
        measure=parts[0].measure,
        fields=tuple(dict.fromkeys(field for part in parts for field in part.fields)),
        statistics=tuple(statistics.values()),
    )


def _declare(function: AnyLoss, *, rule: Callable[..., Needs]) -> AnyLoss:
    vars(function)["needs"] = rule
    return function


def parts_of(loss: Loss) -> tuple[Loss, dict[str, Any]]:
    """(function, keywords) of a loss; its defaults among the keywords, those of partials first."""
    bound: dict[str, Any] = {}
    while isinstance(loss, partial):
        bound = {**loss.keywords, **bound}  # the outer partial wins, as in a call
        loss = loss.func
    parameters = signature(loss).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return loss, {**defaults, **bound}


def name_of(loss: Loss) -> str:
    """The name of a loss in messages: that of the function inside partials, or of its class."""
    function, _ = parts_of(loss)
    return getattr(function, "__name__", type(function).__name__)


def _read(loss: Loss) -> Needs:
    function, keywords = parts_of(loss)
    rule = getattr(function, "needs", None)
    return Needs() if rule is None else rule(**keywords)
