"""The sentiment world against hand computation, exact recursions and its mirror symmetry."""

import functools
import math
from itertools import combinations

import numpy as np
import pytest

from dpo_jax.worlds import annotators, grammar, sentiment

N = 20_000


@functools.cache
def sampled():
    """(records, whole texts, rewards) of N reviews that the tests share."""
    records = sentiment.reviews(n=N, seed=0)
    texts = [f"{record['prompt']} {record['responses'][0]}" for record in records]
    rewards = sentiment.reward(records, [record["responses"][0] for record in records])
    return records, texts, rewards


@functools.cache
def partners():
    """Every judging word -> its mirror."""
    pairs = [pair[1:] for pairs in grammar.JUDGING.values() for pair in pairs]
    return {kind: harsh for kind, harsh in pairs} | {harsh: kind for kind, harsh in pairs}


def mirrored(text: str) -> str:
    """The text with every judging word exchanged for its partner."""
    return " ".join(partners().get(word, word) for word in text.split())


def scored(text):
    """The reward of a whole review, which may be cut anywhere."""
    return sentiment.reward([{"prompt": text}], [""])[0]


def test_log_probability_is_the_sum_over_moods_of_the_hand_written_product():
    kind = grammar.KIND
    line = 1 / len(grammar.FRAMES)
    # `without an adverb` is half of its line; "nobody" turns the mood round for "loved".
    harsh_adjective = line / 2 / 12 * 0.8 * (1 - kind) / 14
    negated_verb = line * 0.8 * (1 - kind) / 5 / 22
    unnegated_verb = line * 0.8 * kind / 5 / 5 / 2 / 22  # one of five WHO, no adverb
    end = 1 - grammar.THIRD
    assert sentiment.log_probability(
        ["the plot was boring . nobody loved the jokes ."]
    ) == pytest.approx(
        math.log(np.mean(harsh_adjective * grammar.JOINTS["."] * negated_verb * end)), abs=1e-12
    )
    assert sentiment.log_probability(
        ["the plot was boring but nobody loved the jokes ."]
    ) == pytest.approx(
        math.log(np.mean(harsh_adjective * grammar.JOINTS["but"] * negated_verb[::-1] * end)),
        abs=1e-12,
    )
    # After "but" only its own clause is turned round; the third clause is the last.
    expected = np.mean(
        harsh_adjective
        * grammar.JOINTS["but"]
        * negated_verb[::-1]
        * (grammar.THIRD * grammar.JOINTS["and"])
        * unnegated_verb
    )
    assert sentiment.log_probability(
        ["the plot was boring but nobody loved the jokes and we loved the jokes ."]
    ) == pytest.approx(math.log(expected), abs=1e-12)


def test_next_words_share_the_probability_of_what_was_read():
    rng = np.random.default_rng(5)
    begun = [text.split()[: rng.integers(len(text.split()) + 1)] for text in sampled()[1][:30]]
    words = grammar.VOCABULARY[3:]
    for prefix in begun:
        following = [" ".join([*prefix, word]) for word in words]
        p_next = np.exp(sentiment.log_probability(following, complete=False)).sum()
        p_end = np.exp(sentiment.log_probability([" ".join(prefix)]))[0]
        p_prefix = np.exp(sentiment.log_probability([" ".join(prefix)], complete=False))[0]
        assert p_next + p_end == pytest.approx(p_prefix, rel=1e-12)


def test_samples_follow_log_probability():
    starts, counts = np.unique(
        [" ".join(text.split()[:3]) for text in sampled()[1]], return_counts=True
    )
    p = np.exp(sentiment.log_probability(starts.tolist(), complete=False))
    common = p * N > 50
    assert common.sum() > 50
    z = (counts - N * p)[common] / np.sqrt(N * p * (1 - p))[common]
    # About 100 standard normals, weakly dependent: their squares have mean 1 +- sqrt(2 / 100).
    assert np.abs(z).max() < 4.5
    assert np.mean(z**2) == pytest.approx(1, abs=4.5 * math.sqrt(2 / common.sum()))


