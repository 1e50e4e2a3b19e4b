"""One detached process per attempt: it owns the hours that a training takes, and nobody needs to live as long.

    python -m worker.supervisor DATA_DIR JOB ATTEMPT FENCE [--handshake FD]

It claims the attempt, gathers the inputs, starts the trainer, numbers its events and output into the journal, beats the
heart, relays the journal, passes on what the server wants, and reports the end. Celery, the host agent, the web service
and Redis may all die and come back meanwhile; a training notices none of it.

*Who it is.* supervisor.json is made by a link that fails where one exists, so that of a message delivered ten times one
supervisor comes to be. It is made before the claim: whatever the server believes to run here has a directory. A claim
that is refused takes the directory away again.

*Threads.* The main thread starts the trainer (which dies with that thread, by the kernel's hand) and is the only one to
write the journal. The heart and the relay only read. Neither can hold it up: a server or a Redis that hangs costs them
their time-outs.

*The end*, in this order: the trainer is gone; whatever else carries the mark is swept; the journal is whole; exit.json
says how it ended; the server is told (events, artifacts, finish), for as long as that takes; finished.json keeps its
answer. Killed before exit.json, the attempt is `lost`; killed after it, the host agent finishes the telling.

*A hang*: while steps are made, each must come within `hang_s` or 20 times the median; in every other phase (loading,
compiling, evaluating: which may be silent for long) something must be heard within `quiet_hang_s`, be it an event or a
byte of output from any rank. Then the ranks are asked for their stacks, which go into the log and into the sentence of
the failure, and all is killed.

*TERM* (from `worker.agent.preempt_all`) means that the host goes down in good order: the trainer writes a checkpoint,
the attempt ends as preempted and the job goes back to the queue. A second TERM means: leave now; what is not told yet
the next host agent tells.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from core import wire
from core.errors import USER_FAULTS, UserError
from core.events import FailureReason
from core.spec import parse_spec
from core.states import Outcome
from core.trial import Certify
from worker.adoption import SUPERVISOR, SupervisorFile
from worker.delivery import EXIT, REPORT, RESULT, deliver
from worker.diagnosis import Deed, Diagnosis, Evidence, Wish, diagnose, num_oom_kills, stopped_before_start
from worker.gpus import sample_gpus
from worker.heart import Heart, Progress
from worker.inputs import device_environment, gather_inputs
from worker.job_directory import EXIT_CODES, ExitFile, Inputs, read_outcome, write_atomically, write_json
from worker.journal import JOURNAL, Journal
from worker.output import Throttle
from worker.processes import (
    ProcessId,
    become_subreaper,
    child_environment,
    mark_of,
    reap,
    secrets_in,
    sweep,
)
from worker.relay import Relay
from worker.server import Interrupted, Server, Stale, insist
from worker.settings import CERTIFIER_ARGV, WorkerSettings
from worker.stacks import describe as describe_stacks
from worker.trainer import EVENTS, EventTail, Line, Trainer, merge_events

log = logging.getLogger(__name__)

_PHASE_EVERY_S = 1.0


class Supervisor:
    def __init__(
        self, settings: WorkerSettings, server: Server, attempt: wire.AttemptRef, assignment: wire.Assignment
    ) -> None:
        self.settings, self.server, self.attempt, self.assignment = settings, server, attempt, assignment
        self.directory = settings.attempt_dir(attempt)
        self.mark = mark_of(attempt)
        self.journal = Journal(self.directory / JOURNAL)
        self.progress = Progress()
        self.relay = Relay(self.journal, server, attempt, assignment.acked_seq, settings.relay_patience_s)
        self.relay.use_redis(assignment.redis_url)
        self.heart = Heart(server, attempt, self.progress, self._take_orders, settings.heartbeat_s)
        self.num_terms = 0

        self.throttle = Throttle()
        self.step_times_s: deque[float] = deque(maxlen=101)
        self.phase = ""
        self.heard_at = time.monotonic()  # when the trainer last said something
        self.stacks: dict[int, list[str]] = {}  # what each rank has printed since it was asked where it stands
        self.stacks_due_at: float | None = None
        self.has_end_event = False
        self.told_reason: str | None = None  # of the trainer's own failure event
        self.deed: Deed = "none"
        self.kill_at: float | None = None  # TERM was sent; KILL follows then
        self.checkpoints_asked = 0
        self.gpus_sampled_at = 0.0
        self.fetch_told_at = 0.0

    # -- from start to end -----------------------------------------------------------------------------------------
    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._on_term)
        self.heart.start()
        self.relay.start()
        diagnosis = self._work()
        self._write_end(diagnosis)
        self.relay.stop()
        try:
            deliver(
                self.settings,
                self.server,
                self.attempt,
                self.directory,
                self.journal,
                is_unwanted=lambda: self.num_terms > 1,
            )
        except Interrupted:
            log.info("told to leave before the server knew the end; the host agent will tell it")
        self.heart.stop()
        self.journal.close()

    def _work(self) -> Diagnosis:
        try:
            spec = parse_spec(self.assignment.spec)
        except USER_FAULTS as fault:
            return Diagnosis(Outcome.FAILED, "bad_spec", str(fault), exit_code=EXIT_CODES["bad_spec"])
        try:
            inputs = gather_inputs(
                self.settings,
                self.server,
                self.attempt,
                self.assignment,
                spec,
                is_unwanted=self._is_unwanted,
                on_progress=self._tell_fetched,
            )
        except UserError as fault:
            reason: FailureReason = "bad_data" if fault.field == "data" else "bad_spec"
            return Diagnosis(Outcome.FAILED, reason, str(fault), exit_code=EXIT_CODES[reason])
        except Interrupted:
            return stopped_before_start(self._wish(), is_stale=self.heart.is_stale)
        spec_json = json.dumps(self.assignment.spec, ensure_ascii=False, indent=1)
        write_atomically(self.directory / "spec.json", spec_json.encode())
        write_json(self.directory / "inputs.json", inputs)
        return self._train(inputs)

    def _train(self, inputs: Inputs) -> Diagnosis:
        oom_kills_before = num_oom_kills()
        environment = child_environment(
            os.environ, self.mark, OMP_NUM_THREADS=str(inputs.threads), **device_environment(inputs.devices)
        )
        secrets = secrets_in(os.environ)
        argv, num_ranks = self._program(inputs)
        try:
            trainer = Trainer(argv, self.directory, environment, secrets, num_ranks)
        except OSError as error:
            fault = UserError("worker.start_failed", problem=str(error))
            return Diagnosis(Outcome.FAILED, "internal", str(fault), exit_code=EXIT_CODES["internal"])
        tail = EventTail(self.directory / EVENTS, self.journal.trainer_offset)
        self.heard_at = time.monotonic()

        while (returncode := trainer.poll()) is None:
            trainer.wait_for_output(self.settings.poll_s)
            self._collect(trainer, tail)
            self._steer(trainer)
            self._sample_gpus(inputs)
            self.journal.sync_if_due(self.settings.journal_sync_s)

        left = sweep(self.mark, timeout_s=self.settings.sweep_s)
        reap()
        while self._collect(trainer, tail):
            pass
        for line in trainer.read_rest():
            self._log(line)
        outcome = read_outcome(self.directory)
        if outcome is None:
            for text in trainer.launcher_tail():
                self._log(Line(0, text))
        self._tell_dropped(is_last=True)
        trainer.close()
        if self.stacks_due_at is not None and self.deed == "none":
            self.deed = "hang"  # it ended of the question, before it could answer
        if left:
            text = f"processes {left} of this attempt could not be killed and may still hold its devices"
            self.journal.append("warning", code="unkillable", text=text)
        death = trainer.death()
        return diagnose(
            Evidence(
                returncode=returncode if death is None else death.returncode,
                rank=None if death is None else death.rank,
                outcome=outcome,
                has_end_event=self.has_end_event,
                has_result=self._has_result(),
                wish=self._wish(),
                deed=self.deed,
                log_tail=trainer.last_words(death),
                num_oom_kills=num_oom_kills() - oom_kills_before,
                grace_s=self.settings.stop_grace_s,
                silence_s=time.monotonic() - self.heard_at,
                stacks=describe_stacks(self.stacks, num_ranks),
            )
        )

    def _program(self, inputs: Inputs) -> tuple[tuple[str, ...], int]:
        """What is started, and on how many ranks. A certificate is one process, which starts each layout's own."""
        if isinstance(inputs.trial, Certify):
            return (*CERTIFIER_ARGV, *self.settings.trainer_argv), 1
        return self.settings.trainer_argv, inputs.ranks

    def _write_end(self, diagnosis: Diagnosis) -> None:
        if diagnosis.outcome in (Outcome.FAILED, Outcome.LOST) and diagnosis.reason != self.told_reason:
            self.journal.append("failure", reason=diagnosis.reason, text=diagnosis.text, remedy=diagnosis.remedy)
        if diagnosis.outcome == Outcome.SUCCEEDED and self.assignment.trial is None:
            self.journal.append("phase", name="upload", done=0, total=None)
        self.journal.sync()
        self._note_journal()
        write_json(
            self.directory / EXIT,
            ExitFile(
                outcome=diagnosis.outcome,
                exit_code=diagnosis.exit_code,
                reason=diagnosis.reason,
                text=diagnosis.text,
                remedy=diagnosis.remedy,
                final_seq=self.journal.last_seq,
            ),
        )

    def _has_result(self) -> bool:
        """Of a trial its report is all."""
        if self.assignment.trial is not None:
            return (self.directory / REPORT).is_file()
        return any((self.directory / RESULT).glob("*"))

    # -- what comes from the trainer -------------------------------------------------------------------------------
    def _collect(self, trainer: Trainer, tail: EventTail) -> bool:
        """True if there was anything."""
        seq_before, num_bytes_before = self.journal.last_seq, trainer.num_bytes_read
        for kind, event in merge_events(tail, self.journal):
            self._note_event(kind, event)
        for line in trainer.read_lines():
            self._log(line)
        if trainer.num_bytes_read > num_bytes_before and not self._makes_steps() and self.stacks_due_at is None:
            self.heard_at = time.monotonic()
        self._tell_dropped()
        self._note_journal()
        return self.journal.last_seq > seq_before

    def _note_event(self, kind: str, event: dict[str, Any]) -> None:
        self.heard_at = time.monotonic()
        match kind:
            case "phase":
                self.phase = str(event.get("name"))
            case "step":
                self.progress.step = int(event.get("step", 0))
                self.step_times_s.append(float(event.get("step_s", 0.0)))
            case "plan":
                self.progress.total_steps = event.get("total_steps")
            case "end":
                self.has_end_event = event.get("outcome") == "succeeded"
            case "failure":
                self.told_reason = event.get("reason")

    def _log(self, line: Line) -> None:
        if self.stacks_due_at is not None:
            self.stacks.setdefault(line.rank, []).append(line.text)
        if self.throttle.admits():
            self.journal.append("log", rank=line.rank, level="info", text=line.text)

    def _tell_dropped(self, *, is_last: bool = False) -> None:
        if num_dropped := self.throttle.take_dropped(is_last=is_last):
            text = f"dropped {num_dropped} lines of output that came too fast; the host keeps them all in its logs"
            self.journal.append("log", rank=0, level="warning", text=text)

    def _note_journal(self) -> None:
        if self.journal.last_seq > self.progress.last_seq:
            self.progress.last_seq = self.journal.last_seq
            self.relay.wake()

    def _tell_fetched(self, num_bytes: int, num_bytes_in_all: int) -> None:
        is_due = time.monotonic() - self.fetch_told_at >= _PHASE_EVERY_S
        if is_due or num_bytes == num_bytes_in_all:
            self.fetch_told_at = time.monotonic()
            self.journal.append("phase", name="fetch", done=num_bytes, total=num_bytes_in_all)
            self._note_journal()

    def _sample_gpus(self, inputs: Inputs) -> None:
        if time.monotonic() - self.gpus_sampled_at < self.settings.gpu_sample_s:
            return
        self.gpus_sampled_at = time.monotonic()
        for sample in sample_gpus():
            if f"gpu{sample.index}" in inputs.devices:
                self.journal.append(
                    "gpu",
                    index=sample.index,
                    utilisation=sample.utilisation,
                    memory_used_bytes=sample.memory_used_bytes,
                    memory_total_bytes=sample.memory_total_bytes,
                    temperature_c=sample.temperature_c,
                )

    # -- what is wanted of the trainer -----------------------------------------------------------------------------
    def _on_term(self, *_: object) -> None:
        self.num_terms += 1

    def _take_orders(self, orders: wire.AttemptOrders) -> None:
        """Called by the heart's thread."""
        self.relay.note_acked(orders.acked_seq)
        self.relay.use_redis(orders.redis_url)

    def _wish(self) -> Wish:
        # A person's wish goes before the host's: "stop" must end paused, not back in the queue.
        orders = self.heart.orders
        if orders is not None and orders.desired != "run":
            return orders.desired
        return "preempt" if self.num_terms else "run"

    def _is_unwanted(self) -> bool:
        return self.heart.is_stale or self._wish() != "run"

    def _steer(self, trainer: Trainer) -> None:
        now = time.monotonic()
        orders = self.heart.orders
        if self.heart.is_stale:
            self._kill(trainer, "stale")
        elif self.kill_at is not None and (now >= self.kill_at or self.num_terms > 1):
            self._kill(trainer, "grace")
        elif self._wish() != "run":
            self.kill_at = self.kill_at or now + self.settings.stop_grace_s
            self.stacks_due_at = None
            trainer.ask_to_stop()
        elif now - self.heard_at > self._patience_s():
            self._question(trainer, now)
        else:
            self.stacks_due_at = None
            self.stacks.clear()
            if self.step_times_s and orders and orders.checkpoint_request > self.checkpoints_asked:
                # Only once it makes steps: before that, the signal would find no handler and end it.
                self.checkpoints_asked = orders.checkpoint_request
                trainer.send(signal.SIGUSR1)

    def _question(self, trainer: Trainer, now: float) -> None:
        """A silent trainer is asked where it stands, and killed when it has had the time to say so."""
        if self.stacks_due_at is None:
            self.stacks_due_at = now + self.settings.stack_wait_s
            trainer.send(signal.SIGUSR2)
        elif now >= self.stacks_due_at:
            self._kill(trainer, "hang")

    def _kill(self, trainer: Trainer, deed: Deed) -> None:
        if self.deed == "none":
            self.deed = deed
        trainer.kill()

    def _makes_steps(self) -> bool:
        return self.phase == "train" and bool(self.step_times_s)

    def _patience_s(self) -> float:
        if self._makes_steps():
            return max(self.settings.hang_s, 20 * statistics.median(self.step_times_s))
        return self.settings.quiet_hang_s


