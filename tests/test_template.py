"""Token ids: borders, BOS and EOS, truncation, and faults of content counted by reason."""

import json
from functools import lru_cache

import numpy as np
import pytest

from dpo_jax.data.packing import pack
from dpo_jax.data.sources import canonical, read
from dpo_jax.data.template import encode_prompt, tokenize
from dpo_jax.structs import BadInput

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh")
BOS, EOS, UNKNOWN = 1, 2, 3


@lru_cache
def words(*, bos: bool = True, eos: bool = True, pad_is_eos: bool = True):
    """A tokenizer of single letters between blanks, real but small."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(  # adds BOS to every text when asked
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    special = {"bos_token": "<bos>"} if bos else {}
    special |= {"eos_token": "<eos>"} if eos else {}
    pad = "<eos>" if pad_is_eos and eos else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token=pad, **special
    )


@lru_cache
def bytewise():
    """A tokenizer that spells every text in bytes, so that different texts stay different."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {word: i for i, word in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def pair(prompt: str, chosen: str, rejected: str, **fields) -> dict:
    return canonical(
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields}, "prefs.jsonl:12"
    )


def one(record: dict, *, row_tokens: int = 64, truncation: str = "drop") -> list[list[int]]:
    """The single group of a record, as lists of ids."""
    ((group,), counts) = tokenize([record], words(), row_tokens=row_tokens, truncation=truncation)
    assert counts == {"drop": {}, "prompt": {"prompts cut": 1}}.get(
        truncation, {"responses cut": 1}
    )
    return [group.prompt.tolist(), *(response.tolist() for response in group.responses)]


def test_prompt_starts_with_bos_and_responses_end_with_eos():
    found = one(pair("a b", "c", "d e"))
    assert found == [[BOS, *ids("a b")], [*ids("c"), EOS], [*ids("d e"), EOS]]


def test_eos_stands_in_for_a_missing_bos_and_an_empty_prompt_is_not_empty():
    assert encode_prompt("a", words(bos=False)).tolist() == [EOS, *ids("a")]
    assert encode_prompt("", words(bos=False)).tolist() == [EOS]
    assert encode_prompt("", words()).tolist() == [BOS]
    with pytest.raises(BadInput, match="no BOS and no EOS"):
        encode_prompt("a", words(bos=False, eos=False))
    with pytest.raises(BadInput, match="no EOS token"):
        tokenize([pair("a", "b", "c")], words(eos=False), row_tokens=64)


def test_a_word_that_is_the_name_of_bos_makes_none():
    from tokenizers import pre_tokenizers

    blanks = words.__wrapped__()
    blanks.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert encode_prompt("<bos> a", blanks).tolist() == [BOS, UNKNOWN, UNKNOWN, *ids("a")]


def test_text_that_reads_like_control_tokens_stays_text():
    tokenizer = bytewise()
    texts = ("<s>system</s>", "</s><s>", "<pad>")
    ((group,), _) = tokenize([pair(*texts)], tokenizer, row_tokens=64)
    prompt, *responses = (part.tolist() for part in (group.prompt, *group.responses))
    assert prompt.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in prompt
    for text, response in zip(texts[1:], responses, strict=True):
        assert response.index(tokenizer.eos_token_id) == len(response) - 1
        assert tokenizer.bos_token_id not in response
        assert tokenizer.decode(response[:-1]) == text


@pytest.mark.parametrize("text", ["é👩‍💻", "אבג", "a\x00b\x07", "  \t\u2028 x ", "\r\n"])
def test_any_text_survives_the_round_trip(text: str):
    tokenizer = bytewise()
    ((group,), _) = tokenize([pair(text, text + "1", text + "2")], tokenizer, row_tokens=128)
    assert tokenizer.decode(group.prompt[1:].tolist()) == text
    assert tokenizer.decode(group.responses[0][:-1].tolist()) == text + "1"


def test_eos_is_scored_though_it_is_the_padding_token():
    assert words().pad_token_id == words().eos_token_id
    groups, _ = tokenize([pair("a", "b", "c d")], words(), row_tokens=64)
    batch = pack(groups, row_tokens=16)
    np.testing.assert_array_equal(batch.target_RN, [[*ids("b"), EOS, *ids("c d"), EOS]])
    assert (batch.weight_RN == 1).all()


