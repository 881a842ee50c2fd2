"""TFDS data sets of preferences: what is written comes back, in order, all of it."""

import subprocess
import sys

import pytest

from dpo_jax.data.sources import read
from dpo_jax.data.tfds_preferences import prepare
from dpo_jax.structs import BadInput

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ASKED, CALM = [{"role": "user", "content": "ü?"}], {"role": "assistant", "content": "calm"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": [1]}}}]


def records(rows: list[dict]) -> list[dict]:
    return read(lambda: rows)[0]


def bare(found: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "where"} for record in found]


@pytest.mark.parametrize(
    "rows",
    [
        [PAIR | {"prompt": f"é {i}", "margin": i / 4, "weight": 0.5} for i in range(300)],
        [PAIR | {"scores": [i, 1.5]} for i in range(3)],
        [PAIR | {"scores": {"good": [1, i], "safe": [i, 2]}} for i in range(3)],
        [PAIR | {"label": "tie"}, PAIR],
        [{"prompt": "p", "completion": "a", "label": i % 2} for i in range(3)],
        [{"prompt": ASKED}, {"prompt": ASKED * 2}],
        [
            {"prompt": "p", "responses": ["a", "b", "c"][: 2 + i], "scores": [3, 2, 1][: 2 + i]}
            for i in range(2)
        ],
        [{"prompt": ASKED, "responses": ["a", "b", "c"]}],
        [{"prompt": ASKED, "chosen": "a", "rejected": [CALM], "tools": TOOLS}],
        [{"prompt": ASKED, "chosen": "a", "rejected": [CALM, *ASKED, CALM]}],
        [{"messages": [*ASKED, CALM, *ASKED, CALM], "chat_template_kwargs": {"thinking": False}}],
    ],
)
def test_records_come_back_as_they_were(rows, tmp_path):
    written = records(rows)
    folder = prepare("some", {"train": written, "test": written[:1]}, data_dir=str(tmp_path))
    assert folder == f"{tmp_path}/preferences/some/1.0.0"
    assert bare(read(f"tfds:{folder}:train")[0]) == bare(written)
    ((first,), _) = read(f"tfds:{folder}:test")
    assert first["where"] == f"tfds:{folder}:test[0]" and bare([first]) == bare(written[:1])


def test_a_data_set_is_found_by_name_and_without_tensorflow(tmp_path):
    """In a process of its own, which knows the folder and not the builder."""
    prepare("some", {"train": records([PAIR] * 10)}, data_dir=str(tmp_path))
    code = (
        "import sys; from dpo_jax.data.sources import read\n"
        "for source in sys.argv[1:]: print(len(read(source)[0]))\n"
        "print('tensorflow' in sys.modules)"
    )
    names = ["preferences/some", "preferences/some:1.0.0", "preferences/some:train[:30%]"]
    names += ["preferences/some:1.0.0:train[2:4]"]
    command = [sys.executable, "-c", code, *(f"tfds:{name}" for name in names)]
    run = subprocess.run(
        command, env={"TFDS_DATA_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["10", "10", "3", "2", "False"]


def test_rows_of_other_builders_are_read(tmp_path):
    """Any TFDS data set: sequences of messages and of numbers, in names of its own."""
    import numpy as np
    import tensorflow_datasets as tfds

    turn = {"from": tfds.features.Text(), "value": tfds.features.Text()}
    features = {
        "conversations": tfds.features.Sequence(turn),
        "votes": tfds.features.Sequence(np.int64),
        "margin": np.float32,
    }

    class Talks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
            yield 0, {"conversations": said, "votes": [1, 2], "margin": 0.5}

    builder = Talks(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    ((record,), _) = read(f"tfds:{builder.data_path}")
    assert record["prompt"] == [{"role": "user", "content": "why?"}]
    assert record["responses"] == [[{"role": "assistant", "content": "so"}]]
    assert record["votes"] == [1, 2] and record["margin"] == 0.5


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("tfds:", "write tfds:name"),
        ("tfds:nothing", "TFDS cannot read it (Dataset nothing not found.)"),
        ("tfds:/nowhere", "TFDS cannot read it (Could not read dataset info"),
        ("tfds:FOLDER:eval", "TFDS cannot read it (Unknown split 'eval'"),
    ],
)
def test_what_is_not_there_is_said(source: str, said: str, tmp_path):
    if "FOLDER" in source:
        folder = prepare("some", {"train": records([PAIR])}, data_dir=str(tmp_path))
        source = source.replace("FOLDER", folder)
    with pytest.raises(BadInput) as caught:
        read(source)
    assert str(caught.value).startswith(f"{source}: {said}") and "\n" not in str(caught.value)


def test_a_source_that_lost_rows_is_refused(tmp_path):
    """The counts of the splits say more than is there."""
    import json
    from pathlib import Path

    folder = prepare("some", {"train": records([PAIR] * 5)}, data_dir=str(tmp_path))
    info = Path(folder) / "dataset_info.json"
    stored = json.loads(info.read_text())
    stored["splits"][0]["shardLengths"] = ["7"]
    info.write_text(json.dumps(stored))
    with pytest.raises(BadInput, match="row 5 of 7 cannot be read"):
        read(f"tfds:{folder}")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([PAIR, PAIR | {"margin": 1}], "records of the same fields"),
        ([PAIR, {"prompt": ASKED, "chosen": "a", "rejected": "b"}], "records of the same fields"),
        (
            [{"prompt": [ASKED[0] | {"name": "x"}], "completion": "a"}],
            "a message with content, name, role is not written",
        ),
        (
            [{"prompt": ASKED, "responses": ["a", "b", [CALM, *ASKED, CALM]]}],
            "lists of conversations of several turns are not written",
        ),
        ([PAIR | {"scores": [[1, 2], [3, 4]]}], "several scores a response want names"),
    ],
)
def test_what_has_no_form_is_refused(rows, said: str, tmp_path):
    with pytest.raises(BadInput) as caught:
        prepare("some", {"train": records(rows)}, data_dir=str(tmp_path))
    assert said in str(caught.value) and not list(tmp_path.iterdir())


def test_a_version_is_written_once(tmp_path):
    for version in ("1.0.0", "1.0.1"):
        prepare("some", {"train": records([PAIR])}, data_dir=str(tmp_path), version=version)
    with pytest.raises(BadInput, match=r"some/1\.0\.1 is there already"):
        prepare("some", {"train": records([PAIR])}, data_dir=str(tmp_path), version="1.0.1")
    with pytest.raises(BadInput, match="preferences/none: no records"):
        prepare("none", {"train": []}, data_dir=str(tmp_path))
