"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, both ways.

    save_adapter("folder", config, lora, params)     # PeftModel.from_pretrained(base, "folder")
    lora, adapters = load_adapter("folder", config)  # {"base": ..., "lora": adapters} for a Model

A module of theirs has one adapter, A (rank, in) and B (out, rank). Where its tensor holds several
of our matrices (NeoX's query_key_value, Phi-3's gate_up_proj, GPT-2's c_attn), the adapter of n of
them has n times the rank: its A stacks theirs, and B meets each of them in a block of its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dpo_jax.models import families, hf, layout, tensor_file, weights
from dpo_jax.models.hf_keys import Keys
from dpo_jax.models.layout import Row
from dpo_jax.models.lora import WEIGHTS, Adapter, Lora, adapters, factors
from dpo_jax.models.tensor_file import Tensor, shown
from dpo_jax.models.transformer import Config
from dpo_jax.structs import BadInput, Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INERT = (  # how the adapter came to be, and what its tensors say anyway
    *("task_type", "revision", "inference_mode", "auto_mapping", "peft_version", "layers_pattern"),
    *("fan_in_fan_out", "target_modules", "megatron_core", "qalora_group_size"),
)
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # that leave the base as it was


# Writing


def save_adapter(
    path: epath.PathLike,
    config: Config,
    lora: Lora,
    params: Params,
    *,
    base: str | None = None,
    dtype: Any = None,
) -> None:
    """Write a folder that peft loads beside the base model, of which it holds nothing.

    params: {"lora": adapters}, whatever stands beside. base: folder or hub name of the base model,
    which the folder then names. dtype: of the tensors; by default that of the parameters. The first
    process writes. Other files of the folder stay.
    Raises: BadInput for a target that the model does not have, and where nothing can be written.
    """
    own = {name: hf.on_host(leaf, dtype) for name, leaf in params["lora"]["layers"].items()}
    targets = {each.target for each in adapters(lora, config)}
    tensors, chosen = {}, {}
    for at, parts in _rows(config):
        if not any(each.target in targets for each in parts):
            continue
        chosen[_short(at, config)] = at, len(parts)
        for layer, name in enumerate(hf.names(at, config)):
            a, b = _theirs(at, parts, {key: x[layer] for key, x in own.items()}, config, lora.rank)
            tensors |= {f"{_stem(name)}.lora_A.weight": a, f"{_stem(name)}.lora_B.weight": b}
    if jax.process_index() == 0:
        _write(epath.Path(path).expanduser(), tensors, _words(lora, chosen, base))


def _theirs(
    at: Row, parts: Sequence[Adapter], own: Mapping[str, np.ndarray], config: Config, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """A (rank, in) and B (out, rank) of a module in one layer; what is no target is 0."""
    if parts[0].out == "D":
        [each] = parts
        return _wide(at, [own[each.a]], config, rank), own[each.b].T
    some = next(own[each.a] for each in parts if each.a in own)
    a = [own[each.a].T if each.a in own else np.zeros_like(some.T) for each in parts]
    blocks = []
    for i, each in enumerate(parts):
        sizes = [getattr(config, axis) for axis in each.out]
        block = np.zeros((len(parts), rank, *sizes), some.dtype)
        block[i] = own.get(each.b, 0)
        blocks.append(block.reshape(-1, *sizes))
    return np.concatenate(a), _wide(at, blocks, config, len(parts) * rank).T


def _wide(at: Row, leaves: Sequence[np.ndarray], config: Config, size: int) -> np.ndarray:
    """The factors that stand where the weights do, with the rank in place of D: (size, wide)."""
    tensor = layout.joined(at, leaves, replace(config, D=size))
    return np.ascontiguousarray(tensor if at.layout.startswith("D ") else tensor.T)


def _words(lora: Lora, chosen: dict[str, tuple[Row, int]], base: str | None) -> dict[str, Any]:
    """The keys of adapter_config.json."""
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    fused = {name: count for name, (_, count) in chosen.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(_transposed(at) for at, _ in chosen.values()),
        "target_modules": sorted(chosen),
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()},
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _write(home: epath.Path, tensors: dict[str, np.ndarray], words: dict[str, Any]) -> None:
    """The config last: without it the folder is no adapter."""
    beside = home / (TENSORS + weights.BESIDE)
    text = home / (CONFIG + weights.BESIDE)
    try:
        home.mkdir(parents=True, exist_ok=True)
        tensor_file.write(beside, tensors, weights.PYTORCH)
        text.write_text(json.dumps(words, indent=2) + "\n")
        (home / CONFIG).unlink(missing_ok=True)
        beside.replace(home / TENSORS)
        text.replace(home / CONFIG)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{home}: the adapter cannot be written ({reason}): make room or give another folder"
        ) from None
    finally:
        for left in (beside, text):
            if left.exists():
                left.unlink()


# Reading


def base_of(home: epath.Path) -> str | None:
    """The base model of a folder that holds an adapter and no model, None for another folder.

    Raises: BadInput where the folder does not name it.
    """
    if (home / hf.CONFIG).exists() or not (home / CONFIG).exists():
        return None
    base = _keys(home).take("base_model_name_or_path", "")
    if not isinstance(base, str) or not base:
        raise BadInput(f"{home / CONFIG}: base_model_name_or_path is missing: name the base model")
    return base


def load_adapter(path: epath.PathLike, config: Config) -> tuple[Lora, Params]:
    """The adapters of a folder or hub name to a model of this architecture, and what they are.

    An adapter to a module of several of our matrices becomes one to each, all with its A, unless
    its blocks are those that `save_adapter` writes. Dropout is not applied.
    Raises: BadInput, by the name of the key or tensor, for what is not implemented or not whole.
    """
    home = hf.folder(path)
    keys = _keys(home)
    rank, alpha = keys.count("r"), keys.number("lora_alpha")
    ranks, alphas = (_pattern(keys, name) for name in ("rank_pattern", "alpha_pattern"))
    scale = alpha / (rank**0.5 if keys.flag("use_rslora", False) else max(rank, 1))
    keys.only(peft_type="LORA", bias="none", loftq_config={}, exclude_modules=[])
    off = ("use_dora", "lora_bias", "use_qalora", "ensure_weight_tying")
    keys.only(**dict.fromkeys(off, False))
    if keys.take("init_lora_weights", True) not in STARTS:
        raise keys.refused("init_lora_weights", "is not implemented: it changes the base")
    for name in (*INERT, "base_model_name_or_path"):
        keys.take(name, None)
    keys.end("adapters")
    found = weights.read(home / TENSORS)
    layers: dict[str, Any] = {}
    for at, parts in _rows(config):
        names = [_stem(name) for name in hf.names(at, config)]
        if not any(f"{name}.lora_A.weight" in found for name in names):
            continue
        module = names[0]
        r = _meant(ranks, module, rank)
        if _meant(alphas, module, alpha) * rank != alpha * r or r not in (rank, rank * len(parts)):
            raise keys.refused("rank_pattern", "is not implemented: one rank and scale for all")
        tensors = [_pair(found, name, at, config, r, home) for name in names]
        layers |= _ours(at, parts, tensors, config, rank)
    if found:
        names = ", ".join(shown(name) for name in sorted(found)[: hf.SHOWN])
        raise BadInput(f"{home / TENSORS}: not implemented, {len(found)} tensors ({names})")
    targets = tuple(each for each, name in WEIGHTS.items() if factors(name).a in layers)
    every = tuple(each.target for each in adapters(Lora(), config))
    lora = Lora(rank, scale * rank, None if targets == every else targets)  # type: ignore[arg-type]
    return lora, {"layers": {name: jnp.asarray(x, jnp.float32) for name, x in layers.items()}}


def _keys(home: epath.Path) -> Keys:
    file = home / CONFIG
    size, _ = tensor_file.stamp(file)
    return Keys(tensor_file.json_object(file, tensor_file.read_bytes(file, 0, size)), str(file))


def _pattern(keys: Keys, name: str) -> dict[str, Any]:
    """Numbers of modules, by the end of their names."""
    values = keys.table(name)
    for module, value in values.items():
        if not re.fullmatch(r"[\w.]+", module) or type(value) not in (int, float) or value <= 0:
            raise keys.refused(name, "is not implemented: give numbers by plain names of modules")
    return values


def _meant(pattern: dict[str, Any], module: str, default: Any) -> Any:
    ends = (value for end, value in pattern.items() if f".{module}".endswith(f".{end}"))
    return next(ends, default)


def _pair(
    found: dict[str, Tensor], name: str, at: Row, config: Config, rank: int, home: epath.Path
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module in one layer, taken out of what was found."""
    out, into = layout.shape(at, config)[:: -1 if _transposed(at) else 1]
    pair = []
    for factor, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
        tensor = found.pop(f"{name}.{factor}.weight", None)
        if tensor is None or tensor.shape != shape:
            what = "missing" if tensor is None else f"{list(tensor.shape)}, wanted {list(shape)}"
            raise BadInput(f"{home / TENSORS}: {name}.{factor}.weight: {what}")
        pair.append(tensor.get())
    return pair[0], pair[1]


def _ours(
    at: Row,
    parts: Sequence[Adapter],
    tensors: Sequence[tuple[np.ndarray, np.ndarray]],
    config: Config,
    rank: int,
) -> dict[str, np.ndarray]:
    """Our factors, stacked over the layers, out of those of a module; all 0 is no target."""
    if parts[0].out == "D":
        [each] = parts
        return {
            each.a: np.stack([_narrow(at, a, config)[0] for a, _ in tensors]),
            each.b: np.stack([b.T for _, b in tensors]),
        }
    a_LRD = np.stack([a for a, _ in tensors])
    narrow = [_narrow(at, b.T, config) for _, b in tensors]
    wide = [np.stack(each) for each in zip(*narrow, strict=True)]
    if a_LRD.shape[1] == rank:
        both = ((each, a_LRD, b) for each, b in zip(parts, wide, strict=True))
    else:
        both = _blocks(parts, a_LRD, wide, rank)
    layers = {}
    for each, a, b in both:
        if np.any(a):
            layers |= {each.a: a.swapaxes(1, 2), each.b: b}
    return layers


def _blocks(parts: Sequence[Adapter], a_LRD: np.ndarray, wide: Sequence[np.ndarray], rank: int):
    """What `_theirs` put together."""
    for i, (each, b) in enumerate(zip(parts, wide, strict=True)):
        own = slice(i * rank, (i + 1) * rank)
        if np.any(np.delete(b, own, axis=1)):
            raise BadInput(f"rank_pattern: {each.target} reads what is another's: not implemented")
        yield each, a_LRD[:, own], b[:, own]


def _narrow(at: Row, tensor: np.ndarray, config: Config) -> list[np.ndarray]:
    """The leaves that `_wide` joined."""
    whole = tensor if at.layout.startswith("D ") else tensor.T
    sized = replace(config, D=tensor.shape[0])
    return [np.array(layout.cut(at, leaf, sized)(whole)) for leaf in at.leaves]


# Modules


def _rows(config: Config) -> list[tuple[Row, list[Adapter]]]:
    """The tensors of a layer that can have an adapter, with those of the matrices in them."""
    return [
        (at, [factors(leaf) for leaf in at.leaves])
        for at in families.rows(config)
        if set(at.leaves) <= set(WEIGHTS.values())
    ]


def _transposed(at: Row) -> bool:
    """Whether the tensor of a module is (in, out)."""
    return at.layout.split()[0] == factors(at.leaves[0]).into


def _stem(name: str) -> str:
    return PREFIX + name.removesuffix(".weight")


def _short(at: Row, config: Config) -> str:
    """The end of a module's name that no other module has."""
    modules = {row.name.rpartition(".")[0] for row in families.rows(config)}
    words = at.name.removesuffix(".weight").split(".")
    ends = (".".join(words[-n:]) for n in range(1, len(words) + 1))
    return next(end for end in ends if sum(f".{name}".endswith(f".{end}") for name in modules) == 1)
