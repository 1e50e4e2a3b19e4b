"""The attempt's own history on its host: what the recorder will know, in the order in which it will know it.

`journal.jsonl` holds one event a line under the attempt's seq: the trainer's events, its captured output, and what the
supervisor itself has to say. It is the source of everything that is sent; the relay reads it again from any seq.

*One numberer at a time*: the supervisor, or after its death the host agent. A line of the trainer's carries `at`, the
offset in events.jsonl after the event, so that whoever numbers next begins exactly there: the trainer appends to a file
of its own, and kill -9 of the supervisor can neither lose nor double an event.

*What survives*: a line is one write, so a killed process leaves whole lines. A power cut may leave less: the file is
synced once a second, and at once for checkpoint, failure and end. Each line ends with the CRC of what stands before it;
on opening, everything from the first bad line on is cut off. The recorder may then have seen more than the file holds;
`continue_after` moves the numbering past what it has, so that no seq ever names two events.
"""

import json
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from core.wire import MAX_EVENTS_A_BATCH, WireEvent

JOURNAL = "journal.jsonl"
_SYNC_AT_ONCE = frozenset({"checkpoint", "failure", "end"})
_INDEX_EVERY = 256  # events between two remembered offsets
_MAX_BATCH_BYTES = 1 << 20  # a batch's size on the wire, roughly; one large event may exceed it


def _to_line(seq: int, ts: float, kind: str, data: dict[str, Any], at: int | None) -> bytes:
    line: dict[str, Any] = {"seq": seq, "ts": ts, "kind": kind, "data": data}
    if at is not None:
        line["at"] = at
    body = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return body[:-1] + b',"crc":%d}\n' % zlib.crc32(body)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """None for a line that was torn or altered."""
    body, separator, crc = line.rpartition(b',"crc":')
    if not separator or not crc.endswith(b"}\n") or not crc[:-2].isdigit() or zlib.crc32(body + b"}") != int(crc[:-2]):
        return None
    parsed: dict[str, Any] = json.loads(body + b"}")
    return parsed


class Journal:
    """Appended to by one thread; `read_after` may be called from any."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self._index: list[tuple[int, int]] = []  # (seq, offset of its line)
        self._num_lines = 0
        self._size = 0
        self._synced_size = 0
        self._synced_at = time.monotonic()
        self.last_seq = 0
        self.trainer_offset = 0  # events.jsonl is merged up to here
        for line, event in _valid_lines(self._file, self.last_seq):
            self._note(event["seq"], len(line))
            self.trainer_offset = event.get("at", self.trainer_offset)
        os.ftruncate(self._file, self._size)
        self._synced_size = self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._synced_size != self._size:
            self.sync()
        os.close(self._file)

    def append(self, kind: str, *, ts: float | None = None, at: int | None = None, **data: Any) -> int:
        """Returns the event's seq. Raises ValueError for a number that JSON does not know (NaN)."""
        return self.append_event(kind, data, time.time() if ts is None else ts, at)

    def append_event(self, kind: str, data: dict[str, Any], ts: float, at: int | None = None) -> int:
        seq = self.last_seq + 1
        line = _to_line(seq, ts, kind, data, at)
        written = os.write(self._file, line)
        if written != len(line):
            # A full disk: take the torn line away again, so that the next one starts whole.
            os.ftruncate(self._file, self._size)
            raise OSError(f"only {written} of {len(line)} bytes of an event could be written")
        with self._lock:
            self._note(seq, len(line))
        if at is not None:
            self.trainer_offset = at
        if kind in _SYNC_AT_ONCE:
            self.sync()
        return seq

    def continue_after(self, seq: int) -> None:
        """The recorder has seen up to `seq`, more than this file holds after a power cut."""
        self.last_seq = max(self.last_seq, seq)

    def sync_if_due(self, interval_s: float) -> None:
        if self._synced_size != self._size and time.monotonic() - self._synced_at >= interval_s:
            self.sync()

    def sync(self) -> None:
        os.fdatasync(self._file)
        self._synced_size = self._size
        self._synced_at = time.monotonic()

    def read_after(self, seq: int, limit: int = MAX_EVENTS_A_BATCH) -> tuple[WireEvent, ...]:
        """The events that follow `seq`, at most `limit`, and no more than makes a reasonable message."""
        with self._lock:
            offset = next((at for known, at in reversed(self._index) if known <= seq + 1), 0)
            end = self._size
        events: list[WireEvent] = []
        num_bytes = 0
        for line in _lines(self._file, offset, end):
            event = _parse_line(line)
            assert event is not None, f"the journal was altered while it was open, after seq {seq}"
            if event["seq"] <= seq:
                continue
            num_bytes += len(line)
            if events and (len(events) == limit or num_bytes > _MAX_BATCH_BYTES):
                break
            events.append(WireEvent(seq=event["seq"], ts=event["ts"], kind=event["kind"], data=event["data"]))
        return tuple(events)

    def _note(self, seq: int, num_bytes: int) -> None:
        if self._num_lines % _INDEX_EVERY == 0:
            self._index.append((seq, self._size))
        self._num_lines += 1
        self._size += num_bytes
        self.last_seq = seq


def _valid_lines(file: int, last_seq: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for line in _lines(file, 0, os.fstat(file).st_size):
        event = _parse_line(line)
        if event is None or event["seq"] <= last_seq:
            return
        last_seq = event["seq"]
        yield line, event


def _lines(file: int, offset: int, end: int) -> Iterator[bytes]:
    """Complete lines between two offsets; pread leaves the file's own position alone."""
    rest = b""
    while offset < end:
        chunk = os.pread(file, min(1 << 18, end - offset), offset)
        if not chunk:
            return
        offset += len(chunk)
        *complete, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in complete)
