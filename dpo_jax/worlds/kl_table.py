"""What the KL estimators estimate, found by listing every response: no sampling, no noise.

A policy and a reference choose token by token in a world of `enumerable`. Every estimator of
`losses` is averaged over the responses y of the policy, summed over the tokens of y ("token") or
applied once to the log-ratio of the whole response ("sequence"), and used in two ways:

    as a loss, samples held      E[grad k(y)]                 y as data, k differentiated
    as a penalty in the reward   E[k(y) grad log policy(y)]   k as a number, y chosen by the policy

Their sum ("both") is the gradient of the value E[k(y)] itself. Each of the three is compared with
what it might be the gradient of: with p the policy and r the reference, KL(p, r), KL(r, p) and
sum |p - r| over whole responses; and, "prefixes held", the same of each next token, summed over
the prefixes that the policy reaches as if its choices could not change which it reaches.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.structs import Array
from dpo_jax.worlds import enumerable

VOCABULARY, STEPS, PROMPTS, SEED = 3, 3, 2, 0
EXACT = 1e-9  # relative; float64 leaves about 1e-15

ESTIMATORS = {
    "k1": losses.kl_k1,
    "abs": losses.kl_abs,
    "k2": losses.kl_k2,
    "k3": losses.kl_k3,
    "exact": losses.kl_exact,
}
UNITS = ("token", "sequence")


class Errors(NamedTuple):
    """|g - t| / |t| of a gradient g against each target t; `zero` is |g| / |reverse|.

    reverse is KL(p, r), forward KL(r, p), variation sum |p - r|; held: the tokens', prefixes held.
    """

    zero: float
    reverse: float
    forward: float
    variation: float
    reverse_held: float
    forward_held: float
    variation_held: float


TARGETS = Errors._fields[1:]
WORDS = {  # p is the policy, r the reference
    "zero": "0",
    "reverse": "KL(p, r)",
    "forward": "KL(r, p)",
    "variation": "sum |p - r|",
    "reverse_held": "tokens' KL(p, r), prefixes held",
    "forward_held": "tokens' KL(r, p), prefixes held",
    "variation_held": "tokens' sum |p - r|, prefixes held",
}


class Row(NamedTuple):
    """One estimator in one unit. value: (E[k] - KL(p, r)) / KL(p, r)."""

    estimator: str
    unit: str
    value: float
    loss: Errors
    penalty: Errors
    both: Errors

    @property
    def verdict(self) -> str:
        """The numbers in words: the value, and what each use has the gradient of."""
        value = "unbiased" if abs(self.value) < EXACT else f"biased by {self.value:+.0%}"
        uses = (("loss", self.loss), ("penalty", self.penalty), ("both", self.both))
        return "; ".join([f"value {value}", *(f"as {use}: {named(e)}" for use, e in uses)])


def named(errors: Errors) -> str:
    """What a gradient with these errors is the gradient of, the plainest word first."""
    for target, words in WORDS.items():
        if getattr(errors, target) < EXACT:
            return words
    return f"{errors.reverse:.0%} off {WORDS['reverse']}"


@lru_cache
def kl_table() -> tuple[Row, ...]:
    """The rows of a policy and a reference of normal token logits, each estimator in each unit."""
    rng = np.random.default_rng(SEED)
    shape = (PROMPTS, len(enumerable.tree(VOCABULARY, STEPS).prefixes), VOCABULARY)
    return measured(rng.standard_normal(shape), rng.standard_normal(shape), steps=STEPS)


def measured(logits_BTV: Array, ref_logits_BTV: Array, *, steps: int) -> tuple[Row, ...]:
    """The rows of this policy and this reference, logits at the prefixes of `enumerable.tree`."""
    with jax.enable_x64(True):
        logits_BTV = jnp.asarray(logits_BTV, jnp.float64)
        ref_BTV = jax.nn.log_softmax(jnp.asarray(ref_logits_BTV, jnp.float64))
        divergence, targets = _truths(logits_BTV, ref_BTV, steps)
        return tuple(
            _row(estimator, unit, divergence, targets, (logits_BTV, ref_BTV, steps))
            for unit in UNITS
            for estimator in ESTIMATORS
        )


HEADER = (
    "k",
    "per",
    "value",
    "loss, KL(p, r)",
    "loss, KL(r, p)",
    "penalty, KL(p, r)",
    "both, KL(p, r)",
)
LEGEND = (
    "Relative errors of the value and of the gradients; p is the policy, r the reference.\n"
    "0 holds for every p and r, other numbers for the two drawn here."
)


def text() -> str:
    """The table and its verdicts, as a terminal shows them."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    for column in HEADER:
        table.add_column(column, justify="left" if column in HEADER[:2] else "right")
    for row in kl_table():
        table.add_row(*cells(row))
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(table)
    shown = [line.rstrip() for line in capture.get().strip("\n").splitlines()]
    verdicts = [f"{row.estimator} per {row.unit}: {row.verdict}" for row in kl_table()]
    return "\n".join([LEGEND, *shown, *verdicts])


