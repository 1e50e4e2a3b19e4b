"""Files that the server keeps and this host needs (data sets, adapters) by the sha256 of their content: fetched once,
verified, shared by all jobs.

A file appears under its final name only when its hash is right. What was fetched before a break stays as `.part` and is
continued with a Range request; a lock on it makes a second job wait for the first one's download and then find it done.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from worker.job_directory import sync_folder
from worker.server import Interrupted, Server, insist

_CHUNK = 1 << 20


class WrongBytes(Exception):
    """The server's file does not have the promised hash, twice in a row."""


def fetch_blob(
    server: Server,
    folder: Path,
    sha256: str,
    *,
    is_unwanted: Callable[[], bool],
    longest_back_off_s: float,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Raises WrongBytes, Interrupted, and Unknown for a file that the server does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / sha256
    part = folder / f"{sha256}.part"
    with part.open("ab") as output:
        while not target.exists():
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if is_unwanted():
                    raise Interrupted from None
                time.sleep(0.05)
        # Whoever held the lock may have finished it meanwhile.
        if target.exists():
            with suppress(FileNotFoundError):
                part.unlink()
            return target
        for _ in range(2):
            insist(
                lambda: _continue(server, sha256, output.fileno(), is_unwanted, on_progress),
                is_unwanted=is_unwanted,
                longest_back_off_s=longest_back_off_s,
            )
            os.fsync(output.fileno())
            with part.open("rb") as whole:
                if hashlib.file_digest(whole, "sha256").hexdigest() == sha256:
                    part.rename(target)
                    sync_folder(folder)
                    return target
            # A part from an older break may be at fault: once more, from the start.
            os.ftruncate(output.fileno(), 0)
    raise WrongBytes(f"what the server sends does not have the sha256 {sha256}")


def _continue(
    server: Server, sha256: str, output: int, is_unwanted: Callable[[], bool], on_progress: Callable[[int], None]
) -> None:
    size = os.fstat(output).st_size
    with server.open_blob(sha256, size) as (offset, chunks):
        if offset != size:
            os.ftruncate(output, offset)
        for chunk in chunks:
            if is_unwanted():
                raise Interrupted
            view = memoryview(chunk)
            while view:
                view = view[os.write(output, view) :]
            on_progress(len(chunk))


__all__ = ["WrongBytes", "fetch_blob"]
