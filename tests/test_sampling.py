"""The sampler against full forward passes, its own log-probs against the packed ones, its cuts."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import CONFIG, MODEL

from dpo_jax import sampling
from dpo_jax.data.packing import pack
from dpo_jax.evaluate import completions
from dpo_jax.logprobs import token_logps
from dpo_jax.models import transformer
from dpo_jax.models.lora import Lora
from dpo_jax.models.transformer import Config, decoder
from dpo_jax.parallel import make_mesh
from dpo_jax.sampling import keep_top_k, keep_top_p, sample
from dpo_jax.structs import BadInput, Group
from dpo_jax.worlds import sentiment

# strong enough that tokens differ in probability and depend on what stands before them
PARAMS = jax.tree.map(
    lambda x: x + 0.15 * jax.random.normal(jax.random.key(5), x.shape),
    MODEL.init(jax.random.key(0)),
)
KEY = jax.random.key(7)
EOS = 3
NEVER = -1  # an eos that is no token
LENGTHS = (1, 5, 16, 17, 4)  # over the border of the padding of prompts
PROMPTS = [
    np.random.default_rng(i).integers(4, CONFIG.V, size=length).astype(np.int32)
    for i, length in enumerate(LENGTHS)
]


@jax.jit
def all_logits(tokens_RT: jax.Array) -> jax.Array:
    """Logits after every place, from one forward pass without a cache."""
    T = tokens_RT.shape[1]
    hidden_RTD, _ = MODEL.hidden(PARAMS, tokens_RT, jnp.arange(T)[None, :], jnp.full((1, T), T))
    return jax.vmap(MODEL.unembed, (None, 0))(PARAMS, hidden_RTD)


def next_logits(ids: np.ndarray) -> np.ndarray:
    """Logits of the token after ids; what is filled up behind them is not seen."""
    tokens_RT = np.zeros((1, 24), np.int32)
    tokens_RT[0, : len(ids)] = ids
    return np.asarray(all_logits(tokens_RT), np.float64)[0, len(ids) - 1]


def softmax(logit_V: np.ndarray) -> np.ndarray:
    weight_V = np.exp(logit_V - logit_V.max())
    return weight_V / weight_V.sum()


def assert_equal(some, others) -> None:
    """The same tokens, log-probs within rounding."""
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], atol=1e-5)


def flat(samples) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, log-probs) of every response in order."""
    pairs = zip(samples.responses, samples.logps, strict=True)
    return [pair for tokens, logps in pairs for pair in zip(tokens, logps, strict=True)]


def drawn(prompts=PROMPTS, **options):
    return sample(MODEL, PARAMS, prompts, **{"key": KEY, "eos": EOS, "max_tokens": 6, **options})


def test_greedy_is_argmax_of_whole_forward_passes():
    greedy = drawn(temperature=0, eos=NEVER, max_tokens=4)
    different = set()
    for prompt, (tokens, logps) in zip(PROMPTS, flat(greedy), strict=True):
        ids = prompt
        for token, logp in zip(tokens, logps, strict=True):
            logit_V = next_logits(ids)
            assert token == logit_V.argmax()
            assert logp == pytest.approx(np.log(softmax(logit_V)[token]), abs=1e-4)
            ids = np.append(ids, token)
            different.add(int(token))
    assert len(different) > 2


