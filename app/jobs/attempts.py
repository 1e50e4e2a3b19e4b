"""An attempt's life, as the dispatcher begins it, its host lives it, and somebody ends it.

    dispatch   queued -> dispatching    a new number, a new fence, devices of one host
    claim      dispatching -> starting  granted once; the same host may ask again and gets the same answer
    beat       (no move)                lease, and what is wanted of the attempt
    finish     -> succeeded | failed | paused | cancelled, or back to queued
    give_up    dispatching -> queued    nobody claimed it
    lose       -> queued | failed | paused | cancelled, when its host has been silent for too long

The fence is what keeps two hosts from doing one job's work: each dispatch, each giving up and each loss counts it up,
and every call on behalf of an attempt carries the fence that the attempt was given. An old one is answered with 409,
at which the supervisor kills its trainer. An attempt ends exactly once: its outcome is written only where none stands.

Retries: what the infrastructure did (killed, lost, hung) is tried again up to `Job.infra_left` times, the first time
after 2 s, then after 10 s, a minute and so on; a host that went down in good order costs nothing; what the job itself
did (out of memory, NaN, a bad spec) would only happen again, and is never retried.
"""

from dataclasses import dataclass
from typing import Any

from sqlmodel import Session, col, func, select

from app.history import remember
from app.jobs.moves import Desired, move
from app.tables import Attempt, Job
from core.states import ON_A_HOST, Actor, JobState, Outcome
from core.wire import LEASE_S, AttemptRef, Finish

FIRST_RETRY_S = 2.0  # most kills are one-off, and a person is watching
SECOND_RETRY_S = 10.0
RETRY_FACTOR = 6.0
LONGEST_RETRY_S = 600.0
MAX_HANGS = 1  # a second hang is no accident
MAX_RETRIES: int = Job.model_fields["infra_left"].default
MAX_PREEMPTIONS = 50  # a job that is put off so often never ends
CLAIMED = ON_A_HOST - {JobState.DISPATCHING}
IN_GOOD_ORDER = frozenset({Outcome.PREEMPTED, Outcome.STOPPED})


class StaleFence(Exception):
    """The caller acts for an attempt that is no longer the job's."""

    def __init__(self, current_fence: int) -> None:
        super().__init__(current_fence)
        self.current_fence = current_fence


class NotRecorded(Exception):
    """The attempt can't end before its last event is stored."""

    def __init__(self, acked_seq: int, final_seq: int) -> None:
        super().__init__(acked_seq, final_seq)
        self.acked_seq = acked_seq
        self.final_seq = final_seq


@dataclass(frozen=True)
class Ending:
    outcome: Outcome
    reason: str | None = None
    text: str = ""
    remedy: str = ""
    exit_code: int | None = None
    final_seq: int | None = None


def dispatch(session: Session, job: Job, host: str, devices: tuple[str, ...], now: float) -> AttemptRef | None:
    """None: the job left the queue meanwhile."""
    session.refresh(job)
    number, fence = job.attempt + 1, job.fence + 1
    is_moved = move(
        session,
        job,
        JobState.DISPATCHING,
        "dispatcher",
        now=now,
        expected_fence=job.fence,
        attempt=number,
        fence=fence,
        host=host,
        devices=list(devices),
        dispatched_at=now,
        sent_at=now,
        lease_until=None,
        checkpoint_request=0,  # what was asked of the attempt before is no wish of this one
        not_before=None,
        wait_code=None,
        wait_parameters=None,
    )
    if not is_moved:
        return None
    session.add(Attempt(job=job.id, number=number, fence=fence, host=host, devices=list(devices), created_at=now))
    return AttemptRef(job=job.id, attempt=number, fence=fence)


