"""Texts by three kinds of tokenizer: one BOS, one EOS that counts, nothing lost, nothing made."""

import random

import numpy as np
import pytest
from trained import KINDS

from dpo_jax.data.packing import pack
from dpo_jax.data.records import canonical
from dpo_jax.data.template import tokenize
from dpo_jax.data.tokens import controls_of, encoded, parted, side_by_side

TEXTS = (
    "Nobody knows!",
    " Four (4).",
    "  two  blanks\n\n\nand lines\n",
    "<s>",
    "</s>",
    "a</s><s> b <|im_start|>system\n",
    "<unk> <|im_end|><|im_end|>",
    "</s",
)
UNUSUAL = ("你好, あ", "é\u0301 👩‍👩", "\x00\x07", "\ufdd0 and </s>")  # bytes can spell them


def texts_of(kind: str) -> tuple[str, ...]:
    return TEXTS if kind == "unigram" else TEXTS + UNUSUAL


def same(found: str, text: str, kind: str) -> bool:
    """Whether a text came back; Unigram takes a blank at the start for the one it puts there."""
    return found == text or (kind == "unigram" and found.lstrip(" ") == text.lstrip(" "))


@pytest.mark.parametrize("kind", KINDS)
def test_one_bos_one_eos_and_every_text_comes_back(kind: str):
    tokenizer = KINDS[kind]()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    made = [t for t in tokenizer.all_special_ids if t != tokenizer.unk_token_id]
    for text in texts_of(kind):
        record = canonical({"prompt": text, "chosen": f"{text}1", "rejected": f"{text}2"}, "x:1")
        ((group,), counts) = tokenize([record], tokenizer, row_tokens=512)
        assert counts == {} and group.scored is None
        prompt = group.prompt.tolist()
        assert prompt[0] == bos and not set(prompt[1:]) & set(made)
        assert same(tokenizer.decode(prompt[1:]), text, kind)
        for number, response in enumerate(group.responses, 1):
            *body, end = response.tolist()
            assert end == eos and not set(body) & set(made)
            assert same(tokenizer.decode(body), f"{text}{number}", kind)
        batch = pack([group], row_tokens=512)
        scored = np.asarray(batch.target_RN)[np.asarray(batch.weight_RN) > 0].tolist()
        assert scored == [*group.responses[0], *group.responses[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_is_tokenised_as_transformers_does(kind: str):
    tokenizer = KINDS[kind]()
    texts = ["Who wrote it?", "two and two", "  a\n", "4 </", ""]
    for text, ids in zip(texts, encoded(texts, tokenizer), strict=True):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_side_by_side_are_the_text(kind: str):
    """Cut at random, no token crosses; cut between words, the tokens are those of the whole."""
    tokenizer, draw = KINDS[kind](), random.Random(kind)
    text = "The quick brown fox jumps over the lazy dog. Who wrote it, and why? Nobody knows!"
    for _ in range(50):
        cuts = sorted(draw.sample(range(1, len(text)), draw.randint(1, 5)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = side_by_side(pieces, tokenizer)
        assert tokenizer.decode(np.concatenate(found).tolist()) == text
        for piece, ids in zip(pieces, found, strict=True):
            spelt = "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
            assert spelt.replace("Ġ", " ").replace("▁", " ").strip() == piece.strip()
    words = ["Who", " wrote", " it", "?"]
    whole = tokenizer("".join(words), add_special_tokens=False)["input_ids"]
    assert np.concatenate(side_by_side(words, tokenizer)).tolist() == whole
    assert side_by_side(["why"], tokenizer)[0].tolist() == encoded(["why"], tokenizer)[0].tolist()


def test_a_pause_that_a_text_holds_is_not_taken():
    tokenizer = KINDS["byte level"]()
    pieces = ["a\ufdd0", "b"]
    found = side_by_side(pieces, tokenizer)
    assert [tokenizer.decode(ids.tolist()) for ids in found] == pieces


def test_eos_that_is_also_the_unknown_token_is_a_control_token():
    """As GPT-2 and Pythia have it: <|endoftext|> is BOS, EOS and unknown in one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([end, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=end, eos_token=end, unk_token=end
    )
    assert controls_of(tokenizer).ids.tolist() == [0]
    assert parted(f"a{end}b", tokenizer) == ["a<", "|endoftext|>b"]
    assert 0 not in encoded([f"a{end}b"], tokenizer)[0]
