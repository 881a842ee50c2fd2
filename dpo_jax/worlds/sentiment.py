"""The sentiment world: film reviews from a known grammar, with an exact reward.

The language (`grammar.py`) is known exactly, so samples of a model can be judged without a judge:
`reward` reads the sentiment off the text, `grammatical` says whether the text is a review at all,
`log_probability` is the true log-probability with the hidden mood summed out.

`reviews`, `prompts` and `judged` are data sources, e.g. `partial(reviews, n=60_000, seed=0)`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.worlds import grammar
from dpo_jax.worlds.grammar import BOS, EOS, INDEX, PAD, VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "VOCABULARY",
    "brevity",
    "completions",
    "entropy",
    "grammatical",
    "judged",
    "legal",
    "log_probability",
    "prompts",
    "reviews",
    "reward",
    "tokenizer",
]

WORDS = {word: i for word, i in INDEX.items() if word not in (PAD, BOS, EOS)}
SPOKEN = tuple(WORDS)
FOREIGN = INDEX[BOS]  # legal nowhere: stands for unknown words and for special ones inside a text

SHORTEST_PROMPT, LONGEST_PROMPT = 2, 8  # words

NEGATION = -0.75  # "not dreadful" praises, but less than "dreadful" blames
REPEAT = 0.3  # a word said again counts less, so that saying it for ever does not pay
SCALE = 6.0  # |reward| of a review stays below this
FLOOR = -4.0  # reward of what is no review: about the worst percentile of the reviews


def reviews(*, n: int, seed: int) -> list[dict[str, Any]]:
    """n records {"prompt": the first 2 to 8 words of a review, "responses": [the rest of it]}."""
    rng = np.random.default_rng(seed)
    mood_B = rng.integers(grammar.MOODS, size=n)
    texts = _draw(np.zeros(n, np.int64), mood_B, rng)
    cut_B = rng.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1, size=n).tolist()
    return [
        {"prompt": " ".join(text[:cut]), "responses": [" ".join(text[cut:])]}
        for text, cut in zip(texts, cut_B, strict=True)
    ]


def prompts(*, n: int, seed: int) -> list[dict[str, Any]]:
    """n records {"prompt": ...}: those of `reviews(n=n, seed=seed)` without the rest."""
    return [{"prompt": record["prompt"]} for record in reviews(n=n, seed=seed)]


def completions(records: Sequence[Mapping[str, Any]], *, n: int, seed: int) -> list[list[str]]:
    """n independent completions of every prompt, drawn from the grammar itself.

    Exact: the mood comes from its posterior given the prompt. Raises ValueError for a prompt that
    begins no review.
    """
    rng = np.random.default_rng(seed)
    state_B, logp_BM = _walk([record["prompt"].split() for record in records], complete=False)
    lost = np.flatnonzero(state_B == grammar.automaton().dead)
    if lost.size:
        raise ValueError(f"no review begins with {records[lost[0]]['prompt']!r}")
    # Gumbel's trick: the largest of log p + noise is a draw from p.
    logp_BnM = np.repeat(logp_BM[:, None], n, axis=1)
    mood_Bn = (logp_BnM + rng.gumbel(size=logp_BnM.shape)).argmax(axis=2)
    texts = _draw(np.repeat(state_B, n), mood_Bn.ravel(), rng)
    return [[" ".join(text) for text in texts[i : i + n]] for i in range(0, len(texts), n)]


def reward(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """The sentiment of prompt + response, float64 (B,): 6 tanh(sum / 6), or -4 for no review.

    The sum runs over the words that judge. A word counts its value, times the factor of the adverb
    before it, times -0.75 behind a negator of its clause, times 0.3 for every time it was said
    before.
    """
    texts = [
        f"{record['prompt']} {response}".split()
        for record, response in zip(records, responses, strict=True)
    ]
    legal_B = _walk(texts)[0] == grammar.automaton().end
    return np.array(
        [
            SCALE * math.tanh(_sentiment(text) / SCALE) if legal else FLOOR
            for text, legal in zip(texts, legal_B, strict=True)
        ],
        np.float64,
    )


def brevity(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Minus the words of each response, float64 (B,): a criterion at odds with `reward`, which
    grows with every word of praise."""
    return np.array([-len(response.split()) for response in responses], np.float64)


