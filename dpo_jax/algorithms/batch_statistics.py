"""Scalars of a whole step that a loss reads: found under the current policy, before the split.

`losses.needs.Statistic` says which; those that are kept live in the train state's memory as
{field: mean so far, field_weight: weight so far}.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpo_jax.algorithms.margins import weighted
from dpo_jax.losses.measure import token_mean
from dpo_jax.losses.needs import Statistic
from dpo_jax.structs import Memory, Scored


def start(statistics: Sequence[Statistic]) -> Memory:
    """The memory before the first step."""
    kept = [statistic.field for statistic in statistics if statistic.keep is not None]
    names = [name for field in kept for name in (field, f"{field}_weight")]
    return {name: jnp.zeros(()) for name in names}


def updated(
    statistics: Sequence[Statistic], memory: Memory, scored: Scored
) -> tuple[Memory, dict[str, jax.Array]]:
    """(memory, {field: value}) with this step counted in; without gradient."""
    raw_B = scored.weight_B
    assert raw_B is not None
    weight_B = token_mean(raw_B[None])[0]
    found = {}
    for statistic in statistics:
        mean = jax.lax.stop_gradient(weighted(weight_B, statistic.value(scored)))
        if statistic.keep is not None:
            memory = _kept(statistic.field, statistic.keep, memory, mean, jnp.sum(raw_B))
            mean = memory[statistic.field]
        found[statistic.field] = mean
    return memory, found


def _kept(name: str, keep: float, memory: Memory, mean: jax.Array, weight: jax.Array) -> Memory:
    """The mean over all steps: every step by its weight, or an exponential moving average."""
    counts = jnp.isfinite(mean) & (weight > 0)  # a step that is no number leaves no trace
    before, total = memory[name], memory[f"{name}_weight"] + jnp.where(counts, weight, 0)
    share = weight / jnp.where(counts, total, 1) if keep == 1 else 1 - keep
    moved = jnp.where(counts, before + share * (mean - before), before)
    return {
        **memory,
        name: moved.astype(before.dtype),
        f"{name}_weight": total.astype(before.dtype),
    }
