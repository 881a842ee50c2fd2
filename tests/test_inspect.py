"""What `dpo-jax inspect` finds in data whose numbers are counted by hand, and how it shows it."""

import copy
import json
import re
from dataclasses import replace
from functools import lru_cache, partial
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from rich.console import Console
from trained import CHATML, KINDS, MARKED, byte_level

from dpo_jax import build, cli, labelling, losses, parts, train
from dpo_jax.algorithms.preference import preference
from dpo_jax.algorithms.sft import sft
from dpo_jax.data import views
from dpo_jax.experiment import Data, Evaluation, Experiment, Mesh, Optim, Run, override
from dpo_jax.inspect_data import facts, page, said, terminal
from dpo_jax.inspect_data.doubts import Evidence, doubts
from dpo_jax.inspect_data.facts import Inspection
from dpo_jax.inspect_data.tokens_shown import Vocabulary, visible
from dpo_jax.models.transformer import Config
from dpo_jax.structs import BadInput, Group

NAMES = ("<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh")
BOS, EOS = 1, 2
HOSTILE = "<script src='http://x.org/a.js'>\x1b[31m</script>\u202e"


@lru_cache
def words() -> Any:
    """A tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(NAMES)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def talker(template: str = CHATML) -> Any:
    made = copy.deepcopy(byte_level())
    made.chat_template = template
    return made


PAIRS = [
    {"prompt": "a b", "chosen": "c d", "rejected": "e"},  # 3 + 3 + 2 tokens with BOS and EOS
    {"prompt": "a", "chosen": "c", "rejected": "d e f"},  # 2 + 2 + 4
    {"prompt": "a", "chosen": "c", "rejected": "c"},  # equal
    {"prompt": "a", "chosen": " ", "rejected": "b"},  # empty
    {"prompt": "a a a a a a a", "chosen": "c", "rejected": "d"},  # 8 + 2 + 2, too long for 10
    {"prompt": 3, "chosen": "c", "rejected": "d"},  # skipped
]
RANKED = [
    {"prompt": "a", "responses": ["b c d e", "c", "b b", "d d d"]},  # 5, 2, 3, 4
    {"prompt": "a b", "responses": ["b", "c"]},
]
TALK = [
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "two"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
]


def made(rows: list[dict[str, Any]], loss: Any = None, **options: Any) -> Experiment:
    """An experiment on these rows; sft without a loss. Eight devices share the rows of a batch."""
    data = {"row_tokens": 10, "groups": 2, "on_bad": "skip", "tokenizer": words} | options
    algorithm = sft if loss is None else partial(preference, loss=partial(loss, beta=0.1))
    return Experiment(
        name="made",
        model=Config(V=640, D=8, L=1, H=2, J=1, E=4, F=8),
        data=Data(source=lambda: rows, **data),
        algorithm=algorithm,
        optim=Optim(learning_rate=1e-3),
        run=Run(steps=3),
    )


def seen(rows: list[dict[str, Any]], loss: Any = None, **options: Any) -> facts.Role:
    return facts.inspection(made(rows, loss, **options)).roles[0]


def names(shown: facts.Shown) -> list[str]:
    return [part.name for part in shown.parts]


def test_counts_lengths_and_padding_are_those_counted_by_hand():
    role = seen(PAIRS[::-1], losses.dpo)
    assert (role.rows, role.records, role.groups, role.responses) == (6, 2, 2, 4)
    assert role.skipped == {"wrong type": 1} and role.repaired == {}
    assert role.dropped == {"equal responses": 1, "empty response": 1, "too long": 1}
    assert {each.name: each.tokens.tolist() for each in role.lengths} == {
        "prompt": [2, 3],
        "chosen": [2, 3],
        "rejected": [4, 2],
        "group": [8, 8],
    }
    assert role.lengths[2].summary == {"least": 2, "median": 3, "mean": 3, "95%": 3.9, "most": 4}
    assert role.unended == 0 and role.ends == ("<eos>",) and role.longer == (0.5, 0.0, 2)
    # a row of 8 places for each of 8 devices, of which two hold a group of 8
    assert role.batches.shapes == ((8, 8),) and role.batches.padding == 1 - 16 / 64
    assert role.batches.measured == "3 of 3 steps" and role.batches.passes == 3
    assert sum(bool(row) for row in role.batches.rows) == 2
    assert sorted(shown.record for shown in role.shown) == [3, 4]  # the skipped one is no record


def test_cut_responses_are_repaired_and_have_no_end():
    role = seen(PAIRS[4:5], losses.dpo, truncation="response")
    assert role.repaired == {"responses cut": 1} and role.dropped == {}
    assert role.unended == 2 == role.responses
    assert any("2 of 2 responses do not end with <eos>" in doubt for doubt in role.doubts)
    assert any("<eos> is never scored" in doubt for doubt in role.doubts)
    assert role.shown[0].parts[1].notes == ("has no end",)
    assert ("kept: responses cut", "1") in said.counts(role)


def test_a_mesh_of_other_devices_is_counted_as_it_is_written():
    here = made(PAIRS, losses.dpo)
    found = facts.inspection(replace(here, run=Run(steps=3, mesh=Mesh(data=1, fsdp=2))))
    assert found.roles[0].batches.shapes == ((2, 8),) and found.roles[0].batches.padding == 0
    assert "shared by 2 devices" in dict(found.options)["devices"]


def test_what_is_shown_stands_in_the_first_batch_of_training():
    experiment = made(PAIRS, losses.dpo, groups=1)
    mesh = parts.mesh(experiment)
    setup = build.setup(experiment, mesh, build.materials(experiment, train.run))
    batch = setup.loader.batch(0)
    (role,) = facts.inspection(experiment).roles
    (shown,) = role.shown
    ids = [token.id for part in shown.parts for token in part.tokens]
    assert ids == batch.tokens_RT[0, : len(ids)].tolist() and shown.record == batch.record_RG[0, 0]
    scored = [token.id for part in shown.parts for token in part.tokens if token.scored]
    assert scored == batch.target_RN[0, : len(scored)].tolist()
    assert role.batches.padding == 1 - setup.loader.fill
    (row, *empty) = role.batches.rows
    assert [s.tokens for s in row] == [len(part.tokens) for part in shown.parts] and not any(empty)
    assert row[0].tokens + row[1].tokens - 1 == batch.end_RGK[0, 0, 0]


def test_a_ranking_goes_from_best_to_worst():
    role = seen(RANKED, losses.plackett_luce_dpo, row_tokens=16)
    assert {each.name: each.tokens.tolist() for each in role.lengths} == {
        "prompt": [2, 3],
        "chosen": [5, 2],
        "between": [2, 3],
        "rejected": [4, 2],
        "group": [16, 7],
    }
    four = next(shown for shown in role.shown if shown.record == 0)
    assert names(four) == ["prompt", *(f"response {k} of 4" for k in (1, 2, 3, 4))]
    assert [part.rank for part in four.parts[1:]] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_judgements_stand_alone_or_beside_a_partner():
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "b", "completion": "c d", "label": False},
    ]
    alone = seen(rows, losses.apo_zero_unpaired)
    assert sorted(names(shown)[1] for shown in alone.shown) == ["desirable", "undesirable"]
    beside = seen(rows, losses.kto)
    assert {shown.record: names(shown)[1:] for shown in beside.shown} == {
        0: ["desirable", "partner"],
        1: ["undesirable", "partner"],
    }
    assert beside.responses == 2 and beside.longer is None  # a partner is counted once
    assert beside.shown[0].said[0].startswith("label ")
    views_of_pairs = seen(PAIRS[:2], losses.apo_zero_unpaired, arrange=views.unpaired)
    assert views_of_pairs.groups == 4 and views_of_pairs.records == 2
    assert views_of_pairs.arranged == (("data.views.unpaired", 2, 2),)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tools_and_users_are_context(template: str):
    role = seen([{"messages": TALK}], row_tokens=256, tokenizer=lambda: talker(template))
    prompt, response = role.shown[0].parts
    parted = {
        scored: "".join(token.text for token in response.tokens if token.scored is scored)
        for scored in (True, False)
    }
    assert parted[True] == "two<|im_end|>four<|im_end|>"
    assert parted[False] == "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    assert "".join(token.text for token in prompt.tokens) == (
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not any(token.scored for token in prompt.tokens)
    unmarked = any("does not mark the assistant's turns" in doubt for doubt in role.doubts)
    assert unmarked == (template == CHATML)
    assert any("end with <|im_end|>, the tokenizer's EOS is </s>" in d for d in role.doubts)
    assert any("1 of 1 prompts begin without BOS" in d for d in role.doubts)


def group(prompt: list[int], *responses: list[int], record: int = 0) -> Group:
    arrays = [np.array(ids, np.int32) for ids in (prompt, *responses)]
    return Group(arrays[0], arrays[1:], record=record)


def doubted(groups: list[Group], text: str = "a", tokenizer: Any = None, **more: Any) -> str:
    record = {"prompt": text, "responses": ["b"], "where": "x:1"}
    return "\n".join(doubts(Evidence(groups, [record], tokenizer or words(), **more)))


def test_bos_is_doubted_where_it_stands_twice_or_not_at_all():
    twice, inside = group([BOS, BOS, 4], [5, EOS]), group([BOS], [BOS, 5, EOS])
    sound, turns = group([BOS, 4], [5, EOS]), group([BOS, 4, EOS, BOS, 5], [5, EOS])
    assert doubted([sound, turns]) == ""
    assert "2 of 3 groups hold BOS (<bos>) twice" in doubted([twice, inside, sound])
    assert "1 of 2 prompts begin without BOS" in doubted([group([4, 5], [5, EOS]), sound])


def test_a_tokenizer_and_a_template_that_both_write_bos_are_doubted():
    sentence_piece = copy.deepcopy(KINDS["sentence piece"]())  # it adds <s> where it is called
    sentence_piece.chat_template = "{{ bos_token }}" + CHATML
    rows = [{"messages": TALK[:2]}]
    role = seen(rows, row_tokens=256, tokenizer=lambda: sentence_piece)
    assert any("both write BOS (<s>)" in doubt for doubt in role.doubts)
    bare = seen(rows, row_tokens=256, tokenizer=lambda: talker("{{ bos_token }}" + CHATML))
    assert not any("both write BOS" in doubt for doubt in bare.doubts)
    sentence_piece.chat_template = "{{ bos_token }}{{ bos_token }}" + CHATML
    with pytest.raises(BadInput, match="writes BOS twice"):
        seen(rows, row_tokens=256, tokenizer=lambda: sentence_piece)


def test_repetitions_are_doubted():
    first, turned = group([BOS], [5, EOS], [6, EOS]), group([BOS], [6, EOS], [5, EOS])
    same = group([BOS], [7, EOS], [7, EOS])
    found = doubted([first, first, turned, same])
    assert "1 of 4 groups hold responses that are identical" in found
    assert "1 of 4 groups repeat an earlier one" in found
    assert "3 of 4 pairs stand the other way round too" in found
    assert "not held out" not in found
    liked = replace(group([BOS], [5, EOS]), label=1.0)
    judged = [liked, replace(liked, label=0.0), replace(group([BOS], [6, EOS]), label=1.0)]
    assert "2 of 3 groups stand with the other label too" in doubted(judged)
    keys = Evidence([turned], [], words()).keys
    assert "1 of 4 groups stand in data.source too" in doubted(
        [first, first, turned, same], others=keys
    )


@pytest.mark.parametrize(
    ("longer", "shorter", "said_of_it"),
    [
        (40, 10, "the better response is the longer one in 80% of the 50 groups"),
        (2, 8, ""),  # too few to be sure: 3 standard errors of 10 are 0.47
        (10, 40, "the better response is the shorter one in 80% of the 50 groups"),
        (550, 450, ""),
    ],
)
def test_a_bias_of_length_is_doubted_where_it_is_large_and_sure(longer, shorter, said_of_it):
    long = [group([BOS, b], [5, 5, EOS], [6, EOS]) for b in range(4, 4 + longer)]
    short = [
        group([BOS, b], [6, EOS], [5, 5, EOS]) for b in range(4 + longer, 4 + longer + shorter)
    ]
    even = [group([BOS, 4000 + b], [6, EOS], [5, EOS]) for b in range(100)]
    found = doubted([*long, *short, *even])
    assert (said_of_it in found) and bool(found) == bool(said_of_it)


def test_text_like_control_tokens_and_unknown_text_are_doubted():
    role = seen([{"prompt": "a <eos>", "completion": "z z"}])
    assert any("1 of 1 records hold text that reads like a control" in d for d in role.doubts)
    # <bos> a < eos > z z <eos>: only a and the control tokens are known
    assert any("5 of 8 tokens are <unk>" in doubt for doubt in role.doubts)


def test_a_template_that_nothing_needs_is_doubted():
    unused = "data.template is not used"
    assert unused in "".join(seen(PAIRS, losses.dpo, template=CHATML).doubts)
    talk = seen([{"messages": TALK}], row_tokens=256, tokenizer=byte_level, template=CHATML)
    assert unused not in "".join(talk.doubts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_make_the_text(kind: str):
    tokenizer = KINDS[kind]()
    text = "The fox\n\n jumps  over\ttwo"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = Vocabulary(tokenizer).tokens(ids, [True] * len(ids))
    # in the sentence piece kind every text begins with a blank, in unigram \t is unknown
    whole = "".join(token.text for token in tokens).removeprefix(
        " " if kind != "byte level" else ""
    )
    assert whole == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert [token.id for token in tokens] == list(ids)


def test_bytes_of_a_character_are_written_as_bytes():
    tokenizer = byte_level()
    ids = tokenizer("🦊", add_special_tokens=False)["input_ids"]
    texts = [token.text for token in Vocabulary(tokenizer).tokens(ids, [True] * len(ids))]
    assert "".join(texts) == "<0xF0><0x9F><0xA6><0x8A>" and len(texts) == len(ids) > 1


def test_what_would_not_be_seen_is_marked():
    assert visible("a b\n") == [("a", False), ("·", True), ("b", False), ("↵\n", True)]
    assert visible("\x1b[0m\u202e") == [("⟨1B⟩", True), ("[0m", False), ("⟨202E⟩", True)]


def printed(found: Inspection, *, colours: str | None = "truecolor", **options: Any) -> str:
    """All that the terminal shows, with its escapes where it has colours."""
    console = Console(
        file=StringIO(),
        record=True,
        width=100,
        force_terminal=colours is not None,
        color_system=colours,  # pyright: ignore[reportArgumentType]
        highlight=False,
    )
    for block in terminal.blocks(found, console, **options):
        console.print(block)
    return console.export_text(styles=colours is not None)


def grounds(text: str) -> list[tuple[str, str]]:
    """(characters, background) of everything printed on one."""
    return re.findall(r"\x1b\[[\d;]*48;2;([\d;]+)m([^\x1b]+)", text)


def test_the_terminal_colours_what_counts_and_alternates():
    text = printed(facts.inspection(made(PAIRS[:1], losses.dpo)))
    shown = {
        name: [ground for ground, piece in grounds(text) if piece == name]
        for name in ("a", "c", "d", "e", "<eos>")
    }
    context, lighter = "68;68;68", "95;95;95"
    assert shown["a"] == [lighter]  # behind <bos>
    best, worst = terminal.background(1.0, True, False), terminal.background(0.0, True, False)

    def channels(colour: str) -> str:
        return ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))

    assert shown["c"] == [channels(best)] and shown["e"] == [channels(worst)]
    assert shown["d"] == [channels(terminal.background(1.0, True, True))]
    assert len({context, lighter, *shown["c"], *shown["d"], *shown["e"]}) == 5


def test_without_colours_bars_and_brackets_stand():
    text = printed(facts.inspection(made(PAIRS[:1], losses.dpo)), colours=None, ids=True)
    assert "<bos>/1|·a/4|·b/5|\n" in text and "·c/6|·d/7|<eos>/2|\n" in text
    talk = made([{"messages": TALK}], row_tokens=256, tokenizer=talker)
    text = printed(facts.inspection(talk), colours=None)
    assert "<|im_end|>|[↵|\n<|im_start|>|" in text and "↵|\n]fo|ur|" in text
    assert "\x1b" not in text


def test_long_parts_are_cut_in_the_middle_unless_wanted_whole():
    experiment = made([{"prompt": "a", "completion": "b " * 400}], row_tokens=512)
    text = printed(facts.inspection(experiment), colours=None)
    assert f"... {401 - terminal.FIRST - terminal.LAST} tokens ..." in text
    count = text.replace("\n", "").count("·b|")
    assert count == terminal.FIRST + terminal.LAST - 1  # the last one is EOS
    whole = printed(facts.inspection(experiment), colours=None, whole=True)
    assert whole.replace("\n", "").count("·b|") == 400


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and its text; every one is closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "input") else [tag]

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a class."""
        return [each for _, each in self.found if name in (each.get("class") or "").split()]


