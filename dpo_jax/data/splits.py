"""Records of a source that is published in one piece, parted in two: to train on and to hold out."""

import zlib
from collections.abc import Iterator
from typing import Any, Literal

from dpo_jax.data.layouts import plain
from dpo_jax.data.sources import Layout, Source, read


def part(
    *,
    source: Source,
    held_out: bool,
    share: float = 0.1,
    by: Literal["prompt", "record"] = "prompt",
    layout: Layout | None = None,
) -> Iterator[dict[str, Any]]:
    """The records of a source that are held out, or the others; for `Data.source`.

    About `share` of them is held out, by what the text hashes to: that of the prompt, so that no
    prompt stands on both sides, or of the whole record. Neither order nor seed changes a side.
    Rows with a fault are passed over. Errors: BadInput for a source that cannot be read.
    """
    for record in read(source, on_bad="skip", layout=layout)[0]:
        texts = [plain(record["prompt"])]
        texts += [plain(each) for each in record["responses"]] if by == "record" else []
        place = zlib.crc32("\0".join(texts).encode(errors="surrogatepass")) / 2**32
        if (place < share) == held_out:
            yield _row(record)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a row that is read again."""
    row = {name: value for name, value in record.items() if name not in ("where", "criteria")}
    if "criteria" in record:
        names = record["criteria"]
        row["scores"] = [dict(zip(names, each, strict=True)) for each in record["scores"]]
    return row
