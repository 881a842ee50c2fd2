"""A probabilistic grammar of short film reviews, compiled to an exact automaton.

A review is two or three clauses joined by ".", "and" or "but", then "." and <eos>. A clause fills
one of the FRAMES. Behind a review stands a mood, one of MOODS levels that nobody sees; it decides
how often a word that judges is a kind one. The clause after "but" turns the mood round, and so
does a negator for the words after it in its clause ("not dreadful" is what a good mood says).

The words that judge come in mirrored pairs of equal value. Exchanging every word for its partner
therefore keeps the probability of a review and negates its sentiment: the mean reward of the
language is exactly 0.

Given a state and a word the next state is unique, which is asserted when the tables are built, so
that the probability of a text is one walk. Two letters beside the house's: Q states of the
automaton, M moods.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# Words that judge: (value, word, its mirror of value -value). NEUTRAL words fill the same places.
JUDGING = {
    "ADJ": [
        (2.0, "brilliant", "dreadful"),
        (1.9, "superb", "horrible"),
        (1.8, "stunning", "terrible"),
        (1.7, "wonderful", "pathetic"),
        (1.6, "delightful", "painful"),
        (1.4, "gripping", "boring"),
        (1.3, "charming", "lifeless"),
        (1.2, "touching", "tedious"),
        (1.1, "clever", "clumsy"),
        (1.0, "lovely", "lazy"),
        (0.9, "funny", "bland"),
        (0.8, "good", "bad"),
        (0.6, "pleasant", "predictable"),
        (0.4, "decent", "thin"),
    ],
    "FEELING": [
        (1.5, "thrilled", "furious"),
        (1.1, "happy", "disappointed"),
        (0.7, "hopeful", "sleepy"),
    ],
    "JUDGED": [
        (1.8, "adored", "loathed"),
        (1.6, "loved", "hated"),
        (1.2, "enjoyed", "resented"),
        (1.0, "admired", "endured"),
        (0.8, "liked", "disliked"),
    ],
    "JUDGE": [
        (1.8, "adore", "loathe"),
        (1.6, "love", "hate"),
        (1.2, "enjoy", "resent"),
        (1.0, "admire", "endure"),
        (0.8, "like", "dislike"),
    ],
    "ADVISE": [
        (1.4, "recommend", "avoid"),
        (1.2, "praise", "mock"),
        (1.0, "revisit", "skip"),
    ],
    "REACTED": [
        (1.3, "cheered", "yawned"),
        (1.0, "laughed", "groaned"),
        (0.7, "smiled", "sighed"),
    ],
    "TREAT": [
        (1.6, "joy", "nightmare"),
        (1.3, "treat", "chore"),
        (1.0, "pleasure", "struggle"),
    ],
}
NEUTRAL = {
    "ADJ": ["long", "loud", "quiet", "modern", "familiar", "simple", "strange", "dark"],
    "FEELING": ["hungry", "thirsty"],
    "JUDGED": ["noticed", "studied", "discussed"],
    "JUDGE": ["notice", "study", "discuss"],
    "ADVISE": ["rent", "watch"],
    "REACTED": ["waited", "whispered"],
    "TREAT": ["ritual", "gamble"],
}
# Adverbs multiply the value of the judging word that follows. All adjectives, and the adverbs that
# stand before them, begin with a consonant: the grammar has no "an".
ADVERBS = {
    "ADV": {
        "totally": 1.6,
        "seriously": 1.5,
        "truly": 1.4,
        "very": 1.3,
        "simply": 1.2,
        "rather": 0.8,
        "fairly": 0.7,
        "mildly": 0.5,
        "slightly": 0.4,
    },
    "ADVV": {"thoroughly": 1.6, "truly": 1.4, "really": 1.3, "secretly": 0.8, "mostly": 0.6},
}
PLAIN = {
    "PART": (
        "acting plot script story ending pacing soundtrack dialogue camerawork editing cast finale"
    ).split(),
    "PARTS": (
        "jokes songs scenes costumes twists effects characters visuals performances villains"
    ).split(),
    "FILM": "film movie drama comedy thriller western sequel remake".split(),
    "WHO": "i we everyone critics audiences".split(),
    "PAL": "brother sister mother friend neighbour".split(),
    "DAY": "monday tuesday friday sunday".split(),
    "LINK": "felt seemed proved remained".split(),
    "NOT": "not never hardly".split(),
}
PLAIN["THING"] = PLAIN["PART"] + PLAIN["PARTS"]
NEGATORS = frozenset([*PLAIN["NOT"], "nobody", "nothing", "neither"])

# Capitals name a class of words, the rest stands for itself, (X) may be left out. All lines are
# equally likely at the start of a clause.
FRAMES = """
the PART was (ADV) ADJ
the PART was NOT (ADV) ADJ
the PART LINK (ADV) ADJ
the PARTS were (ADV) ADJ
the PARTS were NOT (ADV) ADJ
the PARTS LINK (ADV) ADJ
the PART and the PARTS were (ADV) ADJ
the ADJ PART made it (ADV) ADJ
the FILM was ADJ from start to finish
even the PARTS seemed (ADV) ADJ
neither the PART nor the PARTS were ADJ
it was a (ADV) ADJ FILM
it was NOT a ADJ FILM
it had ADJ PARTS and ADJ PARTS
this FILM was a TREAT
this FILM was NOT a TREAT
watching this FILM was a TREAT
WHO (ADVV) JUDGED the THING
WHO (ADVV) JUDGED this FILM on DAY
WHO did not JUDGE the THING
WHO would (not) ADVISE this FILM
WHO REACTED during this FILM
my PAL JUDGED the THING
my PAL left the cinema (ADV) FEELING
nobody JUDGED the THING
you will (not) JUDGE the THING
you should (not) ADVISE this FILM
there was nothing ADJ about the THING
there were ADJ PARTS in every scene
with its ADJ PART it LINK (ADV) ADJ
for a FILM it was (ADV) ADJ
""".strip().splitlines()

KIND = np.array([0.05, 0.25, 0.5, 0.75, 0.95])  # P(kind | judging and not neutral, mood)
MOODS = len(KIND)
NEUTRAL_SHARE = 0.2
JOINTS = {".": 0.56, "and": 0.22, "but": 0.22}
THIRD = 0.5  # share of reviews that have a third clause

JOINT, STOP, END = "joint", "stop", "end"  # places outside a clause
State = tuple[int, bool, tuple[str, ...] | str]  # clause, after "but", symbols read or a place


def _vocabulary() -> tuple[str, ...]:
    literals = [s.strip("()") for line in FRAMES for s in line.split() if s.strip("()").islower()]
    judging = [word for pairs in JUDGING.values() for pair in pairs for word in pair[1:]]
    others = [*NEUTRAL.values(), *ADVERBS.values(), *PLAIN.values(), JOINTS, literals]
    return (PAD, BOS, EOS, *dict.fromkeys([*judging, *itertools.chain(*others)]))


VOCABULARY = _vocabulary()
INDEX = {word: i for i, word in enumerate(VOCABULARY)}
VALENCE = {word: 0.0 for words in NEUTRAL.values() for word in words}
VALENCE |= {kind: value for pairs in JUDGING.values() for value, kind, _ in pairs}
VALENCE |= {harsh: -value for pairs in JUDGING.values() for value, _, harsh in pairs}
MULTIPLIER = {word: factor for words in ADVERBS.values() for word, factor in words.items()}


@functools.cache
def words(symbol: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The words a symbol of a frame may stand for, and their probabilities (words, M)."""
    if symbol not in JUDGING:
        listed = tuple(ADVERBS.get(symbol) or PLAIN.get(symbol) or [symbol])
        return listed, np.full((len(listed), MOODS), 1 / len(listed))
    pairs, neutral = JUDGING[symbol], NEUTRAL[symbol]
    kind = np.broadcast_to((1 - NEUTRAL_SHARE) * KIND / len(pairs), (len(pairs), MOODS))
    plain = np.full((len(neutral), MOODS), NEUTRAL_SHARE / len(neutral))
    listed = (*(pair[1] for pair in pairs), *(pair[2] for pair in pairs), *neutral)
    return listed, np.concatenate([kind, kind[:, ::-1], plain])


