"""What the parts of an experiment stand for: mesh, model, tokenizer, the weights it starts from."""

import copy
import re
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from etils import epath

from dpo_jax import functions, parallel, rundir
from dpo_jax.data import conversations
from dpo_jax.experiment import Experiment
from dpo_jax.models import hf, hf_adapter
from dpo_jax.models.lora import Lora, alike, merged
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import Algorithm, BadInput, Memory, Model, Params, join, parted
from dpo_jax.values import show

FUNCTION = re.compile(r"[\w.]+:[\w.]+(@[0-9a-f]{8})?")  # as descriptions name one


def mesh(experiment: Experiment) -> jax.sharding.Mesh:
    """The mesh of run.mesh over all devices."""
    return parallel.make_mesh(**asdict(experiment.run.mesh))


def config(experiment: Experiment) -> Config:
    """The architecture: the experiment's own, or that of its parents."""
    if experiment.model is not None:
        return experiment.model
    if isinstance(experiment.parent, Experiment):
        return config(experiment.parent)
    assert experiment.parent is not None, "an Experiment has a model or a parent"
    home = epath.Path(experiment.parent)
    if rundir.is_run(home):
        return Config(**rundir.read(home)["model"])
    named = hf.folder(experiment.parent)
    return hf.read_config(hf.folder(hf_adapter.base_of(named) or named))


def model(experiment: Experiment) -> Model:
    """The decoder in the run's dtype; equal values give the same object and its compilations."""
    options = experiment.run
    return _decoder(config(experiment), options.dtype, options.remat, experiment.lora)


@lru_cache(maxsize=16)
def _decoder(architecture: Config, dtype: str, remat: str, lora: Lora | None) -> Model:
    return decoder(architecture, dtype=dtype, remat=remat, lora=lora)


def begun(
    algorithm: Algorithm, whole: Params, key: jax.Array
) -> tuple[Params, Memory, dict[str, Params]]:
    """(trained, memory, frozen) before the first step from the weights of a Model."""
    trained, frozen = parted(whole)
    frozen |= {name: trained for name in algorithm.frozen}
    return *algorithm.init(key, trained, frozen), frozen


def shapes(experiment: Experiment) -> Params:
    """Shapes of the weights of a run: what its Model takes, and the heads of its algorithm."""
    decoder_model = model(experiment)
    algorithm = experiment.algorithm(decoder_model)

    def whole(params: Params, key: jax.Array) -> Params:
        trained, _, frozen = begun(algorithm, params, key)
        return join(trained, frozen)

    return jax.eval_shape(whole, of_decoder(decoder_model), jax.random.key(0))


@lru_cache(maxsize=16)
def of_decoder(model: Model) -> Params:
    """Shapes of what a Model takes, traced once."""
    return jax.eval_shape(model.init, jax.random.key(0))


def tokenizer(experiment: Experiment) -> Any:
    """The tokenizer of data.tokenizer, with the chat template of data.template where that says one:
    what a function makes, or read from a folder or name."""
    return _tokenizer(experiment.data.tokenizer, experiment.data.template)


def _tokenizer(wanted: Any, written: Any) -> Any:
    made: Any = wanted() if callable(wanted) else _pretrained(wanted, "data.tokenizer=")
    if written is not None:
        made = copy.deepcopy(made)  # a function may give the same one again
        made.chat_template = conversations.chat_template(written)
    return made


def _pretrained(name: str, option: str = "") -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{option}{name}: no tokenizer there ({reason})") from None


class Policy(NamedTuple):
    """What can be sampled from."""

    model: Model
    params: Params
    tokenizer: Any


def from_folder(name: str) -> Policy:
    """A model of Hugging Face or an adapter to one, a folder or hub name, with the tokenizer that
    is there, on the first device.

    Raises: BadInput where there is none, or a run directory, which does not hold its tokenizer.
    """
    if rundir.is_run(epath.Path(name)):
        raise BadInput(f"{name} is a run: name its experiment, or `dpo-jax export` it to a folder")
    given, architecture = _foreign(name, None, "float32")
    made = decoder(architecture, lora=given.lora)
    return Policy(made, given.params, _pretrained(str(hf.folder(name))))


def from_run(home: epath.Path, places: jax.sharding.Mesh) -> Policy:
    """The model of a finished run in `home`, its heads among the weights, with its tokenizer.

    Raises: BadInput where there is none, or its tokenizer is a function that is not there.
    """
    record = rundir.read(home)
    data, dtype = record["experiment"]["data"], record["experiment"]["run"]["dtype"]
    given = _read(str(home), places, dtype)
    made = decoder(Config(**record["model"]), dtype=dtype, lora=given.lora)
    spoken = (_described(data.get(name)) for name in ("tokenizer", "template"))
    return Policy(made, given.params, _tokenizer(*spoken))


