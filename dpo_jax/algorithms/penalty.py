"""How far a policy may go from its reference: the KL in the reward or in the loss.

What the estimators do there is measured in docs/losses.md (`worlds.kl_table`). In the reward, k1
and no other makes the RLHF objective E[score] - beta KL(policy, reference): the others are held
like scores although they move with the policy, so that it comes to rest elsewhere, even where
their mean is the KL. In the loss the gradient is that of each token's own estimate, not of what
the token leads to: k2 and exact pull by KL(policy, reference), k3 by KL(reference, policy), abs by
the total variation, and k1 not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.logprobs import TokenStatistics
from dpo_jax.losses.needs import parts_of
from dpo_jax.structs import Array, BadInput, Memory

Estimator = Callable[..., jax.Array]  # (logp, ref_logp) -> kl, elementwise
Place = Literal["reward", "loss"]
COEFFICIENT = "kl_coefficient"  # in the memory of a run that adapts it
LARGEST_ERROR = 0.2  # of the adaptive coefficient


@dataclass(frozen=True)
class Penalty:
    """beta times the KL of every token, by an estimator; `losses.kl_exact` sums over the whole
    vocabulary.

    target: nats a response that the coefficient is adapted to (1909.08593 section 2.2), starting
    at beta; None = beta stays. horizon: responses over which it changes by a factor of about e.
    """

    beta: float
    kl: Estimator
    place: Place
    target: float | None = None
    horizon: float = 10_000

    def __post_init__(self) -> None:
        if self.place not in ("reward", "loss"):
            raise BadInput(f"algorithm.kl_in={self.place!r}; it must be reward or loss")
        if self.target is not None and not (self.beta > 0 and self.target > 0):
            raise BadInput(
                f"algorithm.kl_target={self.target} adapts algorithm.beta={self.beta}: both must "
                "be more than 0"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen weights it compares with: none without a coefficient."""
        return ("reference",) if self.beta else ()

    @property
    def exact(self) -> bool:
        return parts_of(self.kl)[0] is losses.kl_exact

    @property
    def in_loss(self) -> bool:
        return bool(self.beta) and self.place == "loss"

    def start(self) -> Memory:
        """The memory before the first step."""
        return {} if self.target is None else {COEFFICIENT: jnp.float32(self.beta)}

    def coefficient(self, memory: Memory) -> Array | float:
        """What the KL is multiplied by now."""
        return self.beta if self.target is None else memory[COEFFICIENT]

    def adapted(self, memory: Memory, kl: float, responses: int) -> Memory:
        """The memory after a rollout of so many responses with a mean KL in nats.

        beta <- beta (1 + e responses / horizon),   e = clip(kl / target - 1, -0.2, 0.2)
        """
        if self.target is None:
            return memory
        error = float(np.clip(kl / self.target - 1, -LARGEST_ERROR, LARGEST_ERROR))
        return {**memory, COEFFICIENT: memory[COEFFICIENT] * (1 + error * responses / self.horizon)}

    def tokens(self, found: TokenStatistics, ref_logp_RN: Array | None) -> jax.Array:
        """The KL of every token, kl_RN; 0 where unused."""
        if self.exact:
            assert found.policy_kl_RN is not None
            return found.policy_kl_RN
        assert ref_logp_RN is not None
        return self.kl(found.logp_RN, ref_logp_RN)
