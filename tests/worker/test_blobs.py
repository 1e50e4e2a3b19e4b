import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.wire import DataFile
from tests.worker.conftest import Host
from worker.blobs import WrongBytes, fetch_blob
from worker.server import Interrupted, Server, Unknown

CONTENT = bytes(range(256)) * 8000


@pytest.fixture
def server(host: Host) -> Iterator[Server]:
    with Server(host.settings) as server:
        yield server


def fetch(server: Server, folder: Path, file: DataFile) -> Path:
    return fetch_blob(server, folder, file.sha256, is_unwanted=lambda: False, longest_back_off_s=0.1)


def test_a_file_is_fetched_once(host: Host, server: Server, tmp_path: Path) -> None:
    file = host.ledger.put_blob(CONTENT)
    path = fetch(server, tmp_path / "blobs", file)
    assert path.read_bytes() == CONTENT
    assert fetch(server, tmp_path / "blobs", file) == path
    assert host.ledger.served_ranges == [None]
    assert [each.name for each in (tmp_path / "blobs").iterdir()] == [file.sha256]


def test_an_empty_file_is_a_file(host: Host, server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, host.ledger.put_blob(b"")).read_bytes() == b""


def test_a_broken_download_goes_on_where_it_broke(host: Host, server: Server, tmp_path: Path) -> None:
    file = host.ledger.put_blob(CONTENT)
    host.ledger.cut_blob_after = 1_000_000
    path = fetch(server, tmp_path, file)
    assert path.read_bytes() == CONTENT
    assert len(host.ledger.served_ranges) == 2
    assert host.ledger.served_ranges[1] is not None, "the second request asked for the rest"


def test_a_part_that_is_damaged_is_fetched_again_from_the_start(host: Host, server: Server, tmp_path: Path) -> None:
    file = host.ledger.put_blob(CONTENT)
    (tmp_path / f"{file.sha256}.part").write_bytes(b"not the beginning of it")
    assert fetch(server, tmp_path, file).read_bytes() == CONTENT
    assert host.ledger.served_ranges == ["bytes=23-", None]


def test_a_file_that_is_not_what_was_promised_is_refused(host: Host, server: Server, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"promised").hexdigest()
    host.ledger.blobs[sha256] = b"something else"
    with pytest.raises(WrongBytes):
        fetch(server, tmp_path, DataFile(dataset="d", sha256=sha256, bytes=8))
    assert not (tmp_path / sha256).exists()


def test_a_file_that_the_server_does_not_have_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Unknown):
        fetch(server, tmp_path, DataFile(dataset="d", sha256="0" * 64, bytes=8))


def test_two_jobs_that_need_one_file_fetch_it_once(host: Host, server: Server, tmp_path: Path) -> None:
    file = host.ledger.put_blob(CONTENT)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server, tmp_path, file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == CONTENT for path in paths] == [True] * 4
    assert len(host.ledger.served_ranges) == 1


def test_waiting_for_a_server_that_is_away_ends_when_the_job_is_cancelled(
    host: Host, server: Server, tmp_path: Path
) -> None:
    file = host.ledger.put_blob(CONTENT)
    host.ledger.stop()
    answers = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        fetch_blob(server, tmp_path, file.sha256, is_unwanted=lambda: next(answers, True), longest_back_off_s=0.1)
