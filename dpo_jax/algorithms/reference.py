"""References that move: what `preference(reference=...)` takes in place of the policy at step 0.

A function (step, policy, reference) -> reference, called before every step with what is trained,
which of a policy with adapters are the adapters alone; the moving reference is part of the train
state's memory, so that a resumed run continues with it.
"""

import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, Params


def soft_update(
    step: Array, policy: Params, reference: Params, *, alpha: Array | float = 0.6, every: int = 512
) -> Params:
    """TR-DPO, Gorbatovski et al. 2404.09656 eq. 5-6: after every `every` steps,

        reference <- alpha policy + (1 - alpha) reference

    alpha = 1 is the hard update. Defaults are the paper's. Of adapters A and B are averaged, and
    not their product: with alpha below 1 that is another reference than the average of weights.
    """
    due = (step > 0) & (step % every == 0)
    share = jnp.asarray(alpha, float)

    def moved(p: Array, r: Array) -> jax.Array:
        return jnp.where(due, (share * p + (1 - share) * r).astype(r.dtype), r)

    return jax.tree.map(moved, policy, reference)
