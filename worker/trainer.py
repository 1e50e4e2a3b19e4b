"""The trainer as its supervisor sees it: a process or several ranks, what they print, and a file of events.

On one device it is one process, whose output comes through a pipe. On several, torchrun is started in its place and
starts the ranks; each appends its output to a file of its own, and the pipe carries torchrun's words alone. It runs in
a session of its own with the attempt's mark, dies with the caller's main thread (which must therefore be the one that
starts it), and never sees the worker's token. Everything it starts carries the mark, too.

*What torchrun is not asked for.* At a TERM it passes that on and KILLs the ranks 30 s later, before a large checkpoint
is written; so signals go past it, to the ranks. It ends with 1 whatever a rank ended with; so `death` reads from its
report which rank fell by itself, and how. The ranks that torchrun then closes are not to blame.
"""

import json
import os
import re
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.journal import Journal
from worker.output import LineReader
from worker.processes import MARK, ProcessId, dying_with_this_process, kill_marked, ranks_below

EVENTS = "events.jsonl"
_READ_BYTES = 1 << 16
_READS_A_POLL = 64  # a flood of output must not keep the main loop from everything else
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node")
_CLOSING = re.compile(r"Sending process (\d+) closing signal")
_FIRST_FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_REPORTED_RANK = re.compile(r"^\s*rank\s*: (\d+) \(local_rank: \d+\)")
_REPORTED_CODE = re.compile(r"^\s*exitcode\s*: (-?\d+) \(pid: (\d+)\)")


def rank_log(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.log"


@dataclass(frozen=True)
class Line:
    rank: int
    text: str


@dataclass(frozen=True)
class Death:
    """How the rank ended whose end ended all."""

    rank: int
    returncode: int  # negative for a signal


def read_death(launcher_lines: Iterable[str]) -> Death | None:
    """From torchrun's report, the rank that ended by itself and not well; one that a signal ended goes first, for the
    others may have failed a moment later because it was gone. None where torchrun tells of none."""
    closed: set[int] = set()  # pids that were alive when torchrun ended the rest
    found: dict[int, Death] = {}
    rank = 0
    for line in launcher_lines:
        if closing := _CLOSING.search(line):
            closed.add(int(closing[1]))
        elif failed := _FIRST_FAILED.search(line):
            found[int(failed[3])] = Death(int(failed[2]), int(failed[1]))
        elif reported := _REPORTED_RANK.search(line):
            rank = int(reported[1])
        elif code := _REPORTED_CODE.search(line):
            found[int(code[2])] = Death(rank, int(code[1]))
    causes = [death for pid, death in found.items() if pid not in closed]
    return min(causes, key=lambda death: (death.returncode >= 0, death.rank), default=None)


class RankLog:
    """What a rank has printed into its file since we began to look."""

    def __init__(self, path: Path, secrets: Sequence[str]) -> None:
        self.lines = LineReader(secrets)
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data


class Trainer:
    def __init__(
        self,
        argv: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        secrets: Sequence[str] = (),
        num_ranks: int = 1,
    ) -> None:
        self.num_ranks = num_ranks
        self.num_bytes_read = 0  # of output
        self._mark = environment[MARK]
        self._log = (directory / "trainer.log").open("ab")
        self._printed = LineReader(secrets)
        self._launcher_lines: deque[str] = deque(maxlen=10_000)  # torchrun's: silence, and a report at the end
        self._rank_logs = [RankLog(rank_log(directory, rank), secrets) for rank in range(num_ranks)]
        self._ranks: dict[int, ProcessId] = {}
        self._told_to_stop: set[int] = set()
        python, *program = argv
        launcher = [] if num_ranks == 1 else [*_TORCHRUN, str(num_ranks)]
        self._process = subprocess.Popen(  # noqa: S603  an argv list, no shell
            dying_with_this_process([python, *launcher, *program, str(directory)]),
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

    # -- signals ---------------------------------------------------------------------------------------------------
    def ask_to_stop(self) -> None:
        """TERM to each rank, once. To be repeated: torchrun takes seconds to start its ranks."""
        for rank in self._find_ranks().keys() - self._told_to_stop:
            self._told_to_stop.add(rank)
            self._ranks[rank].send(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """To each rank that there is."""
        for process in self._find_ranks().values():
            process.send(number)

    def kill(self) -> None:
        """All that carries the mark, torchrun and grandchildren included. To be repeated until `poll` tells the end."""
        kill_marked(self._mark)

    def _find_ranks(self) -> Mapping[int, ProcessId]:
        if self.num_ranks == 1 and not self._ranks:
            process = ProcessId.of(self._process.pid)
            self._ranks = {} if process is None else {0: process}
        elif len(self._ranks) < self.num_ranks:
            self._ranks = ranks_below(self._process.pid, self._mark) | self._ranks
        return self._ranks

    # -- output ----------------------------------------------------------------------------------------------------
    def wait_for_output(self, timeout_s: float) -> None:
        self._selector.select(timeout_s)

    def read_lines(self) -> Iterator[Line]:
        """What the ranks have printed since; never blocks."""
        if self.num_ranks == 1:
            yield from (Line(0, text) for text in self._read_pipe())
            return
        self._launcher_lines.extend(self._read_pipe())
        for rank, log in enumerate(self._rank_logs):
            for _ in range(_READS_A_POLL):
                if not (data := log.read()):
                    break
                self.num_bytes_read += len(data)
                for text in log.lines.feed(data):
                    yield Line(rank, text)

    def read_rest(self) -> Iterator[Line]:
        yield from self.read_lines()
        rest = [self._logged(text) for text in self._printed.finish()]
        if self.num_ranks == 1:
            yield from (Line(0, text) for text in rest)
            return
        self._launcher_lines.extend(rest)
        for rank, log in enumerate(self._rank_logs):
            for text in log.lines.finish():
                yield Line(rank, text)

    def launcher_tail(self) -> tuple[str, ...]:
        """The last lines of torchrun, which matter where no rank could say how it ended; nothing on one device."""
        return () if self.num_ranks == 1 else tuple(self._printed.tail)

    def death(self) -> Death | None:
        """Once all output is read: the rank whose end ended the others."""
        return read_death(self._launcher_lines)

    def last_words(self, death: Death | None) -> tuple[str, ...]:
        """Of the rank that fell, or of torchrun where none did."""
        if self.num_ranks == 1:
            return tuple(self._printed.tail)
        return self.launcher_tail() if death is None else tuple(self._rank_logs[death.rank].lines.tail)

    def _read_pipe(self) -> Iterator[str]:
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
            self.num_bytes_read += len(data)
            for text in self._printed.feed(data):
                yield self._logged(text)

    def close(self) -> None:
        assert self._process.poll() is not None
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._selector.close()
        self._log.close()

    def _logged(self, text: str) -> str:
        self._log.write(text.encode() + b"\n")
        self._log.flush()
        return text


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