def claim(session: Session, job: Job, attempt: Attempt, fence: int, now: float) -> None:
    """Raises StaleFence unless the attempt is the job's newest and nobody ended it."""
    is_first = move(
        session,
        job,
        JobState.STARTING,
        "worker",
        now=now,
        expected_fence=check_fence(job, attempt, fence),
        lease_until=now + LEASE_S,
        progress_at=now,
        reason=None,
        text=None,
        remedy=None,
    )
    if is_first:
        attempt.claimed_at = now
    elif job.state not in CLAIMED:
        raise StaleFence(job.fence)
    attempt.beat_at = now
    session.add(attempt)


def beat(session: Session, job: Job, attempt: Attempt, fence: int, now: float) -> Desired:
    """Prolongs the lease; returns what is wanted. Raises StaleFence as `claim` does."""
    check_fence(job, attempt, fence)
    if job.state not in CLAIMED:
        raise StaleFence(job.fence)
    job.lease_until = now + LEASE_S
    attempt.beat_at = now
    session.add(job)
    session.add(attempt)
    assert job.desired in ("run", "stop", "cancel")
    return job.desired  # type: ignore[return-value]  # a column is a str; the assertion above is what holds


def finish(session: Session, job: Job, attempt: Attempt, message: Finish, now: float) -> None:
    """Ends the attempt and moves its job. A repeat changes nothing. Raises StaleFence, NotRecorded."""
    if attempt.fence == message.fence and attempt.final_seq is not None:
        return
    check_fence(job, attempt, message.fence)
    if job.state == JobState.DISPATCHING and message.outcome is Outcome.SUCCEEDED:
        raise StaleFence(job.fence)  # nobody succeeds at what they never claimed
    if attempt.acked_seq < message.final_seq:
        raise NotRecorded(attempt.acked_seq, message.final_seq)
    ending = Ending(
        outcome=message.outcome,
        reason=message.reason or attempt.reason,
        text=message.text or attempt.text or "",
        remedy=message.remedy or attempt.remedy or "",
        exit_code=message.exit_code,
        final_seq=message.final_seq,
    )
    is_moved = _conclude(session, job, attempt, ending, "worker", now=now)
    assert is_moved, f"{job.id}: {job.state} -> {message.outcome}"


def give_up(session: Session, job: Job, now: float) -> bool:
    """Back to the queue under a new fence, so that a launch which turns up after all is refused."""
    attempt = session.get_one(Attempt, (job.id, job.attempt))
    if not _requeue(session, job, "sweeper", expected_fence=attempt.fence, now=now, fence=attempt.fence + 1):
        return False
    _end(session, attempt, Ending(Outcome.LOST, "lost", "its host never took it up"), now)
    return True


def lose(session: Session, job: Job, text: str, now: float) -> bool:
    """The attempt's host is taken for gone; should it come back, its fence is old."""
    attempt = session.get_one(Attempt, (job.id, job.attempt))
    if job.fence != attempt.fence or job.state not in CLAIMED:
        return False
    job.fence += 1
    session.add(job)
    session.flush()
    return _conclude(session, job, attempt, Ending(Outcome.LOST, "lost", text), "sweeper", now=now)


def end_unclaimed(session: Session, job: Job, now: float) -> None:
    """A person took the job back before its host took it up; `move` has already counted the fence up."""
    attempt = session.get_one(Attempt, (job.id, job.attempt))
    _end(session, attempt, Ending(Outcome.STOPPED, "stopped"), now)


def check_fence(job: Job, attempt: Attempt, fence: int) -> int:
    """The fence, if it is the attempt's own and still the job's. Raises StaleFence."""
    if not (attempt.fence == fence == job.fence and attempt.number == job.attempt and attempt.outcome is None):
        raise StaleFence(job.fence)
    return fence


def _end(session: Session, attempt: Attempt, ending: Ending, now: float) -> None:
    assert attempt.outcome is None, f"attempt {attempt.job}.{attempt.number} has ended already: {attempt.outcome}"
    attempt.outcome = ending.outcome.value
    attempt.reason, attempt.text, attempt.remedy = ending.reason, ending.text or None, ending.remedy or None
    attempt.exit_code, attempt.final_seq, attempt.ended_at = ending.exit_code, ending.final_seq, now
    session.add(attempt)
    session.flush()


