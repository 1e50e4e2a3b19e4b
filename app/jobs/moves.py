"""The one statement that changes a job's state.

A move is a compare-and-swap: an UPDATE that names the states it may come from (the table in core.states) and, for
whoever acts on behalf of one attempt, that attempt's fence. No row means that somebody else was first: the caller is
stale and has to look again. In the same transaction the move is written down as an event of attempt 0 whose seq is the
job's new `rev`; so the history of a job can neither miss a move nor hold one that did not happen, and a live stream
that shows events shows moves.

Everything else in app.jobs decides *which* move to make; nothing outside app.jobs makes one.
"""

from typing import Any, Literal

from sqlalchemy import update
from sqlmodel import Session, col

from app.tables import Event, Job
from core.states import Action, Actor, JobState, sources_of

Desired = Literal["run", "stop", "cancel"]

QUEUE_TOPIC = "queue"  # what the dispatcher waits on
JOBS_TOPIC = "jobs"  # any job changed: the list's live stream


def topic_of(job: str) -> str:
    """What a job's own live stream waits on."""
    return f"job:{job}"


def move(
    session: Session,
    job: Job,
    to: JobState,
    actor: Actor,
    *,
    now: float,
    expected_fence: int | None = None,
    who: str | None = None,
    **values: Any,
) -> bool:
    """Moves the job if it still may, sets `values` with it, and refreshes `job` either way.

    `who` is the name of the person behind it. False: the job is in no state from which `actor` may move it to `to`,
    or its fence is no longer the expected one."""
    session.refresh(job)
    source = job.state
    statement = update(Job).where(col(Job.id) == job.id, col(Job.state).in_(sources_of(to, actor)))
    if expected_fence is not None:
        statement = statement.where(col(Job.fence) == expected_fence)
    moved = session.execute(
        statement.values(state=to.value, rev=col(Job.rev) + 1, **values).returning(col(Job.rev)),
        execution_options={"synchronize_session": False},
    ).first()
    session.refresh(job)
    if moved is None:
        return False
    told = {"from": source, "state": to.value, "actor": actor, "attempt": job.attempt, "who": who}
    reasons = {key: values.get(key) for key in ("reason", "text", "remedy")}
    _append(session, job, "state", now, {key: value for key, value in (told | reasons).items() if value is not None})
    return True


def note_wish(session: Session, job: Job, wanted: Action, *, now: float, who: str | None) -> None:
    """Writes down what a person asked for where the job's state stays as it is, with the fields changed for it."""
    job.rev += 1
    session.add(job)
    session.flush()
    _append(session, job, "wish", now, {"desired": wanted} | ({"who": who} if who else {}))


def enter(session: Session, job: Job, *, now: float, who: str | None) -> None:
    """The job's first event: it stands in the queue."""
    assert job.state == JobState.QUEUED and job.rev == 1
    session.add(job)
    session.flush()
    _append(session, job, "state", now, {"state": job.state, "actor": "user"} | ({"who": who} if who else {}))


def _append(session: Session, job: Job, kind: str, now: float, data: dict[str, Any]) -> None:
    session.add(Event(job=job.id, attempt=0, seq=job.rev, ts=now, kind=kind, data=data))
    session.flush()