def test_samples_depend_on_nothing_but_the_record_and_its_number():
    """Not on batch size, on order, on the other prompts (nor their length), nor on n."""
    whole = flat(drawn(n=3))
    assert_equal(flat(drawn(n=3, rows=1)), whole)  # one prompt at a time
    assert_equal(flat(drawn(n=3, rows=7)), whole)  # two, and the last batch is not full
    backwards = drawn(PROMPTS[::-1], n=3, records=range(4, -1, -1))
    assert_equal(flat(backwards), [x for i in (4, 3, 2, 1, 0) for x in whole[3 * i : 3 * i + 3]])
    for i, prompt in enumerate(PROMPTS):
        assert_equal(flat(drawn([prompt], n=3, records=[i])), whole[3 * i : 3 * i + 3])
    assert_equal(flat(drawn(n=5))[:2], whole[:2])
    others = flat(drawn(n=3, records=range(5, 10)))
    assert [tokens.tolist() for tokens, _ in others] != [tokens.tolist() for tokens, _ in whole]
    assert len({tokens.tobytes() for tokens, _ in whole[:3]}) > 1  # samples of one prompt differ


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_packed_samples(temperature):
    """Those of the whole policy at that temperature, though top-k and top-p cut the draw."""
    samples = drawn(n=2, temperature=temperature, top_k=9, top_p=0.95)
    groups = [Group(*pair) for pair in zip(PROMPTS, samples.responses, strict=True)]
    batch = pack(groups, row_tokens=64)
    logp_RN = np.asarray(token_logps(MODEL, PARAMS, batch, temperature=temperature))
    for row, slot in zip(*np.nonzero(batch.record_RG >= 0), strict=True):
        for k in range(2):
            expected = samples.logps[batch.record_RG[row, slot]][k]
            found = logp_RN[row][batch.slot_RN[row] == 2 * slot + k]
            np.testing.assert_allclose(found, expected, atol=1e-4)


def by_blocks(key: jax.Array, logit_V: np.ndarray, size: int) -> int:
    """A draw in two, block by block: the obvious way."""
    of_block, of_id = jax.random.split(key)
    blocks = [logit_V[start : start + size] for start in range(0, len(logit_V), size)]
    mass = np.array([np.sum(np.exp(block)) for block in blocks])
    noise = np.array(jax.random.gumbel(of_block, mass.shape))
    best = int(np.argmax(noise + np.log(mass, where=mass > 0, out=np.full_like(mass, -np.inf))))
    noise = np.array(jax.random.gumbel(of_id, (size,)))[: len(blocks[best])]
    return size * best + int(np.argmax(blocks[best] + noise))