def test_entropy_and_length_agree_with_exact_recursions():
    table = grammar.automaton()
    p_QVM = np.exp(table.logp_QVM)
    surprise_QM = -np.where(p_QVM > 0, p_QVM * np.log(np.maximum(p_QVM, 1e-300)), 0).sum(1)
    nats_QM = np.zeros_like(surprise_QM)  # to come after a state, the mood known
    words_QM = np.zeros_like(surprise_QM)
    reading = (np.arange(len(nats_QM)) != table.end)[:, None]
    for _ in range(table.longest):
        nats_QM = surprise_QM + np.einsum("qvm,qvm->qm", p_QVM, nats_QM[table.next_QV])
        words_QM = reading + np.einsum("qvm,qvm->qm", p_QVM, words_QM[table.next_QV])
    texts = sampled()[1]
    nats_B = -sentiment.log_probability(texts)
    error = 4.5 * nats_B.std() / math.sqrt(N)
    known_mood = nats_QM[0].mean()
    # H(text | mood) <= H(text) <= H(text | mood) + H(mood)
    assert known_mood - error < nats_B.mean() < known_mood + math.log(grammar.MOODS) + error
    assert nats_B.mean() == pytest.approx(29.54, abs=error)
    words_B = np.array([len(text.split()) + 1 for text in texts])
    assert words_B.mean() == pytest.approx(
        words_QM[0].mean(), abs=4.5 * words_B.std() / math.sqrt(N)
    )
    assert (words_B.min(), words_B.max()) == (11, table.longest) == (11, 28)


def test_entropy_of_completions():
    nats, error = sentiment.entropy(n=N, seed=3)
    assert nats == pytest.approx(20.07, abs=4.5 * error)
    assert error < 0.1


def test_mirror_keeps_the_probability_and_negates_the_reward():
    _, texts, rewards = sampled()
    mirror = [mirrored(text) for text in texts[:2000]]
    assert mirror != texts[:2000]
    np.testing.assert_allclose(
        sentiment.log_probability(mirror), sentiment.log_probability(texts[:2000]), rtol=1e-12
    )
    negated = sentiment.reward([{"prompt": text} for text in mirror], [""] * 2000)
    np.testing.assert_allclose(negated, -rewards[:2000], atol=1e-12)


