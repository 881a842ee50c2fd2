"""The enumerable world, and what the losses converge to in it."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import descend

from dpo_jax import losses
from dpo_jax.data.packing import pack
from dpo_jax.logprobs import response_logps
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.structs import BadInput
from dpo_jax.worlds import enumerable
from dpo_jax.worlds.enumerable import EOS, random_world

BETA = 0.5


@pytest.fixture(scope="module")
def world():
    return random_world(seed=1)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_policy(world, seed):
    """Log-probabilities of a policy with normal logits, float64."""
    logits_BK = np.random.default_rng(seed).standard_normal(world.reward_BK.shape)
    return logits_BK - np.log(np.exp(logits_BK).sum(-1, keepdims=True))


# ---------------------------------------------------------------- the list


@pytest.mark.parametrize(("vocabulary", "steps"), [(2, 1), (2, 4), (3, 3), (4, 2)])
def test_responses_are_all_paths_of_a_prefix_free_code(vocabulary, steps):
    listed = enumerable.responses(vocabulary, steps)
    words = vocabulary - 1
    assert len(set(listed)) == len(listed) == sum(words**n for n in range(steps + 1))
    assert all(r[-1] == EOS or len(r) == steps for r in listed)
    assert not any(EOS in r[:-1] for r in listed)
    assert not any(a == b[: len(a)] for a, b in itertools.permutations(listed, 2))


@pytest.mark.parametrize(("vocabulary", "steps"), [(2, 4), (3, 3), (4, 2)])
def test_token_level_policies_are_distributions_over_the_list(vocabulary, steps, float64):
    path = enumerable.tree(vocabulary, steps)
    rng = np.random.default_rng(0)
    logits_BTV = rng.standard_normal((2, len(path.prefixes), vocabulary))
    logp_BK = enumerable.autoregressive(logits_BTV, steps)
    np.testing.assert_allclose(np.exp(logp_BK).sum(-1), 1.0, rtol=0, atol=1e-12)

    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    for k, response in enumerate(enumerable.responses(vocabulary, steps)):
        choices = [(path.prefixes.index(response[:n]), token) for n, token in enumerate(response)]
        by_hand_B = np.prod([p_BTV[:, t, v] for t, v in choices], axis=0)
        np.testing.assert_allclose(np.exp(logp_BK[:, k]), by_hand_B, rtol=1e-12)


def test_prompts_differ_and_none_begins_with_another():
    prompts = random_world(prompts=5, steps=1).prompts
    assert len(set(prompts)) == 5
    assert len({len(prompt) for prompt in prompts}) == 1
    assert all(prompt[0] == EOS for prompt in prompts)


def test_groups_stand_in_the_order_of_the_tables(world):
    for b, group in enumerate(world.groups()):
        assert (group.record, tuple(group.prompt)) == (b, world.prompts[b])
        assert tuple(tuple(response) for response in group.responses) == world.responses


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda w: random_world(vocabulary=1), "vocabulary >= 2"),
        (lambda w: random_world(vocabulary=2, prompts=2), "vocabulary >= 3"),
        (lambda w: replace(w, reward_BK=w.reward_BK[:, 1:]), "reward_BK has shape"),
        (lambda w: replace(w, ref_logp_BK=w.ref_logp_BK - 0.1), "reference sums to"),
        (lambda w: w.lists(1), "lists of 1 responses"),
        (lambda w: w.pairs(np.eye(15)[:2]), "never draws 2 different"),
    ],
)
def test_bad_input(world, make, says):
    with pytest.raises(BadInput, match=says):
        make(world)


# ---------------------------------------------------------------- its truths


def test_partition_and_optimal_policy_by_hand(float64):
    """Two responses: EOS with pi_ref 1/4 and reward 0, a word with 3/4 and reward beta log 2."""
    world = enumerable.World(
        vocabulary=2,
        steps=1,
        prompts=((EOS,),),
        reward_BK=np.array([[0.0, BETA * np.log(2.0)]]),
        ref_logp_BK=np.log([[0.25, 0.75]]),
    )
    log_z = enumerable.log_partition(world.ref_logp_BK, world.reward_BK, BETA)
    np.testing.assert_allclose(np.exp(log_z), [1 / 4 + 2 * 3 / 4], rtol=1e-12)
    np.testing.assert_allclose(np.exp(world.optimal_policy(BETA)), [[1 / 7, 6 / 7]], rtol=1e-12)


def test_kl_by_hand_with_a_response_that_never_comes(float64):
    logp_BK = jnp.log(jnp.array([[0.5, 0.5, 0.0]]))
    other_BK = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    np.testing.assert_allclose(enumerable.kl(logp_BK, other_BK), 0.5 * np.log(2.0), rtol=1e-12)
    assert np.isposinf(enumerable.kl(other_BK, logp_BK))
    grad_BK = jax.grad(lambda logp_BK: enumerable.kl(logp_BK, other_BK).sum())(logp_BK)
    assert np.isfinite(grad_BK).all()


def test_objective_falls_short_of_its_maximum_by_beta_kl(world, float64):
    """J(pi) = beta log Z - beta KL(pi, pi*) for every pi, so pi* is its only maximiser."""
    log_z_B = enumerable.log_partition(world.ref_logp_BK, world.reward_BK, BETA)
    best_BK = world.optimal_policy(BETA)
    for logp_BK in (best_BK, random_policy(world, 2), random_policy(world, 3)):
        gained_B = enumerable.objective(logp_BK, world.ref_logp_BK, world.reward_BK, BETA)
        short_B = BETA * enumerable.kl(logp_BK, best_BK)
        np.testing.assert_allclose(gained_B, BETA * log_z_B - short_B, rtol=0, atol=1e-12)


def test_gradient_ascent_on_the_objective_finds_the_optimal_policy(world, float64):
    def loss(logits_BK):
        logp_BK = jax.nn.log_softmax(logits_BK)
        return -enumerable.objective(logp_BK, world.ref_logp_BK, world.reward_BK, BETA).sum()

    found_BK = jax.nn.log_softmax(descend(loss, jnp.array(world.ref_logp_BK), steps=1000, rate=0.3))
    np.testing.assert_allclose(found_BK, world.optimal_policy(BETA), rtol=0, atol=1e-9)


def test_preferences_agree_with_rankings(world, float64):
    """Plackett-Luce lists sum to one, and i stands above j in them as often as i beats j."""
    reward_BK = world.reward_BK[:, :4]
    orders = np.array(list(itertools.permutations(range(4))))
    p_BG = np.exp(enumerable.ranking_logp(reward_BK[:, orders]))
    np.testing.assert_allclose(p_BG.sum(-1), 1.0, rtol=1e-12)
    p_BKK = enumerable.preference(reward_BK)
    for i, j in itertools.permutations(range(4), 2):
        above_G = np.argmax(orders == i, axis=1) < np.argmax(orders == j, axis=1)
        np.testing.assert_allclose(p_BG[:, above_G].sum(-1), p_BKK[:, i, j], rtol=1e-12)


@pytest.mark.parametrize("sampled", ["reference", "uniform"])
def test_populations_are_the_draw_and_then_the_annotator(world, sampled, float64):
    """Both forms of the pairs, against q_i q_j p_ij / (1 - sum q^2) written out."""
    q_BK = np.exp(world.ref_logp_BK)
    if sampled == "uniform":
        q_BK = np.full_like(q_BK, 1 / q_BK.shape[1])
    p_BKK = np.asarray(enumerable.preference(world.reward_BK))
    met_BKK = q_BK[:, :, None] * q_BK[:, None, :] / (1 - (q_BK**2).sum(-1))[:, None, None] / 2
    given = None if sampled == "reference" else q_BK

    both = world.lists(2, given)
    at = (both.prompt_B, both.response_BK[:, 0], both.response_BK[:, 1])
    np.testing.assert_allclose(both.weight_B, 2 * (met_BKK * p_BKK)[at], rtol=1e-10)
    np.testing.assert_allclose(both.weight_B.sum(), 1.0, rtol=1e-12)

    once = world.pairs(given)
    at = (once.prompt_B, once.response_BK[:, 0], once.response_BK[:, 1])
    assert len(once.weight_B) * 2 == len(both.weight_B)
    np.testing.assert_allclose(once.weight_B, 2 * met_BKK[at], rtol=1e-10)
    np.testing.assert_allclose(once.soft_label_B, p_BKK[at], rtol=1e-12)
    np.testing.assert_allclose(world.lists(3, given).weight_B.sum(), 1.0, rtol=1e-12)


def test_scored_reads_the_right_responses(world, float64):
    population = world.pairs()
    logp_BK = random_policy(world, 4)
    scored = world.scored(population, logp_BK)
    for b in (0, 7, len(population.weight_B) - 1):
        prompt, pair = population.prompt_B[b], population.response_BK[b]
        np.testing.assert_array_equal(scored.logp_BK[b], logp_BK[prompt, pair])
        np.testing.assert_array_equal(scored.ref_logp_BK[b], world.ref_logp_BK[prompt, pair])
        assert scored.length_BK[b].tolist() == [len(world.responses[k]) for k in pair]


# ---------------------------------------------------------------- losses against the truth


def soft_dpo_loss(world, population, logp_BK, beta):
    """p dpo(i over j) + (1 - p) dpo(j over i) on the pairs i < j."""
    swapped = replace(population, response_BK=population.response_BK[:, ::-1])
    loss = partial(losses.dpo, beta=beta)
    p_B = population.soft_label_B
    won_B = p_B * loss(world.scored(population, logp_BK))
    lost_B = (1 - p_B) * loss(world.scored(swapped, logp_BK))
    return jnp.sum(population.weight_B * (won_B + lost_B))


def test_soft_labels_equal_both_orders(world, float64):
    logp_BK = random_policy(world, 5)
    soft = soft_dpo_loss(world, world.pairs(), logp_BK, BETA)
    hard = world.expected_loss(partial(losses.dpo, beta=BETA), world.lists(2), logp_BK)
    np.testing.assert_allclose(soft, hard, rtol=1e-12)


@pytest.mark.parametrize("sampled", ["reference", "uniform"])
def test_dpo_on_the_population_finds_the_optimal_policy(world, sampled, float64):
    """Whatever responses are compared: KL(pi, pi*) vanishes and beta log pi/pi_ref = r + c(x)."""
    shape = world.reward_BK.shape
    population = world.pairs(np.full(shape, 1 / shape[1]) if sampled == "uniform" else None)
    path = enumerable.tree(world.vocabulary, world.steps)
    logits_BTV = jnp.zeros((shape[0], len(path.prefixes), world.vocabulary))

    def loss(logits_BTV):
        logp_BK = enumerable.autoregressive(logits_BTV, world.steps)
        return soft_dpo_loss(world, population, logp_BK, BETA)

    best_BK = world.optimal_policy(BETA)
    found_BTV = descend(loss, logits_BTV, steps=1000, rate=0.1)
    found_BK = enumerable.autoregressive(found_BTV, world.steps)
    assert np.all(enumerable.kl(world.ref_logp_BK, best_BK) > 0.1)  # there is a way to go
    assert np.all(enumerable.kl(found_BK, best_BK) < 1e-10)

    shift_BK = BETA * (found_BK - world.ref_logp_BK) - world.reward_BK
    np.testing.assert_allclose(shift_BK, shift_BK[:, :1].repeat(15, 1), rtol=0, atol=1e-9)


def test_the_gradient_weight_of_a_pair(world, float64):
    """dL/dlogp is -beta sigmoid(-beta D) for the chosen response and its negative for the other."""
    population = world.lists(2)
    scored = world.scored(population, random_policy(world, 6))

    def total(logp_BK):
        return losses.dpo(replace(scored, logp_BK=logp_BK), beta=BETA).sum()

    ratio_BK = np.asarray(scored.logp_BK - scored.ref_logp_BK)
    weight_B = BETA / (1 + np.exp(BETA * (ratio_BK[:, 0] - ratio_BK[:, 1])))
    gradient_BK = jax.grad(total)(scored.logp_BK)
    np.testing.assert_allclose(gradient_BK, np.stack([-weight_B, weight_B], -1), rtol=1e-12)


@pytest.mark.parametrize(("link", "size"), [("bradley_terry", 2), ("plackett_luce", 3)])
def test_the_true_reward_minimises_the_reward_losses(world, link, size, float64):
    """Convex in the rewards, with gradient zero at r + c(x) and curvature in every other way."""
    population = world.lists(size)
    at = (population.prompt_B[:, None], population.response_BK)

    def loss(reward_BK):
        return jnp.sum(population.weight_B * getattr(losses, link)(reward_BK[at]))

    shifted_BK = world.reward_BK + np.array([[1.0], [-2.0]])
    gradient_BK = jax.jit(jax.grad(loss))(shifted_BK)
    np.testing.assert_allclose(gradient_BK, 0.0, atol=1e-12)
    assert np.abs(jax.jit(jax.grad(loss))(0.5 * shifted_BK)).max() > 1e-3


def test_what_the_kl_estimators_estimate(world, float64):
    """Under y ~ pi: values of k1 and k3 are KL(pi, ref), k2 is E[d^2] / 2; as losses (samples held
    fixed) k1 has gradient 0, k2 that of KL(pi, ref), k3 that of KL(ref, pi).
    """
    logits_BK, ref_BK = random_policy(world, 7), world.ref_logp_BK

    def truth(flip):
        def divergence(logits_BK):
            pair = jax.nn.log_softmax(logits_BK), jnp.asarray(ref_BK)
            return enumerable.kl(*(pair[::-1] if flip else pair)).sum()

        return jax.value_and_grad(divergence)(logits_BK)

    def estimate(estimator):
        def mean(logits_BK):
            logp_BK = jax.nn.log_softmax(logits_BK)
            p_BK = jax.lax.stop_gradient(jnp.exp(logp_BK))
            return jnp.sum(p_BK * estimator(logp_BK, ref_BK))

        return jax.value_and_grad(mean)(logits_BK)

    (reverse, reverse_grad), (_, forward_grad) = truth(flip=False), truth(flip=True)
    half_square = np.sum(np.exp(logits_BK) * (logits_BK - ref_BK) ** 2) / 2
    np.testing.assert_allclose(losses.kl_exact(logits_BK, ref_BK).sum(), reverse, rtol=1e-12)
    for estimator, value, gradient in (
        (losses.kl_k1, reverse, jnp.zeros_like(reverse_grad)),
        (losses.kl_k2, half_square, reverse_grad),
        (losses.kl_k3, reverse, forward_grad),
    ):
        got, got_grad = estimate(estimator)
        np.testing.assert_allclose(got, value, rtol=1e-12)
        np.testing.assert_allclose(got_grad, gradient, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- a transformer in the world


@pytest.fixture(scope="module")
def policy(world):
    """(parameters, parameters -> logp_BK over all responses): one packed row holds them all."""
    model = decoder(Config(V=world.vocabulary, D=32, L=2, H=2, J=1, E=16, F=64))
    batch = jax.tree.map(jnp.asarray, pack(world.groups(), row_tokens=88))
    records = np.asarray(batch.record_RG).reshape(-1)
    order_B = np.argsort(records)[-len(world.prompts) :]

    def logps(params):
        logp_RGK = response_logps(model, params, batch)
        return logp_RGK.reshape(-1, logp_RGK.shape[-1])[order_B]

    return model.init(jax.random.key(0)), logps


def test_a_transformer_is_a_distribution_over_the_list(policy):
    params, logps = policy
    sharper = jax.tree.map(lambda x: 5 * x, params)
    # float32 sums of up to three token log-probs
    np.testing.assert_allclose(np.exp(jax.jit(logps)(sharper)).sum(-1), 1.0, rtol=0, atol=2e-6)


def test_dpo_brings_a_transformer_to_the_optimal_policy(world, policy):
    """As near as minimising KL(pi*, pi) itself brings it, in as many steps from the same start."""
    params, logps = policy
    own = replace(world, ref_logp_BK=np.asarray(logps(params)))
    population, best_BK = own.pairs(), own.optimal_policy(BETA)

    def dpo(params):
        return soft_dpo_loss(own, population, logps(params), BETA)

    def direct(params):
        return enumerable.kl(best_BK, logps(params)).mean()

    def distance(params):
        return float(enumerable.kl(logps(params), best_BK).mean())

    assert distance(params) > 0.5
    by_dpo = distance(descend(dpo, params, steps=600, rate=0.003))
    directly = distance(descend(direct, params, steps=600, rate=0.003))
    assert directly < 1e-3  # the comparison says something
    assert by_dpo <= 1.2 * directly + 1e-4
