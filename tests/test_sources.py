"""Records: every form and file kind read alike, every fault named by file, line and field."""

import gzip
import json
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest

from dpo_jax.data import sources
from dpo_jax.data.sources import canonical, read
from dpo_jax.structs import BadInput

PAIR = {"prompt": "two and two?", "chosen": "four", "rejected": "five"}


def line(**fields) -> bytes:
    return json.dumps(PAIR | fields).encode()


def stopped(tmp_path, content: bytes, *, name: str = "prefs.jsonl") -> str:
    """The message that reading the content as a file ends with, without the folder."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(str(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message.removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("raw", "prompt", "responses"),
    [
        (PAIR, "two and two?", ["four", "five"]),
        ({"prompt": "p", "responses": ["a", "b", "c"]}, "p", ["a", "b", "c"]),
        ({"prompt": "p", "completion": "a"}, "p", ["a"]),
        ({"prompt": "p"}, "p", []),
        ({"text": "a whole text"}, "", ["a whole text"]),
    ],
)
def test_every_form_becomes_prompt_and_responses(raw, prompt: str, responses: list[str]):
    record = canonical(raw | {"id": 7}, "here:1")
    assert record == {"prompt": prompt, "responses": responses, "where": "here:1", "id": 7}


def test_numbers_of_a_record_are_checked_and_null_is_no_field():
    fields = {"label": True, "soft_label": 0.25, "margin": -3, "weight": 2, "scores": [1, 0.5]}
    record = canonical(PAIR | fields, "here:1")
    assert {name: record[name] for name in fields} == fields | {"label": 1.0}
    assert set(canonical(PAIR | dict.fromkeys(fields), "here:1")) == {
        "prompt",
        "responses",
        "where",
    }
    assert canonical(PAIR | {"weight": np.float32(0.5)}, "here:1")["weight"] == 0.5


def test_scores_sort_a_list_but_not_a_pair():
    """A list may come in any order, equal scores keep theirs; chosen and rejected say the order."""
    listed = canonical({"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}, "here:1")
    assert listed["responses"] == ["b", "a", "c"] and listed["scores"] == [3, 1, 1]
    assert canonical(PAIR | {"scores": [0, 1]}, "here:1")["responses"] == ["four", "five"]
    several = {"prompt": "p", "responses": ["a", "b"], "scores": [[1, 2], [3, 4]]}
    assert canonical(several, "here:1")["scores"] == [[1, 2], [3, 4]]


def test_named_scores_become_lists_with_names_and_change_no_order():
    listed = {"prompt": "p", "responses": ["a", "b", "c"]}
    by_name = {"helpfulness": [1, 3, 2], "safety": [0.5, 0, -1]}
    by_response = [
        {"helpfulness": 1, "safety": 0.5},
        {"safety": 0, "helpfulness": 3},
        {"helpfulness": 2, "safety": -1, "style": None},
    ]
    for scores in (by_name, by_name | {"style": None}, by_response):
        record = canonical(listed | {"scores": scores}, "here:1")
        assert record["responses"] == ["a", "b", "c"]
        assert record["criteria"] == ["helpfulness", "safety"]
        assert record["scores"] == [[1, 0.5], [3, 0], [2, -1]]
    record = canonical(PAIR | {"scores": {"safety": [1, 2], "helpfulness": [4, 5]}}, "here:1")
    assert record["responses"] == ["four", "five"]
    assert (record["criteria"], record["scores"]) == (["safety", "helpfulness"], [[1, 4], [2, 5]])
    judged = {"prompt": "p", "completion": "a", "scores": {"safety": [1]}}
    assert canonical(judged, "here:1")["scores"] == [[1]]
    for none in ({}, {"safety": None}, [{}, {"safety": None}]):
        assert not canonical(PAIR | {"scores": none}, "here:1").keys() & {"scores", "criteria"}
    stray = canonical(PAIR | {"scores": [1, 2], "criteria": "mine"}, "here:1")
    assert "criteria" not in stray and stray["scores"] == [1, 2]


def test_named_scores_of_a_parquet_file(tmp_path):
    """A column of structs or of lists of structs has every field in every row, null where not."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        PAIR | {"scores": [{"helpfulness": 5.0}, {"helpfulness": 3.0}]},
        PAIR | {"scores": [{"helpfulness": 4.0, "safety": None}, {"helpfulness": 1.0}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prefs.parquet")
    records, _ = read(tmp_path / "prefs.parquet")
    assert [record["criteria"] for record in records] == [["helpfulness"]] * 2
    assert [record["scores"] for record in records] == [[[5], [3]], [[4], [1]]]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_all_kinds_of_file_give_the_same_records(tmp_path, kind: str):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = [PAIR | {"margin": float(i), "note": "zwei + zwei = vier ✓"} for i in range(3)]
    path = tmp_path / f"prefs{kind}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        packed = {
            ".jsonl": lambda: lines,
            ".json": lambda: json.dumps(rows).encode(),
            ".jsonl.gz": lambda: gzip.compress(lines),
            ".jsonl.zst": lambda: zstandard.ZstdCompressor().compress(lines),
        }
        path.write_bytes(packed[kind]())
    records, skipped = read(path)
    places = [record.pop("where").removeprefix(str(path)) for record in records]
    numbered = kind.startswith(".jsonl")
    assert places == [f":{i}" if numbered else f": record {i}" for i in (1, 2, 3)]
    bare = {"prompt": PAIR["prompt"], "responses": ["four", "five"], "note": rows[0]["note"]}
    assert records == [bare | {"margin": float(i)} for i in range(3)] and skipped == {}


def test_a_function_is_a_source():
    def reviews() -> list[dict]:
        return [PAIR, {"prompt": "p", "chosen": "a"}]

    with pytest.raises(BadInput, match=r'reviews\(\)\[1\]: field "rejected" is missing'):
        read(reviews)
    records, skipped = read(reviews, on_bad="skip")
    assert len(records) == 1 and skipped == {"missing field": 1}
    for returned in (3, "text", {"prompt": "p"}):
        with pytest.raises(BadInput, match=r"returned .*; it must return dicts or yield them"):
            read(cast(Any, lambda returned=returned: returned))


def test_a_function_may_yield():
    def reviews():
        for i in range(3):
            yield PAIR | {"id": i}

    records, _ = read(reviews)
    assert [record["id"] for record in records] == [0, 1, 2]
    assert records[2]["where"].endswith("reviews()[2]")


def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n\r\n" + line() + b"\r\n\n  \n" + line())
    records, _ = read(str(path))
    assert [record["where"].rsplit(":")[-1] for record in records] == ["1", "3", "6"]


@pytest.mark.parametrize(
    ("bad", "field", "found"),
    [
        (b'{"prompt": "a", "chosen": "b"}', "rejected", "is missing; a pair needs prompt, chosen"),
        (b'{"chosen": "b"}', "rejected", "is missing; a pair needs prompt, chosen"),
        (b'{"question": "a"}', "prompt", "is missing; a record needs"),
        (b'{"prompt": "a", "responses": []}', "responses", "is a list"),
        (b'{"prompt": "a", "responses": ["b", 2]}', "responses[1]", "is a number (2)"),
        (b'{"prompt": "a", "responses": "bc"}', "responses", "is text ('bc'); it must be a list"),
        (line(chosen=None), "chosen", "is null; it must be text"),
        (line(chosen=True), "chosen", "is a boolean (True)"),
        (line(rejected=["five"]), "rejected", "is a list (['five'])"),
        (line(prompt={"text": "a"}), "prompt", "is an object"),
        (line(label="false"), "label", "is text ('false'); it must be true, false, 0 or 1"),
        (line(label=0.5), "label", "is a number (0.5)"),
        (line(soft_label=1.5), "soft_label", "it must be a number from 0 to 1"),
        (line(margin=True), "margin", "is a boolean"),
        (line(margin=float("nan")), "margin", "is a number (nan)"),
        (line(margin=10**400), "margin", "is a number (very large)"),
        (line(weight=-1), "weight", "it must be a finite number that is not negative"),
        (line(scores=[1]), "scores", "it must be 2 finite numbers"),
        (line(scores=[1, float("inf")]), "scores", "it must be 2 finite numbers"),
        (line(scores={"safety": [1]}), "scores.safety", "is a list ([1]); it must be 2 finite"),
        (line(scores={"safety": 1}), "scores.safety", "is a number (1); it must be 2 finite"),
        (line(scores={"good": [1, 2], "safety": [1, None]}), "scores.safety", "2 finite numbers"),
        (line(scores={"safety": [1, float("nan")]}), "scores.safety", "it must be 2 finite"),
        (line(scores={"safety": [1, True]}), "scores.safety", "it must be 2 finite numbers"),
        (line(scores={"safety": [{"a": 1}, {"a": 2}]}), "scores.safety", "2 finite numbers"),
        (line(scores=[{"good": 1, "safety": 2}, {"good": 1}]), "scores[1].safety", "is missing"),
        (line(scores=[{"good": 1}, {"good": "1"}]), "scores[1].good", "is text ('1')"),
        (line(scores=[{"good": 1}]), "scores", "holds 1 objects; it must be 2"),
        (line(scores=[{"good": 1}, 2]), "scores[1]", "is a number (2); it must be an object"),
        (
            b'{"prompt": "a", "scores": {"safety": []}}',
            "scores.safety",
            "it must be 0 finite numbers",
        ),
        (b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}', "prompt", "surrogate U+D800"),
        (b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}', "prompt", "is not UTF-8 at byte"),
        (b'{"prompt": "a", "chosen": "b", "chosen": "c"}', "chosen", "stands twice"),
    ],
)
def test_a_faulty_field_is_named_with_file_and_line(tmp_path, bad: bytes, field: str, found: str):
    message = stopped(tmp_path, line() + b"\n" + bad + b"\n")
    assert message.startswith(f'prefs.jsonl:2: field "{field}" ') and found in message


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (b'{"prompt": "a", "cho', "not JSON (Unterminated string"),
        (b"{} {}", "not JSON (Extra data"),
        (b"[1, 2]", "a list ([1, 2]) instead of an object"),
        (b'"text"', "text ('text') instead of an object"),
        (b"[" * 20_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"\x80\x81", "not UTF-8 at byte 0"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, bad: bytes, found: str):
    message = stopped(tmp_path, line() + b"\n" + bad)
    assert message.startswith("prefs.jsonl:2: ") and found in message


def test_faulty_records_are_counted_by_reason_when_skipped(tmp_path):
    path = tmp_path / "prefs.jsonl"
    faulty = [b'{"prompt": "a", "chosen": "b"}', line(chosen=1), b"{", b"[]", line(margin="1")]
    path.write_bytes(b"\n".join([line(), *faulty, line()]))
    records, skipped = read(str(path), on_bad="skip")
    assert [record["where"] for record in records] == [f"{path}:1", f"{path}:7"]
    assert skipped == {"missing field": 1, "wrong type": 2, "not JSON": 1, "not an object": 1}
    path.write_bytes(b"\n".join(faulty[:2]))
    with pytest.raises(BadInput, match=r"no records \(1 missing field, 1 wrong type\)"):
        read(str(path), on_bad="skip")


def test_files_that_cannot_be_read_are_said(tmp_path):
    assert stopped(tmp_path, b"") == "prefs.jsonl: no records"
    assert stopped(tmp_path, b"\n \n") == "prefs.jsonl: no records"
    assert stopped(tmp_path, b"[]", name="a.json") == "a.json: no records"
    assert "instead of a list" in stopped(tmp_path, line(), name="a.json")
    assert "not JSON" in stopped(tmp_path, b"[", name="a.json")
    assert "is it whole?" in stopped(tmp_path, gzip.compress(line())[:-9], name="a.jsonl.gz")
    assert "is it whole?" in stopped(tmp_path, line(), name="a.jsonl.gz")
    assert "is it whole?" in stopped(tmp_path, line(), name="a.jsonl.zst")
    assert "not a whole Parquet file" in stopped(tmp_path, line(), name="a.parquet")
    assert "this kind of file is not read" in stopped(tmp_path, line(), name="a.csv")
    with pytest.raises(BadInput, match=r"none\.jsonl: no such file"):
        read(str(tmp_path / "none.jsonl"))
    with pytest.raises(BadInput, match="it must be stop or skip"):
        read(str(tmp_path / "none.jsonl"), on_bad="warn")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_without_end_fills_no_memory(tmp_path, monkeypatch, kind: str):
    import zstandard

    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    path = tmp_path / f"prefs{kind}"
    fine = line(chosen="x" * 900)
    packed = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
    path.write_bytes(packed[kind](fine + b"\n" + fine))
    assert len(read(path)[0]) == 2
    path.write_bytes(packed[kind](fine + b"\n" + line(chosen="x" * 1000) + b"\n"))
    with pytest.raises(BadInput, match=r":2: the line is longer than 1000 bytes"):
        read(path, on_bad="skip")


def test_hostile_files_take_little_memory(shared):
    """The most that a process holds grows by less than 48 MB over all of golden/bad_rows."""
    code = (
        "import resource, sys\n"
        "from dpo_jax.data.sources import read\n"
        "from dpo_jax.structs import BadInput\n"
        "def held(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = held()\n"
        "for file in sys.argv[1:]:\n"
        "    try: read(file)\n"
        "    except BadInput: pass\n"
        "print(held() - before)"
    )
    files = [str(path) for path in (shared / "golden" / "bad_rows").glob("*.jsonl*")]
    assert len(files) == 37
    run = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 48 << 10  # in kB


def test_strings_are_never_opened(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(line(prompt="../../etc/passwd", chosen="file:///x", rejected="http://x"))
    ((record,), _) = read(str(path))
    assert [record["prompt"], *record["responses"]] == ["../../etc/passwd", "file:///x", "http://x"]