def test_reward_statistics():
    _, texts, rewards = sampled()
    # Exactly 0 by the mirror: mean, skewness and the covariance with the length.
    assert abs(rewards.mean()) < 4.5 * rewards.std() / math.sqrt(N)
    lengths = np.array([len(text.split()) for text in texts])
    assert abs(np.corrcoef(lengths, rewards)[0, 1]) < 4.5 / math.sqrt(N)
    # Long reviews feel more strongly, but mildly so: room for a length bias, not a shortcut.
    assert 0 < np.corrcoef(lengths, np.abs(rewards))[0, 1] < 0.25
    excess = np.mean((rewards / rewards.std()) ** 4) - 3
    assert rewards.std() == pytest.approx(
        1.944, abs=4.5 * rewards.std() * math.sqrt((excess + 2) / (4 * N))
    )
    # One hump: the further from 0, the rarer.
    shares = np.histogram(np.abs(rewards), bins=[0, 1, 2, 3, 4, 5, 6])[0] / N
    assert (np.diff(shares) < 0).all()
    # The price of breaking the grammar is near the worst percentile of the reviews.
    assert np.mean(rewards < sentiment.FLOOR) == pytest.approx(0.01, abs=4.5 * math.sqrt(0.01 / N))


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("the plot was boring . the cast was superb .", -1.4 + 1.9),
        ("the plot was totally boring . the cast was slightly superb .", -1.4 * 1.6 + 1.9 * 0.4),
        # The negator ends with its clause, whatever joins them.
        ("the plot was not boring . the cast was bad .", 1.4 * 0.75 - 0.8),
        ("the plot was never very boring but the cast was bad .", 1.4 * 1.3 * 0.75 - 0.8),
        ("nobody loved the plot and i truly loved the cast .", -1.6 * 0.75 + 1.6 * 1.4 * 0.3),
        ("neither the plot nor the songs were thin . we whispered during this film .", 0.3),
        # Repeats shrink whatever their sign.
        (
            "the plot was bad . the cast was bad . the story was not bad .",
            -0.8 - 0.8 * 0.3 + 0.8 * 0.75 * 0.09,
        ),
        # An adverb is spent on a neutral word too.
        ("the plot was totally long . the superb cast made it mildly dark .", 1.9),
        ("it had bad jokes and good songs . you should not skip this film .", 1.0 * 0.75),
        ("my mother left the cinema rather furious . critics cheered during this film .", 0.1),
        ("this remake was hardly a chore . watching this remake was a joy .", 1.3 * 0.75 + 1.6),
    ],
)
def test_reward_by_hand(text, total):
    expected = 6 * math.tanh(total / 6)
    words = text.split()
    for cut in range(len(words) + 1):  # the reward is of prompt + completion, wherever it is cut
        record = {"prompt": " ".join(words[:cut])}
        assert sentiment.reward([record], [" ".join(words[cut:])])[0] == pytest.approx(
            expected, abs=1e-12
        )


def test_every_sample_is_grammatical():
    texts = sampled()[1]
    assert np.isfinite(sentiment.log_probability(texts)).all()
    assert all(sentiment.grammatical(text) for text in texts[:200])
    assert len(set(texts)) > 0.999 * N


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the plot was boring .",
        "the plot was boring . the cast was superb",
        "the plot was boring the cast was superb .",
        "the plot was boring . . the cast was superb .",
        "the plot was boring . the cast was superb . .",
        "the plot were boring . the cast was superb .",
        "the plot was boring . the cast was banana .",
        "the plot was boring . the cast was superb . <eos>",
        "<bos> the plot was boring . the cast was superb .",
        "the plot was boring . <pad> the cast was superb .",
        "The plot was boring . the cast was superb .",
        " . ".join(["the plot was boring"] * 4) + " .",
        " . ".join(["the plot was boring"] * 40) + " .",
    ],
)
def test_ungrammatical(text):
    assert not sentiment.grammatical(text)
    assert sentiment.log_probability([text])[0] == -math.inf
    assert scored(text) == sentiment.FLOOR


@pytest.mark.parametrize("word", ["<eos>", "<pad>", "<bos>", "banana"])
def test_no_review_begins_with_a_special_or_unknown_word(word):
    begun = [f"the plot was boring . the cast was superb . {word}", f"{word} the plot", word]
    assert (sentiment.log_probability(begun, complete=False) == -math.inf).all()


@pytest.mark.parametrize("luck", [0.0, 1 - 2.0**-24])
def test_extreme_luck_draws_possible_words(luck):
    class Luck(np.random.Generator):
        """Draws the least or the greatest uniform that a generator can, again and again."""

        def random(self, size, dtype):
            return np.full(size, luck, dtype)

    moods = np.arange(grammar.MOODS)
    texts = sentiment._draw(np.zeros_like(moods), moods, Luck(np.random.PCG64(0)))
    assert all(sentiment.grammatical(" ".join(text)) for text in texts)


def test_a_review_cut_short_is_grammatical_only_where_it_may_end():
    for text in sampled()[1][:100]:
        words = text.split()
        begun = [" ".join(words[:cut]) for cut in range(len(words))]
        whole = np.flatnonzero(np.isfinite(sentiment.log_probability(begun)))
        assert all(words[cut - 1] == "." and len(words) - cut >= 5 for cut in whole)
    whole = "the plot was boring . the cast was superb . the songs were good ."
    assert sentiment.grammatical(whole)
    assert sentiment.grammatical(" ".join(whole.split()[:10]))


