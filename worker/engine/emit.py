"""The trainer's own events: one strict JSON line each in events.jsonl, whole or not at all.

A line goes out in a single write to a descriptor opened with O_APPEND, so whoever tails the file sees lines in order.
If a power cut tore the last line, its half is cut off before the first new one; `seq` goes on from the last whole line,
so a resumed run in the same directory never gives a number twice.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.events import BaseEvent, Failure, Phase, Warning, finite, to_line

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MIN_PROGRESS_S = 0.5  # between two progress events of one phase: a page draws no faster


class Emitter:
    """Appends events to one file. `monotonic` paces progress; `now` is only shown."""

    def __init__(self, path: Path, now: Clock = time.time, monotonic: Clock = time.monotonic) -> None:
        self.last_seq = _mend_tail(path)
        self._now = now
        self._monotonic = monotonic
        self._last_progress = ("", 0.0)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> "Emitter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def emit(self, kind: type[BaseEvent], **fields: Any) -> None:
        """One event. A float that is no number is written as null."""
        values = {name: finite(value) if isinstance(value, float) else value for name, value in fields.items()}
        event = kind(seq=self.last_seq + 1, ts=self._now(), **values)
        line = to_line(event.model_dump(mode="json"))
        written = os.write(self._file, line)
        assert written == len(line), "a local file takes a line whole"
        self.last_seq += 1

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Where the job is. Progress within a phase is thinned out; its beginning and its end always go out."""
        last_name, last_time = self._last_progress
        now = self._monotonic()
        if name == last_name and done != total and now - last_time < MIN_PROGRESS_S:
            return
        self._last_progress = (name, now)
        self.emit(Phase, name=name, done=done, total=total)

    def warn(self, code: str, text: str) -> None:
        self.emit(Warning, code=code, text=text)

    def fail(self, reason: str, text: str, remedy: str) -> None:
        self.emit(Failure, reason=reason, text=text, remedy=remedy)


class NoEmitter:
    """What a rank has that is not the first: its events are the first one's too. Warnings go to its log."""

    def emit(self, kind: type[BaseEvent], **fields: Any) -> None: ...

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None: ...

    def warn(self, code: str, text: str) -> None:
        log.warning("%s: %s", code, text)

    def fail(self, reason: str, text: str, remedy: str) -> None: ...


def _mend_tail(path: Path) -> int:
    """Cuts off a torn last line and returns the seq of the last whole one; 0 for a new file."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        window = 1 << 16
        while True:
            start = max(0, size - window)
            file.seek(start)
            tail = file.read(size - start)
            end = tail.rfind(b"\n") + 1
            begin = tail.rfind(b"\n", 0, max(end - 1, 0)) + 1
            if start == 0 or (end > 0 and begin > 0):
                break
            window *= 4
        file.truncate(start + end)
        return int(json.loads(tail[begin:end])["seq"]) if end else 0