def _expand(line: str) -> list[tuple[str, ...]]:
    """The frames of a line, with and without each symbol in brackets."""
    choices = [[[], [s.strip("()")]] if s.startswith("(") else [[s]] for s in line.split()]
    return [tuple(itertools.chain(*choice)) for choice in itertools.product(*choices)]


@functools.cache
def frames() -> dict[tuple[str, ...], float]:
    """Every frame as a tuple of symbols, with its probability at the start of a clause."""
    expanded = [_expand(line) for line in FRAMES]
    weight = {frame: 1 / len(FRAMES) / len(some) for some in expanded for frame in some}
    assert len(weight) == sum(map(len, expanded)), "a frame stands twice in FRAMES"
    for frame in weight:
        prefix = next((frame[:i] for i in range(len(frame)) if frame[:i] in weight), None)
        assert prefix is None, f"frame {prefix} is a prefix of {frame}"
    return weight


@functools.cache
def _branches() -> dict[tuple[str, ...], dict[str, float]]:
    """The frames as a trie: the symbols read so far -> {next symbol: probability}."""
    trie: dict[tuple[str, ...], dict[str, float]] = {}
    for frame, weight in frames().items():
        for i, symbol in enumerate(frame):
            branch = trie.setdefault(frame[:i], {})
            branch[symbol] = branch.get(symbol, 0.0) + weight
    return {
        place: {symbol: weight / sum(branch.values()) for symbol, weight in branch.items()}
        for place, branch in trie.items()
    }