def test_seeds_repeat_and_are_independent():
    first, again = sentiment.reviews(n=500, seed=7), sentiment.reviews(n=500, seed=7)
    other = sentiment.reviews(n=500, seed=8)
    assert first == again
    texts, others = ({r["prompt"] + r["responses"][0] for r in some} for some in (first, other))
    assert not texts & others
    assert sentiment.prompts(n=500, seed=7) == [{"prompt": r["prompt"]} for r in first]
    assert sentiment.reviews(n=0, seed=0) == []


def test_prompts_are_the_first_two_to_eight_words_equally_often():
    records, _, _ = sampled()
    lengths, counts = np.unique([len(r["prompt"].split()) for r in records], return_counts=True)
    assert lengths.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert np.abs(counts - N / 7).max() < 4.5 * math.sqrt(N * 1 / 7 * 6 / 7)
    assert min(len(r["responses"][0].split()) for r in records) >= 2


def test_completions_follow_the_conditional_law():
    prompt = "the plot was boring and i loathed the script . the jokes were"
    n = 4000
    drawn = sentiment.completions([{"prompt": prompt}], n=n, seed=0)[0]
    assert all(sentiment.grammatical(f"{prompt} {text}") for text in drawn[:100])
    adjectives = {
        "kind": [pair[1] for pair in grammar.JUDGING["ADJ"]],
        "harsh": [pair[2] for pair in grammar.JUDGING["ADJ"]],
    }
    p = {
        name: np.exp(
            sentiment.log_probability([f"{prompt} {word}" for word in words], complete=False)
            - sentiment.log_probability([prompt], complete=False)
        ).sum()
        for name, words in adjectives.items()
    }
    assert p["harsh"] > 2 * p["kind"]  # the prompt tells the mood
    for name, words in adjectives.items():
        count = sum(text.split()[0] in words for text in drawn)
        assert abs(count - n * p[name]) < 4.5 * math.sqrt(n * p[name] * (1 - p[name]))


@pytest.mark.parametrize(
    ("annotator", "responses", "size"),
    [(annotators.bradley_terry, 2, 2), (annotators.plackett_luce, 4, 4)],
)
def test_judged_completions_are_in_order_as_often_as_bradley_terry_says(annotator, responses, size):
    """Of every pair of a ranking too; to four standard errors over prompts."""
    records = sentiment.judged(n=1500, seed=4, annotator=annotator, responses=responses)
    assert [r["prompt"] for r in records] == [
        r["prompt"] for r in sentiment.prompts(n=1500, seed=4)
    ]
    score_BK = np.array([record["scores"]["reward"] for record in records])
    assert score_BK.shape == (1500, size)
    for record, score_K in zip(records[:50], score_BK, strict=False):
        np.testing.assert_array_equal(
            sentiment.reward([record] * size, record["responses"]), score_K
        )
    gap_BP = np.stack([score_BK[:, i] - score_BK[:, j] for i, j in combinations(range(size), 2)], 1)
    # that a pair of distance d came out in order has probability sigmoid(|d|)
    miss_B = ((gap_BP > 0) + 0.5 * (gap_BP == 0) - 1 / (1 + np.exp(-np.abs(gap_BP)))).mean(axis=1)
    assert abs(miss_B.mean()) < 4 * miss_B.std() / np.sqrt(1500)


