"""What stands on this host's disk: attempts whose supervisor lives, and those that a dead one left unfinished.

The host agent looks through the job directories at its start and at every beat. Whether a supervisor lives is asked of
the kernel (pid, start time and boot id), never of a bare pid. An unfinished attempt with exit.json ended in good order
and only has to be told; one without it is `lost`, whatever the trainer may have achieved: what carries its mark is
killed, the events that the trainer had written are numbered into the journal, and the server hears of it.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from core import wire
from worker.delivery import EXIT, FINISHED, deliver
from worker.diagnosis import Diagnosis, never_started, supervisor_died
from worker.job_directory import ExitFile, Inputs, write_json
from worker.journal import JOURNAL, Journal
from worker.processes import ProcessId, mark_of, sweep
from worker.server import Server, Stale, insist
from worker.settings import WorkerSettings
from worker.trainer import EVENTS, EventTail, merge_events

SUPERVISOR = "supervisor.json"


class SupervisorFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    attempt: wire.AttemptRef
    process: ProcessId


@dataclass(frozen=True)
class FoundAttempt:
    attempt: wire.AttemptRef
    process: ProcessId
    directory: Path

    @property
    def is_supervised(self) -> bool:
        return self.process.is_alive()


def unfinished_attempts(settings: WorkerSettings) -> list[FoundAttempt]:
    return list(_unfinished(settings.worker_dir / "jobs"))


def _unfinished(jobs: Path) -> Iterator[FoundAttempt]:
    for path in sorted(jobs.glob(f"*/a*/{SUPERVISOR}")):
        if (path.parent / FINISHED).exists():
            continue
        try:
            found = SupervisorFile.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):  # given back just now, or no file of ours
            continue
        yield FoundAttempt(found.attempt, found.process, path.parent)


def devices_in_use(settings: WorkerSettings) -> frozenset[str]:
    """Those of the attempts that live on this host."""
    devices: set[str] = set()
    for found in live_attempts(settings):
        with suppress(FileNotFoundError):  # it is still gathering its inputs
            devices |= set(Inputs.model_validate_json((found.directory / "inputs.json").read_bytes()).devices)
    return frozenset(devices)


def live_attempts(settings: WorkerSettings) -> list[FoundAttempt]:
    return [found for found in unfinished_attempts(settings) if found.is_supervised]


def adopt(settings: WorkerSettings, server: Server, found: FoundAttempt, is_unwanted: Callable[[], bool]) -> str:
    """Finishes what a dead supervisor left; returns the state that the server answers. Raises Interrupted."""
    assert not found.is_supervised
    with Journal(found.directory / JOURNAL) as journal:
        if not (found.directory / EXIT).exists():
            sweep(mark_of(found.attempt), timeout_s=settings.sweep_s)
            try:
                acked_seq = insist(
                    lambda: server.send_events(found.attempt, ()),
                    is_unwanted=is_unwanted,
                    longest_back_off_s=settings.longest_back_off_s,
                )
            except Stale:  # the server does not know it at all; what follows finds out again, and closes the case
                acked_seq = 0
            journal.continue_after(acked_seq)
            tail = EventTail(found.directory / EVENTS, journal.trainer_offset)
            while list(merge_events(tail, journal)):
                pass
            end = supervisor_died()
            journal.append("failure", reason=end.reason, text=end.text, remedy=end.remedy)
            journal.sync()
            _write_exit(found.directory, end, journal.last_seq)
        return deliver(settings, server, found.attempt, found.directory, journal, is_unwanted=is_unwanted).state


def _write_exit(directory: Path, end: Diagnosis, final_seq: int) -> None:
    exit_file = ExitFile(
        outcome=end.outcome,
        exit_code=end.exit_code,
        reason=end.reason,
        text=end.text,
        remedy=end.remedy,
        final_seq=final_seq,
    )
    write_json(directory / EXIT, exit_file)


def report_unknown(server: Server, attempt: wire.AttemptRef) -> None:
    """The server believes an attempt to be here of which this host has no trace: it never began. Raises Stale, Away."""
    end = never_started()
    server.finish(
        attempt,
        wire.Finish(fence=attempt.fence, outcome=end.outcome, reason=end.reason, text=end.text, final_seq=0),
    )
