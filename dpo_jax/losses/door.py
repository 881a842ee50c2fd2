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

    BadInput names field and loss when it is None; AssertionError when an axis is not as long as
    in `logp_BK`.
    """
    value = getattr(scored, field)
    if value is None:
        raise BadInput(
            f"losses.{loss} needs Scored.{field}, which is None; "
            f"fill it, or take a loss (or a keyword) that does not read it"
        )
    chex.assert_rank(scored.logp_BK, 2, custom_message=f"losses.{loss}: Scored.logp_BK")
    dims = chex.Dimensions()
    dims["BK"] = scored.logp_BK.shape
    letters = field.rsplit("_", 1)[-1]
    chex.assert_shape(value, dims[letters], custom_message=f"losses.{loss}: Scored.{field}")
    return floating(value)