def test_the_page_is_whole_and_asks_for_nothing():
    rows = [
        {"prompt": HOSTILE, "chosen": 'two & "two"', "rejected": "four"},
        {"prompt": "why", "chosen": "a dog", "rejected": HOSTILE},
    ]
    experiment = made(rows, losses.dpo, row_tokens=400, tokenizer=byte_level)
    held = replace(experiment, evaluation=Evaluation(source=lambda: rows))
    found = facts.inspection(held)
    text = page.page(found)
    elements = Elements(text)
    assert elements.open == []
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(
        tag for tag, _ in elements.found
    )
    for tag, attributes in elements.found:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action")
            assert name != "href" or (value or "").startswith("#"), (tag, value)
    outside = re.sub(r'title="[^"]*"|<span[^>]*>[^<]*', "", text)  # the data may name addresses
    assert not re.search(r"https?:|@import|url\((?!#)", outside)
    assert "\x1b" not in text and "\u202e" not in text
    tokens = [t for role in found.roles for s in role.shown for p in s.parts for t in p.tokens]
    spans = elements.of("t")
    assert [int(span["data-id"] or 0) for span in spans] == [token.id for token in tokens]
    assert len(elements.of("s")) == sum(token.scored for token in tokens)
    assert len(elements.of("c")) == sum(token.control for token in tokens)
    assert sum(tag == "svg" for tag, _ in elements.found) == 2
    assert all(doubt in elements.text for role in found.roles for doubt in role.doubts)
    assert "2 of 2 groups stand in data.source too" in elements.text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


