"""Sources in two parts, and tokenizers learned from a source."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dpo_jax.data import bpe
from dpo_jax.data.layouts import fields
from dpo_jax.data.sources import read
from dpo_jax.data.splits import part
from dpo_jax.data.template import tokenize
from dpo_jax.structs import BadInput


def rows(n: int) -> list[dict]:
    """Pairs of which every two share a prompt."""
    return [{"prompt": f"p{i // 2}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(n)]


def written(folder: Path, some: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def sides(source, **options) -> tuple[list[dict], list[dict]]:
    left, right = (list(part(source=source, held_out=side, **options)) for side in (False, True))
    return left, right


def test_the_two_parts_are_the_whole_and_share_no_prompt(tmp_path):
    source = written(tmp_path, rows(2000))
    trained, held_out = sides(source, share=0.25)
    prompts = [{row["prompt"] for row in side} for side in (trained, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(trained) + len(held_out) == 2000
    # 1000 prompts with a chance of 1/4: within five standard deviations
    assert abs(len(prompts[1]) - 250) < 5 * np.sqrt(1000 * 0.25 * 0.75)
    whole = [record["responses"] for record in read(source)[0]]
    assert sorted(whole) == sorted(row["responses"] for row in trained + held_out)


def test_a_side_is_decided_by_the_text_alone(tmp_path):
    """Other rows, their order and their number change no side; a larger share only adds."""
    some = rows(400)
    held_out = {row["responses"][0] for row in sides(lambda: some)[1]}
    assert {row["responses"][0] for row in sides(lambda: some[::-1])[1]} == held_out
    fewer = {row["responses"][0] for row in sides(lambda: some[:100])[1]}
    assert fewer == held_out & {row["chosen"] for row in some[:100]}
    assert held_out < {row["responses"][0] for row in sides(lambda: some, share=0.5)[1]}


def test_by_record_rows_of_one_prompt_may_part():
    some = [{"prompt": "", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(400)]
    assert {len(side) for side in sides(lambda: some)} == {0, 400}
    assert 0 < len(sides(lambda: some, by="record")[1]) < 400


def test_what_is_read_again_is_the_same(tmp_path):
    """Messages, labels, named scores and other fields; a faulty row is passed over."""
    said = [{"role": "user", "content": "why"}]
    some = [
        {"prompt": said, "responses": ["x", "y"], "scores": {"b": [1, 2], "a": [3, 1]}, "id": i}
        for i in range(6)
    ]
    for record in some:
        record["prompt"] = [{"role": "user", "content": f"why {record['id']}"}]
    source = written(tmp_path, [*some, {"prompt": 3}])
    trained, held_out = sides(source, share=0.5)
    again = read(lambda: trained + held_out)[0]
    wanted = read(lambda: some)[0]
    for record in (*again, *wanted):
        del record["where"]
    assert sorted(again, key=lambda record: record["id"]) == wanted


def test_a_layout_is_read_before_the_split(tmp_path):
    source = written(tmp_path, [{"q": f"p{i}", "a": "x"} for i in range(50)])
    layout = partial(fields, prompt="q", completion="a")
    assert {row["prompt"] for side in sides(source, layout=layout) for row in side} == {
        f"p{i}" for i in range(50)
    }
    with pytest.raises(BadInput, match="no such file"):
        list(part(source="none.jsonl", held_out=True))


# Tokenizers

SENTENCES = [{"text": f"the {word} sat on the mat, {i} times"} for i, word in enumerate("cat dog")]


def texts():
    return [*SENTENCES, {"prompt": [{"role": "user", "content": "zebra zebra"}], "completion": "ok"}]


def test_a_learned_tokenizer_is_a_function_of_the_records():
    first, second = (bpe.byte_level(source=lambda: texts(), size=300) for _ in range(2))
    assert first is not second and first.get_vocab() == second.get_vocab()
    assert bpe.byte_level(source=texts, size=300) is bpe.byte_level(source=texts, size=300)
    other = bpe.byte_level(source=lambda: SENTENCES, size=300)
    assert other.get_vocab() != first.get_vocab()


def test_it_knows_every_text_and_learns_what_it_read():
    made = bpe.byte_level(source=texts, size=290)
    assert 258 < len(made) <= 290
    for text in ("Grüße 你好 \n\n\t x", "the mat", "<s> is </s>"):
        assert made.decode(made.encode(text, add_special_tokens=False)) == text
    learned = made.encode("zebra zebra", add_special_tokens=False)
    assert len(learned) < len("zebra zebra") / 2, "what messages say is learned too"


def test_its_control_tokens_stand_at_the_ends():
    made = bpe.byte_level(source=texts, size=300, start=None, end="<|im_end|>", others=bpe.TURNS)
    assert made.bos_token is None and made.eos_token == made.pad_token == "<|im_end|>"
    records = read(lambda: [{"prompt": "a", "completion": "b"}])[0]
    (group,), _ = tokenize(records, made, row_tokens=16)
    assert group.prompt[0] == group.responses[0][-1] == made.eos_token_id
    both = bpe.byte_level(source=texts, size=300, start="<e>", end="<e>", template=bpe.CHATML)
    assert both.bos_token_id == both.eos_token_id and both.chat_template == bpe.CHATML
