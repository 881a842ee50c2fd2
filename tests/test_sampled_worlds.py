"""The sampler where every response can be listed: how often each is drawn, by chi-square tests."""

from functools import cache

import jax
import numpy as np
import online
import pytest

from dpo_jax.data.packing import pack
from dpo_jax.logprobs import naive_token_logps
from dpo_jax.sampling import sample
from dpo_jax.worlds import enumerable

PARAMS = online.away()
DRAWS = 6000  # to each prompt
LEAST = 5  # expected draws of a bin; rarer responses share one
SIGNIFICANCE = 1e-3  # a true sampler is below it with one key in a thousand; the key is fixed
CUTS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 0, 1.0),
    (1.0, 2, 1.0),
    (1.0, 0, 0.9),
    (1.4, 2, 0.6),
]


@cache
def chosen() -> np.ndarray:
    """The probability of every next word behind every beginning of a response, p_BTV: read off the
    listed responses, among which each word follows each beginning."""
    groups, path = online.WORLD.groups(), enumerable.tree(len(online.WORDS), online.STEPS)
    batch = pack(groups, row_tokens=max(group.tokens for group in groups), rows=len(groups))
    logp_RN = np.asarray(naive_token_logps(online.MODEL, PARAMS, batch), np.float64)
    p_BTV = np.zeros((len(groups), len(path.prefixes), len(online.WORDS)))
    for b, slot_N in enumerate(np.asarray(batch.slot_RN)):
        for k, length in enumerate(path.length_K):
            at = (b, path.source_KN[k, :length], path.target_KN[k, :length])
            p_BTV[at] = np.exp(logp_RN[b][slot_N == k])
    np.testing.assert_allclose(p_BTV.sum(axis=-1), 1, atol=1e-5)
    return p_BTV


def cut(p_V: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The words at the temperature, the top_k likeliest of them, of these the fewest that hold
    top_p; one after the other."""
    p_V = p_V ** (1 / temperature)
    order = np.argsort(-p_V)[: top_k or None]
    mass, kept = 0.0, np.zeros(len(p_V))
    for v in order:
        if mass < top_p * p_V[order].sum():
            kept[v] = p_V[v]
        mass += p_V[v]
    return kept / kept.sum()


@cache
def listed(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The probability of every response, p_BK."""
    path = enumerable.tree(len(online.WORDS), online.STEPS)
    p_BTV = np.apply_along_axis(cut, -1, chosen(), temperature, top_k, top_p)
    step_BKN = p_BTV[:, path.source_KN, path.target_KN]
    there_KN = np.arange(online.STEPS) < path.length_K[:, None]
    return np.where(there_KN, step_BKN, 1).prod(axis=-1)


def drawn(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """How often every response was drawn, count_BK."""
    samples = sample(
        online.MODEL,
        PARAMS,
        [np.array(prompt, np.int32) for prompt in online.WORLD.prompts],
        key=jax.random.key(11),
        eos=enumerable.EOS,
        n=DRAWS,
        max_tokens=online.STEPS,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    number = {response: k for k, response in enumerate(online.WORLD.responses)}
    count_BK = np.zeros((len(samples.responses), len(number)), int)
    for b, responses in enumerate(samples.responses):
        np.add.at(count_BK[b], [number[tuple(ids.tolist())] for ids in responses], 1)
    return count_BK


def p_value(count_BK: np.ndarray, p_BK: np.ndarray) -> float:
    """That counts so far from DRAWS p_BK or further come up: Pearson's chi-square over both
    prompts, the responses expected less than LEAST times in one bin; 0 for what cannot be."""
    from scipy.stats import chi2

    if count_BK[p_BK == 0].any():
        return 0.0
    distance, bins = 0.0, 0
    for count_K, expected_K in zip(count_BK, DRAWS * p_BK, strict=True):
        rare_K = expected_K < LEAST
        expected = np.append(expected_K[~rare_K], expected_K[rare_K].sum())
        count = np.append(count_K[~rare_K], count_K[rare_K].sum())
        if expected[-1] < LEAST:  # too rare together as well: they join the last bin
            expected, count = (np.append(x[:-2], x[-2:].sum()) for x in (expected, count))
        distance += np.sum((count - expected) ** 2 / expected)
        bins += len(expected) - 1
    return float(chi2.sf(distance, bins))


@pytest.fixture(scope="module")
def counts() -> dict[tuple[float, int, float], np.ndarray]:
    return {options: drawn(*options) for options in CUTS}


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_whole_responses_are_drawn_as_often_as_they_should(counts, options):
    """At one temperature and cut, and at no other of the list."""
    assert p_value(counts[options], listed(*options)) > SIGNIFICANCE
    others = [each for each in CUTS if each != options]
    assert max(p_value(counts[options], listed(*each)) for each in others) < 1e-12


def test_cuts_leave_out_responses_that_the_policy_has():
    whole = listed(1.0, 0, 1.0)
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-6)
    assert whole.min() > 0
    by_k, by_p, both = (listed(*options) == 0 for options in CUTS[3:])
    assert by_k.sum() > 5 and by_p.sum() > 5 and both.sum() > max(by_k.sum(), by_p.sum())