def _conclude(session: Session, job: Job, attempt: Attempt, ending: Ending, actor: Actor, *, now: float) -> bool:
    _end(session, attempt, ending, now)
    remember(session, job, attempt, now)
    to, values = next_state(
        job,
        ending,
        num_hangs=_count_ended(session, job, Attempt.reason == "hang"),
        num_preemptions=_count_ended(session, job, col(Attempt.outcome).in_([each.value for each in IN_GOOD_ORDER])),
        now=now,
    )
    if to is JobState.SUCCEEDED and job.state in (JobState.STARTING, JobState.RUNNING):
        move(session, job, JobState.FINALIZING, actor, now=now, expected_fence=job.fence)
    if to is JobState.QUEUED:
        return _requeue(session, job, actor, expected_fence=job.fence, now=now, **values)
    return move(session, job, to, actor, now=now, expected_fence=job.fence, lease_until=None, **values)


def next_state(
    job: Job, ending: Ending, *, num_hangs: int, num_preemptions: int, now: float
) -> tuple[JobState, dict[str, Any]]:
    """What an attempt's end (counted already) and the person's wish make of the job, and the fields that go with it."""
    why: dict[str, Any] = {"reason": ending.reason, "text": ending.text or None, "remedy": ending.remedy or None}
    over: dict[str, Any] = {"ended_at": now, "not_before": None}
    to, values = JobState.QUEUED, why
    if ending.outcome is Outcome.SUCCEEDED:
        to, values = JobState.SUCCEEDED, over | dict.fromkeys(why)
    elif job.desired == "cancel":
        to, values = JobState.CANCELLED, over | why
    elif ending.outcome is Outcome.FAILED:
        to, values = JobState.FAILED, over | why
    elif job.desired == "stop":
        to = JobState.PAUSED
    elif ending.outcome in IN_GOOD_ORDER:
        # Stopped though nobody asked: its host went down.
        if num_preemptions > MAX_PREEMPTIONS:
            to, values = JobState.FAILED, over | why | {"reason": "preempted"}
    elif num_hangs > MAX_HANGS:
        to, values = JobState.FAILED, over | why | {"reason": "hang"}
    elif job.infra_left == 0:
        to, values = JobState.FAILED, over | why | {"reason": "lost"}
    else:
        retry = MAX_RETRIES - job.infra_left + 1
        delay_s = retry_delay_s(retry)
        told = {"retry": retry, "seconds": delay_s, "reason": ending.reason or "lost"}
        values = why | {"infra_left": job.infra_left - 1, "not_before": now + delay_s}
        values |= {"wait_code": "wait.retry", "wait_parameters": told}
    return to, values


def retry_delay_s(retry: int) -> float:
    """Seconds before the n-th retry, n from 1."""
    assert retry >= 1
    return FIRST_RETRY_S if retry == 1 else min(LONGEST_RETRY_S, SECOND_RETRY_S * RETRY_FACTOR ** (retry - 2))


def _requeue(session: Session, job: Job, actor: Actor, *, expected_fence: int, now: float, **values: Any) -> bool:
    """Keeps `queued_at`: the job has waited for its turn already."""
    gone: dict[str, Any] = {"host": None, "devices": None, "lease_until": None}
    return move(session, job, JobState.QUEUED, actor, now=now, expected_fence=expected_fence, **gone, **values)


def _count_ended(session: Session, job: Job, which: Any) -> int:
    """Attempts that their host saw to an end; one that a person took back before it was claimed is none."""
    ended = select(func.count()).select_from(Attempt).where(Attempt.job == job.id, col(Attempt.final_seq).is_not(None))
    return session.exec(ended.where(which)).one()