def legal(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> np.ndarray:
    """Whether prompt + response is a whole review of the grammar, 0.0 or 1.0 (B,)."""
    texts = [
        f"{record['prompt']} {response}".split()
        for record, response in zip(records, responses, strict=True)
    ]
    return (_walk(texts)[0] == grammar.automaton().end).astype(np.float64)


def grammatical(text: str) -> bool:
    """Whether the text is a whole review of the grammar."""
    return bool(_walk([text.split()])[0][0] == grammar.automaton().end)


def log_probability(texts: Sequence[str], *, complete: bool = True) -> np.ndarray:
    """log P(text) under the grammar in nats, the mood summed out, float64 (B,); -inf if illegal.

    With complete=False: the log-probability that a review begins with the text, so that
    log_probability(whole) - log_probability(prompt, complete=False) is that of the completion.
    """
    _, logp_BM = _walk([text.split() for text in texts], complete=complete)
    return np.logaddexp.reduce(logp_BM, axis=1)


def judged(
    *,
    n: int,
    seed: int,
    annotator: Callable[..., Any],
    responses: int = 4,
    broken: float = 0.0,
) -> list[dict[str, Any]]:
    """What an annotator says of completions of n prompts, those of `prompts(n=n, seed=seed)`.

    One record a label, best to worst, with the true scores beside them. annotator: (score_K1, rng)
    -> labels of two responses or more, as in `annotators`. broken: the share of completions in
    which one word is another, any one of the vocabulary; most of those are no reviews.
    """
    records, rng = prompts(n=n, seed=seed), np.random.default_rng(seed)
    drawn = completions(records, n=responses, seed=seed)
    texts = [[_broken(text, broken, rng) for text in several] for several in drawn]
    flat = [text for several in texts for text in several]
    repeated = [record for record in records for _ in range(responses)]
    score_BK = reward(repeated, flat).reshape(n, responses)
    found = []
    for record, several, score_K in zip(records, texts, score_BK, strict=True):
        for label in annotator(score_K[:, None], rng):
            ranked = [several[k] for k in label.order]
            scores = {"reward": score_K[list(label.order)].tolist()}
            found.append({**record, "responses": ranked, "scores": scores})
    return found


def _broken(text: str, rate: float, rng: np.random.Generator) -> str:
    words = text.split()
    if rng.random() < rate:
        words[rng.integers(len(words))] = SPOKEN[rng.integers(len(SPOKEN))]
    return " ".join(words)


def entropy(*, n: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """Entropy of a completion given its prompt, nats with <eos>: (estimate, standard error).

    No model's loss per response on `reviews` can be lower in expectation.
    """
    records = reviews(n=n, seed=seed)
    whole = [f"{record['prompt']} {record['responses'][0]}" for record in records]
    begun = [record["prompt"] for record in records]
    nats_B = log_probability(begun, complete=False) - log_probability(whole)
    return float(nats_B.mean()), float(nats_B.std() / math.sqrt(n))


@functools.cache
def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a word, split at spaces; decoding joins the words by single spaces.

    There is no <unk>: encoding a word outside VOCABULARY is an error, because a model trained
    here knows nothing of it.
    """
    import tokenizers
    import transformers

    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(INDEX))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _draw(state_B: np.ndarray, mood_B: np.ndarray, rng: np.random.Generator) -> list[list[str]]:
    """The words that follow each state until <eos>, which is left out."""
    table = grammar.automaton()
    states, vocabulary = table.next_QV.shape
    state_B = state_B.copy()
    ids_BT = np.full((len(state_B), table.longest), INDEX[PAD])
    for t in range(table.longest):
        writing = np.flatnonzero(state_B != table.end)
        row = mood_B[writing] * states + state_B[writing]
        # 24 random bits: row + u is exact in float64 and stays below row + 1.
        u = rng.random(len(row), dtype=np.float32).astype(np.float64)
        token = np.searchsorted(table.cumulative, row + u, side="right") - row * vocabulary
        ids_BT[writing, t] = token
        state_B[writing] = table.next_QV[state_B[writing], token]
    length_B = (ids_BT != INDEX[PAD]).sum(axis=1) - 1
    return [
        [VOCABULARY[i] for i in row[:length]]
        for row, length in zip(ids_BT.tolist(), length_B.tolist(), strict=True)
    ]


def _walk(
    texts: Sequence[Sequence[str]], *, complete: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The state after each text and log P(mood, text) (B, M); complete: <eos> is read as well."""
    table = grammar.automaton()
    state_B = np.zeros(len(texts), np.int64)
    logp_BM = np.full((len(texts), grammar.MOODS), -math.log(grammar.MOODS))
    if not texts:
        return state_B, logp_BM
    # A longer text is illegal by its length alone: one word too many is enough to read.
    rows = [[WORDS.get(word, FOREIGN) for word in text[: table.longest]] for text in texts]
    rows = [[*row, INDEX[EOS]] for row in rows] if complete else rows
    length_B = np.array([len(row) for row in rows])
    ids_BT = np.full((len(rows), length_B.max()), INDEX[PAD])
    ids_BT[np.arange(ids_BT.shape[1])[None] < length_B[:, None]] = [i for row in rows for i in row]
    for t in range(ids_BT.shape[1]):
        reading = np.flatnonzero(t < length_B)
        here, token = state_B[reading], ids_BT[reading, t]
        logp_BM[reading] += table.logp_QVM[here, token]
        state_B[reading] = table.next_QV[here, token]
    return state_B, logp_BM


def _sentiment(text: Sequence[str]) -> float:
    """The sum of the values that a grammatical text expresses."""
    total, factor, sign = 0.0, 1.0, 1.0
    said: dict[str, int] = {}
    for word in text:
        if word in grammar.VALENCE:
            times = said.get(word, 0)
            said[word] = times + 1
            total += sign * factor * grammar.VALENCE[word] * REPEAT**times
            factor = 1.0
        elif word in grammar.JOINTS:  # "and" inside a clause comes before no negated word
            sign = 1.0
        elif word in grammar.NEGATORS:
            sign = NEGATION
        else:
            factor = grammar.MULTIPLIER.get(word, factor)
    return total
