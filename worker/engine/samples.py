"""Samples in files: written once, one after another, and read through the page cache by whoever needs them.

A set of samples is a folder:

    token_ids.bin   int32    of all samples, side by side
    trained.bin     1 byte   for each of them: whether it has a loss
    ends.bin        int64    where each sample begins, in tokens, and at last where the last one ends
    lines.bin       int64    the line (of Parquet the row) where each sample's row begins
    profile.json             its DataProfile
    index.json               sizes of the files above, and a checksum over the small ones; written last

So a million conversations cost no more memory than the pages that are touched, and processes of one host share them.
All numbers are little-endian, as every machine with a GPU has them.
"""

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from core.chat import Sample
from core.profile import DataProfile
from worker.job_directory import sync_folder, write_atomically

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

TOKEN_IDS, TRAINED, ENDS, LINES = "token_ids.bin", "trained.bin", "ends.bin", "lines.bin"
PROFILE, INDEX = "profile.json", "index.json"
# What finds everything else; a wrong byte in it would train on shifted samples.
CHECKED = (ENDS, LINES, PROFILE)


class Broken(Exception):
    """The folder doesn't hold what was written; the text says how that shows."""


@dataclass(frozen=True)
class MeasuredSet:
    profile: DataProfile
    samples: "SampleStore"


class SampleWriter:
    """Appends to the files of a folder, batch by batch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {
            name: (folder / name).open("xb") for name in (TOKEN_IDS, TRAINED, ENDS, LINES)
        }
        self._num_tokens = 0
        self._files[ENDS].write(bytes(8))

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def write(self, samples: Iterable[tuple[Sample, int]]) -> None:
        """Samples, each with the line of its row."""
        token_ids, trained, ends, lines = array("i"), bytearray(), array("q"), array("q")
        for sample, line in samples:
            token_ids.extend(sample.token_ids)
            begin = len(trained)
            trained.extend(bytes(len(sample.token_ids)))
            for start, end in sample.runs:
                trained[begin + start : begin + end] = b"\1" * (end - start)
            ends.append(self._num_tokens + len(token_ids))
            lines.append(line)
        self._num_tokens += len(token_ids)
        for name, part in ((TOKEN_IDS, token_ids), (TRAINED, trained), (ENDS, ends), (LINES, lines)):
            self._files[name].write(part)

    def finish(self, profile: DataProfile) -> None:
        """Makes the set whole and durable; only then is there an index."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self._folder / PROFILE, profile.model_dump_json().encode())
        names = (*self._files, PROFILE)
        index = {"bytes": {name: (self._folder / name).stat().st_size for name in names}, "sha256": _hash(self._folder)}
        write_atomically(self._folder / INDEX, json.dumps(index).encode())
        sync_folder(self._folder)


def open_set(folder: Path, keeper: object = None) -> MeasuredSet:
    """What a SampleWriter finished. Raises Broken. `keeper` lives as long as the samples do: it may hold a lock."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        sizes, digest = dict(index["bytes"]), index["sha256"]
        for name in (TOKEN_IDS, TRAINED, ENDS, LINES, PROFILE):
            size = (folder / name).stat().st_size
            if size != sizes[name]:
                raise Broken(f"{name} has {size:,} bytes in place of {sizes[name]:,}")
        if _hash(folder) != digest:
            raise Broken("its checksum is another")
        profile = DataProfile.model_validate_json((folder / PROFILE).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise Broken(str(error).split("\n")[0]) from error
    return MeasuredSet(profile, SampleStore(folder, keeper))


def _hash(folder: Path) -> str:
    whole = hashlib.sha256()
    for name in CHECKED:
        with (folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


class SampleStore:
    """Samples by their number in the set, from files that may be gone from their folder meanwhile."""

    def __init__(self, folder: Path, keeper: object = None) -> None:
        self._keeper = keeper
        self._token_ids = _map(folder / TOKEN_IDS, np.int32)
        self._trained = _map(folder / TRAINED, np.bool_)
        self._ends = _map(folder / ENDS, np.int64)
        self._lines = _map(folder / LINES, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def sample(self, index: int) -> tuple[IntArray, BoolArray]:
        """Token ids and which of them are trained; both read-only views."""
        start, end = self._ends[index], self._ends[index + 1]
        return self._token_ids[start:end], self._trained[start:end]

    def line(self, index: int) -> int:
        return int(self._lines[index])


def _map(path: Path, type: Any) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return np.zeros(0, type)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), type)
