"""A data set on a hub -> a Parquet file on this host, which is then read like any other.

The `datasets` library finds, downloads and builds it, or takes what it has built before where the hub can't be
reached; what comes out is written to one file, named by the commit that it is of. So the revision is known and
recorded, a second job reads the file without a hub, and behind this module a hub's data set is a file with a sha256.

A commit that was recorded once (InputFile.revision) is asked for again when a run is resumed: the hub may have moved
on, the run may not.
"""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.hub import HubDataset
from worker.job_directory import InputFile, sync_folder

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_hub_dataset(name: str, wanted: HubDataset, folder: Path, commit: str | None = None) -> InputFile:
    """The data set's file below `folder`, at `commit` where that is given. Raises UserError hub.* with `name`, as the
    spec has it, for what can't be had."""
    revision = commit or wanted.revision
    if revision is not None and COMMIT.fullmatch(revision):
        kept = _place(folder, wanted, revision)
        if kept.is_file():
            return _as_input(name, kept, revision)
    data = _load(name, wanted, revision)
    found = _commit_of(data)
    if revision is not None and COMMIT.fullmatch(revision) and found != revision:
        raise UserError("hub.other_revision", "data.train", name=name, wanted=revision, found=found)
    path = _place(folder, wanted, found)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            data.to_parquet(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    log.info("%s is commit %s of %s, %d rows", name, found, wanted.repository, len(data))
    return _as_input(name, path, found)


def _load(name: str, wanted: HubDataset, revision: str | None) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(wanted.repository, wanted.config, split=wanted.split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError("hub.unknown", "data.train", name=name, problem=_first_line(error)) from error
    except (ConnectionError, HfHubHTTPError) as error:
        raise UserError("hub.unreachable", "data.train", name=name, problem=_first_line(error)) from error
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        # No such configuration or split (the library lists those that there are), no file that it can read, ...
        raise UserError("hub.unusable", "data.train", name=name, problem=_first_line(error)) from error


def _commit_of(data: Any) -> str:
    """The library builds into .../CONFIG/VERSION/COMMIT/; "" where it doesn't say."""
    for file in data.cache_files:
        commit = Path(file["filename"]).parent.name
        if COMMIT.fullmatch(commit):
            return commit
    return ""


def _place(folder: Path, wanted: HubDataset, commit: str) -> Path:
    parts = "\0".join((wanted.repository, wanted.config or "", wanted.split, commit))
    return folder / "hub" / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.parquet"


def _as_input(name: str, path: Path, commit: str) -> InputFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(dataset=name, path=str(path), sha256=digest, revision=commit)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]
