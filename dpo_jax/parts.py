"""What the parts of an experiment stand for: mesh, model, tokenizer, the weights it starts from."""

import copy
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from etils import epath

from dpo_jax import parallel, rundir
from dpo_jax.data import conversations
from dpo_jax.experiment import Experiment
from dpo_jax.models import hf
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import BadInput, Model, Params
from dpo_jax.values import show


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
    return hf.read_config(hf.folder(experiment.parent))


def model(experiment: Experiment) -> Model:
    """The decoder in the run's dtype; equal values give the same object and its compilations."""
    return _decoder(config(experiment), experiment.run.dtype, experiment.run.remat)


@lru_cache(maxsize=16)
def _decoder(architecture: Config, dtype: str, remat: str) -> Model:
    return decoder(architecture, dtype=dtype, remat=remat)


def trained_shapes(experiment: Experiment) -> Params:
    """Shapes of what a run trains: the decoder's weights and the heads that its algorithm adds."""
    decoder_model = model(experiment)
    algorithm = experiment.algorithm(decoder_model)

    def trained(key: jax.Array) -> Params:
        params = decoder_model.init(key)
        return algorithm.init(key, params, {name: params for name in algorithm.frozen})[0]

    return jax.eval_shape(trained, jax.random.key(0))


def tokenizer(experiment: Experiment) -> Any:
    """The tokenizer of data.tokenizer, with the chat template of data.template where that says one:
    what a function makes, or read from a folder or name."""
    wanted, written = experiment.data.tokenizer, experiment.data.template
    made = wanted() if callable(wanted) else _pretrained(wanted, "data.tokenizer=")
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
    """A model of Hugging Face, a folder or hub name, with its own tokenizer, on the first device.

    Raises: BadInput where there is none, or a run directory, which does not hold its tokenizer.
    """
    if rundir.is_run(epath.Path(name)):
        raise BadInput(f"{name} is a run: name its experiment, or `dpo-jax export` it to a folder")
    home = hf.folder(name)
    decoder_model, params, _ = hf.load(home)
    return Policy(decoder_model, params, _pretrained(str(home)))


def stored(experiment: Experiment, parent: str) -> Params:
    """The weights of a parent that is a path: those of a run, heads too, or of a model folder."""
    home, places = epath.Path(parent), mesh(experiment)
    if not rundir.is_run(home):
        rundir.say(f"{experiment.name}: starts from the weights of {parent}")
        return hf.load(parent, sharding=places, dtype=experiment.run.dtype)[1]
    shapes = jax.eval_shape(model(experiment).init, jax.random.key(0))
    return rundir.load_weights(home, {**shapes, **rundir.heads(home, shapes)}, places)


def inherited(experiment: Experiment, params: Params) -> Params:
    """A parent's weights as this run stores them, without the heads that it does not train."""
    wanted = trained_shapes(experiment)
    others = sorted(params.keys() - wanted.keys())
    if others:
        rundir.say(
            f"{experiment.name}: starts without {', '.join(others)} of its parent, which "
            f"{show(experiment.algorithm)} does not train"
        )
    kept = {name: params[name] for name in wanted if name in params}
    shapes = {name: wanted[name] for name in kept}
    # the dtype of a parent may be another
    return jax.tree.map(lambda x, like: x.astype(like.dtype), kept, shapes)
