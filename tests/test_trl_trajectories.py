"""Training runs recorded from TRL 1.16, replayed: same batches, steps, metrics and final weights.

TRL ran tiny float32 models with torch on a CPU. A batch of four groups stands here in two packed
rows with shared prompts, where TRL laid out eight padded ones.
"""

import gzip
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import GradientTransformation

from dpo_jax import losses, optim
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.scores import length_desensitized
from dpo_jax.algorithms.sft import sft
from dpo_jax.data.packing import pack
from dpo_jax.experiment import Optim
from dpo_jax.logprobs import per_response
from dpo_jax.models import families, hf
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import Algorithm, Batch, Group, Model, Params, TrainState
from dpo_jax.train import make_update

BETA = 0.1
# One shape for all steps of all runs; two of its six slots stay empty.
SHAPE = {"row_tokens": 448, "rows": 2, "scored": 352, "slots": 3}
DPO = partial(losses.dpo, beta=BETA)
NLL = partial(losses.nll, per="token")
TABLE = {
    "sigmoid": DPO,
    "hinge": partial(losses.hinge, beta=BETA),
    "ipo": partial(losses.ipo, beta=BETA, length_norm=True),
    "exo_pair": partial(losses.exo, beta=BETA, label_smoothing=1e-3),
    "nca_pair": partial(losses.nca, beta=BETA),
    "robust": partial(losses.robust_dpo, beta=BETA, label_smoothing=0.1),
    "bco_pair": partial(losses.bco_pair, beta=BETA),
    "sppo_hard": partial(losses.sppo_hard, beta=BETA),
    "aot": partial(losses.aot, beta=BETA),
    "aot_unpaired": partial(losses.aot_unpaired, beta=BETA),
    "apo_zero": partial(losses.apo_zero, beta=BETA),
    "apo_down": partial(losses.apo_down, beta=BETA),
    "discopop": partial(losses.discopop, beta=BETA, tau=0.05),
    "sft": NLL,
    "sigmoid_norm": partial(DPO, length_norm=True),
    "sigmoid+forward_kl": partial(DPO, divergence=losses.forward_kl),
    "sigmoid+js": partial(DPO, divergence=losses.jensen_shannon),
    "sigmoid+alpha0.5": partial(DPO, divergence=losses.alpha_divergence(alpha=0.5)),
    "sigmoid+wpo": losses.weighted(DPO, losses.wpo_weight),
    "sigmoid+ld0.5": DPO,
    "mpo": losses.mix((0.8, DPO), (0.2, partial(losses.bco_pair, beta=BETA)), (1.0, NLL)),
}
SCORES = {"sigmoid+ld0.5": partial(length_desensitized, alpha=0.5)}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected")
# (rtol, atol), about twice what is found. It is what float32 leaves of sums around 300 after some
# steps of Adam: two packings of the same batches differ by a third of it. In SFT it is Adam's
# 1 - b2**t, float32 in optax and float64 in torch.
CLOSE = {
    "loss": (2e-5, 0.0),
    "grad_norm": (5e-5, 0.0),
    "learning_rate": (1e-6, 0.0),
    "kl": (0.0, 5e-4),
    "rewards/accuracies": (0.0, 0.0),
    **dict.fromkeys(REWARDS, (0.0, 5e-5)),
    **dict.fromkeys(LOGPS, (2e-6, 0.0)),
}


@dataclass(frozen=True, eq=False)
class Recorded:
    """What TRL left behind."""

    folder: Path
    values: dict[str, Any]

    def steps(self, run: str) -> list[dict[str, float]]:
        return self.values[run]["steps"]

    def batches(self, run: str) -> list[dict[str, Any]]:
        return json.loads(gzip.decompress((self.folder / f"{run}_batches.json.gz").read_bytes()))

    def weights(self, name: str, family: str) -> Params:
        """The tensors of a file, in a folder with the config.json that describes them."""
        with tempfile.TemporaryDirectory() as folder:
            keys = {"model_type": family} | self.values[family]["config"]
            (Path(folder) / "config.json").write_text(json.dumps(keys))
            shutil.copy(self.folder / f"{name}.safetensors", Path(folder) / "model.safetensors")
            return hf.load(folder)[1]

    def model(self, family: str) -> Model:
        return compiled(families.read({"model_type": family} | self.values[family]["config"]))


@cache
def compiled(config: Config) -> Model:
    """The decoder compiled apart from what stands on it, so once for all losses."""
    model = decoder(config)
    return model._replace(hidden=jax.jit(model.hidden), unembed=jax.jit(model.unembed))


@pytest.fixture(scope="module")
def recorded(shared) -> Recorded:
    folder = shared / "golden" / "trl_traj"
    return Recorded(folder, json.loads((folder / "trajectory.json").read_text()))


# Batches: padded rows with masks -> groups