def _moves(state: State) -> list[tuple[str, float, State]]:
    """What may follow a state: (symbol, probability, next state)."""
    clause, flipped, place = state
    if place == END:  # absorbs, so that finished texts can stand in a rectangle
        return [(PAD, 1.0, state)]
    if place == STOP:
        last: State = (0, False, END)
        if clause == 2:
            return [(EOS, 1.0, last)]
        # "." after the second clause ended the review or goes on: Bayes' rule.
        more = THIRD * JOINTS["."] / (1 - THIRD + THIRD * JOINTS["."])
        go_on = _moves((2, False, ()))
        return [(EOS, 1 - more, last), *((s, more * p, to) for s, p, to in go_on)]
    if place == JOINT:
        stop: State = (clause, False, STOP)
        if clause == 2:
            return [(".", 1.0, stop)]
        more = 1.0 if clause == 0 else THIRD
        joints: dict[str, tuple[str, float, State]] = {
            s: (s, more * p, (clause + 1, s == "but", ())) for s, p in JOINTS.items()
        }
        if clause == 1:  # the review may end here, which a "." leaves open
            joints["."] = (".", 1 - more + more * JOINTS["."], stop)
        return [*joints.values()]
    assert isinstance(place, tuple)
    branch = _branches()[place]
    ends = {symbol: (*place, symbol) in frames() for symbol in branch}
    joint: State = (clause, False, JOINT)
    return [
        (symbol, weight, joint if ends[symbol] else (clause, flipped, (*place, symbol)))
        for symbol, weight in branch.items()
    ]


def _turned(state: State) -> bool:
    """Whether a word drawn here sees the mood turned round: by "but", by a negator, not by both."""
    _, flipped, place = state
    negated = isinstance(place, tuple) and any(NEGATORS.issuperset(words(s)[0]) for s in place)
    return flipped != negated


@dataclass(frozen=True, eq=False)
class Automaton:
    """The grammar as tables. State 0 is the start; `end` has read <eos>; `dead` is no review.

    next_QV: int32, the state after a word. logp_QVM: log P(word | state, mood).
    places: the meaning of each state. longest: words of the longest review, with <eos>.
    """

    next_QV: np.ndarray
    logp_QVM: np.ndarray
    places: tuple[State, ...]
    longest: int
    end: int
    dead: int

    @functools.cached_property
    def cumulative(self) -> np.ndarray:
        """Row r = mood * Q + state holds r + the distribution function over the words, flat.

        One sorted array: the word drawn by a uniform u is one binary search for r + u.
        """
        p_MQV = np.exp(np.moveaxis(self.logp_QVM, 2, 0))
        moods, states, vocabulary = p_MQV.shape
        p_RV = p_MQV.reshape(moods * states, vocabulary)
        cdf_RV = np.minimum(np.cumsum(p_RV, axis=1), 1.0)
        return (cdf_RV + np.arange(moods * states)[:, None]).ravel()


@functools.cache
def automaton() -> Automaton:
    """Compile the frames; asserts that the next state is unique and that rows sum to one."""
    number: dict[State, int] = {(0, False, ()): 0}
    moves: list[list[tuple[str, float, State]]] = []
    for state in (pending := [*number]):  # grows while it is read
        moves.append(_moves(state))
        for _, _, to in moves[-1]:
            if to not in number:
                number[to] = len(number)
                pending.append(to)
    dead = len(number)
    next_QV = np.full((dead + 1, len(VOCABULARY)), dead, np.int32)
    p_QVM = np.zeros((dead + 1, len(VOCABULARY), MOODS))
    for state, q in number.items():
        for symbol, weight, to in moves[q]:
            listed, p = words(symbol)
            ids = [INDEX[word] for word in listed]
            assert (next_QV[q, ids] == dead).all(), f"{symbol} is ambiguous after {state}"
            next_QV[q, ids] = number[to]
            p_QVM[q, ids] = weight * (p[:, ::-1] if _turned(state) else p)
    assert np.allclose(p_QVM[:dead].sum(axis=1), 1, atol=1e-12, rtol=0)
    with np.errstate(divide="ignore"):
        logp_QVM = np.log(p_QVM)
    longest = 3 * max(map(len, frames())) + 3 + 1
    return Automaton(next_QV, logp_QVM, tuple(number), longest, number[0, False, END], dead)
