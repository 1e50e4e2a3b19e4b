"""What a person can ask of a job. Each action either does what core.states.ACTIONS allows in the job's present state,
or is refused with 409 and a sentence that names the state and what is possible instead.

cancel and stop take one road. While nobody trains (queued, dispatching, paused) the job moves at once; an attempt that
lives is told by the reply to its next heartbeat, leaves a checkpoint and ends, and its end moves the job. Should it
have ended well by then, it has succeeded: what is done is done.
"""

from typing import Any

from fastapi import status
from sqlmodel import Session, col, select

from app.jobs.attempts import end_unclaimed
from app.jobs.create import Origin, insert_job
from app.jobs.moves import Desired, move, note_wish
from app.problems import Problem, not_found
from app.tables import CheckpointRow, Job
from core.errors import UserError
from core.spec import JobSpec, parse_spec
from core.states import ACTIONS, TRIAL_ACTIONS, Action, JobState

AT_ONCE = (JobState.QUEUED, JobState.PAUSED)
LIVES_ON_A_HOST = (JobState.STARTING, JobState.RUNNING, JobState.FINALIZING)


def get_job(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id)
    if job is None:
        raise not_found("job", job_id)
    return job


def legal_actions(job: Job) -> tuple[Action, ...]:
    legal = ACTIONS[JobState(job.state)]
    return legal if job.trial is None else tuple(action for action in legal if action in TRIAL_ACTIONS)


def cancel(session: Session, job: Job, *, now: float, who: str | None) -> None:
    """Ends it. Asking again while it still stops changes nothing."""
    _require(job, "cancel")
    if job.state == JobState.STOPPING:
        if job.desired != "cancel":
            job.desired = "cancel"
            note_wish(session, job, "cancel", now=now, who=who)
        return
    _end_or_stop(session, job, "cancel", JobState.CANCELLED, now=now, who=who)


def stop(session: Session, job: Job, *, now: float, who: str | None) -> None:
    """Leaves a checkpoint and pauses."""
    _require(job, "stop")
    _end_or_stop(session, job, "stop", JobState.PAUSED, now=now, who=who)


def resume(session: Session, job: Job, *, now: float, who: str | None) -> None:
    """Back to the end of the queue of its priority; it goes on where its checkpoint is."""
    _require(job, "resume")
    is_moved = move(
        session, job, JobState.QUEUED, "user", now=now, who=who, desired="run", queued_at=now, not_before=None,
        reason=None, text=None, remedy=None,
    )  # fmt: skip
    assert is_moved


def checkpoint(session: Session, job: Job, *, now: float, who: str | None) -> None:
    """The trainer writes one at its next step boundary; the request travels with the heartbeat's reply."""
    _require(job, "checkpoint")
    job.checkpoint_request += 1
    note_wish(session, job, "checkpoint", now=now, who=who)


def retry(session: Session, job: Job, *, now: float, who: str | None, owner: str | None) -> Job:
    """The same spec as a new job that starts from this one's newest checkpoint, on the host that has it."""
    _require(job, "retry")
    spec = parse_spec(job.spec)
    return insert_job(session, spec, now=now, who=who, owner=owner, origin=_continuing(session, job, "retry"))


def extend(
    session: Session,
    job: Job,
    *,
    now: float,
    who: str | None,
    owner: str | None,
    epochs: float | None,
    max_steps: int | None,
) -> Job:
    """A finished job's spec as a new job that trains on to `epochs` or `max_steps` in all; without a number, twice as
    long as before."""
    _require(job, "extend")
    spec = _lengthened(parse_spec(job.spec), epochs, max_steps)
    return insert_job(session, spec, now=now, who=who, owner=owner, origin=_continuing(session, job, "extend"))


def clone(job: Job) -> JobSpec:
    """The spec to fill a form with; nothing is made."""
    return parse_spec(job.spec)


def _require(job: Job, action: Action) -> None:
    legal = legal_actions(job)
    if action in legal:
        return
    listed = ", ".join(legal)
    if job.trial is not None and action not in TRIAL_ACTIONS:
        error = UserError("trial.illegal_action", "", action=action, legal=listed)
    else:
        error = UserError("job.illegal_action", "", action=action, state=job.state, legal=listed)
    raise Problem(status.HTTP_409_CONFLICT, error)


def _end_or_stop(session: Session, job: Job, desired: Desired, end: JobState, *, now: float, who: str | None) -> None:
    ended: dict[str, Any] = {"ended_at": now} if end is JobState.CANCELLED else {}
    if job.state in AT_ONCE:
        is_moved = move(session, job, end, "user", now=now, who=who, not_before=None, wait_code=None,
                        wait_parameters=None, **ended)  # fmt: skip
    elif job.state == JobState.DISPATCHING:
        # Under a new fence, so that the host's claim is refused.
        is_moved = move(session, job, end, "user", now=now, who=who, expected_fence=job.fence, fence=job.fence + 1,
                        host=None, devices=None, **ended)  # fmt: skip
        end_unclaimed(session, job, now)
    else:
        assert job.state in LIVES_ON_A_HOST, job.state
        is_moved = move(session, job, JobState.STOPPING, "user", now=now, who=who, desired=desired)
    assert is_moved, "the write transaction keeps everybody else out since the state was read"


def _continuing(session: Session, job: Job, kind: str) -> Origin:
    """What a job that goes on from this one's checkpoints needs to know; nothing, when it left none."""
    line = [job.id, *(job.resume_jobs or [])]
    has_checkpoint = session.exec(select(CheckpointRow).where(col(CheckpointRow.job).in_(line))).first() is not None
    if not has_checkpoint:
        return Origin(parent=job.id, kind=kind)
    return Origin(parent=job.id, kind=kind, resume_jobs=tuple(line), pinned_host=job.pinned_host)


def _lengthened(spec: JobSpec, epochs: float | None, max_steps: int | None) -> JobSpec:
    schedule = spec.schedule
    if epochs is None and max_steps is None:
        epochs = None if schedule.epochs is None else 2 * schedule.epochs
        max_steps = None if schedule.max_steps is None else 2 * schedule.max_steps
    for field, before, after in (
        ("epochs", schedule.epochs, epochs),
        ("max_steps", schedule.max_steps, max_steps),
    ):
        if before is not None and after is not None and after <= before:
            raise UserError("job.not_longer", field, before=before, after=after, what=field)
        if before is None and after is not None:
            raise UserError("job.other_length", field, given=field, used="max_steps" if field == "epochs" else "epochs")
    # Through the parser again: the new number has bounds too.
    changed = schedule.model_dump(mode="json") | {"epochs": epochs, "max_steps": max_steps}
    return parse_spec(spec.model_dump(mode="json") | {"schedule": changed})
