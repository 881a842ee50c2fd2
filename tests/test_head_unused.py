"""Places without a token: nothing of them is read, and the head walks as far as tokens go."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import equations, relative_error

from dpo_jax import head, parallel
from dpo_jax.head import Statistics, Wanted, statistics
from dpo_jax.structs import Array

R, N, D, V = 8, 6, 8, 32
SIZE = 8  # tokens of a chunk
WANTED = Wanted(policy_kl=True, entropy=True, square=True)


def first(*counts: int) -> np.ndarray:
    """The first places of every row."""
    return np.arange(N)[None, :] < np.array(counts)[:, None]


USED = {
    "all": first(*[N] * R),
    "none": first(*[0] * R),
    "one": first(*[0] * 5, 1, 0, 0),
    "uneven": first(0, 6, 1, 0, 0, 5, 6, 3),
    "scattered": np.random.default_rng(0).random((R, N)) < 0.6,
    "the first rows": first(6, 6, *[0] * 6),
}


class Given(NamedTuple):
    """What a head reads, and the slopes of what it says."""

    policy: dict[str, Array]
    reference: dict[str, Array]
    hidden_RND: Array
    ref_hidden_RND: Array
    target_RN: Array
    slope: Statistics


def drawn(seed: int, used_RN: np.ndarray) -> Given:
    """Random, where tokens are; elsewhere what spoils all that reads it. The bias makes exp(logits)
    overflow where the sum over the vocabulary is not known."""
    rng = np.random.default_rng(seed)

    def spoilt(x_RN: np.ndarray) -> np.ndarray:
        used = used_RN.reshape(R, N, *[1] * (x_RN.ndim - 2))
        return np.where(used, x_RN, np.nan).astype(np.float32)

    def model() -> dict[str, Array]:
        w_DV = rng.normal(size=(D, V))
        return {"w_DV": w_DV.astype(np.float32), "b_V": (200 + w_DV[0]).astype(np.float32)}

    return Given(
        model(),
        model(),
        spoilt(rng.normal(size=(R, N, D))),
        spoilt(rng.normal(size=(R, N, D))),
        np.where(used_RN, rng.integers(0, V, (R, N)), V + 7).astype(np.int32),
        Statistics(*(spoilt(rng.normal(size=(R, N))) for _ in Statistics._fields)),
    )


def unembed(params, hidden, turned=None):
    if turned is not None:
        jax.debug.callback(turned)
    return hidden @ params["w_DV"] + jnp.broadcast_to(params["b_V"], (*hidden.shape[:-1], V))


def found(given: Given, used_RN: Array, turned=None) -> tuple[Statistics, tuple]:
    """(statistics, gradients of weights and hidden states under the slopes)."""
    reference = {"unembed": unembed, "params": given.reference, "hidden_RND": given.ref_hidden_RND}

    def said(policy, hidden_RND):
        own = head.side(partial(unembed, turned=turned), policy, hidden_RND)
        other = head.side(**reference)
        return statistics(own, given.target_RN, used_RN, reference=other, wanted=WANTED)

    out, pull = jax.vjp(said, given.policy, given.hidden_RND)
    return out, pull(given.slope)


def naive(given: Given, used_RN: np.ndarray) -> tuple[Statistics, tuple]:
    """The same of the full logits of the tokens alone."""

    def said(policy, hidden_RND):
        logp_UV = jax.nn.log_softmax(unembed(policy, hidden_RND[used_RN]))
        ref_UV = jax.nn.log_softmax(unembed(given.reference, given.ref_hidden_RND[used_RN]))
        p_UV, at = jnp.exp(logp_UV), (np.arange(used_RN.sum()), given.target_RN[used_RN])
        return Statistics(
            logp_UV[at],
            ref_UV[at],
            jnp.sum(jnp.exp(ref_UV) * (ref_UV - logp_UV), axis=-1),
            jnp.sum(p_UV * (logp_UV - ref_UV), axis=-1),
            -jnp.sum(p_UV * logp_UV, axis=-1),
            jax.lax.stop_gradient(jnp.log(jnp.sum(p_UV**2, axis=-1))),
        )

    out, pull = jax.vjp(said, given.policy, jnp.asarray(given.hidden_RND))
    gradients = pull(jax.tree.map(lambda x_RN: jnp.asarray(x_RN[used_RN]), given.slope))
    return jax.tree.map(lambda x_U: jnp.zeros((R, N)).at[used_RN].set(x_U), out), gradients


def assert_same(mine, expected, used_RN: np.ndarray):
    """Equal where tokens are, and 0 to the bit elsewhere."""
    for x_RN, y_RN in zip(mine[0], expected[0], strict=True):
        np.testing.assert_allclose(x_RN, y_RN, atol=1e-4)  # logits are 200 and more
        assert (np.asarray(x_RN)[~used_RN] == 0).all()
    assert (np.asarray(mine[1][1])[~used_RN] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(mine))
    if used_RN.any():
        assert relative_error(mine[1], expected[1]) < 1e-4
    else:
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(mine))


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2 * SIZE * V)  # of two models


@pytest.mark.parametrize("name", USED)
def test_what_is_not_used_is_not_read_and_not_walked(name):
    used_RN, turns = USED[name], []
    given = drawn(1, used_RN)
    mine = jax.jit(partial(found, turned=lambda: turns.append(1)))(given, used_RN)
    assert_same(mine, naive(given, used_RN), used_RN)
    jax.effects_barrier()
    assert len(turns) == 2 * -(-int(used_RN.sum()) // SIZE)  # there and back


def test_members_walk_as_far_as_the_one_that_uses_most():
    names, turns = ["uneven", "none", "one", "scattered"], []
    used_MRN = np.stack([USED[name] for name in names])
    given = [drawn(seed, used_RN) for seed, used_RN in enumerate(used_MRN)]
    given_M = jax.tree.map(lambda *x: np.stack(x), *given)
    together = jax.vmap(partial(found, turned=lambda: turns.append(1)))
    mine_M = jax.jit(together)(given_M, used_MRN)
    for i, used_RN in enumerate(used_MRN):
        mine = jax.tree.map(lambda x_M, i=i: x_M[i], mine_M)
        assert_same(mine, naive(given[i], used_RN), used_RN)
    jax.effects_barrier()
    most = max(int(used_RN.sum()) for used_RN in used_MRN)
    assert len(turns) == 2 * -(-most // SIZE)


@pytest.mark.parametrize("one_data", [True, False])
def test_members_turn_together(one_data):
    """No loop asks each member whether it goes on, which would select between weights' slopes."""
    used_RN = USED["uneven"]
    members = jax.tree.map(lambda *x: np.stack(x), *(drawn(seed, used_RN) for seed in (1, 2)))
    shared = Given(0, 0, 0, 0, None, 0) if one_data else 0  # type: ignore[arg-type]
    if one_data:
        members = members._replace(target_RN=members.target_RN[0])
    used = used_RN if one_data else np.stack([used_RN] * 2)
    jaxpr = jax.make_jaxpr(jax.vmap(found, (shared, None if one_data else 0)))(members, used)
    loops = [x for x in equations(jaxpr.jaxpr) if x.primitive.name == "while"]
    assert len(loops) == 2
    assert all(loop.params["cond_jaxpr"].out_avals[0].shape == () for loop in loops)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("name", ["none", "uneven", "the first rows"])