def cells(row: Row) -> tuple[str, ...]:
    """A row under HEADER; 0 = exact."""
    errors = (row.loss.reverse, row.loss.forward, row.penalty.reverse, row.both.reverse)
    value = "0" if abs(row.value) < EXACT else f"{row.value:+.2f}"
    return (row.estimator, row.unit, value, *("0" if e < EXACT else f"{e:.2f}" for e in errors))


# ---------------------------------------------------------------- what is estimated


def _truths(
    logits_BTV: jax.Array, ref_BTV: jax.Array, steps: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KL(policy, reference), and the gradient of every target by its name."""
    ref_BK = enumerable.autoregressive(ref_BTV, steps)
    reached_BT = _reached(logits_BTV, steps)

    def over_responses(divergence):
        return lambda x_BTV: divergence(enumerable.autoregressive(x_BTV, steps), ref_BK).sum()

    def over_tokens(divergence):
        return lambda x_BTV: jnp.sum(reached_BT * divergence(jax.nn.log_softmax(x_BTV), ref_BTV))

    divergences = {"reverse": enumerable.kl, "forward": _flipped, "variation": _variation}
    truths = {name: over_responses(f) for name, f in divergences.items()}
    truths |= {f"{name}_held": over_tokens(f) for name, f in divergences.items()}
    gradients = {name: jax.grad(truth)(logits_BTV) for name, truth in truths.items()}
    return truths["reverse"](logits_BTV), gradients


def _flipped(logp_BK: jax.Array, ref_logp_BK: jax.Array) -> jax.Array:
    return enumerable.kl(ref_logp_BK, logp_BK)


def _variation(logp_BK: jax.Array, ref_logp_BK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(jnp.exp(logp_BK) - jnp.exp(ref_logp_BK)), axis=-1)


def _reached(logits_BTV: jax.Array, steps: int) -> jax.Array:
    """The probability (B, T) that the policy comes to a prefix: that of its responses together."""
    path = enumerable.tree(logits_BTV.shape[-1], steps)
    p_BK = jnp.exp(enumerable.autoregressive(logits_BTV, steps))
    at_KNT = path.source_KN[:, :, None] == np.arange(len(path.prefixes))[None, None, :]
    passes_KT = (at_KNT & _used(path)[:, :, None]).any(axis=1)
    return p_BK @ jnp.asarray(passes_KT, p_BK.dtype)


# ---------------------------------------------------------------- what estimates


def _row(
    estimator: str,
    unit: str,
    divergence: jax.Array,
    targets: dict[str, jax.Array],
    world: tuple[jax.Array, jax.Array, int],
) -> Row:
    logits_BTV, ref_BTV, steps = world
    estimate = _per_token if unit == "token" else _per_sequence

    def expectation(sampling_BTV, estimating_BTV):
        """E[k]: its two arguments are one policy, told apart to be differentiated apart."""
        p_BK = jnp.exp(enumerable.autoregressive(sampling_BTV, steps))
        return jnp.sum(p_BK * estimate(estimator, estimating_BTV, ref_BTV, steps))

    both = jax.value_and_grad(expectation, argnums=(0, 1))
    value, (penalty_BTV, loss_BTV) = both(logits_BTV, logits_BTV)

    def errors(gradient_BTV):
        size = jnp.linalg.norm(gradient_BTV) / jnp.linalg.norm(targets["reverse"])
        return Errors(float(size), *(_error(gradient_BTV, targets[name]) for name in TARGETS))

    bias = float((value - divergence) / divergence)
    return Row(
        estimator, unit, bias, errors(loss_BTV), errors(penalty_BTV), errors(loss_BTV + penalty_BTV)
    )


def _error(gradient_BTV: jax.Array, target_BTV: jax.Array) -> float:
    return float(jnp.linalg.norm(gradient_BTV - target_BTV) / jnp.linalg.norm(target_BTV))


def _per_token(estimator: str, logits_BTV: jax.Array, ref_BTV: jax.Array, steps: int) -> jax.Array:
    """k (B, K) summed over the tokens of each response; `exact` over the prefixes it passes."""
    path = enumerable.tree(logits_BTV.shape[-1], steps)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    if estimator == "exact":
        k_BKN = losses.kl_exact(logp_BTV, ref_BTV)[:, path.source_KN]
    else:
        at = (slice(None), path.source_KN, path.target_KN)
        k_BKN = ESTIMATORS[estimator](logp_BTV[at], ref_BTV[at])
    return jnp.sum(jnp.where(_used(path)[None], k_BKN, 0.0), axis=-1)


def _per_sequence(
    estimator: str, logits_BTV: jax.Array, ref_BTV: jax.Array, steps: int
) -> jax.Array:
    """k (B, K) of the summed log-ratio; `exact` over all responses, the same for each."""
    logp_BK = enumerable.autoregressive(logits_BTV, steps)
    ref_BK = enumerable.autoregressive(ref_BTV, steps)
    if estimator == "exact":
        return jnp.broadcast_to(losses.kl_exact(logp_BK, ref_BK)[:, None], logp_BK.shape)
    return ESTIMATORS[estimator](logp_BK, ref_BK)


def _used(path: enumerable.Tree) -> np.ndarray:
    """Whether a step (K, N) stands within its response."""
    return np.arange(path.source_KN.shape[1])[None, :] < path.length_K[:, None]
