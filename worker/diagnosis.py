"""How an attempt ended, in the words of the protocol and in a sentence for its owner.

Three witnesses: the trainer's outcome.json (its last act; none = it did not get there), the exit status, and what was
asked of it. The order of belief is outcome.json, then our own deeds (a grace that ran out, a hang), then the status. An
exit that nobody can explain is never a success.

With several ranks the status is that of the rank that fell first. One exception to the order: where a signal ended that
rank, an outcome.json of another, which only knows that its neighbour is gone, is hearsay.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core import errors
from core.errors import Parameter
from core.events import FailureReason
from core.states import Outcome
from worker.job_directory import OutcomeFile

Wish = Literal["run", "stop", "cancel", "preempt"]
# Why the supervisor itself killed the trainer, if it did.
Deed = Literal["none", "grace", "hang", "stale"]

STOPPED_WITH_CHECKPOINT = 75
# What operators, schedulers and kernels end a process with; the rest are crashes of its own.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_LOG_LINES_SHOWN = 5


@dataclass(frozen=True)
class Diagnosis:
    outcome: Outcome
    reason: FailureReason | None = None
    text: str = ""
    remedy: str = ""
    exit_code: int | None = None  # 128 + n for signal n


@dataclass(frozen=True)
class Evidence:
    returncode: int  # of the process, or of the rank that fell first: negative for a signal
    outcome: OutcomeFile | None
    has_end_event: bool
    has_result: bool
    wish: Wish
    deed: Deed
    log_tail: Sequence[str]
    num_oom_kills: int  # by the kernel, on this host, while the trainer ran
    grace_s: float
    silence_s: float = 0.0  # before a hang was called one
    stacks: str = ""  # where it hung, in a sentence
    rank: int | None = None  # that fell first, where there are several


def diagnose(evidence: Evidence) -> Diagnosis:  # noqa: PLR0911  one way out a kind of end, in order of belief
    exit_code = evidence.returncode if evidence.returncode >= 0 else 128 - evidence.returncode
    if evidence.deed == "stale":
        return _ended(Outcome.LOST, "lost", "exit.stale", exit_code=exit_code)
    if evidence.outcome is not None and not _is_hearsay(evidence, evidence.outcome):
        return _by_outcome(evidence, evidence.outcome)
    if evidence.deed == "hang":
        return _ended(
            Outcome.LOST,
            "hang",
            "exit.hang",
            "exit.remedy_hang",
            exit_code,
            minutes=round(evidence.silence_s / 60, 1),
            stacks=evidence.stacks,
        )
    if evidence.wish != "run" and (evidence.deed == "grace" or -evidence.returncode in _FROM_OUTSIDE):
        outcome, reason = _as_wished(evidence.wish)
        text = "exit.grace" if evidence.deed == "grace" else "exit.early"
        return _ended(outcome, reason, text, exit_code=exit_code, grace_s=evidence.grace_s)
    if evidence.returncode < 0:
        return _by_signal(evidence, signal.Signals(-evidence.returncode), exit_code)
    if exit_code == 128 + signal.SIGKILL:  # a launcher between us and the trainer says it so
        return _by_signal(evidence, signal.SIGKILL, exit_code)
    return _ended(
        Outcome.FAILED,
        "internal",
        _of_rank("exit.unexplained", evidence),
        "exit.remedy_log",
        exit_code,
        code=exit_code,
        log=_shown(evidence.log_tail),
        **_rank_of(evidence),
    )


def _is_hearsay(evidence: Evidence, outcome: OutcomeFile) -> bool:
    """A rank was ended by a signal, and another wrote what came of that: an error, or a stop that nobody wished."""
    if evidence.rank is None or evidence.returncode >= 0:
        return False
    return outcome.reason == "internal" or (outcome.code == STOPPED_WITH_CHECKPOINT and evidence.wish == "run")


def _of_rank(code: str, evidence: Evidence) -> str:
    return code if evidence.rank is None else f"{code}_rank"


def _rank_of(evidence: Evidence) -> dict[str, Parameter]:
    return {} if evidence.rank is None else {"rank": evidence.rank}


def _by_outcome(evidence: Evidence, outcome: OutcomeFile) -> Diagnosis:
    if outcome.code == STOPPED_WITH_CHECKPOINT:
        ended, reason = _as_wished(evidence.wish)
        return Diagnosis(ended, reason, outcome.text, outcome.remedy, outcome.code)
    if outcome.code != 0:
        return Diagnosis(Outcome.FAILED, outcome.reason or "internal", outcome.text, outcome.remedy, outcome.code)
    if evidence.has_end_event and evidence.has_result:
        return Diagnosis(Outcome.SUCCEEDED, None, outcome.text, outcome.remedy, 0)
    missing = "its end event" if not evidence.has_end_event else "anything in result/ (of a trial: report.json)"
    return _ended(Outcome.FAILED, "internal", "exit.incomplete", "exit.remedy_log", outcome.code, missing=missing)


def _as_wished(wish: Wish) -> tuple[Outcome, FailureReason]:
    # Stopped though nobody on the server asked: the host was going down, and the job goes back to the queue.
    return (Outcome.STOPPED, "stopped") if wish in ("stop", "cancel") else (Outcome.PREEMPTED, "preempted")


def _by_signal(evidence: Evidence, number: signal.Signals, exit_code: int) -> Diagnosis:
    if number not in _FROM_OUTSIDE:
        return _ended(
            Outcome.FAILED,
            "internal",
            _of_rank("exit.crashed", evidence),
            "exit.remedy_crashed",
            exit_code,
            signal=number.name,
            log=_shown(evidence.log_tail),
            **_rank_of(evidence),
        )
    if number == signal.SIGKILL and evidence.num_oom_kills:
        return _ended(
            Outcome.LOST,
            "killed",
            "exit.killed_by_kernel",
            "exit.remedy_host_memory",
            exit_code,
            num_kills=evidence.num_oom_kills,
        )
    return _ended(
        Outcome.LOST,
        "killed",
        _of_rank("exit.killed", evidence),
        "exit.remedy_killed",
        exit_code,
        signal=number.name,
        **_rank_of(evidence),
    )


def stopped_before_start(wish: Wish, *, is_stale: bool) -> Diagnosis:
    """The wish came while the data was still on its way."""
    if is_stale:
        return _ended(Outcome.LOST, "lost", "exit.stale")
    outcome, reason = _as_wished(wish)
    return _ended(outcome, reason, "exit.early")


def supervisor_died() -> Diagnosis:
    """What the host agent reports for an attempt without exit.json: how the trainer ended is not known."""
    return _ended(Outcome.LOST, "lost", "exit.supervisor_died")


def never_started() -> Diagnosis:
    """What the host agent reports for an attempt that the server believes to be here and that has no directory."""
    return _ended(Outcome.LOST, "lost", "exit.no_directory")


def _ended(
    outcome: Outcome,
    reason: FailureReason,
    text: str,
    remedy: str = "",
    exit_code: int | None = None,
    **parameters: Parameter,
) -> Diagnosis:
    return Diagnosis(
        outcome,
        reason,
        errors.Reason(text, parameters).text(),
        errors.Reason(remedy, {}).text() if remedy else "",
        exit_code,
    )


def _shown(log_tail: Sequence[str]) -> str:
    lines = [line for line in log_tail if line.strip()][-_LOG_LINES_SHOWN:]
    return " / ".join(line[:300] for line in lines) or "(nothing)"


def num_oom_kills() -> int:
    """How many processes the kernel's out-of-memory killer has ended on this machine since it booted."""
    try:
        counters = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), 0)