# -- becoming a supervisor -----------------------------------------------------------------------------------------
def take_directory(directory: Path, attempt: wire.AttemptRef) -> bool:
    """False where this attempt has, or had, a supervisor already."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".tmp-{SUPERVISOR}-{os.getpid()}"
    write_json(temporary, SupervisorFile(attempt=attempt, process=ProcessId.current()))
    try:
        os.link(temporary, directory / SUPERVISOR)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def give_back_directory(directory: Path) -> None:
    (directory / SUPERVISOR).unlink()
    with suppress(OSError):  # not empty: another supervisor is at its door, or an older attempt stands beside it
        directory.rmdir()
        directory.parent.rmdir()


def claim(settings: WorkerSettings, server: Server, attempt: wire.AttemptRef) -> wire.Assignment:
    """Raises Stale, or Interrupted where the server does not answer while the launch task waits."""
    host = settings.host_id()
    # Half of the launch task's patience; the other half is for starting this process on a busy host.
    deadline = time.monotonic() + settings.handshake_s / 2
    return insist(
        lambda: server.claim(attempt, host),
        is_unwanted=lambda: time.monotonic() > deadline,
        longest_back_off_s=1.0,
    )


def supervise(settings: WorkerSettings, attempt: wire.AttemptRef, handshake: TextIO) -> None:
    directory = settings.attempt_dir(attempt)
    if not take_directory(directory, attempt):
        handshake.write("refused: it has a supervisor on this host\n")
        return
    server = Server(settings)
    try:
        assignment = claim(settings, server, attempt)
    except (Stale, Interrupted) as error:
        give_back_directory(directory)
        handshake.write(f"refused: {str(error) or 'the server does not answer'}\n")
        return
    handshake.write("claimed\n")
    handshake.close()
    _say_everything_in(directory / "supervisor.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    become_subreaper()
    Supervisor(settings, server, attempt, assignment).run()


def _say_everything_in(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.supervisor")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("job")
    parser.add_argument("attempt", type=int)
    parser.add_argument("fence", type=int)
    parser.add_argument("--handshake", type=int, metavar="FD", help="where to answer; and detach from the caller")
    arguments = parser.parse_args(argv)
    attempt = wire.AttemptRef(job=arguments.job, attempt=arguments.attempt, fence=arguments.fence)
    settings = WorkerSettings.load(arguments.data_dir)
    if arguments.handshake is None:
        supervise(settings, attempt, sys.stdout)
        return
    # The caller started us in a new session; its leader ends here, so that no terminal can ever be ours and nobody's
    # child list holds us.
    if os.fork():
        os._exit(0)
    with open(arguments.handshake, "w", encoding="utf-8", buffering=1) as handshake:  # noqa: PTH123  a descriptor
        supervise(settings, attempt, handshake)


if __name__ == "__main__":
    main()
