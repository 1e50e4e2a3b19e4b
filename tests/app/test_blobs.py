"""Files by their content: whole or not at all."""

import errno
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from app.blobs import BlobStore, IncomingBlob, StoredBlob
from app.problems import Problem
from app.tables import ArtifactRow, Blob, Job
from tests.app.conftest import NOW, House

CONTENT = b"0123456789" * 300_000  # more than one write


async def body(content: bytes = CONTENT, fault: Exception | None = None) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 65_536):
        yield content[start : start + 65_536]
    if fault is not None:
        raise fault


def store(blobs: BlobStore, chunks: AsyncIterator[bytes], max_bytes: int = 2**30) -> StoredBlob:
    async def receive() -> StoredBlob:
        async with blobs.incoming(chunks, max_bytes=max_bytes) as blob:
            blob.keep()
            return blob.stored

    return anyio.run(receive)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_file_is_named_by_what_it_holds(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert store(blobs, body()) == StoredBlob(sha256, len(CONTENT))
    assert files(tmp_path) == [tmp_path / sha256[:2] / sha256]
    assert b"".join(blobs.read(sha256)) == CONTENT
    assert store(blobs, body()).sha256 == sha256
    assert len(files(tmp_path)) == 1


def test_what_is_too_large_or_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    with pytest.raises(Problem) as refused:
        store(blobs, body(), max_bytes=len(CONTENT) - 1)
    assert refused.value.status == 413
    with pytest.raises(ConnectionError):
        store(blobs, body(fault=ConnectionError("the client is gone")))
    assert files(tmp_path) == []


def test_a_full_disk_is_507_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Problem) as refused:
        store(BlobStore(tmp_path), body(fault=OSError(errno.ENOSPC, "No space left on device")))
    assert refused.value.status == 507
    assert files(tmp_path) == []


def test_a_file_is_synced_before_it_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    order: list[str] = []
    fsync, keep = os.fsync, IncomingBlob.keep
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("sync") or fsync(descriptor))
    monkeypatch.setattr(IncomingBlob, "keep", lambda blob: order.append("name") or keep(blob))
    store(BlobStore(tmp_path), body())
    assert order == ["sync", "name", "sync"]  # the file, its name, the folder that holds the name


@pytest.fixture
def artifact(house: House) -> str:
    """The address of a finished job's file."""

    async def keep() -> StoredBlob:
        async with house.services.blobs.incoming(body(), max_bytes=2**30) as blob:
            blob.keep()
            return blob.stored

    stored = anyio.run(keep)
    with house.services.database.write() as session:
        session.add(Blob(sha256=stored.sha256, bytes=stored.bytes, created_at=NOW))
        session.add(
            Job(id="job_1", name="x", spec={}, spec_sha256="", state="succeeded", created_at=NOW, queued_at=NOW)
        )
        session.flush()
        session.add(ArtifactRow(job="job_1", name="a/b.safetensors", sha256=stored.sha256, bytes=stored.bytes))
    return "/api/v1/jobs/job_1/artifacts/a/b.safetensors"


def test_a_download_can_be_continued(house: House, artifact: str) -> None:
    victor = house.api("victor")
    whole = victor.get(artifact)
    assert whole.status_code == 200 and whole.content == CONTENT
    rest = victor.get(artifact, headers={"Range": "bytes=2000000-", "If-Range": whole.headers["etag"]})
    assert rest.status_code == 206 and rest.content == CONTENT[2_000_000:]
    assert rest.headers["content-range"] == f"bytes 2000000-{len(CONTENT) - 1}/{len(CONTENT)}"
    assert victor.get(artifact, headers={"Range": f"bytes={len(CONTENT)}-"}).status_code == 416


def test_a_download_never_becomes_a_page_of_ours(house: House, artifact: str) -> None:
    headers = house.api("victor").get(artifact).headers
    assert headers["content-disposition"].startswith("attachment")
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert headers["x-content-type-options"] == "nosniff"