# The command

MODULE = """
from functools import partial
from dpo_jax.algorithms.sft import sft
from dpo_jax.experiment import Data, Experiment, Optim, Run
from dpo_jax.models.transformer import Config
from dpo_jax.worlds import sentiment

EXPERIMENT = Experiment(
    name="looked",
    model=Config(V=512, D=8, L=1, H=2, J=1, E=4, F=8),
    data=Data(source="data.jsonl", tokenizer=sentiment.tokenizer, groups=2, row_tokens=16),
    algorithm=sft,
    optim=Optim(learning_rate=1e-3),
    run=Run(steps=2, dir="runs/mine"),
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("looked.py").write_text(MODULE)
    rows = ({"prompt": "the plot", "completion": "was good ."}, {"prompt": "", "completion": " "})
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_shows_and_writes_the_page_beside_the_run(folder, capsys):
    assert cli.main(["inspect", "looked.py"]) == 0
    out = capsys.readouterr().out
    assert "dropped: empty response" in out and "data.jsonl:1" in out
    assert out.splitlines()[-1] == "page: runs/mine-inspect.html"
    written = Path("runs/mine-inspect.html").read_text()
    assert Elements(written).open == [] and "data.jsonl:1" in written
    assert [path.name for path in Path("runs").iterdir()] == ["mine-inspect.html"]
    assert (
        cli.main(["inspect", "looked.py", "--html", "a/b.html", "run.seed=3", "--rows", "0"]) == 0
    )
    assert '<span class="t' not in Path("a/b.html").read_text()


@pytest.mark.parametrize(
    ("words", "said_of_it"),
    [
        (["--record", "1"], "data.jsonl:2: none of 1 records can be used (1 empty response)"),
        (["--record", "2"], "--record=2: data.source has the records 0 to 1"),
        (["--rows", "-1"], "--rows=-1: it must not be negative"),
        (["--html", "."], "--html=.: it is a folder"),
        (["--html", "data.jsonl/x.html"], "--html=data.jsonl/x.html: cannot be written"),
        (["data.source=none.jsonl"], "none.jsonl: no such file"),
        (["model.V=100"], "model.V=100 is less than the tokenizer's 200 tokens"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_writes_nothing(folder, capsys, words, said_of_it):
    before = sorted(folder.rglob("*"))
    assert cli.main(["inspect", "looked.py", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"dpo-jax: error: {said_of_it}") and err.count("\n") == 1
    after = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)]
    assert after == before


def test_sampled_data_is_read_where_it_was_made(folder):
    experiment = override(tiny_runs.EXPERIMENT, {"evaluation.source": None})
    with pytest.raises(BadInput, match=r"data.source is sampled from .*sft.*`dpo-jax train`"):
        facts.inspection(experiment)
    assert not Path("runs").exists()
    file = labelling.place(tiny_runs.PAIRS)
    file.parent.mkdir(parents=True)
    pair = {"prompt": "the plot", "chosen": "was good .", "rejected": "was bad ."}
    file.write_text(json.dumps(pair | {"scores": {"words": [3.0, 2.0]}}) + "\n")
    (shown,) = facts.inspection(experiment).roles[0].shown
    assert facts.inspection(experiment).roles[0].source == "sampled from Experiment sft"
    assert [part.notes for part in shown.parts] == [(), ("words 3",), ("words 2",)]
    assert shown.where == f"{file}:1"
