"""Notices silence, each five seconds, by this server's clock alone.

    a launch that nobody claimed    30 s: sent again; 120 s: back to the queue under a new fence
    an attempt without a heartbeat  60 s: shown as unreachable (a badge, app.jobs.badge), nothing else: it may well be
                                    training on, and its host reports it dead when it comes back without it
    ... for 15 minutes              given up where nothing is lost by it: no checkpoint lies on that host yet, or a
                                    person wants the job ended anyway
    replies, sessions, links        deleted when their time is over

Silence is counted from this server's own start at the earliest: while it was down nobody could speak to it.
"""

import logging
import threading

from sqlalchemy import delete
from sqlmodel import Session, col, select

from app.jobs.attempts import CLAIMED, give_up, lose
from app.jobs.moves import JOBS_TOPIC, QUEUE_TOPIC, topic_of
from app.services import Services
from app.tables import Attempt, IdempotentReply, Job, LoginLink, LoginSession
from core.states import JobState
from core.wire import DISPATCH_GIVE_UP_S, DISPATCH_RESEND_S, AttemptRef

log = logging.getLogger(__name__)

PERIOD_S = 5.0
LOST_S = 15 * 60.0
REPLIES_KEPT_S = 24 * 3600.0


class Sweeper(threading.Thread):
    def __init__(self, services: Services) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._services = services
        self._started_at = services.clock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            try:
                sweep_once(self._services, self._started_at)
            except Exception:
                # The border of this loop: the next round looks at everything again.
                log.exception("the sweeper's round failed")


def sweep_once(services: Services, started_at: float) -> None:
    now = services.clock()
    changed: list[str] = []
    again: list[tuple[str, AttemptRef]] = []
    with services.database.read() as session:
        has_work = _silent_jobs(session, started_at, now)
        has_garbage = _anything_expired(session, now)
    if has_work:
        with services.database.write() as session:
            for job in _silent_jobs(session, started_at, now):
                if _treat(session, job, started_at, now):
                    changed.append(job.id)
                elif job.state == JobState.DISPATCHING:
                    assert job.host is not None
                    job.sent_at = now
                    session.add(job)
                    again.append((job.host, AttemptRef(job=job.id, attempt=job.attempt, fence=job.fence)))
    if has_garbage:
        with services.database.write() as session:
            _delete_expired(session, now)
    if changed:
        services.wake.notify(JOBS_TOPIC, QUEUE_TOPIC, *(topic_of(job) for job in changed))
    for host, launch in again:
        services.launcher.send_launch(host, launch.job, launch.attempt, launch.fence)


def _silent_jobs(session: Session, started_at: float, now: float) -> list[Job]:
    """Jobs that need a look: nothing is written in a round that finds none."""
    unclaimed = [
        job
        for job in session.exec(select(Job).where(Job.state == JobState.DISPATCHING.value))
        if now - max(job.sent_at or 0.0, started_at) >= DISPATCH_RESEND_S
    ]
    claimed = session.exec(select(Job).where(col(Job.state).in_([state.value for state in CLAIMED]))).all()
    return unclaimed + [job for job in claimed if _may_be_given_up(session, job, started_at, now)]


def _may_be_given_up(session: Session, job: Job, started_at: float, now: float) -> bool:
    attempt = session.get_one(Attempt, (job.id, job.attempt))
    silent_s = now - max(attempt.beat_at or 0.0, started_at)
    return silent_s >= LOST_S and (job.pinned_host is None or job.state == JobState.STOPPING)


def _treat(session: Session, job: Job, started_at: float, now: float) -> bool:
    """True if the job moved."""
    if job.state == JobState.DISPATCHING:
        unclaimed_s = now - max(job.dispatched_at or 0.0, started_at)
        return unclaimed_s >= DISPATCH_GIVE_UP_S and give_up(session, job, now)
    return lose(session, job, f"its host has not been heard of for {LOST_S / 60:.0f} minutes", now)


def _anything_expired(session: Session, now: float) -> bool:
    return any(
        session.exec(select(column).where(limit).limit(1)).first() is not None
        for column, limit in (
            (IdempotentReply.key, col(IdempotentReply.created_at) < now - REPLIES_KEPT_S),
            (LoginSession.id_sha256, col(LoginSession.expires_at) < now),
            (LoginLink.token_sha256, col(LoginLink.expires_at) < now),
        )
    )


def _delete_expired(session: Session, now: float) -> None:
    session.execute(delete(IdempotentReply).where(col(IdempotentReply.created_at) < now - REPLIES_KEPT_S))
    session.execute(delete(LoginSession).where(col(LoginSession.expires_at) < now))
    session.execute(delete(LoginLink).where(col(LoginLink.expires_at) < now))
