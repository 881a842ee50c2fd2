"""A world small enough to list every response, so that what theory says can be computed.

A response is words, ended by EOS (token 0) or by the last step. The responses form a prefix-free
code, so a policy that chooses token by token is a proper distribution over the list: its
probabilities sum to one. With rewards r and reference pi_ref on the list,

    Z(x)        = sum_y pi_ref(y|x) exp(r(x,y) / beta)                  log_partition
    pi*(y|x)    = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)                 optimal_policy
    J(pi)       = E_pi[r] - beta KL(pi, pi_ref) <= beta log Z           objective
    P(y1 > y2)  = sigmoid(r(x,y1) - r(x,y2))                            preference

Here B counts prompts and K all responses of the world; in a `Population` B counts lists and K the
responses of a list. Policies are log-probabilities `logp_BK` over the listed responses. Everything
is jax.numpy, differentiable, and float64 where x64 is on; the world's own tables are float64 numpy.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.structs import Array, BadInput, Group, Scored

EOS = 0


# ---------------------------------------------------------------- truths of any table (B, K)


def expectation(logp_BK: Array, value_BK: Array) -> jax.Array:
    """E_pi[value] per prompt (B,); responses of probability zero count nothing."""
    p_BK = jnp.exp(logp_BK)
    # masked before the product too: 0 * inf is NaN in the value and in the gradient
    return jnp.sum(p_BK * jnp.where(p_BK > 0, value_BK, 0.0), axis=-1)


def kl(logp_BK: Array, other_logp_BK: Array) -> jax.Array:
    """KL(pi, other) = E_pi[log pi - log other] in nats, per prompt (B,). Swap for the other way."""
    return expectation(logp_BK, jnp.subtract(logp_BK, other_logp_BK))


def log_partition(ref_logp_BK: Array, reward_BK: Array, beta: float | Array) -> jax.Array:
    """log Z = log sum_y pi_ref(y) exp(r(y) / beta), per prompt (B,)."""
    return jax.nn.logsumexp(jnp.add(ref_logp_BK, reward_BK / beta), axis=-1)


def optimal_policy(ref_logp_BK: Array, reward_BK: Array, beta: float | Array) -> jax.Array:
    """log pi* = log pi_ref + r / beta - log Z (B, K): the maximiser of `objective`."""
    return jax.nn.log_softmax(jnp.add(ref_logp_BK, reward_BK / beta), axis=-1)


def objective(
    logp_BK: Array, ref_logp_BK: Array, reward_BK: Array, beta: float | Array
) -> jax.Array:
    """The RLHF objective J = E_pi[r] - beta KL(pi, pi_ref), per prompt (B,)."""
    return expectation(logp_BK, reward_BK) - beta * kl(logp_BK, ref_logp_BK)


def preference(reward_BK: Array) -> jax.Array:
    """Bradley-Terry probability (B, K, K) that response i beats response j; 1/2 on the diagonal."""
    return jax.nn.sigmoid(reward_BK[..., :, None] - reward_BK[..., None, :])


def ranking_logp(reward_BK: Array) -> jax.Array:
    """Plackett-Luce log-probability (B,) that the responses are ranked as they stand along K.

    sum_k r_k - log sum_{j >= k} exp(r_j): the best is drawn first, then the best of the rest.
    """
    last = np.ndim(reward_BK) - 1  # cumlogsumexp takes no negative axis
    rest_BK = jax.lax.cumlogsumexp(jnp.asarray(reward_BK), axis=last, reverse=True)
    return jnp.sum(reward_BK - rest_BK, axis=-1)


# ---------------------------------------------------------------- the list of responses


@lru_cache
def responses(vocabulary: int, steps: int) -> tuple[tuple[int, ...], ...]:
    """Every response over tokens 0..vocabulary-1, shortest first.

    W = vocabulary - 1 words give W^n responses of n words and EOS for n < steps, and W^steps that
    stop at the last step without one.
    """
    if vocabulary < 2 or steps < 1:
        raise BadInput(
            f"enumerable world: {vocabulary} tokens and {steps} steps; it needs EOS, at least "
            "one word (vocabulary >= 2) and one step"
        )
    words = range(1, vocabulary)
    ended = ((*w, EOS) for n in range(steps) for w in itertools.product(words, repeat=n))
    return (*ended, *itertools.product(words, repeat=steps))


@dataclass(frozen=True, eq=False)
class Tree:
    """The responses as paths: T prefixes that choose a next token, N steps at most.

    A step of a response stands in `source_KN` (its prefix) and `target_KN` (its token); the steps
    past its length are 0 and count nothing.
    """

    prefixes: tuple[tuple[int, ...], ...]
    source_KN: np.ndarray
    target_KN: np.ndarray
    length_K: np.ndarray


@lru_cache
def tree(vocabulary: int, steps: int) -> Tree:
    """The prefix tree of `responses(vocabulary, steps)`."""
    listed = responses(vocabulary, steps)
    words = range(1, vocabulary)
    prefixes = tuple(w for n in range(steps) for w in itertools.product(words, repeat=n))
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    source_KN = np.zeros((len(listed), steps), np.int32)
    target_KN = np.zeros((len(listed), steps), np.int32)
    for k, response in enumerate(listed):
        source_KN[k, : len(response)] = [place[response[:n]] for n in range(len(response))]
        target_KN[k, : len(response)] = response
    return Tree(prefixes, source_KN, target_KN, np.array([len(r) for r in listed], np.int32))


def autoregressive(logits_BTV: Array, steps: int) -> jax.Array:
    """Log-probabilities (B, K) of all responses when prefix t chooses by softmax(logits_BTV[:, t]).

    The prefixes are those of `tree(V, steps)`; every distribution over the list is such a policy.
    """
    path = tree(logits_BTV.shape[-1], steps)
    logp_BTV = jax.nn.log_softmax(jnp.asarray(logits_BTV), axis=-1)
    logp_BKN = logp_BTV[:, path.source_KN, path.target_KN]
    used_KN = np.arange(steps)[None, :] < path.length_K[:, None]
    return jnp.sum(jnp.where(used_KN[None], logp_BKN, 0.0), axis=-1)


# ---------------------------------------------------------------- the world


@dataclass(frozen=True, eq=False)
class Population:
    """Finitely many lists of responses with the probability of meeting each; weights sum to one.

    prompt_B: the prompt's number. response_BK: numbers in the list of responses, best to worst
    (in `World.pairs` unordered: the first wins with probability soft_label_B).
    """

    prompt_B: np.ndarray
    response_BK: np.ndarray
    weight_B: np.ndarray
    soft_label_B: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class World:
    """Prompts, the responses over `vocabulary` tokens in at most `steps`, a reward and a reference.

    reward_BK is what the annotator sees, in nats of log-odds. ref_logp_BK sums to one on K; a
    model's own log-probabilities over `groups()` may stand there (`dataclasses.replace`).
    Raises BadInput where tables and list differ, or the reference is no distribution.
    """

    vocabulary: int
    steps: int
    prompts: tuple[tuple[int, ...], ...]
    reward_BK: np.ndarray
    ref_logp_BK: np.ndarray

    def __post_init__(self):
        shape = (len(self.prompts), len(self.responses))
        for name in ("reward_BK", "ref_logp_BK"):
            table = np.asarray(getattr(self, name), np.float64)
            if table.shape != shape:
                raise BadInput(
                    f"enumerable world: {name} has shape {table.shape}; {shape[0]} prompts with "
                    f"{shape[1]} responses need {shape}"
                )
            object.__setattr__(self, name, table)
        total_B = np.exp(self.ref_logp_BK).sum(-1)
        # float32 log-probs of a model sum to one only to its rounding
        if not np.allclose(total_B, 1.0, rtol=0, atol=1e-5):
            raise BadInput(
                f"enumerable world: the reference sums to {total_B} over the responses of each "
                "prompt; give log-probabilities of a distribution over the whole list"
            )

    @property
    def responses(self) -> tuple[tuple[int, ...], ...]:
        """All K responses, in the order of every `_BK` table."""
        return responses(self.vocabulary, self.steps)

    @property
    def length_K(self) -> np.ndarray:
        """Tokens of each response, EOS counted."""
        return tree(self.vocabulary, self.steps).length_K

    def optimal_policy(self, beta: float | Array) -> jax.Array:
        """log pi* (B, K) of this world's reference and reward."""
        return optimal_policy(self.ref_logp_BK, self.reward_BK, beta)

    def groups(self) -> list[Group]:
        """One group per prompt with all its responses, in list order, for `data.packing.pack`."""
        listed = [np.array(response, np.int32) for response in self.responses]
        return [
            Group(prompt=np.array(prompt, np.int32), responses=listed, record=b)
            for b, prompt in enumerate(self.prompts)
        ]

    def lists(self, size: int = 2, sampling_BK: Array | None = None) -> Population:
        """Every ranked list of `size` distinct responses: drawn from `sampling_BK`, then annotated.

        Responses are drawn independently from `sampling_BK` (probabilities; the reference where
        None) until they differ; their order has Bradley-Terry (Plackett-Luce) probability under the
        reward. Size 2: both orders of every pair stand here, weighted by p and 1 - p.
        """
        list_GK = self._chosen(itertools.permutations, size)
        with jax.enable_x64(True):
            rank_p_BG = np.asarray(jnp.exp(ranking_logp(self.reward_BK[:, list_GK])))
        return self._population(list_GK, rank_p_BG, sampling_BK)

    def pairs(self, sampling_BK: Array | None = None) -> Population:
        """Every pair i < j once, soft_label_B = P(i beats j), weighted by drawing it (`lists`)."""
        pair_GK = self._chosen(itertools.combinations, 2)
        met = self._population(pair_GK, np.ones((len(self.prompts), len(pair_GK))), sampling_BK)
        with jax.enable_x64(True):
            p_BKK = np.asarray(preference(self.reward_BK))
        soft_label_B = p_BKK[:, pair_GK[:, 0], pair_GK[:, 1]].reshape(-1)
        return replace(met, soft_label_B=soft_label_B)

    def scored(self, population: Population, logp_BK: Array) -> Scored:
        """What a preference loss may know of the population's lists under the policy `logp_BK`."""
        prompt_B, response_BK = population.prompt_B, population.response_BK
        at = (prompt_B[:, None], response_BK)
        return Scored(
            logp_BK=jnp.asarray(logp_BK)[at],
            ref_logp_BK=jnp.asarray(self.ref_logp_BK[at]),
            length_BK=jnp.asarray(self.length_K[response_BK]),
            weight_B=jnp.asarray(population.weight_B),
            soft_label_B=None
            if population.soft_label_B is None
            else jnp.asarray(population.soft_label_B),
        )

    def expected_loss(
        self, loss: Callable[[Scored], Array], population: Population, logp_BK: Array
    ) -> jax.Array:
        """The loss of a policy on the whole population: sum_B weight_B loss_B, a scalar."""
        scored = self.scored(population, logp_BK)
        return jnp.sum(jnp.asarray(population.weight_B) * loss(scored))

    def _chosen(self, choose: Callable, size: int) -> np.ndarray:
        if not 2 <= size <= len(self.responses):
            raise BadInput(
                f"enumerable world: lists of {size} responses; give a size from 2 to "
                f"{len(self.responses)}, the responses of this world"
            )
        return np.array(list(choose(range(len(self.responses)), size)), np.int32)

    def _population(
        self, list_GK: np.ndarray, share_BG: np.ndarray, sampling_BK: Array | None
    ) -> Population:
        """G lists a prompt, weighted by the draw times `share_BG`; prompts weigh the same."""
        sampling_BK = np.exp(self.ref_logp_BK) if sampling_BK is None else np.asarray(sampling_BK)
        drawn_BG = sampling_BK[:, list_GK].prod(-1) * share_BG
        total_B = drawn_BG.sum(-1, keepdims=True) * len(self.prompts)
        if not np.all(total_B > 0):
            raise BadInput(
                f"enumerable world: the sampling never draws {list_GK.shape[1]} different "
                "responses of some prompt; give more of them a probability"
            )
        return Population(
            prompt_B=np.repeat(np.arange(len(self.prompts), dtype=np.int32), len(list_GK)),
            response_BK=np.tile(list_GK, (len(self.prompts), 1)),
            weight_B=(drawn_BG / total_B).reshape(-1),
        )