@pytest.mark.parametrize(("V", "size"), [(65, 8), (128, 16), (300, 16)])
def test_of_many_ids_a_block_is_drawn_and_one_of_the_block(V, size):
    """With blocks of which nothing is left, and a last one that is not full."""
    logit_RV = jax.random.normal(jax.random.key(1), (64, V)).at[:, V // 8 : V // 2].set(-jnp.inf)
    keys_R = jax.random.split(jax.random.key(2), 64)
    expected = [
        by_blocks(key, np.asarray(row), size) for key, row in zip(keys_R, logit_RV, strict=True)
    ]
    np.testing.assert_array_equal(sampling.drawn(keys_R, logit_RV), expected)


@pytest.mark.parametrize("V", [256, 300])
def test_a_mesh_changes_no_draw(V):
    """Though blocks of ids are parted over its devices, and 19 of them do not divide."""
    mesh = make_mesh(2, 1, 4)
    logit_RV = jax.random.normal(jax.random.key(1), (64, V))
    keys_R = jax.random.split(jax.random.key(2), 64)
    expected_R = sampling.drawn(keys_R, logit_RV)
    parted = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    with jax.set_mesh(mesh):
        found_R = jax.jit(sampling.drawn)(keys_R, jax.device_put(logit_RV, parted))
    np.testing.assert_array_equal(found_R, expected_R)


def test_of_few_ids_draws_are_those_of_categorical():
    logit_RV = jax.random.normal(jax.random.key(1), (64, 50)).at[:, 7:20].set(-jnp.inf)
    keys_R = jax.random.split(jax.random.key(2), 64)
    expected_R = jax.vmap(jax.random.categorical)(keys_R, logit_RV)
    np.testing.assert_array_equal(sampling.drawn(keys_R, logit_RV), expected_R)


def test_draws_follow_the_softmax_and_rounding_moves_few():
    logit_V = 2 * jax.random.normal(jax.random.key(3), (80,)).at[8:30].set(-jnp.inf)
    count = 200_000
    logit_RV = jnp.broadcast_to(logit_V, (count, 80))
    keys_R = jax.random.split(jax.random.key(4), count)
    found_R = np.asarray(sampling.drawn(keys_R, logit_RV))
    expected_V = softmax(np.asarray(logit_V, np.float64))
    error_V = np.sqrt(expected_V * (1 - expected_V) / count)
    found_V = np.bincount(found_R, minlength=80) / count
    assert (np.abs(found_V - expected_V) <= 4 * error_V).all()
    noise_RV = 1e-6 * jax.random.normal(jax.random.key(5), logit_RV.shape)
    assert np.mean(found_R != sampling.drawn(keys_R, logit_RV + noise_RV)) < 1e-4


def test_of_the_likeliest_the_first_is_taken():
    tied_RV = jnp.array([[0.0, 2.0, 2.0], [-jnp.inf, -1.0, -1.0]])
    np.testing.assert_array_equal(sampling.likeliest(tied_RV), [1, 1])


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_layers_one_after_another_draw_what_a_loop_does(lora, monkeypatch):
    """Their caches differ in form: one a layer, or one of all."""
    config = replace(CONFIG, L=3, windows=(4, 0, 7))

    def draws(unrolled: int):
        monkeypatch.setattr(transformer, "UNROLLED", unrolled)
        model = decoder(config, lora=lora)
        params = model.init(jax.random.key(0))
        options = {"key": KEY, "eos": NEVER, "max_tokens": 6, "n": 2}
        return flat(sample(model, params, PROMPTS, **options))

    assert_equal(draws(3), draws(0))


def test_eos_ends_a_response_and_changes_nothing_before_it():
    endless, ended = drawn(n=16, eos=NEVER, max_tokens=12), drawn(n=16, max_tokens=12)
    assert not endless.finished.any()
    assert 0 < ended.finished.mean() < 1
    pairs = zip(flat(endless), flat(ended), ended.finished.reshape(-1), strict=True)
    for (long, long_logp), (short, short_logp), finished in pairs:
        stop = np.flatnonzero(long == EOS)
        assert finished == (len(stop) > 0)
        assert len(short) == (stop[0] + 1 if finished else 12)
        np.testing.assert_array_equal(short, long[: len(short)])
        np.testing.assert_allclose(short_logp, long_logp[: len(short)], atol=1e-5)


def kept_by_loop(logit_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Indices that top-k, then top-p on what is left, keep: one token after the other."""
    order = sorted(range(len(logit_V)), key=lambda v: -logit_V[v])
    order = order[:top_k] if top_k else order
    weights, mass, kept = np.exp(logit_V[order] - logit_V[order].max()), 0.0, []
    for v, weight in zip(order, weights / weights.sum(), strict=True):
        if mass >= top_p:
            break
        kept.append(v)
        mass += weight
    return np.sort(kept)


def test_cuts_are_those_of_a_slow_loop():
    logit_RV = np.random.default_rng(0).normal(0, 2, (20, 17)).astype(np.float32)
    for top_k in (1, 3, 16, 17, 40):
        kept_RV = np.isfinite(keep_top_k(jnp.asarray(logit_RV), jnp.int32(top_k)))
        for kept_V, logit_V in zip(kept_RV, logit_RV, strict=True):
            np.testing.assert_array_equal(
                np.flatnonzero(kept_V), kept_by_loop(logit_V, top_k=top_k, top_p=1.0)
            )
    for top_p in (1e-6, 0.3, 0.7, 0.99):
        kept_RV = np.isfinite(keep_top_p(jnp.asarray(logit_RV), jnp.float32(top_p)))
        for kept_V, logit_V in zip(kept_RV, logit_RV, strict=True):
            np.testing.assert_array_equal(
                np.flatnonzero(kept_V), kept_by_loop(logit_V, top_k=0, top_p=top_p)
            )


def test_a_cut_leaves_the_kept_logits_as_they_were():
    logit_RV = jnp.asarray([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 1.0, 0.0]])
    np.testing.assert_array_equal(
        keep_top_k(logit_RV, jnp.int32(1)),
        [[-np.inf, 3, -np.inf, -np.inf], [5, 5, -np.inf, -np.inf]],  # a tie stays
    )
    np.testing.assert_array_equal(
        keep_top_p(logit_RV, jnp.float32(0.8)),  # 0.64 + 0.24 of the first row
        [[-np.inf, 3, -np.inf, 2], [5, 5, -np.inf, -np.inf]],
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 4, 1.0), (1.3, 9, 0.7)]
)
def test_first_tokens_are_drawn_as_often_as_they_should(temperature, top_k, top_p):
    count = 4000
    samples = drawn(
        PROMPTS[1:2],
        n=count,
        max_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    tokens = np.array([tokens[0] for tokens in samples.responses[0]])
    logit_V = next_logits(PROMPTS[1]) / temperature
    kept = kept_by_loop(logit_V, top_k, top_p)
    expected_V = np.zeros(CONFIG.V)
    expected_V[kept] = softmax(logit_V[kept])
    found_V = np.bincount(tokens, minlength=CONFIG.V) / count
    error_V = np.sqrt(expected_V * (1 - expected_V) / count)
    assert (np.abs(found_V - expected_V) <= 5 * error_V + 2 / count).all()
    assert (expected_V > 0.02).sum() > 2  # there was something to draw


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"n": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BadInput, match=r"temperature >= 0, top_k >= 0, 0 < top_p <= 1"):
        drawn(**options)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(BadInput, match=r"at least one token \(BOS"):
        drawn([PROMPTS[0], np.zeros(0, np.int32)])


def test_completions_count_tokens_and_decode_without_the_end():
    """A vocabulary padded beyond the tokenizer's: what has no text reads as nothing."""
    tokenizer = sentiment.tokenizer()
    model = decoder(Config(V=len(tokenizer) + 56, D=8, L=1, H=2, J=1, E=4, F=8))
    done = completions(
        model,
        model.init(jax.random.key(0)),
        {},
        [{"prompt": "the film"}, {"prompt": "this sequel was"}],
        tokenizer,
        rewards=(words,),
        key=KEY,
        n=3,
        max_tokens=5,
    )
    assert done.kl is None and done.tokens.shape == done.finished.shape == (2, 3)
    for i, texts in enumerate(done.texts):
        for k, text in enumerate(texts):
            assert "<eos>" not in text
            assert len(text.split()) <= done.tokens[i, k] <= 5
            assert done.rewards["words"][i, k] == len(text.split()) + 100 * i
    assert [row["prompt"] for row in done.rows(4)] == ["the film"] * 3 + ["this sequel was"] * 3


def words(records, responses):
    """The number of words, 100 more for the second prompt, so that a swap would show."""
    extra = [100 * ("sequel" in record["prompt"]) for record in records]
    return np.array([len(text.split()) for text in responses]) + np.array(extra)


PADDED = decoder(Config(V=24, D=8, L=1, H=2, J=1, E=4, F=8, tied=False))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 2}])
def test_ids_behind_the_vocabulary_are_never_drawn(options):
    """Though theirs are the largest logits; log-probs stay those of the whole policy."""
    params = PADDED.init(jax.random.key(0))
    params = {**params, "unembed_DV": params["unembed_DV"].at[:, 17:].multiply(30.0)}
    prompts = [np.array([4, 5], np.int32), np.array([6], np.int32)]
    given = {"key": KEY, "eos": NEVER, "n": 4, "max_tokens": 6, **options}
    free = sample(PADDED, params, prompts, **given)
    assert max(ids.max() for row in free.responses for ids in row) >= 17
    kept = sample(PADDED, params, prompts, vocabulary=17, **given)
    assert max(ids.max() for row in kept.responses for ids in row) < 17
    groups = [Group(*pair) for pair in zip(prompts, kept.responses, strict=True)]
    for i, group in enumerate(groups):
        batch = pack([group], row_tokens=32)
        logp_N = np.asarray(token_logps(PADDED, params, batch))[0]
        for k in range(4):
            expected = logp_N[batch.slot_RN[0] == k]
            np.testing.assert_allclose(kept.logps[i][k], expected, atol=1e-4)


