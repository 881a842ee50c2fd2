"""Hugging Face folders and our models, both ways: config.json and safetensors.

    model, params, config = hf.load("Qwen/Qwen3-0.6B", sharding=mesh)
    hf.save("folder", config, params)             # transformers' from_pretrained reads it

Parameters are read by the slice, straight into their shards, and never unpickled.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from etils import epath

from dpo_jax import parallel
from dpo_jax.models import families, layout, tensor_file, weights
from dpo_jax.models.layout import Row
from dpo_jax.models.tensor_file import shown
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import BadInput, Model, Params

CONFIG = "config.json"
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a hub repository
SHOWN = 4  # names in an error
ROWS = 4096  # of an embedding that are compared at a time


def load(
    path: epath.PathLike,
    *,
    sharding: Any = None,
    dtype: str = "float32",
    remat: str = "none",
) -> tuple[Model, Params, Config]:
    """The model of a folder (gs:// too) or a hub name, its parameters and its architecture.

    sharding: a mesh, on which the names of the parameters decide; one sharding for all of them; a
        tree of shardings; None = the first device.
    dtype, remat: of the computation, as in `decoder`; parameters are float32 (or float64).
    Raises: BadInput for what is not implemented or not whole, by the names of keys and tensors.
    """
    home = folder(path)
    config = read_config(home)
    model = decoder(config, dtype=dtype, remat=remat)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found = match(weights.read(home), config, home)
    return model, _placed(found, config, shapes, _places(sharding, shapes)), config


def _placed(found: Mapping[str, Any], config: Config, shapes: Params, places: Params) -> Params:
    """The parameters, each cut out of its tensors."""
    params: dict[str, Any] = {"layers": {}}
    for at in families.rows(config):
        tensors = [found[name] for name in names(at, config)]
        source = tensors if at.layered else tensors[0]
        into, place, shape = (
            tree["layers"] if at.layered else tree for tree in (params, places, shapes)
        )
        for leaf in at.leaves:
            view, kind = layout.cut(at, leaf, config), shape[leaf].dtype
            into[leaf] = weights.place(source, place[leaf], view, dtype=kind)
    return params


def save(
    path: epath.PathLike,
    config: Config,
    params: Params,
    *,
    extra: Mapping[str, Any] | None = None,
    score: Any = None,
    dtype: Any = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a folder that `load` and transformers' from_pretrained read.

    extra: keys of config.json beside the architecture, such as eos_token_id. score: weights (D,) of
    a scalar head, for AutoModelForSequenceClassification; it stands in place of the one over the
    vocabulary, and only transformers reads such a folder. dtype: of the tensors; by default that of
    the parameters. The first process writes. Other files of the folder stay.
    Raises: BadInput for an architecture that config.family has no words for.
    """
    values = families.write(config) | dict(extra or {})
    families.read(values, CONFIG)
    tensors = {}
    if score is not None:
        values |= families.classifier(config)
        tensors["score.weight"] = on_host(score, dtype)[None, :]
    for at in families.rows(config):
        if score is not None and "unembed_DV" in at.leaves:
            continue
        tree = params["layers"] if at.layered else params
        arrays = [on_host(tree[leaf], dtype) for leaf in at.leaves]
        for layer, name in enumerate(names(at, config)):
            parts = [array[layer] for array in arrays] if at.layered else arrays
            tensors[name] = layout.joined(at, parts, config)
    values["dtype"] = str(next(iter(tensors.values())).dtype)
    if jax.process_index():
        return
    home = epath.Path(path).expanduser()
    (home / CONFIG).unlink(missing_ok=True)  # until the end, that it describes no other weights
    weights.write(home, tensors, shard_bytes=shard_bytes)
    beside = home / (CONFIG + ".tmp")
    beside.write_text(json.dumps(values, indent=2) + "\n")
    beside.replace(home / CONFIG)


def folder(path: epath.PathLike) -> epath.Path:
    """A folder, or that of a hub name (owner/name, with @revision), downloaded where missing."""
    home = epath.Path(path).expanduser()
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(path))
    return home if home.is_dir() or not named else _downloaded(path, named[1], named[2])


