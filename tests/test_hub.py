"""Data sets of the hub, from a server on this machine that answers as the hub does."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpo_jax.data.hub import PARQUET
from dpo_jax.data.sources import read
from dpo_jax.structs import BadInput

ROWS = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
TOKEN = "a-token"


def table() -> bytes:
    import pyarrow
    import pyarrow.parquet

    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), written)
    return written.getvalue()


def files() -> dict[tuple[str, str, str], bytes]:
    """(repository, revision, path) -> content."""
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    found = {
        ("o/open", "main", "folder/x.jsonl"): lines,
        ("o/open", "v2", "folder/x.jsonl"): lines.replace(b'"p"', b'"q"'),
        ("o/gated", "main", "x.jsonl"): lines,
        ("o/two", PARQUET, "one/train/0000.parquet"): table(),
        ("o/two", PARQUET, "other/train/0000.parquet"): table(),
    }
    parts = ("train/0000", "train/0001", "partial-test/0000")
    return found | {("o/open", PARQUET, f"default/{part}.parquet"): table() for part in parts}


class Hub(BaseHTTPRequestHandler):
    """What of the hub's protocol a reader needs: listings, files, and its ways to refuse."""

    stored = files()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        _, *parts = path.split("/")
        listing = parts[0] == "api"
        repo, rest = "/".join(parts[1 + listing : 3 + listing]), "/".join(parts[4 + listing :])
        revisions = {name[1] for name in self.stored if name[0] == repo}
        names = {f"{name[1]}/{name[2]}": name for name in self.stored if name[0] == repo}
        if not revisions:
            self._refuse(401, "RepoNotFound")
        elif repo == "o/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "GatedRepo")
        elif listing and rest in revisions:
            paths = [name[2] for name in names.values() if name[1] == rest]
            items = [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in paths]
            self._answer(json.dumps(items).encode())
        elif listing:
            self._refuse(404, "RevisionNotFound")
        elif rest in names:
            self._answer(self.stored[names[rest]])
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def _refuse(self, status: int, reason: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", hashlib.sha1(self.path.encode()).hexdigest())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


READING = """
import json, sys
from dpo_jax.data.sources import read
from dpo_jax.structs import BadInput
for source in sys.argv[1:]:
    try:
        records, _ = read(source)
        print(json.dumps([records[0]["prompt"], [record["where"] for record in records]]))
    except BadInput as error:
        print(json.dumps(str(error).removeprefix(source + ": ")))
"""


def readings(endpoint: str, home, *sources: str, token: str = "") -> dict:
    """What every source gives in a process whose hub is at the endpoint."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", READING, *sources]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(zip(sources, map(json.loads, run.stdout.splitlines()), strict=True))


def test_files_and_splits_of_the_hub(endpoint: str, tmp_path):
    file, split, tagged = "hub:o/open/folder/x.jsonl", "hub:o/open", "hub:o/open@v2/folder/x.jsonl"
    gated = "hub:o/gated/x.jsonl"
    sources = [file, split, tagged, "hub:o/two/other:train", gated]
    found = readings(endpoint, tmp_path, *sources, token=TOKEN)
    assert found[file] == ["p", [f"{file}:{i}" for i in (1, 2, 3)]]
    assert found[tagged][0] == "q" and found[gated][0] == "p"
    assert len(found[split][1]) == 6
    assert found[split][1][3] == "hub:o/open/default/train/0001.parquet: record 1"
    assert len(found["hub:o/two/other:train"][1]) == 3


def test_what_the_hub_refuses_is_said(endpoint: str, tmp_path):
    said = {
        "hub:o/gated/x.jsonl": "the data set is gated: accept its terms on its page and set HF_TO",
        "hub:o/none/x.jsonl": "the hub has no such data set; if it is private, set HF_TOKEN",
        "hub:o/none:train": "the hub has no such data set; if it is private, set HF_TOKEN",
        "hub:o/open/no.jsonl": "the data set has no such file",
        "hub:o/open:test": "the hub keeps only part of this split; name its files",
        "hub:o/open:eval": "there is no split eval; there is partial-test, train",
        "hub:o/two": "there is no configuration default; write hub:o/two/CONFIG:train with one of",
        "hub:o/gated@v3/x.jsonl": "the data set is gated",
        "hub:o/open@v3:train": "a revision goes with a file: hub:o/open@v3/FILE",
        "hub:o/open/folder/x.jsonl:train": "a file has no split; leave :train out",
        "hub:open": "write hub:owner/name, hub:owner/name:split,",
    }
    found = readings(endpoint, tmp_path, *said)
    for source, message in said.items():
        assert found[source].startswith(message), (source, found[source])


def test_without_a_network_it_is_said():
    for source in ("hub:o/open:train", "hub:o/open/x.jsonl"):
        with pytest.raises(BadInput) as caught:
            read(source)
        message = str(caught.value)
        assert message.startswith(f"{source}: cannot be had from the hub (") and "\n" not in message
        assert message.endswith("; without a network give a file")
