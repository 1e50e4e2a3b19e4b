"""The trainer as its supervisor sees it: a process, a pipe with what it prints, and a file that it appends events to.

It runs in a session of its own with the attempt's mark, dies with the supervisor's main thread (which must therefore be
the one that starts it), and never sees the worker's token. Everything it starts carries the mark, too.
"""

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worker.journal import Journal
from worker.output import LineReader
from worker.processes import dying_with_this_process

EVENTS = "events.jsonl"
_READ_BYTES = 1 << 16
_READS_A_POLL = 64  # a flood of output must not keep the main loop from everything else


class Trainer:
    def __init__(self, argv: Sequence[str], directory: Path, environment: Mapping[str, str], secrets: Sequence[str]):
        self._log = (directory / "trainer.log").open("ab")
        self.lines = LineReader(secrets)
        self._process = subprocess.Popen(  # noqa: S603  an argv list, no shell
            dying_with_this_process([*argv, str(directory)]),
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._is_output_open = True

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)  # does nothing to a process that was already waited for

    def wait_for_output(self, timeout_s: float) -> None:
        self._selector.select(timeout_s)

    def read_lines(self) -> Iterator[str]:
        """What has been printed since; never blocks."""
        for _ in range(_READS_A_POLL):
            if not self._is_output_open:
                return
            try:
                data = os.read(self._output, _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                self._is_output_open = False
                self._selector.unregister(self._output)
                return
            for line in self.lines.feed(data):
                yield self._logged(line)

    def read_rest(self) -> Iterator[str]:
        yield from self.read_lines()
        for line in self.lines.finish():
            yield self._logged(line)

    def close(self) -> None:
        assert self._process.poll() is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._selector.close()
        self._log.close()

    def _logged(self, line: str) -> str:
        self._log.write(line.encode() + b"\n")
        self._log.flush()
        return line


class EventTail:
    """New whole lines of events.jsonl, from an offset on, each with the offset after it."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self.offset = offset

    def read(self) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """None stands for a line that is no event. A last line without its end is left for later: it may be growing."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(_READ_BYTES)
                if b"\n" not in data:
                    data += file.readline()
        except FileNotFoundError:
            return
        *complete, _ = data.split(b"\n")
        for line in complete:
            self.offset += len(line) + 1
            yield _parse(line), self.offset


def merge_events(tail: EventTail, journal: Journal) -> Iterator[tuple[str, dict[str, Any]]]:
    """Numbers the trainer's new events into the journal; yields the kind and the fields of each."""
    for event, offset in tail.read():
        if event is None:
            text = f"a line of {EVENTS} that ends at byte {offset} is no event and was left out"
            journal.append("warning", at=offset, code="bad_event", text=text)
            continue
        kind, ts = event.pop("kind"), event.pop("ts")
        event.pop("seq", None)  # the trainer's own numbering ends here
        journal.append_event(kind, event, ts, at=offset)
        yield kind, event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line, parse_constant=_refuse)
    except ValueError:
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("kind"), str)
    return event if is_event and isinstance(event.get("ts"), int | float) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