def test_broken_completions_have_another_word():
    """One in a third of them, which mostly ends the review; the labels go by what is written."""
    options = {"n": 300, "seed": 4, "annotator": annotators.noiseless, "responses": 2}
    whole, broken = sentiment.judged(**options), sentiment.judged(**options, broken=1 / 3)
    assert all(sentiment.legal([r] * 2, r["responses"]).all() for r in whole)
    changed = 0
    for before, after in zip(whole, broken, strict=True):
        gone = {*before["responses"]} - {*after["responses"]}
        for old in gone:
            words = old.split()
            others = [new.split() for new in after["responses"]]
            differing = [
                sum(a != b for a, b in zip(words, new, strict=True))
                for new in others
                if len(new) == len(words)
            ]
            assert min(differing) == 1
        changed += len(gone)
        assert after["scores"]["reward"][0] >= after["scores"]["reward"][1]
        true = sentiment.reward([after] * 2, after["responses"])
        np.testing.assert_array_equal(true, after["scores"]["reward"])
    assert abs(changed - 200) < 4 * np.sqrt(600 * 2 / 9)
    legal = np.concatenate([sentiment.legal([r] * 2, r["responses"]) for r in broken])
    assert (1 - legal).sum() > 0.7 * changed


def test_completions_of_what_begins_no_review():
    with pytest.raises(ValueError, match="no review begins with 'plot the'"):
        sentiment.completions([{"prompt": "the plot"}, {"prompt": "plot the"}], n=1, seed=0)


def test_reward_refuses_a_missing_response():
    with pytest.raises(ValueError, match="shorter"):
        sentiment.reward(sentiment.prompts(n=2, seed=0), ["was boring ."])


@pytest.fixture
def frame(monkeypatch):
    """Compiles the grammar with more frames; the caches are emptied before and after."""

    def clear():
        for cache in (grammar.automaton, grammar.frames, grammar._branches):
            cache.cache_clear()

    def build(*lines):
        clear()
        monkeypatch.setattr(grammar, "FRAMES", [*grammar.FRAMES, *lines])
        return grammar.automaton()

    yield build
    clear()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("the PART was", "is a prefix of"),
        ("the FILM was ADJ from start to finish today", "is a prefix of"),
        ("nobody JUDGED the THING", "stands twice"),
        ("nobody JUDGED the PART", "is ambiguous after"),
    ],
)
def test_an_ambiguous_grammar_is_not_built(frame, line, message):
    with pytest.raises(AssertionError, match=message):
        frame(line)


def test_one_more_frame_builds(frame):
    places = len(frame().places)
    # Two new places behind "nobody", in each of the five kinds of clause.
    assert len(frame("nobody REACTED during THING").places) == places + 2 * 5


def test_no_word_has_two_meanings():
    judging = [word for pairs in grammar.JUDGING.values() for pair in pairs for word in pair[1:]]
    neutral = [word for words in grammar.NEUTRAL.values() for word in words]
    assert len(grammar.VALENCE) == len(judging) + len(neutral) == len({*judging, *neutral})
    meanings = [grammar.VALENCE, grammar.MULTIPLIER, grammar.NEGATORS, grammar.JOINTS]
    assert len({word for words in meanings for word in words}) == sum(map(len, meanings))
    for words in grammar.ADVERBS.values():
        assert all(grammar.MULTIPLIER[word] == factor for word, factor in words.items())
    articled = [*grammar.ADVERBS["ADV"], *grammar.NEUTRAL["ADJ"], *grammar.NEUTRAL["TREAT"]]
    articled += [
        word for name in ("ADJ", "TREAT") for pair in grammar.JUDGING[name] for word in pair[1:]
    ]
    assert not [word for word in articled if word[0] in "aeiou"]  # "a", never "an"
    assert 150 <= len(sentiment.VOCABULARY) <= 300
    assert len(set(sentiment.VOCABULARY)) == len(sentiment.VOCABULARY)


def test_tokenizer_is_one_token_a_word():
    tokenizer = sentiment.tokenizer()
    assert tokenizer is sentiment.tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [*sentiment.VOCABULARY]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in sampled()[1][:50]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_tokenizer_refuses_unknown_words():
    with pytest.raises(Exception, match="UNK"):
        sentiment.tokenizer()("the banana was superb")
