"""What happens at the door of every loss: fields are there, axes agree, numbers are precise."""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.structs import Array, BadInput, Scored


def floating(x: Array | float) -> jax.Array:
    """`x` in float32 or better: bfloat16, float16, bool and int become float32, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def present(scored: Scored, field: str, loss: str) -> jax.Array:
    """`scored.<field>` in float32 or better, of the axes that its last letters name.

    BadInput names field and loss when it is None; AssertionError when B or K is not as long as
    in `logp_BK`; C is as long as it is.
    """
    value = getattr(scored, field)
    if value is None:
        raise BadInput(
            f"losses.{loss} needs Scored.{field}, which is None; "
            f"fill it, or take a loss (or a keyword) that does not read it"
        )
    chex.assert_rank(scored.logp_BK, 2, custom_message=f"losses.{loss}: Scored.logp_BK")
    sizes = dict(zip("BK", scored.logp_BK.shape, strict=True))
    shape = tuple(sizes.get(letter) for letter in field.rsplit("_", 1)[-1])
    chex.assert_shape(value, shape, custom_message=f"losses.{loss}: Scored.{field}")
    return floating(value)


def statistic(scored: Scored, field: str, loss: str) -> jax.Array:
    """`scored.<field>`, a scalar of the whole step, without gradient; 0 where it is None."""
    value = getattr(scored, field)
    value = jnp.zeros((), floating(scored.logp_BK).dtype) if value is None else floating(value)
    chex.assert_rank(value, 0, custom_message=f"losses.{loss}: Scored.{field}")
    return jax.lax.stop_gradient(value)
