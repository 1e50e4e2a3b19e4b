"""Carries the journal to the recorder: quickly by Redis, surely by HTTP.

The journal is the truth, `acked_seq` (from heartbeats and HTTP replies) is how far the recorder has stored it, and the
relay only ever moves a reading position between the two. Redis is believed in nothing: a batch that was added to the
stream counts as sent, not as arrived. Once sent events stand unacknowledged for `patience_s` (the stream was flushed
or trimmed, the recorder's group is gone), or Redis does not answer, everything after acked_seq goes by HTTP until the
recorder has caught up; then the fast road is tried again. What arrives twice, the recorder drops by its seq.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from core import wire
from worker.journal import Journal
from worker.server import Away, Server, Stale

_REDIS_RETRY_S = 5.0
_LONGEST_PAUSE_S = 5.0


class Relay(threading.Thread):
    def __init__(self, journal: Journal, server: Server, attempt: wire.AttemptRef, acked_seq: int, patience_s: float):
        super().__init__(name="relay", daemon=True)
        self._journal, self._server, self._attempt = journal, server, attempt
        self._patience_s = patience_s
        self._wake = threading.Event()
        self._is_stopping = False
        self._lock = threading.Lock()  # of what the heart may change: acked_seq, its time, the address of Redis
        self._acked_seq = acked_seq
        self._waiting_since: float | None = None  # sent events wait for their acknowledgement since
        self._redis_url: str | None = None
        self._sent_seq = acked_seq
        self._redis: redis.Redis | None = None
        self._redis_broken_until = 0.0

    # -- from other threads ----------------------------------------------------------------------------------------
    def wake(self) -> None:
        """New events stand in the journal."""
        self._wake.set()

    def note_acked(self, acked_seq: int) -> None:
        with self._lock:
            if acked_seq > self._acked_seq:
                self._acked_seq = acked_seq
                self._waiting_since = time.monotonic() if self._sent_seq > acked_seq else None

    def use_redis(self, url: str | None) -> None:
        with self._lock:
            if url != self._redis_url:
                self._redis_url = url
                self._redis = None
                self._redis_broken_until = 0.0

    def stop(self) -> None:
        self._is_stopping = True
        self._wake.set()
        self.join()

    # -- the thread ------------------------------------------------------------------------------------------------
    def run(self) -> None:
        pause_s = 0.2
        while not self._is_stopping:
            self._wake.wait(min(1.0, self._patience_s / 2))
            self._wake.clear()
            try:
                while self._has_work() and not self._is_stopping:
                    self._send()
                pause_s = 0.2
            except (Away, Stale):
                # Stale comes from a server that does not know the attempt at all; the heart will hear it, too.
                self._pause(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _pause(self, pause_s: float) -> None:
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not self._is_stopping:
            time.sleep(0.05)
        self._wake.set()

    def _has_work(self) -> bool:
        return self._journal.last_seq > max(self._sent_seq, self._acked_seq) or self._is_overdue()

    def _is_overdue(self) -> bool:
        with self._lock:
            return self._waiting_since is not None and time.monotonic() - self._waiting_since > self._patience_s

    def _send(self) -> None:
        if not self._is_overdue():
            client = self._usable_redis()
            if client is not None and self._send_by_redis(client):
                return
        catch_up(
            self._journal,
            self._server,
            self._attempt,
            self._acked_seq,
            on_acked=self._note_sent_and_acked,
            is_unwanted=lambda: self._is_stopping,
        )

    def _note_sent_and_acked(self, acked_seq: int) -> None:
        with self._lock:
            self._acked_seq = max(self._acked_seq, acked_seq)
            # Whatever else was sent by Redis counts as lost: it goes again.
            self._sent_seq = self._acked_seq
            self._waiting_since = None

    def _usable_redis(self) -> redis.Redis | None:
        with self._lock:
            if self._redis_url is None or time.monotonic() < self._redis_broken_until:
                return None
            if self._redis is None:
                self._redis = redis.Redis.from_url(self._redis_url, socket_timeout=5, socket_connect_timeout=2)
            return self._redis

    def _send_by_redis(self, client: redis.Redis) -> bool:
        events = self._journal.read_after(max(self._sent_seq, self._acked_seq))
        if not events:  # what was overdue has been acknowledged in this moment
            return True
        entry: dict[Any, Any] = {  # redis' own type of it is invariant in a union of six
            "job": self._attempt.job,
            "attempt": self._attempt.attempt,
            "fence": self._attempt.fence,
            "batch": json.dumps([event.model_dump() for event in events], ensure_ascii=False, allow_nan=False),
        }
        try:
            client.xadd(wire.EVENT_STREAM, entry, maxlen=wire.EVENT_STREAM_MAX_ENTRIES, approximate=True)
        except redis.RedisError:
            self._redis_broken_until = time.monotonic() + _REDIS_RETRY_S
            return False
        with self._lock:
            self._sent_seq = events[-1].seq
            if self._sent_seq > self._acked_seq and self._waiting_since is None:
                self._waiting_since = time.monotonic()
        return True


def catch_up(
    journal: Journal,
    server: Server,
    attempt: wire.AttemptRef,
    acked_seq: int,
    *,
    on_acked: Callable[[int], None] = lambda acked_seq: None,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> int:
    """Sends everything after `acked_seq` by HTTP; returns the recorder's watermark. Raises Away and Unknown."""
    while not is_unwanted():
        events = journal.read_after(acked_seq)
        acked_before, acked_seq = acked_seq, server.send_events(attempt, events)
        on_acked(acked_seq)
        if acked_seq >= journal.last_seq:
            break
        if events and acked_seq <= acked_before:
            raise Away(f"the recorder stands at event {acked_seq} although {events[0].seq} and on were sent")
    return acked_seq