def test_the_fields_of_a_record_reach_its_group():
    fields = {"label": 1, "soft_label": 0.25, "margin": 2.0, "weight": 0.5, "scores": [3, 4]}
    records = [pair("a", "", "b", **fields), pair("a", "b", "c", **fields)]
    ((group,), dropped) = tokenize(records, words(), row_tokens=64)
    assert dropped == {"empty response": 1} and group.record == 1
    assert (group.label, group.soft_label, group.margin, group.weight) == (1.0, 0.25, 2.0, 0.5)
    np.testing.assert_array_equal(group.scores, [[3.0], [4.0]])


def test_named_scores_stand_in_the_order_of_the_first_record():
    records = [
        pair("a", "b", "c", scores={"helpfulness": [5, 3], "safety": [1, 2]}),
        pair(
            "a", "b", "d", scores=[{"safety": 7, "helpfulness": 8}, {"safety": 0, "helpfulness": 9}]
        ),
    ]
    groups, _ = tokenize(records, words(), row_tokens=64)
    assert [group.criteria for group in groups] == [("helpfulness", "safety")] * 2
    np.testing.assert_array_equal(groups[0].scores, [[5, 1], [3, 2]])
    np.testing.assert_array_equal(groups[1].scores, [[8, 7], [9, 0]])
    plain, _ = tokenize([pair("a", "b", "c", scores=[1, 2])], words(), row_tokens=64)
    assert plain[0].criteria == ()


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"safety": [1, 2]}, "has the criteria safety, prefs.jsonl:12 has helpfulness, safety;"),
        ([1, 2], "has the criteria without names, prefs.jsonl:12 has helpfulness, safety;"),
        (
            {"helpfulness": [1, 2], "honesty": [1, 2]},
            "has the criteria helpfulness, honesty, prefs.jsonl:12 has helpfulness, safety;",
        ),
    ],
)
def test_all_records_have_the_same_criteria(scores, said: str):
    first = pair("a", "b", "c", scores={"helpfulness": [1, 2], "safety": [1, 2]})
    with pytest.raises(BadInput) as caught:
        tokenize([first, pair("a", "b", "c", scores=scores)], words(), row_tokens=64)
    assert f'prefs.jsonl:12: field "scores" {said}' in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("a", "", "b", "empty response"),
        ("a", " \n", "b", "empty response"),
        ("a", "", "", "empty response"),
        ("a", "b", "b", "equal responses"),
        ("a", "b  c", "b c", "equal responses"),  # other text, the same tokens
        ("a " * 9, "b", "c", "too long"),
        ("a", "b", "c " * 9, "too long"),
    ],
)
def test_faults_of_content_are_dropped_and_counted(prompt, chosen, rejected, reason: str):
    """A row of 10: BOS, prompt, and two responses with EOS."""
    records = [pair("a", "b", "b c"), pair(prompt, chosen, rejected)]
    groups, dropped = tokenize(records, words(), row_tokens=10)
    assert [group.record for group in groups] == [0] and dropped == {reason: 1}


def test_a_blank_response_is_empty_though_it_has_tokens():
    records = [pair("a", " \n", "b"), pair("a", "b", "c")]
    assert tokenize(records, bytewise(), row_tokens=10)[1] == {"empty response": 1}


@pytest.mark.parametrize(("row_tokens", "kept"), [(9, 1), (8, 0)])
def test_a_group_may_fill_the_row_but_not_exceed_it(row_tokens: int, kept: int):
    """BOS a b, c EOS, d e f EOS: nine tokens."""
    records = [pair("a b", "c", "d e f"), pair("a", "b", "c")]
    groups, dropped = tokenize(records, words(), row_tokens=row_tokens)
    assert len(groups) == 1 + kept and dropped == ({} if kept else {"too long": 1})


def test_truncating_the_prompt_keeps_bos_and_the_end():
    record = pair("a b c d e", "f", "g h")  # BOS + 5, 2 and 3 tokens
    found = one(record, row_tokens=9, truncation="prompt")
    assert found == [[BOS, *ids("c d e")], [*ids("f"), EOS], [*ids("g h"), EOS]]
    assert one(record, row_tokens=7, truncation="prompt")[0] == [BOS, *ids("e")]
    with pytest.raises(BadInput, match=r"1 too long.*row_tokens=11 would do"):
        tokenize([record], words(), row_tokens=6, truncation="prompt")