def random_world(
    *,
    vocabulary: int = 3,
    steps: int = 3,
    prompts: int = 2,
    seed: int = 0,
    reward_scale: float = 1.0,
    ref_scale: float = 1.0,
) -> World:
    """A world with normal rewards (nats) and a reference of normal token logits, fixed by `seed`.

    The prompts are EOS, where a BOS would stand, and words; all of one length, or a prompt would
    be the beginning of another and its answer. The defaults list 15 responses.
    """
    rng = np.random.default_rng(seed)
    path = tree(vocabulary, steps)
    if prompts < 1 or (prompts > 1 and vocabulary < 3):
        raise BadInput(
            f"enumerable world: {prompts} prompts over {vocabulary - 1} word(s); it needs one "
            "prompt or more, and two words (vocabulary >= 3) to tell prompts apart"
        )
    width = next(n for n in itertools.count(1) if prompts <= (vocabulary - 1) ** n)
    words = itertools.islice(itertools.product(range(1, vocabulary), repeat=width), prompts)
    named = tuple((EOS, *word) for word in words)
    logits_BTV = ref_scale * rng.standard_normal((len(named), len(path.prefixes), vocabulary))
    with jax.enable_x64(True):
        ref_logp_BK = np.asarray(autoregressive(logits_BTV, steps))
    reward_BK = reward_scale * rng.standard_normal(ref_logp_BK.shape)
    return World(vocabulary, steps, named, reward_BK, ref_logp_BK)
