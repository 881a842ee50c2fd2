"""Data sets of the Hugging Face hub as files on this machine.

    hub:owner/name                  split train of its only configuration (or "default")
    hub:owner/name:test             another split
    hub:owner/name/config:test      another configuration
    hub:owner/name/folder/x.jsonl   one file of the repository, of a kind that `sources` reads
    hub:owner/name@revision/x.jsonl the same at a branch, tag or commit

Splits are read from the Parquet version that the hub keeps of every data set, so nothing of the
repository is run. Files stay in the hub's own cache (HF_HOME); HF_TOKEN opens gated ones.
"""

import re
from collections.abc import Callable
from typing import Any

from dpo_jax.structs import BadInput

PREFIX = "hub:"
PARQUET = "refs/convert/parquet"  # the branch of the Parquet version
_FORM = re.compile(
    r"hub:(?P<repo>[^/:@]+/[^/:@]+)(@(?P<revision>[^/:]+))?(/(?P<path>[^:]+))?(:(?P<split>[^:]+))?"
)


def files(source: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name for messages, local path) of every file of a `hub:` source, downloaded when missing.

    Errors: BadInput for a source of another form, a data set that is not there, gated or out of
    reach, and a split that it has not.
    """
    found = _FORM.fullmatch(source)
    if not found:
        raise BadInput(
            f"{source}: write hub:owner/name, hub:owner/name:split, hub:owner/name/config:split or"
            " hub:owner/name/file.jsonl"
        )
    repo, revision, path, split = found["repo"], found["revision"], found["path"], found["split"]
    if path and path.endswith(suffixes):
        if split:
            raise BadInput(f"{source}: a file has no split; leave :{split} out")
        return [(source, _download(source, repo, path, revision))]
    if revision:
        raise BadInput(f"{source}: a revision goes with a file: hub:{repo}@{revision}/FILE")
    names = _split_files(source, repo, path, split or "train")
    return [(f"{PREFIX}{repo}/{name}", _download(source, repo, name, PARQUET)) for name in names]


def _split_files(source: str, repo: str, config: str | None, split: str) -> list[str]:
    """The Parquet files of a split, named config/split/0000.parquet."""
    from huggingface_hub import HfApi

    api = HfApi()
    listed = _asked(
        source, lambda: api.list_repo_files(repo, repo_type="dataset", revision=PARQUET)
    )
    places = [name.split("/") for name in listed if name.endswith(".parquet")]
    configs = sorted({place[0] for place in places if len(place) == 3})
    if config is None:
        config = configs[0] if len(configs) == 1 else "default"
    if config not in configs:
        raise BadInput(
            f"{source}: there is no configuration {config}; write hub:{repo}/CONFIG:{split} with "
            f"one of {', '.join(configs) or 'none'}"
        )
    splits = sorted({place[1] for place in places if place[0] == config})
    if split not in splits:
        part = f"partial-{split}" in splits
        why = "the hub keeps only part of this split" if part else f"there is no split {split}"
        remedy = "name its files" if part else f"there is {', '.join(splits)}"
        raise BadInput(f"{source}: {why}; {remedy}")
    return sorted("/".join(place) for place in places if place[:2] == [config, split])


def _download(source: str, repo: str, name: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    return _asked(
        source, lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    )


def _asked(source: str, call: Callable[[], Any]) -> Any:
    """What the hub answers; its refusals as BadInput."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError:
        why = "the data set is gated: accept its terms on its page and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such data set; if it is private, set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = "there is no such revision, or no Parquet version; name a file: hub:owner/name/FILE"
    except errors.RemoteEntryNotFoundError:
        why = "the data set has no such file"
    except Exception as error:  # the clients of its several versions raise their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        why = f"cannot be had from the hub ({reason}); without a network give a file"
    raise BadInput(f"{source}: {why}")