def test_on_a_mesh_devices_may_use_none(monkeypatch, shape, name):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 4 * V)
    used_RN = USED[name]
    given = drawn(3, used_RN)
    mesh = parallel.make_mesh(*shape)
    rows = NamedSharding(mesh, PartitionSpec(parallel.RULES["R"]))
    weights = {"policy": given.policy, "reference": given.reference}
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, parallel.shardings(mesh, weights))
        placed = jax.device_put(given._replace(policy={}, reference={}), rows)._replace(**weights)
        mine = jax.device_get(jax.jit(found)(placed, used_RN))
        most = int(jax.jit(head._most)(used_RN))
    assert_same(mine, naive(given, used_RN), used_RN)
    assert most == max(part.sum() for part in np.split(used_RN, shape[0] * shape[1]))


@pytest.mark.parametrize(
    ("places", "vocabulary", "size"),
    [
        (2000, 2**13, 2000),  # all have room
        (2500, 2**13, 250),  # LEAST, cut evenly
        (2**16, 2**9, 2**12),  # a sixteenth of all
        (2**16, 2**14, 2**10),  # what LOGITS_AT_ONCE has room for
        (10, 2**30, 1),
    ],
)
def test_chunks_are_cut_evenly_and_have_room(monkeypatch, places, vocabulary, size):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2**24)
    monkeypatch.setattr(head, "LEAST", 256)
    assert head._size(places, vocabulary) == size