def test_completions_draw_what_the_tokenizer_has():
    tokenizer = sentiment.tokenizer()
    size = len(tokenizer)
    model = decoder(Config(V=size + 56, D=8, L=1, H=2, J=1, E=4, F=8, tied=False))
    params = model.init(jax.random.key(0))
    params = {**params, "unembed_DV": params["unembed_DV"].at[:, size:].multiply(30.0)}
    done = completions(
        model,
        params,
        {},
        [{"prompt": "the film"}],
        tokenizer,
        rewards=(),
        key=KEY,
        n=8,
        max_tokens=5,
    )
    words = [len(text.split()) for text in done.texts[0]]
    np.testing.assert_array_equal(words, (done.tokens - done.finished)[0])  # every id is a word


def test_no_more_positions_than_a_learned_table_has():
    learned = Config(V=17, D=8, L=1, H=2, J=2, E=4, F=8, positions="learned", P=10)
    model = decoder(learned)
    params, prompts = model.init(jax.random.key(0)), [np.arange(4, 8, dtype=np.int32)]
    given = {"key": KEY, "eos": NEVER, "temperature": 0}
    (row,) = sample(model, params, prompts, max_tokens=6, **given).logps
    assert np.isfinite(row[0]).all()
    with pytest.raises(BadInput, match=r"evaluation.max_tokens=7 .* model.P=10"):
        sample(model, params, prompts, max_tokens=7, **given)


