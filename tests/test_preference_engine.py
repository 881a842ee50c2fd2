"""Preference training through the engine, every loss against the slow obvious way."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import (
    MODEL,
    POLICY,
    REFERENCE,
    Engine,
    Said,
    evaluated,
    gradient,
    groups,
    lists,
    log_prob,
    log_ratio,
    lone,
    mean,
    packed,
    said,
    started,
)
from tiny import relative_error

from dpo_jax import losses, parallel
from dpo_jax.algorithms import scores
from dpo_jax.algorithms.preference import preference
from dpo_jax.data import views
from dpo_jax.data.packing import pack
from dpo_jax.losses.door import present
from dpo_jax.losses.needs import name_of
from dpo_jax.structs import BadInput, Group, Scored, TrainState

KEY = jax.random.key(0)
BETA = 0.3
DPO = partial(losses.dpo, beta=BETA)
KTO = partial(losses.kto, beta=BETA, desirable=1.3, undesirable=0.7)
TDPO = partial(losses.tdpo, beta=BETA, alpha=0.5)
BETA_DPO = partial(losses.beta_dpo, beta=BETA)
NLL = partial(losses.nll, per="token")
ls, sigmoid, still = jax.nn.log_sigmoid, jax.nn.sigmoid, jax.lax.stop_gradient


@losses.needs(fields=("kl_BK",))
def kl_of_both(scored: Scored) -> jax.Array:
    kl_BK = present(scored, "kl_BK", "kl_of_both")
    return kl_BK[:, 0] + 2 * kl_BK[:, 1]


@losses.needs(reference=False, responses=None, fields=("aligned_BK",))
def likely(scored: Scored) -> jax.Array:
    """A weight of any number of responses."""
    return jnp.exp(present(scored, "aligned_BK", "likely")[:, 0])


# What is computed is what is needed


@pytest.mark.parametrize(
    ("loss", "collected", "objective"),
    [
        (partial(losses.cpo, beta=BETA), "", "p"),
        (partial(losses.nll, per="token"), "", "p"),
        (partial(losses.dpo, beta=BETA, reference_free=True), "", "p"),
        (DPO, "r", "p"),
        (losses.weighted(DPO, losses.wpo_weight), "r", "p"),
        (losses.mix((1.0, partial(losses.simpo, beta=2.0, gamma=1.0)), (1.0, DPO)), "r", "p"),
        (TDPO, "", "pr"),
        (BETA_DPO, "rp", "p"),
        (KTO, "rp", "p"),
        (partial(losses.bco, beta=BETA), "rp", "p"),
        (partial(losses.npo, beta=BETA), "r", "p"),
        (losses.mix((1.0, TDPO), (1.0, BETA_DPO)), "rp", "pr"),
    ],
    ids=lambda case: name_of(case) if callable(case) else case,
)
def test_what_is_computed_is_what_is_needed(loss, collected, objective):
    """p is a forward pass of the policy, r one of the reference."""
    calls: list[str] = []

    def steps(state, frozen, batch):
        def hidden(params, *arrays):
            calls.append("p" if params["embed_VD"] is state.params["embed_VD"] else "r")
            return MODEL.hidden(params, *arrays)

        algorithm = preference(MODEL._replace(hidden=hidden), loss=loss)
        frozen = {name: frozen[name] for name in algorithm.frozen}
        batch, memory = algorithm.collect(state, frozen, batch, None)
        calls.append("|")
        return algorithm.objective(state.params, frozen, memory, algorithm.measure(batch), None)

    wanted, algorithm = losses.needs(loss), preference(MODEL, loss=loss)
    items = lone(4) if "label_B" in wanted.fields else groups(4, responses=wanted.responses or 2)
    batch = packed(algorithm.prepare(items))
    jax.eval_shape(steps, started(algorithm), {"reference": REFERENCE}, batch)
    assert calls == [*collected, "|", *objective]
    assert algorithm.frozen == (("reference",) if "r" in calls else ())


# Value, gradient and metrics, whole and in microbatches


class Case(NamedTuple):
    """A loss, its groups, and its mean over them by the slow way."""

    loss: Callable[..., Any]
    expected: Callable[[Said], jax.Array]
    items: Sequence[Group] = tuple(groups(11))
    microbatches: tuple[int, ...] = ()
    plugs: dict[str, Any] = {}  # noqa: RUF012
    packed: Callable[..., Any] = packed


def dpo(x: Said) -> jax.Array:
    return -x.mean(ls(BETA * x.D_B))


def kto(x: Said, weight_B: float | jax.Array = 1.0) -> jax.Array:
    kl = still(jax.nn.relu(x.mean(x.ratio_BK[:, 1])))
    z_B = BETA * (x.ratio_BK[:, 0] - kl)
    return x.mean(weight_B * jnp.where(x.label_B, 1.3 * sigmoid(-z_B), 0.7 * sigmoid(z_B)))


def bco_pair(x: Said) -> jax.Array:
    return -x.mean(ls(BETA * x.ratio_BK[:, 0]) + ls(-BETA * x.ratio_BK[:, 1]))


def tdpo(x: Said) -> jax.Array:
    kl_BK = x.total(x.kl_BKT)
    gap_B = kl_BK[:, 1] - still(kl_BK[:, 0])
    return -x.mean(ls(BETA * (x.D_B - 0.5 * gap_B)))


def wpo(x: Said) -> jax.Array:
    aligned_BK = still(x.total(x.aligned_BKT)) / x.length_BK
    return -x.mean(jnp.exp(aligned_BK[:, 0] + aligned_BK[:, 1]) * ls(BETA * x.D_B))


def normalized(x: Said) -> jax.Array:
    mean_BK = x.ratio_BK / x.length_BK
    return -x.mean(ls(BETA * (mean_BK[:, 0] - mean_BK[:, 1])))


def by_sequence(x: Said) -> jax.Array:
    return -x.mean(x.logp_BK[:, 0] / x.length_BK[:, 0])


def ranking(x: Said) -> jax.Array:
    """Plackett-Luce, place after place of list after list."""
    values = []
    for z_K, length_K in zip(BETA * x.ratio_BK, x.length_BK, strict=True):
        K = int((length_K > 0).sum())
        values.append(sum((jnp.log(jnp.sum(jnp.exp(z_K[k:K]))) - z_K[k] for k in range(K)), 0.0))
    return x.mean(jnp.stack(values))


def every_pair(x: Said) -> jax.Array:
    values = []
    for z_K, length_K in zip(BETA * x.ratio_BK, x.length_BK, strict=True):
        K = int((length_K > 0).sum())
        found = [-ls(z_K[i] - z_K[j]) for j in range(K) for i in range(j)]
        values.append(sum(found) / len(found))
    return x.mean(jnp.stack(values))


PAIRED = tuple(views.partnered(lone(11, seed=1)))
RANKED = {"items": tuple(lists(16, 2, 7, 4)), "packed": partial(pack, row_tokens=64, rows=4)}
CASES = {
    "kto": Case(KTO, kto, PAIRED, (2, 4)),
    "kto and nll": Case(
        losses.mix((1.0, KTO), (0.5, NLL)), lambda x: kto(x) + 0.5 * x.nll(), PAIRED, (4,)
    ),
    "weighted kto": Case(
        losses.weighted(KTO, likely),
        lambda x: kto(x, jnp.exp(still(x.total(x.aligned_BKT) / x.length_BK))[:, 0]),
        PAIRED,
    ),
    "kl": Case(kl_of_both, lambda x: x.mean(x.total(x.kl_BKT) @ jnp.array([1.0, 2.0]))),
    "tdpo": Case(TDPO, tdpo),
    "wpo": Case(losses.weighted(DPO, losses.wpo_weight), wpo, microbatches=(4,)),
    "normalized": Case(DPO, normalized, plugs={"score": scores.length_normalized}),
    "length_norm": Case(partial(DPO, length_norm=True), normalized),
    "rpo": Case(
        losses.mix((1.0, DPO), (0.7, NLL)), lambda x: dpo(x) + 0.7 * x.nll(), microbatches=(2, 4)
    ),
    "rpo by sequence": Case(
        losses.mix((1.0, DPO), (0.7, partial(NLL, per="sequence"))),
        lambda x: dpo(x) + 0.7 * by_sequence(x),
    ),
    "mpo": Case(
        losses.mix((0.8, DPO), (0.2, partial(losses.bco_pair, beta=BETA)), (1.0, NLL)),
        lambda x: 0.8 * dpo(x) + 0.2 * bco_pair(x) + x.nll(),
    ),
    "plackett_luce_dpo": Case(
        partial(losses.plackett_luce_dpo, beta=BETA), ranking, microbatches=(2,), **RANKED
    ),
    "all_pairs": Case(losses.all_pairs(DPO), every_pair, **{**RANKED, "items": lists(5, 2, 4, 3)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_what_the_slow_way_gives(name):
    """Value and gradient; a step in microbatches is the whole step in these and in all metrics."""
    case = CASES[name]
    algorithm = preference(MODEL, loss=case.loss, **case.plugs)
    batch = case.packed(case.items)
    state, metrics = Engine(algorithm)(batch)

    def slow(params):
        return case.expected(said(params, REFERENCE, case.items))

    value, expected = jax.jit(jax.value_and_grad(slow))(POLICY)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert relative_error(gradient(state), expected) < 1e-5
    assert metrics["grad_norm"] > 1e-3
    for microbatches in case.microbatches:
        parts, found = Engine(algorithm, microbatches=microbatches)(batch)
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        assert relative_error(gradient(parts), gradient(state)) < 1e-5


def test_the_running_mean_of_one_term_is_not_read_by_another():
    bco_pair = partial(losses.bco_pair, beta=BETA)  # reads a delta where it is given one
    batch = CASES["mpo"].packed(CASES["mpo"].items)

    def value(loss):
        algorithm = preference(MODEL, loss=loss)
        _, memory = algorithm.init(KEY, POLICY, {})
        state = TrainState(jnp.int32(0), POLICY, None, memory, jnp.int32(0))
        whole, _ = algorithm.collect(state, {"reference": REFERENCE}, batch, KEY)
        whole = replace(whole, shared={k: jnp.add(x, 0.3) for k, x in whole.shared.items()})
        arguments = (POLICY, {"reference": REFERENCE}, {}, algorithm.measure(whole), KEY)
        return float(algorithm.objective(*arguments)[0])

    parts = [value(losses.mix((1.0, loss))) for loss in (BETA_DPO, bco_pair)]
    assert value(losses.mix((1.0, BETA_DPO), (1.0, bco_pair))) == pytest.approx(sum(parts))


# KTO


@pytest.fixture(scope="module")
def kto_step() -> Engine:
    return Engine(preference(MODEL, loss=KTO))


def test_kto_compares_with_the_partners_of_the_whole_step(kto_step):
    items = lone(11, seed=1)
    prepared = kto_step.algorithm.prepare(items)
    expected = views.partnered(items)
    assert [g.record for g in prepared] == list(range(11))
    for one, other in zip(prepared, expected, strict=True):
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
        assert one.prompt is other.prompt
    batch = packed(prepared)
    kl = mean(prepared, lambda g: log_ratio(g, 1))
    assert kl > 0.5
    _, metrics = kto_step(batch)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    collect = jax.jit(kto_step.algorithm.collect)
    whole, _ = collect(started(kto_step.algorithm), {"reference": REFERENCE}, batch, None)
    assert float(whole.shared["kl"]) == pytest.approx(kl, rel=1e-5)
    for side, label in (("chosen", 1.0), ("rejected", 0.0)):
        of_class = [g for g in prepared if g.label == label]
        reward = mean(of_class, lambda g: BETA * log_ratio(g))
        assert metrics[f"rewards/{side}"] == pytest.approx(reward, rel=1e-5)
        logp = mean(of_class, lambda g: log_prob(POLICY, g))
        assert metrics[f"logps/{side}"] == pytest.approx(logp, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "microbatches"), [((2, 1, 1), 1), ((1, 2, 1), 1), ((2, 2, 2), 2)]
)
def test_no_mesh_changes_kto(kto_step, shape, microbatches):
    batch = packed(PAIRED)
    alone, expected = kto_step(batch)
    mesh = parallel.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        state = started(kto_step.algorithm)
        state = jax.device_put(state, parallel.shardings(mesh, state))
        spread = Engine(kto_step.algorithm, microbatches=microbatches)
        after, metrics = spread(parallel.shard_batch(mesh, batch), state)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert relative_error(gradient(after), gradient(alone)) < 1e-5


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_step_of_one_class_works(kto_step, label):
    items = views.partnered(lone(11, label=label, seed=1))
    state, metrics = kto_step(packed(items))
    z = [BETA * (log_ratio(g) - metrics["kl"]) for g in items]
    values = {g.record: 1 / (1 + np.exp(x if label else -x)) for g, x in zip(items, z, strict=True)}
    weight = 1.3 if label else 0.7
    assert metrics["loss"] == pytest.approx(weight * mean(items, lambda g: values[g.record]))
    assert np.all(np.isfinite([*metrics.values()])) and metrics["skipped"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    assert metrics["rewards/chosen" if label == 0 else "rewards/rejected"] == 0


def test_both_classes_have_a_weight():
    batch = packed(PAIRED)

    @jax.jit
    def value(desirable, undesirable):
        loss = partial(losses.kto, beta=BETA, desirable=desirable, undesirable=undesirable)
        return evaluated(preference(MODEL, loss=loss), batch)[0]

    good, bad = float(value(1.0, 0.0)), float(value(0.0, 1.0))
    kl = mean(PAIRED, lambda g: log_ratio(g, 1))
    chance = {g.record: 1 / (1 + np.exp(BETA * (log_ratio(g) - kl))) for g in PAIRED}
    assert good == pytest.approx(mean(PAIRED, lambda g: chance[g.record] * (g.label or 0.0)))
    left = mean(PAIRED, lambda g: (1 - chance[g.record]) * (1 - (g.label or 0.0)))
    assert bad == pytest.approx(left)
    assert float(value(4 / 3, 0.5)) == pytest.approx(4 / 3 * good + bad / 2)


def test_the_tokens_of_a_partner_change_nothing_but_kl(kto_step):
    """Where kl is below 0, and so no part of the loss; the gradient through it is in the table."""
    items = views.partnered(lone(11, seed=3))
    others = [replace(g, responses=[g.responses[0], 1 + g.responses[1] % 16]) for g in items]
    (state, metrics), (other, found) = (kto_step(packed(each)) for each in (items, others))
    assert metrics.pop("kl") != pytest.approx(found["kl"], rel=0.1)
    assert found.pop("kl") < 0
    assert found == metrics
    assert relative_error(gradient(other), gradient(state)) == 0


# Scores


def test_length_desensitized_counts_the_tokens_behind_the_shorter_length_less():
    items = groups(11)
    batch = packed(items)

    @jax.jit
    def value(alpha):
        score = partial(scores.length_desensitized, alpha=alpha)
        return evaluated(preference(MODEL, loss=DPO, score=score), batch)[0]

    def by_hand(alpha: float, group: Group) -> float:
        assert group.scored is not None
        m = min(int(mask.sum()) for mask in group.scored)
        weight = lambda t: 1.0 if t < m else alpha  # noqa: E731
        w, b, rw, rb = (log_prob(p, group, k, weight) for p in (POLICY, REFERENCE) for k in (0, 1))
        return float(np.log1p(np.exp(-BETA * (w - b - rw + rb))))

    found = [float(value(alpha)) for alpha in (0.0, 0.3, 1.0)]
    expected = [mean(items, partial(by_hand, alpha)) for alpha in (0.0, 0.3, 1.0)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found[0] - found[2]) > 1e-3
    plain = jax.jit(lambda: evaluated(preference(MODEL, loss=DPO), batch)[0])
    assert found[2] == float(plain())
    with pytest.raises(BadInput, match=r"length_desensitized compares 2 lengths, the data has 3"):
        algorithm = preference(MODEL, loss=losses.all_pairs(DPO), score=scores.length_desensitized)
        evaluated(algorithm, pack(groups(2, responses=3), row_tokens=64))
    with pytest.raises(BadInput, match=r"length_desensitized .* 2 .*loss kto .* 1"):
        preference(MODEL, loss=KTO, score=scores.length_desensitized)