def _described(option: Any) -> Any:
    """The text or the function that a description is of."""
    keywords = dict(option) if isinstance(option, dict) else {}
    name = keywords.pop("function", option)
    if not isinstance(name, str) or not FUNCTION.fullmatch(name):
        return name
    return partial(functions.named(name.partition("@")[0]), **keywords)


# The weights of a parent


class Weights(NamedTuple):
    """Weights as a Model takes them, heads beside them, and what the adapters in them are."""

    params: Params
    lora: Lora | None = None


def stored(experiment: Experiment, parent: str) -> Weights:
    """The weights of a parent that is a path: those of a run, heads too, or of a model folder."""
    if not rundir.is_run(epath.Path(parent)):
        rundir.say(f"{experiment.name}: starts from the weights of {parent}")
    return _read(parent, mesh(experiment), experiment.run.dtype)


def _read(name: str, places: jax.sharding.Mesh, dtype: str) -> Weights:
    home = epath.Path(name)
    if not rundir.is_run(home):
        return _foreign(name, places, dtype)[0]
    record = rundir.read(home)
    lora = Lora(**record["lora"]) if "lora" in record else None
    architecture = Config(**record["model"])
    made = decoder(architecture, dtype=rundir.precision(home), lora=lora)
    whole, below = jax.eval_shape(made.init, jax.random.key(0)), record.get("base")
    wanted = whole if below is None else parted(whole)[0]
    own = rundir.load_weights(home, {**wanted, **rundir.heads(home, wanted)}, places)
    if lora is None or below is None:
        return Weights(own, lora)
    base = _continued(_read(below, places, dtype), lora, architecture)["base"]
    return Weights(join(own, {"base": base}), lora)


def _foreign(name: str, places: jax.sharding.Mesh | None, dtype: str) -> tuple[Weights, Config]:
    """Of Hugging Face: those of a model, or of an adapter and the model that it names."""
    home = hf.folder(name)
    below = hf_adapter.base_of(home)
    _, params, architecture = hf.load(below or name, sharding=places, dtype=dtype)
    if below is None:
        return Weights(params), architecture
    lora, own = hf_adapter.load_adapter(home, architecture)
    return Weights({"base": params, "lora": own}, lora), architecture


def finished(experiment: Experiment, home: epath.Path, places: jax.sharding.Mesh) -> Params:
    """The weights of a finished run in `home`, as its Model takes them, on the mesh.

    Raises: BadInput where they are adapters and the run of the parent is not there.
    """
    wanted, below = shapes(experiment), rundir.base(experiment)
    if experiment.lora is None or below is None:
        return rundir.load_weights(home, wanted, places)
    trained = rundir.load_weights(home, parted(wanted)[0], places)
    if isinstance(experiment.parent, Experiment) and not rundir.is_run(epath.Path(below)):
        raise BadInput(f"{home} holds adapters to the weights of {below}, which is not there")
    given = _read(below, places, experiment.run.dtype)
    base = _continued(given, experiment.lora, config(experiment))["base"]
    return join(trained, {"base": _like(base, wanted["base"])})


def inherited(experiment: Experiment, given: Weights) -> Params:
    """A parent's weights as this run takes them up, without the heads that it does not train.

    Of a run with lora they are {"base"}, and {"lora"} where the parent's adapters go on.
    """
    wanted = shapes(experiment)
    params = _continued(given, experiment.lora, config(experiment))
    others = sorted(params.keys() - wanted.keys())
    if others:
        rundir.say(
            f"{experiment.name}: starts without {', '.join(others)} of its parent, which "
            f"{show(experiment.algorithm)} does not train"
        )
    kept = {name: params[name] for name in wanted if name in params}
    return _like(kept, {name: wanted[name] for name in kept})


def _continued(given: Weights, lora: Lora | None, architecture: Config) -> Params:
    """Weights for a run with this lora: the same adapters go on, others are merged."""
    same = given.lora is not None and lora is not None and alike(given.lora, lora, architecture)
    if same or given.lora == lora:
        return given.params
    plain = given.params if given.lora is None else merged(given.params, given.lora)
    if lora is None:
        return plain
    names = jax.eval_shape(decoder(architecture).init, jax.random.key(0))
    heads = {name: leaf for name, leaf in plain.items() if name not in names}
    return {"base": {name: plain[name] for name in names}, **heads}


def _like(params: Params, shapes: Params) -> Params:
    """In the dtypes of a run: those of a parent may be others."""
    return jax.tree.map(lambda x, like: x.astype(like.dtype), params, shapes)