def test_few_prompts_fill_few_rows(monkeypatch):
    """A line on a terminal does not pay for 512."""
    seen = []
    whole = MODEL.hidden

    def counted(params, tokens_RT, *rest):
        seen.append(tokens_RT.shape[0])
        return whole(params, tokens_RT, *rest)

    model = MODEL._replace(hidden=counted)
    few = sample(model, PARAMS, PROMPTS[:3], key=KEY, eos=EOS, max_tokens=4, n=2)
    assert max(seen) == 8
    assert_equal(flat(few), flat(drawn(PROMPTS[:3], n=2, max_tokens=4)))


@pytest.mark.parametrize(
    ("unrolled", "mesh"),
    [(8, None), (0, None), (8, {"data": 2, "fsdp": 2, "tensor": 2}), (0, {"data": -1})],
)
def test_prompts_read_several_in_a_row_draw_what_lone_ones_do(unrolled, mesh, monkeypatch):
    """Rows of several are dealt out into a cache of their own, on the device that reads them."""
    monkeypatch.setattr(transformer, "UNROLLED", unrolled)
    model = decoder(replace(CONFIG, L=3, windows=(4, 0, 7)))
    params = jax.tree.map(
        lambda x: x + 0.15 * jax.random.normal(jax.random.key(5), x.shape),
        model.init(jax.random.key(0)),
    )
    options = {"key": KEY, "eos": EOS, "max_tokens": 6, "n": 2}
    lone = sample(model, params, PROMPTS, **options)
    monkeypatch.setattr(sampling, "PACKED", 1)
    devices = nullcontext() if mesh is None else jax.set_mesh(make_mesh(**mesh))
    with devices:
        assert_equal(flat(sample(model, params, PROMPTS, **options)), flat(lone))
        # a call for each two of them
        assert_equal(flat(sample(model, params, PROMPTS, rows=4, **options)), flat(lone))


def test_prompts_in_a_row_are_read_together(monkeypatch):
    """No more places than they fill, in eighths of the longest."""
    monkeypatch.setattr(sampling, "PACKED", 1)
    seen, whole = [], MODEL.hidden_only
    assert whole is not None

    def counted(params, at_RN, tokens_RT, *rest):
        seen.append(tokens_RT.shape)
        return whole(params, at_RN, tokens_RT, *rest)

    model = MODEL._replace(hidden_only=counted)
    assert_equal(
        flat(sample(model, PARAMS, PROMPTS, key=KEY, eos=EOS, max_tokens=4)),
        flat(drawn(max_tokens=4)),
    )
    ((R, T),) = set(seen)
    assert R * T < sum(LENGTHS) + 8 < len(PROMPTS) * 32
