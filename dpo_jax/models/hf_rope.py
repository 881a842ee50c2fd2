"""How a config.json says what differs with the position or the layer: rotary turns and windows.

Files of transformers 4 say rope_theta and rope_scaling, those of 5 say rope_parameters.
"""

import math
from collections.abc import Sequence
from typing import Any

from dpo_jax.models.hf_keys import REQUIRED, Keys
from dpo_jax.models.rope import Scaling
from dpo_jax.models.transformer import Config
from dpo_jax.structs import BadInput

Values = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
SCALINGS = {  # our kind: {transformers' key: our field}
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "beta_fast": "fast",
        "beta_slow": "slow",
        "attention_factor": "attention",
        "truncate": "truncate",
    },
    "longrope": {
        "factor": "factor",
        "original_max_position_embeddings": "original",
        "attention_factor": "attention",
        "short_factor": "short",
        "long_factor": "long",
    },
}


def flat_rope(keys: Keys, theta: float = 10_000.0) -> Values:
    """rope_base, rope_share and rope_scaling, from the keys of transformers 4 or 5."""
    name, given = table(keys)
    return turns(keys, name, defaults(keys, theta) | given)


def table(keys: Keys) -> tuple[str, Values]:
    """How positions turn: its name and what it says."""
    older, newer = keys.table("rope_scaling"), keys.table("rope_parameters")
    if older and newer:
        raise keys.refused("rope_scaling", "and rope_parameters say the same thing: leave one out")
    return ("rope_scaling", older) if older else ("rope_parameters", newer)


def defaults(keys: Keys, theta: float) -> Values:
    """What stands beside the table in files of transformers 4."""
    return {
        "rope_theta": keys.number("rope_theta", theta),
        "partial_rotary_factor": keys.number("partial_rotary_factor", 1.0),
    }


def turns(keys: Keys, name: str, given: Values, *, partial: bool = False) -> Values:
    """The fields of a table: rope_type, rope_theta, partial_rotary_factor, factor and so on."""
    inner = Keys(given, f"{keys.where}: {name}")
    kind = inner.take("rope_type", inner.take("type", "default"))
    inner.only(type=kind)
    base, share = inner.number("rope_theta"), inner.number("partial_rotary_factor")
    if share != 1 and not partial:
        raise inner.refused("partial_rotary_factor", "is not implemented for this model_type")
    if kind not in ("default", *SCALINGS):
        known = ", ".join(["default", *SCALINGS])
        raise inner.refused("rope_type", f"is not implemented ({known} are)")
    scaling = None if kind == "default" else _scaling(keys, inner, kind)
    inner.end(f"rope_type {kind}")
    return {"rope_base": base, "rope_share": share, "rope_scaling": scaling}


def _scaling(keys: Keys, inner: Keys, kind: Any) -> Scaling:
    positions, said = keys.count("max_position_embeddings", 0), {}
    for name, field in SCALINGS[kind].items():
        default = None if field == "factor" else getattr(Scaling(kind), field)
        default = REQUIRED if field in ("low", "high") else default
        whole = field in ("truncate", "short", "long")
        said[field] = inner.take(name, default) if whole else inner.number(name, default)
    if kind == "dynamic":
        inner.only(original_max_position_embeddings=positions)
    if kind != "linear":
        said["original"] = int(said.get("original", 0)) or positions
    if kind == "longrope" and said["factor"] is None:
        said["factor"] = positions / max(said["original"], 1)
    if kind == "yarn":
        inner.take("finetuned", None)  # a note that transformers does not read either
        top, bottom = inner.number("mscale", None), inner.number("mscale_all_dim", None)
        if top and bottom and said["attention"] is None and said["factor"]:
            one, other = (0.1 * m * math.log(said["factor"]) + 1 for m in (top, bottom))
            said["attention"] = one / other
    if said["factor"] is None:
        raise BadInput(f"{inner.where}: factor is missing")
    return Scaling(kind, **said)


def written_rope(c: Config) -> Values:
    return {"rope_theta": c.rope_base, "rope_scaling": written_scaling(c.rope_scaling)}


def written_scaling(scaling: Scaling | None) -> Values | None:
    if scaling is None:
        return None
    said = {name: getattr(scaling, field) for name, field in SCALINGS[scaling.kind].items()}
    kept = {name: list(x) if type(x) is tuple else x for name, x in said.items() if x is not None}
    return {"rope_type": scaling.kind} | kept


def layered_rope(keys: Keys, theta: float, local_theta: float | None) -> Values:
    """One rope for the layers that see all, a plain one for those with a window."""
    older, newer = keys.table("rope_scaling"), Keys(keys.table("rope_parameters"), keys.where)
    full, sliding = newer.table(FULL), newer.table(SLIDING)
    newer.end("rope_parameters by layer type")
    if older and full and any(full.get(name, value) != value for name, value in older.items()):
        raise keys.refused("rope_scaling", f"and rope_parameters.{FULL} differ: leave one out")
    flat = defaults(keys, theta)
    local = flat["rope_theta"]
    if local_theta is not None:
        local = keys.number("rope_local_base_freq", local_theta)
    said = turns(keys, "rope_scaling", flat | full | older)
    other = turns(keys, SLIDING, flat | {"rope_theta": local} | sliding)
    if other["rope_scaling"] is not None:
        raise keys.refused("rope_parameters", f"stretches {SLIDING}, which is not implemented")
    return said | {"local_rope_base": other["rope_base"]}


# Windows


def windows(keys: Keys, L: int, window: int, default: Sequence[str]) -> Values:
    """The window of every layer by layer_types."""
    types = keys.series("layer_types", default, L)
    for each in types:
        if each not in (FULL, SLIDING):
            raise keys.refused("layer_types", f"has {each!r} ({FULL} and {SLIDING} are known)")
    if SLIDING in types and not window:
        raise keys.refused("layer_types", f"has {SLIDING} and there is no sliding_window")
    return {"windows": tuple(window if each == SLIDING else 0 for each in types)}


def written_windows(c: Config) -> Values:
    windows = c.of_layers(c.windows)
    types = [SLIDING if window else FULL for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": types}
