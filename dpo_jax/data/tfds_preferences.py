"""Preference data as TensorFlow Datasets in array_record, written and read without TensorFlow.

    prepare("hh", {"train": read("hh_train.jsonl.gz")[0], "test": read("hh_test.jsonl.gz")[0]})

writes the data set preferences/hh, which `tfds:preferences/hh:train` names as a source from then
on. So does `tfds:NAME` any other data set that TFDS knows or finds prepared under TFDS_DATA_DIR:

    tfds:name    tfds:name/config:split    tfds:name:1.0.0:split    tfds:name:train[:10%]
    tfds:/folder/name/config/1.0.0:split   tfds:gs://bucket/name/1.0.0:split

Two traps of TFDS are avoided: its Parquet writer loses rows without a word, so array_record is
written and every source is held against the count it promises; text comes back as bytes and a
list of objects as an object of lists, so both are turned round.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.layouts import PAIR_SCORES, is_conversation
from dpo_jax.structs import BadInput

PREFIX = "tfds:"
NUMBERS = ("label", "soft_label", "margin", "weight")
JSON = ("tools", "chat_template_kwargs")
WRITTEN = ("scores", "criteria", *NUMBERS, *JSON)  # of a record, beside prompt and responses
ANSWERS = {0: (), 1: ("completion",), 2: ("chosen", "rejected")}  # where all records have so many
LIST = ("responses",)
MESSAGES = ({"role", "content"}, {"from", "value"})
_FORM = re.compile(
    r"tfds:(?P<name>[^:]+(://[^:]+)?)(:(?P<version>\d+\.\d+\.\d+))?(:(?P<split>[^:\[]+(\[.*\])?))?"
)


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a `tfds:` source, in its order.

    Errors: BadInput for a source of another form, a data set or split that is not there, and one
    that holds fewer rows than it says.
    """
    import tensorflow_datasets as tfds

    found = _FORM.fullmatch(source)
    if not found:
        raise BadInput(f"{source}: write tfds:name, tfds:name/config:split or tfds:/folder:split")
    name, version, split = found["name"], found["version"], found["split"] or "train"
    try:
        if "://" in name or name.startswith(("/", ".", "~")):
            builder: Any = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name if version is None else f"{name}:{version}")
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
        data = builder.as_data_source(split=split)
        promised = builder.info.splits[split].num_examples
    except Exception as error:  # TFDS raises whatever its builders, readers and registry do
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{source}: TFDS cannot read it ({reason})") from error
    if len(data) != promised:
        raise BadInput(
            f"{source}: {len(data)} rows of {promised}; prepare it again in array_record"
        )
    for i in range(promised):
        try:
            row = data[i]
        except (RuntimeError, IndexError) as error:
            raise BadInput(f"{source}: row {i} of {promised} cannot be read ({error})") from error
        yield f"{source}[{i}]", {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    """A value of TFDS as JSON would hold it: text, numbers, and messages as a list of objects."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        turned = {key: _plain(each) for key, each in value.items()}
        return _messages(turned) if any(map(turned.keys().__ge__, MESSAGES)) else turned
    if hasattr(value, "tolist"):  # an array or number of NumPy
        return _plain(value.tolist())
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _messages(columns: Mapping[str, Any]) -> Any:
    """{"role": [...], "content": [...]} as a list of messages; lists of such lists likewise."""
    lists = [column for column in columns.values() if isinstance(column, list)]
    if len(lists) < len(columns):
        return dict(columns)
    return [_messages(dict(zip(columns, each, strict=True))) for each in zip(*lists, strict=True)]


def prepare(
    name: str,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    data_dir: str | None = None,
    version: str = "1.0.0",
) -> str:
    """Writes records (of `sources.read`) as the TFDS data set preferences/NAME; its folder.

    splits: {"train": records, ...}. Prompt, responses, scores and the numbers of a record are
    written, in order; what else it holds is not. data_dir: None = TFDS_DATA_DIR, or
    ~/tensorflow_datasets.
    Errors: BadInput for a version that is there, for records that do not all have the same fields,
    and for what the writer has no form for: messages with more than role and content, lists of
    conversations of several turns.
    """
    import tensorflow_datasets as tfds

    records = [record for part in splits.values() for record in part]
    if not records:
        raise BadInput(f"preferences/{name}: no records")
    form = _Form.of(records)
    builder = _builder()(
        features=form.features(records[0]),
        rows={split: [form.row(record) for record in part] for split, part in splits.items()},
        data_dir=data_dir,
        config=tfds.core.BuilderConfig(name=name, version=version),
        version=version,
    )
    if builder.is_prepared():
        raise BadInput(f"{builder.data_path} is there already; give another version or remove it")
    builder.download_and_prepare(file_format="array_record")
    for split, part in splits.items():
        found = sum(1 for _ in rows(f"{PREFIX}{builder.data_path}:{split}"))
        assert found == len(part), f"{builder.data_path}: {found} of {len(part)} in {split}"
    return str(builder.data_path)


class _Form(NamedTuple):
    """How records are written: as pairs, completions or lists, their responses as text or turns.

    A list inside a list would need TensorFlow, so a list of responses holds text.
    """

    answers: tuple[str, ...]  # the fields of the responses; ("responses",) for a list
    talks: bool  # whether prompts are conversations
    turns: bool  # whether responses are

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> "_Form":
        """That of all records. Errors: BadInput where they have none in common."""
        counts = {len(record["responses"]) for record in records}
        answers = ANSWERS.get(counts.pop(), LIST) if len(counts) == 1 else LIST
        talks = is_conversation(records[0]["prompt"])
        turns = talks and any(len(answer) > 1 for r in records for answer in r["responses"])
        first = {name for name in WRITTEN if name in records[0]}
        for record in records:
            where = record["where"]
            fields = {name for name in WRITTEN if name in record}
            alike = (fields, record.get("criteria")) == (first, records[0].get("criteria"))
            if not alike or is_conversation(record["prompt"]) != talks:
                raise BadInput(
                    f"{where}: a TFDS data set holds records of the same fields, kinds "
                    f"of text and criteria; {records[0]['where']} has others"
                )
            for message in chain(record["prompt"], *record["responses"]) if talks else ():
                if message.keys() != {"role", "content"}:
                    raise BadInput(
                        f"{where}: a message with {', '.join(sorted(message))} is not "
                        "written to TFDS, only role and content are"
                    )
        if turns and answers == LIST:
            raise BadInput(
                f"{records[0]['where']}: lists of conversations of several turns are not"
                " written to TFDS; give pairs, or responses of one turn"
            )
        return cls(answers, talks, turns)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record as a row that `sources` reads back as the same record."""
        row: dict[str, Any] = {"prompt": record["prompt"]}
        row |= {name: record[name] for name in NUMBERS if name in record}
        row |= {name: json.dumps(record[name]) for name in JSON if name in record}
        found = record["responses"]
        if self.talks and not self.turns:
            found = [message["content"] for (message,) in found]
        if self.answers == LIST:
            row["responses"] = found
        else:
            row |= dict(zip(self.answers, found, strict=True))
        return row | self._scores(record)

    def _scores(self, record: Mapping[str, Any]) -> dict[str, Any]:
        scores = record.get("scores")
        if scores is None:
            return {}
        if "criteria" in record:
            columns = map(list, zip(*scores, strict=True))
            return {"scores": dict(zip(record["criteria"], columns, strict=True))}
        if any(isinstance(score, list) for score in scores):
            raise BadInput(f"{record['where']}: several scores a response want names to be written")
        if self.answers == ANSWERS[2]:
            return dict(zip(PAIR_SCORES, scores, strict=True))
        return {"scores": scores}

    def features(self, record: Mapping[str, Any]) -> Any:
        """The TFDS features of such rows."""
        import tensorflow_datasets as tfds

        kinds = tfds.features
        message = {"role": kinds.Text(), "content": kinds.Text()}
        part = kinds.Sequence(message) if self.turns else kinds.Text()
        scores = kinds.Sequence(np.float64)
        every = {
            "prompt": kinds.Sequence(message) if self.talks else kinds.Text(),
            "responses": kinds.Sequence(kinds.Text()),
            "scores": {name: scores for name in record["criteria"]}
            if "criteria" in record
            else scores,
        }
        every |= dict.fromkeys((*NUMBERS, *PAIR_SCORES), np.float64)
        every |= {name: part for names in ANSWERS.values() for name in names}
        every |= {name: kinds.Text() for name in JSON}
        return kinds.FeaturesDict({name: every[name] for name in self.row(record)})


@cache
def _builder() -> Any:
    """The class of the builder; a function because importing TFDS takes a second."""
    import tensorflow_datasets as tfds

    class Preferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows of preferences, in their order."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # to find it TFDS imports a package that it does not list

        def __init__(self, *, features: Any, rows: Any, **options: Any):
            self._features, self._rows = features, rows
            super().__init__(file_format="array_record", **options)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=self._features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in self._rows}

        def _generate_examples(self, split: str) -> Any:
            yield from enumerate(self._rows[split])

    return Preferences
