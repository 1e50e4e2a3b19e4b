"""Files by their content: `blobs/ab/abcd...`, the name being the sha256 of the bytes.

No path is ever built from what a person wrote. A file appears under its name only when it is whole and on disk:
streamed into `incoming/` while it is hashed, synced, renamed, the folder synced. What a killed process leaves in
`incoming/` is removed at the next start. Two uploads of the same bytes meet at the rename and are one file."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from sqlalchemy.dialects.sqlite import insert
from sqlmodel import Session, col

from app.problems import Problem
from app.tables import Blob
from core.errors import UserError

SHA256 = re.compile(r"[0-9a-f]{64}")
WRITE_BYTES = 2**20  # gathered before a thread is asked to write and hash them
READ_BYTES = 2**20
DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class StoredBlob:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class IncomingBlob:
    temporary: Path
    target: Path
    stored: StoredBlob

    def read(self) -> Iterator[bytes]:
        return read_chunks(self.temporary)

    def keep(self) -> None:
        """Gives the file its name: a rename, quick enough for the transaction that first refers to it."""
        self.target.parent.mkdir(exist_ok=True)
        self.temporary.rename(self.target)
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class BlobStore:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), sha256
        return self._root / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def remove_unfinished(self) -> None:
        """At the start of the one web process, when nobody else can be writing."""
        for path in self._incoming.iterdir():
            path.unlink(missing_ok=True)

    @asynccontextmanager
    async def incoming(self, chunks: AsyncIterable[bytes], *, max_bytes: int) -> AsyncIterator["IncomingBlob"]:
        """A body of unknown length, whole and synced in a file of no name yet; what isn't kept is gone afterwards.
        Raises Problem: 413 over `max_bytes`, 507 when the disk is full."""
        temporary = self._incoming / secrets.token_hex(16)
        hasher, num_bytes = hashlib.sha256(), 0
        try:
            with temporary.open("xb") as file:

                def write(data: bytes) -> None:
                    hasher.update(data)
                    file.write(data)

                def sync() -> None:
                    file.flush()
                    os.fsync(file.fileno())

                gathered = bytearray()
                async for chunk in chunks:
                    num_bytes += len(chunk)
                    if num_bytes > max_bytes:
                        raise Problem(413, UserError("upload.too_large", limit=max_bytes))
                    gathered += chunk
                    if len(gathered) >= WRITE_BYTES:
                        await run_in_threadpool(write, bytes(gathered))
                        gathered.clear()
                await run_in_threadpool(write, bytes(gathered))
                await run_in_threadpool(sync)
            sha256 = hasher.hexdigest()
            yield IncomingBlob(temporary, self.path(sha256), StoredBlob(sha256, num_bytes))
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                raise Problem(507, UserError("upload.disk_full")) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, sha256: str) -> Iterator[bytes]:
        return read_chunks(self.path(sha256))

    def delete(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def response(self, sha256: str, *, filename: str, media_type: str = "application/octet-stream") -> FileResponse:
        """The file as a download; a Range is honoured, and the ETag names the content."""
        return FileResponse(
            self.path(sha256),
            media_type=media_type,
            filename=filename,
            # A stored file never becomes a page of ours, whatever it holds.
            headers={"ETag": f'"{sha256}"', "Content-Security-Policy": "default-src 'none'; sandbox"},
        )


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def record_blob(session: Session, stored: StoredBlob, now: float) -> None:
    """Writes the row of a stored file, in the transaction that first refers to it."""
    row = {"sha256": stored.sha256, "bytes": stored.bytes, "created_at": now}
    session.execute(insert(Blob).values(row).on_conflict_do_nothing(index_elements=[col(Blob.sha256)]))