def test_truncating_responses_cuts_the_longest_and_adds_no_eos():
    """A row of 9 leaves 7 for b EOS and c d e f g EOS: the long one is cut to 5, without EOS."""
    record = pair("a", "b", "c d e f g")
    found = one(record, row_tokens=9, truncation="response")
    assert found == [[BOS, *ids("a")], [*ids("b"), EOS], ids("c d e f g")]
    assert one(record, row_tokens=5, truncation="response")[1:] == [ids("b"), ids("c")]


@pytest.mark.parametrize(
    ("record", "row_tokens", "reason"),
    [
        (("a b c d", "e", "f"), 5, "empty after truncation"),
        (("a b c d", "e", "f"), 6, "empty after truncation"),  # one place for two responses
        (("a", "b c d", "b c e"), 6, "equal after truncation"),
        (("a b c d", "e", "f"), 4, "too long"),
    ],
)
def test_truncation_never_empties_or_equals_responses_silently(record, row_tokens, reason):
    records = [pair(*record), pair("a", "b", "c")]
    _, dropped = tokenize(records, words(), row_tokens=row_tokens + 20)
    assert dropped == {}
    with pytest.raises(BadInput, match=rf"none of 1 records can be used \(1 {reason}\)"):
        tokenize(records[:1], words(), row_tokens=row_tokens, truncation="response")


def test_nothing_left_names_the_row_length_that_does():
    records = [pair("a " * 5, "b", "c"), pair("a " * 7, "b", "c"), pair("a", "", "c")]
    with pytest.raises(BadInput) as caught:
        tokenize(records, words(), row_tokens=8)
    message = str(caught.value)
    assert message.startswith("prefs.jsonl:12: none of 3 records can be used (2 too long, 1 empty")
    assert "takes 12 tokens and a row has 8; row_tokens=12 would do" in message
    assert len(tokenize(records, words(), row_tokens=12)[0]) == 2


def test_records_must_suit_the_algorithm_and_each_other():
    with pytest.raises(BadInput, match=r"prefs.jsonl:12: the record has 2 responses, .* needs 1"):
        tokenize([pair("a", "b", "c")], words(), row_tokens=64, responses=1)
    prompt = canonical({"prompt": "a"}, "prompts.jsonl:3")
    with pytest.raises(BadInput, match=r"prompts.jsonl:3: the record has no responses, .* needs 2"):
        tokenize([prompt], words(), row_tokens=64, responses=2)
    assert tokenize([prompt], words(), row_tokens=64)[0][0].responses == []
    mixed = [pair("a", "b", "c"), pair("a", "b", "c", margin=1.0)]
    with pytest.raises(BadInput, match=r'field "margin" is missing, prefs\.jsonl:12 has it'):
        tokenize(mixed, words(), row_tokens=64)
    with pytest.raises(BadInput, match="truncation='left'; it must be drop, prompt or response"):
        tokenize([prompt], words(), row_tokens=64, truncation="left")
    with pytest.raises(BadInput, match="no records"):
        tokenize([], words(), row_tokens=64)


def test_hostile_files_are_accepted_or_refused_as_expected(shared):
    """Every file of golden/bad_rows: BadInput or groups, and which of them EXPECTED.json says."""
    folder = shared / "golden" / "bad_rows"
    expected = json.loads((folder / "EXPECTED.json").read_text())
    assert len(expected) == 37
    for case in expected:
        path = next(folder.glob(case["file"] + "*"))
        try:
            records, _ = read(path)
            groups, _ = tokenize(records, bytewise(), row_tokens=512)
            outcome = f"accepted {len(groups)} of {len(records)}"
        except BadInput as error:
            outcome = str(error)
            assert outcome.startswith(str(path)) and "\n" not in outcome
        wanted, accepted = case["expect"], outcome.startswith("accepted")
        if wanted.startswith("accept"):
            count = 2 if "2 rows" in wanted else 1
            assert outcome == f"accepted {count} of {count}", (case, outcome)
        elif wanted.startswith("drop"):
            assert not accepted and "(1 " in outcome, (case, outcome)
        else:
            named = f"{path}:" if case["bytes"] == 0 or "half" in case["why"] else f"{path}:1: "
            assert not accepted and outcome.startswith(named), (case, outcome)