def completions(batch: dict[str, Any], prefix: str = "") -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) of every row, cut where its completion mask begins."""
    names = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "completion_mask"))
    rows = []
    for ids, attention, completion in zip(*(batch[name] for name in names), strict=True):
        n, scored = sum(attention), sum(completion)
        assert attention[:n] == [1] * n and completion[n - scored : n] == [1] * scored
        rows.append((np.array(ids[: n - scored]), np.array(ids[n - scored : n])))
    return rows


def pairs(batch: dict[str, Any]) -> Batch:
    """The chosen rows stand above the rejected ones."""
    rows = completions(batch)
    chosen, rejected = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return pack(
        [_beside(first, last) for first, last in zip(chosen, rejected, strict=True)], **SHAPE
    )


def judged(batch: dict[str, Any]) -> Batch:
    """KTO: a completion with its label, beside it the one of another record to the same prompt."""
    rows = zip(completions(batch), completions(batch, "KL_"), batch["label"], strict=True)
    groups = [replace(_beside(own, other), label=float(label)) for own, other, label in rows]
    return pack(groups, **SHAPE)


def texts(batch: dict[str, Any]) -> Batch:
    """Supervised fine-tuning, where a label of -100 is not scored."""
    mask = [[int(label != -100) for label in labels] for labels in batch["labels"]]
    rows = completions(batch | {"completion_mask": mask})
    return pack([(prompt, [completion]) for prompt, completion in rows], **SHAPE)


def _beside(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> Group:
    np.testing.assert_array_equal(first[0], second[0], err_msg="prompts of one group")
    return Group(first[0], [first[1], second[1]])


# Runs


def start(algorithm: Algorithm, tx: GradientTransformation, params: Params) -> TrainState:
    params, memory = algorithm.init(jax.random.key(0), params, {})
    return TrainState(jnp.int32(0), params, tx.init(params), memory, jnp.int32(0))


def replay(algorithm: Algorithm, batches: list[Batch], params: Params) -> tuple[list, Params]:
    """Metrics of every step, and the final weights, under TRL's AdamW."""
    settings = Optim(learning_rate=1e-3, schedule=optim.linear, clip=1.0)
    tx, rate = optim.transformation(settings, len(batches)), optim.rate(settings, len(batches))
    update, state = jax.jit(make_update(algorithm, tx)), start(algorithm, tx, params)
    steps = []
    for step, batch in enumerate(batches):
        state, values = update(state, {"reference": params}, batch, jax.random.key(step))
        steps.append(jax.device_get(values) | {"learning_rate": rate(step)})
    return steps, jax.device_get(state.params)


def same(values: dict[str, Any], expected: dict[str, float], names: tuple[str, ...], where: Any):
    for name in names:
        rtol, atol = CLOSE[name]
        np.testing.assert_allclose(
            values[name], expected[name], rtol=rtol, atol=atol, err_msg=f"{name} at {where}"
        )


def same_steps(steps: list, expected: list[dict[str, float]], names: tuple[str, ...]) -> None:
    for step, (values, record) in enumerate(zip(steps, expected, strict=True)):
        same(values, record, names, f"step {step}")


def same_weights(params: Params, expected: Params) -> None:
    """All but a few of 66,000 weights to 1e-6, where training moved them by up to 1e-2.

    A gradient that is zero but for rounding becomes a step of random size in Adam: two packings of
    the same batches leave such a weight 2e-5 apart.
    """
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    gaps = [np.ravel(x - y) for x, y in zip(*map(jax.tree.leaves, (params, expected)), strict=True)]
    gap = np.abs(np.concatenate(gaps))
    assert np.sum(gap > 1e-6) <= 10 and np.max(gap) < 1e-4, np.sort(gap)[-8:]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_dpo_trains_as_recorded(recorded, name):
    model = recorded.model(name)
    batches = [pairs(batch) for batch in recorded.batches(name)]
    algorithm = preference(model, loss=DPO)
    steps, params = replay(algorithm, batches, recorded.weights(f"{name}_init", name))
    names = ("loss", "grad_norm", "learning_rate", "rewards/accuracies", *REWARDS, *LOGPS)
    same_steps(steps, recorded.steps(name), names)
    same_weights(params, recorded.weights(f"{name}_final", name))


def test_sft_trains_as_recorded(recorded):
    model = recorded.model("llama")
    batches = [texts(batch) for batch in recorded.batches("sft_llama")]
    steps, params = replay(sft(model), batches, recorded.weights("llama_init", "llama"))
    same_steps(steps, recorded.steps("sft_llama"), ("loss", "grad_norm", "learning_rate"))
    same_weights(params, recorded.weights("sft_llama_final", "llama"))


def test_kto_trains_as_recorded(recorded):
    model = recorded.model("llama")
    batches = [judged(batch) for batch in recorded.batches("kto_llama")]
    algorithm = preference(model, loss=partial(losses.kto, beta=BETA))
    steps, params = replay(algorithm, batches, recorded.weights("llama_init", "llama"))
    names = ("loss", "grad_norm", "learning_rate", "kl", *REWARDS, *LOGPS)
    same_steps(steps, recorded.steps("kto_llama"), names)
    same_weights(params, recorded.weights("kto_llama_final", "llama"))


# Losses at fixed weights


@pytest.mark.parametrize("name", TABLE)
def test_recorded_losses(recorded, name):
    table = recorded.values["llama"]["loss_table"]
    row = next(row for row in table["rows"] if row["name"] == name)
    model = recorded.model("llama")
    policy, reference = (recorded.weights(table[role], "llama") for role in ("policy", "reference"))
    batch = pairs(recorded.batches("llama")[table["batch_index"]])
    algorithm = preference(model, loss=TABLE[name], score=SCORES.get(name, per_response))
    tx = optim.sgd(0.0)
    update, state = make_update(algorithm, tx), start(algorithm, tx, policy)
    _, values = update(state, {"reference": reference}, batch, jax.random.key(0))
    for measured in ("loss", "grad_norm"):
        np.testing.assert_allclose(values[measured], row[measured], rtol=1e-4, err_msg=measured)
    # A loss without a reference reports log-probs as its rewards, TRL the log-ratios all the same.
    rewards = ("rewards/accuracies", *REWARDS) if name != "sft" else ()
    same(values, row["metrics"], (*LOGPS, *rewards), name)


def test_every_recorded_loss_is_here(recorded):
    rows = recorded.values["llama"]["loss_table"]["rows"]
    assert sorted(row["name"] for row in rows) == sorted(TABLE)