@lru_cache(maxsize=16)
def _downloaded(path: epath.PathLike, name: str, revision: str | None) -> epath.Path:
    from huggingface_hub import snapshot_download

    try:
        return epath.Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"{path}: no such folder, and not to be had from the hub ({reason}): give a folder, or "
            "go online (and set HF_TOKEN where the model is gated)"
        ) from None


def read_config(home: epath.Path) -> Config:
    """The architecture of a folder."""
    file = home / CONFIG
    size, _ = tensor_file.stamp(file)
    values = tensor_file.json_object(file, tensor_file.read_bytes(file, 0, size))
    return families.read(values, str(file))


def names(at: Row, config: Config) -> list[str]:
    """The tensors of a row, one a layer."""
    return [at.name.format(layer) for layer in range(config.L)] if at.layered else [at.name]


def match(found: Mapping[str, Any], config: Config, where: Any) -> dict[str, Any]:
    """The tensors that the rows of a Config want, out of those of a file.

    Raises: BadInput that names what is missing, unexpected or of another shape.
    """
    own = _renamed(found, config)
    wanted = {
        name: layout.shape(at, config) for at in families.rows(config) for name in names(at, config)
    }
    embedding, head = (families.holder(config, leaf) for leaf in ("embed_VD", "unembed_DV"))
    if config.tied and head in own:
        _untie(own, embedding, head, where)
    said = families.NAMES[config.family]
    faults = {
        "missing": sorted(wanted.keys() - own.keys()),
        "unexpected": [
            shown(tensor.name)
            for name, tensor in own.items()
            if name not in wanted and not re.fullmatch(said.ignored, name.removeprefix(said.prefix))
        ],
        "misshaped": [
            f"{own[name].name} {list(own[name].shape)}, by config.json {list(shape)}"
            for name, shape in wanted.items()
            if name in own and own[name].shape != shape
        ],
    }
    lines = [f"{len(each)} {what} ({_few(each)})" for what, each in faults.items() if each]
    if lines:
        raise BadInput(f"{where}: the tensors are not those of its {CONFIG}: {'; '.join(lines)}")
    return {name: own[name] for name in wanted}


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")


def _renamed(found: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The tensors of a file under the names of the rows."""
    said = families.NAMES[config.family]
    apart = {at.name for at in said.rows if not at.name.startswith(said.prefix)}
    bare = not any(name.startswith(said.prefix) for name in found)
    own = {}
    for name, tensor in found.items():
        name = said.others.get(name, name)
        own[said.prefix + name if bare and name not in apart else name] = tensor
    return own


def _untie(own: dict[str, Any], embedding: str, head: str, where: Any) -> None:
    """Take out the head that a file of a tied model holds too; it must be the embedding."""
    other = own.pop(head)
    one = own.setdefault(embedding, other)
    rows = range(0, one.shape[0], ROWS) if one.shape == other.shape else (None,)
    for start in rows:
        part = slice(0, 0) if start is None else slice(start, start + ROWS)
        if start is None or not np.array_equal(one.get((part,)), other.get((part,))):
            raise BadInput(
                f"{where}: {CONFIG} says tie_word_embeddings, and {other.name} is not {one.name}: "
                "say false if the head is one of its own, or remove it"
            )


def _places(sharding: Any, shapes: Params) -> Params:
    """A sharding for every parameter."""
    if isinstance(sharding, jax.sharding.Mesh):
        return parallel.shardings(sharding, shapes)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda _: sharding, shapes)
    return sharding


def on_host(array: Any, dtype: Any) -> np.ndarray:
    """The whole of an array, which several processes may hold."""
    return np.asarray(parallel.on_host(array)).astype(dtype or array.dtype, copy=False)
