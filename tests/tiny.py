"""Small models and groups that several tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import Group

CONFIG = Config(V=17, D=16, L=1, H=4, J=2, E=4, F=24)
MODEL = decoder(CONFIG)


def groups(n: int, *, responses: int = 2, seed: int = 0, longest: int = 7) -> list[Group]:
    """n groups of random ids and lengths, every fourth one of weight 1/2."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        return rng.integers(1, CONFIG.V, size=rng.integers(1, longest + 1)).astype(np.int32)

    weights = [0.5 if b % 4 == 3 else 1.0 for b in range(n)]
    return [Group(ids(), [ids() for _ in range(responses)], weight=weight) for weight in weights]


def relative_error(tree, other) -> float:
    """Largest difference over the leaves, each against the norm of its leaf of `other`."""
    import jax

    differences = jax.tree.map(
        lambda x, y: float(np.linalg.norm(np.subtract(x, y)) / (np.linalg.norm(y) + 1e-30)),
        jax.device_get(tree),
        jax.device_get(other),
    )
    return max(jax.tree.leaves(differences))


def equations(jaxpr) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside of them too."""
    from jax.extend.core import jaxprs_in_params

    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def descend(loss: Callable[[Any], Any], params: Any, *, steps: int, rate: float) -> Any:
    """`params` after `steps` of Adam on `loss`, the rate falling to zero along a cosine."""
    import jax
    import optax

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, memory = carry
        updates, memory = optimizer.update(jax.grad(loss)(params), memory)
        return (optax.apply_updates(params, updates), memory), None

    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return train((params, optimizer.init(params)))[0]
