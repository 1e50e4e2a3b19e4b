"""/api/v1/jobs: everything that can be done with a job, for programs."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlmodel import Session, col, select

from app.auth import AnyCaller, Caller
from app.forecast import forecast_to_keep
from app.held import HeldTo, held_to
from app.idempotency import OnlyOnce
from app.jobs import (
    JOBS_TOPIC,
    QUEUE_TOPIC,
    actions,
    badges,
    create_job,
    get_job,
    legal_actions,
    topic_of,
)
from app.jobs.create import settle
from app.live import After, EventView, LastEventId, api_events, cursor_from, wants_stream
from app.metrics import NAMES, Point, parse_names, read_curve, thin
from app.problems import faults_lie_in_spec, not_found
from app.services import AnyServices, Services
from app.tables import ArtifactRow, Attempt, CheckpointRow, Event, Host, Job, User
from app.times import Time
from app.trials import Told, told_by, trial_of
from core.errors import TEXTS, USER_FAULTS, Reason
from core.spec import parse_spec
from core.states import Action, Badge, JobState
from core.trial import AnyTrial, Trial, parse_trial
from core.unbuilt import refuse_unbuilt

router = APIRouter(prefix="/api/v1/jobs", tags=["jobs"])

MOST_JOBS = 200
MOST_EVENTS = 1000

JobText = Annotated[str, Field(max_length=200)]


# -- what is said of a job -----------------------------------------------------------------------------------------
class Wait(BaseModel):
    code: str
    text: str
    position: int | None  # among those that wait, from 1


class JobView(BaseModel):
    id: str
    name: str
    state: JobState
    badges: tuple[Badge, ...]
    desired: str
    actions: tuple[Action, ...]  # what may be asked of it now
    owner: str | None
    spec: dict[str, Any]
    tags: list[str]
    notes: str
    priority: int
    attempt: int
    host: str | None
    devices: list[str]
    wait: Wait | None  # why it stands in the queue
    reason: str | None
    text: str | None
    remedy: str | None
    plan: dict[str, Any] | None
    summary: dict[str, Any]
    forecast: dict[str, Any] | None  # core.forecast.Forecast, as it stood when the job was submitted
    held_to: HeldTo | None  # null in a list
    parent: str | None
    parent_kind: str | None
    trial: Trial | None
    created_at: Time
    queued_at: Time
    started_at: Time | None
    ended_at: Time | None
    progress_at: Time | None


class JobList(BaseModel):
    data: list[JobView]
    next_cursor: str | None
    has_more: bool


class EventList(BaseModel):
    data: list[EventView]
    next_cursor: int | None  # the next `after`
    has_more: bool


class LogLine(BaseModel):
    id: int
    attempt: int
    ts: float
    rank: int
    level: str
    text: str


class LogList(BaseModel):
    data: list[LogLine]
    next_cursor: int | None
    has_more: bool


class AttemptView(BaseModel):
    number: int
    host: str
    devices: list[str]
    outcome: str | None
    reason: str | None
    exit_code: int | None
    text: str | None
    remedy: str | None
    acked_seq: int
    final_seq: int | None
    created_at: Time
    claimed_at: Time | None
    beat_at: Time | None
    ended_at: Time | None


class AttemptList(BaseModel):
    data: list[AttemptView]


class CheckpointView(BaseModel):
    attempt: int
    step: int
    path: str
    bytes: int
    is_best: bool
    created_at: Time


class CheckpointList(BaseModel):
    data: list[CheckpointView]


class ArtifactView(BaseModel):
    name: str
    bytes: int
    sha256: str


class ArtifactList(BaseModel):
    data: list[ArtifactView]


class Metrics(BaseModel):
    x: Literal["step"]
    series: dict[str, list[Point]]


class SpecView(BaseModel):
    spec: dict[str, Any]


# -- what is asked of it -------------------------------------------------------------------------------------------
class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CreateJob(Body):
    spec: dict[str, Any]
    # {"kind": "dry_run" | "lr_probe" | "certify", ...}: some steps are made of it, for what they tell (core.trial).
    trial: dict[str, Any] | None = None


class ExtendJob(Body):
    """The new length in all; without either, twice the old one."""

    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(None, ge=1)


class PatchJob(Body):
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=32)] | None = None
    notes: Annotated[str, Field(max_length=20_000)] | None = None


# -- routes --------------------------------------------------------------------------------------------------------
@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=JobView,
    dependencies=[Depends(faults_lie_in_spec)],
)
def post_job(request: Request, body: CreateJob, once: OnlyOnce, caller: AnyCaller, services: AnyServices) -> Response:
    trial = _parse_trial(request, body.trial)
    spec = parse_spec(body.spec)
    refuse_unbuilt(spec)
    with services.database.read() as session:
        settle(session, spec)  # tells of all names that are unknown, where a plan would stop at the first
    forecast = forecast_to_keep(services, spec)

    def act(session: Session) -> JobView:
        author = _author(services, caller)
        job = create_job(session, spec, **author, trial=trial, forecast=forecast)
        return view_job(session, job, services.clock())

    response = once.reply(status.HTTP_201_CREATED, act)
    services.wake.notify(QUEUE_TOPIC, JOBS_TOPIC)
    return response


@router.get("")
def list_jobs(
    services: AnyServices,
    state: Annotated[list[JobState] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_JOBS)] = 50,
    cursor: str | None = None,
) -> JobList:
    """Newest first."""
    statement = select(Job).order_by(col(Job.id).desc()).limit(limit + 1)
    if state:
        statement = statement.where(col(Job.state).in_([each.value for each in state]))
    if cursor is not None:
        statement = statement.where(col(Job.id) < cursor)
    with services.database.read() as session:
        jobs = session.exec(statement).all()
        data = view_jobs(session, jobs[:limit], services.clock())
    has_more = len(jobs) > limit
    return JobList(data=data, next_cursor=data[-1].id if has_more else None, has_more=has_more)


@router.get("/{job_id}")
def read_job(job_id: str, services: AnyServices) -> JobView:
    with services.database.read() as session:
        job = get_job(session, job_id)
        return view_job(session, job, services.clock())


@router.get("/{job_id}/trial")
def read_trial(job_id: str, services: AnyServices) -> Told:
    """What a trial has told so far; 404 for a job that is none."""
    with services.database.read() as session:
        job = get_job(session, job_id)
        trial = trial_of(job)
        if trial is None:
            raise not_found("trial", job_id)
        return told_by(session, job, trial)


@router.patch("/{job_id}")
def patch_job(job_id: str, body: PatchJob, services: AnyServices) -> JobView:
    """Only what is given changes; the spec stays as it was submitted."""
    given = body.model_dump(exclude_unset=True, exclude_none=True)

    def change(session: Session, job: Job) -> None:
        for field, value in given.items():
            setattr(job, field, value)
        session.add(job)

    return _act(services, job_id, change)


@router.post("/{job_id}/cancel")
def cancel(job_id: str, caller: AnyCaller, services: AnyServices) -> JobView:
    return _act(services, job_id, lambda s, job: actions.cancel(s, job, now=services.clock(), who=caller.name))


@router.post("/{job_id}/stop")
def stop(job_id: str, caller: AnyCaller, services: AnyServices) -> JobView:
    return _act(services, job_id, lambda s, job: actions.stop(s, job, now=services.clock(), who=caller.name))


@router.post("/{job_id}/resume")
def resume(job_id: str, caller: AnyCaller, services: AnyServices) -> JobView:
    return _act(services, job_id, lambda s, job: actions.resume(s, job, now=services.clock(), who=caller.name))


@router.post("/{job_id}/checkpoint")
def checkpoint(job_id: str, caller: AnyCaller, services: AnyServices) -> JobView:
    return _act(services, job_id, lambda s, job: actions.checkpoint(s, job, now=services.clock(), who=caller.name))


@router.post("/{job_id}/retry", status_code=status.HTTP_201_CREATED, response_model=JobView)
def retry(job_id: str, once: OnlyOnce, caller: AnyCaller, services: AnyServices) -> Response:
    def act(session: Session) -> JobView:
        job = actions.retry(session, get_job(session, job_id), **_author(services, caller))
        return view_job(session, job, services.clock())

    response = once.reply(status.HTTP_201_CREATED, act)
    services.wake.notify(QUEUE_TOPIC, JOBS_TOPIC)
    return response


@router.post("/{job_id}/extend", status_code=status.HTTP_201_CREATED, response_model=JobView)
def extend(
    job_id: str, once: OnlyOnce, caller: AnyCaller, services: AnyServices, body: ExtendJob | None = None
) -> Response:
    length = body or ExtendJob()

    def act(session: Session) -> JobView:
        old = get_job(session, job_id)
        job = actions.extend(
            session, old, epochs=length.epochs, max_steps=length.max_steps, **_author(services, caller)
        )
        return view_job(session, job, services.clock())

    response = once.reply(status.HTTP_201_CREATED, act)
    services.wake.notify(QUEUE_TOPIC, JOBS_TOPIC)
    return response


@router.post("/{job_id}/clone")
def clone(job_id: str, services: AnyServices) -> SpecView:
    """The spec to start another job from; nothing is created."""
    with services.database.read() as session:
        return SpecView(spec=actions.clone(get_job(session, job_id)).model_dump(mode="json"))


@router.get("/{job_id}/metrics")
def metrics(
    job_id: str,
    services: AnyServices,
    names: Annotated[str, Query(description=f"Any of {', '.join(NAMES)}; empty: all.")] = "",
    x: Literal["step"] = "step",
    max_points: Annotated[int, Query(ge=4, le=100_000)] = 2000,
) -> Metrics:
    """One point a step, from the newest attempt that made it; the least and greatest of each stretch when there are
    more than `max_points`."""
    wanted = parse_names(names)
    with services.database.read() as session:
        job = get_job(session, job_id)
        series = {name: thin(read_curve(session, job, name), max_points) for name in wanted}
    return Metrics(x=x, series=series)


@router.get("/{job_id}/events", response_model=EventList)
def events(
    *,
    request: Request,
    job_id: str,
    services: AnyServices,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MOST_EVENTS)] = MOST_EVENTS,
    last_event_id: LastEventId = None,
) -> EventList | StreamingResponse:
    """With `Accept: text/event-stream` the same events as a stream, which goes on until the job ends."""
    cursor = cursor_from(after, last_event_id)
    with services.database.read() as session:
        get_job(session, job_id)
        found = [] if wants_stream(request) else _events_after(session, job_id, cursor, limit + 1)
    if wants_stream(request):
        return api_events(request, services, job_id, cursor)
    data = [EventView.model_validate(event, from_attributes=True) for event in found[:limit]]
    has_more = len(found) > limit
    return EventList(data=data, next_cursor=data[-1].id if has_more else None, has_more=has_more)


@router.get("/{job_id}/logs")
def logs(
    job_id: str,
    services: AnyServices,
    after: After = None,
    q: Annotated[str, Query(max_length=200, description="Lines that hold this text, in either case.")] = "",
    limit: Annotated[int, Query(ge=1, le=MOST_EVENTS)] = MOST_EVENTS,
) -> LogList:
    with services.database.read() as session:
        get_job(session, job_id)
        found = _events_after(session, job_id, after or 0, limit + 1, kind="log", q=q)
    data = [_log_line(event) for event in found[:limit]]
    has_more = len(found) > limit
    return LogList(data=data, next_cursor=data[-1].id if has_more else None, has_more=has_more)


@router.get("/{job_id}/attempts")
def attempts(job_id: str, services: AnyServices) -> AttemptList:
    with services.database.read() as session:
        get_job(session, job_id)
        found = session.exec(select(Attempt).where(Attempt.job == job_id).order_by(col(Attempt.number))).all()
    return AttemptList(data=[AttemptView.model_validate(each, from_attributes=True) for each in found])


@router.get("/{job_id}/checkpoints")
def checkpoints(job_id: str, services: AnyServices) -> CheckpointList:
    with services.database.read() as session:
        get_job(session, job_id)
        found = session.exec(
            select(CheckpointRow)
            .where(CheckpointRow.job == job_id)
            .order_by(col(CheckpointRow.attempt), col(CheckpointRow.step))
        ).all()
    return CheckpointList(data=[CheckpointView.model_validate(each, from_attributes=True) for each in found])


@router.get("/{job_id}/artifacts")
def artifacts(job_id: str, services: AnyServices) -> ArtifactList:
    with services.database.read() as session:
        get_job(session, job_id)
        found = session.exec(select(ArtifactRow).where(ArtifactRow.job == job_id).order_by(col(ArtifactRow.name))).all()
    return ArtifactList(data=[ArtifactView.model_validate(each, from_attributes=True) for each in found])


@router.get("/{job_id}/artifacts/{name:path}", response_class=FileResponse)
def download(job_id: str, name: str, services: AnyServices) -> FileResponse:
    """A name is looked up, never made into a path: the file lies under its hash."""
    with services.database.read() as session:
        artifact = session.get(ArtifactRow, (job_id, name))
    if artifact is None:
        raise not_found("artifact", name)
    return services.blobs.response(artifact.sha256, filename=name.rsplit("/", 1)[-1])


def _parse_trial(request: Request, given: dict[str, Any] | None) -> AnyTrial | None:
    if given is None:
        return None
    try:
        return parse_trial(given)
    except USER_FAULTS:
        request.state.pointer_prefix = ""  # these count from the body
        raise


# -- shared --------------------------------------------------------------------------------------------------------
def view_job(session: Session, job: Job, now: float) -> JobView:
    """With what it was predicted to do beside what it did, which takes a few queries."""
    (seen,) = view_jobs(session, [job], now)
    return seen.model_copy(update={"held_to": held_to(session, job, now)})


def view_jobs(session: Session, jobs: Sequence[Job], now: float) -> list[JobView]:
    owners = _names(session, User, {job.owner for job in jobs})
    hosts = _names(session, Host, {job.host for job in jobs})
    return [
        JobView(
            **job.model_dump(
                include=set(JobView.model_fields) - {"devices", "summary", "tags", "owner", "host", "held_to"}
            ),
            badges=badges(job, now),
            actions=legal_actions(job),
            owner=owners.get(job.owner),
            host=hosts.get(job.host),
            devices=job.devices or [],
            tags=job.tags or [],
            summary=job.summary or {},
            wait=_wait(job),
            held_to=None,
        )
        for job in jobs
    ]


def _names(session: Session, table: type[User] | type[Host], ids: set[str | None]) -> dict[str | None, str]:
    found = session.exec(select(table.id, table.name).where(col(table.id).in_(ids - {None}))).all()
    return dict(found)


def _wait(job: Job) -> Wait | None:
    if job.state != JobState.QUEUED or job.wait_code not in TEXTS:
        return None
    parameters = dict(job.wait_parameters or {})
    return Wait(code=job.wait_code, text=Reason(job.wait_code, parameters).text(), position=parameters.get("position"))


def _events_after(
    session: Session, job_id: str, after: int, limit: int, *, kind: str | None = None, q: str = ""
) -> list[Event]:
    statement = select(Event).where(Event.job == job_id, col(Event.id) > after)
    if kind is not None:
        statement = statement.where(Event.kind == kind)
    if q:
        statement = statement.where(col(Event.data)["text"].as_string().icontains(q, autoescape=True))
    return list(session.exec(statement.order_by(col(Event.id)).limit(limit)).all())


def _log_line(event: Event) -> LogLine:
    told = event.data
    assert event.id is not None
    return LogLine(
        id=event.id,
        attempt=event.attempt,
        ts=event.ts,
        rank=told.get("rank", 0),
        level=told.get("level", "info"),
        text=told["text"],
    )


def _act(services: Services, job_id: str, act: Callable[[Session, Job], None]) -> JobView:
    with services.database.write() as session:
        job = get_job(session, job_id)
        act(session, job)
        session.flush()
        seen = view_job(session, job, services.clock())
    services.wake.notify(QUEUE_TOPIC, JOBS_TOPIC, topic_of(job_id))
    return seen


def _author(services: Services, caller: Caller) -> dict[str, Any]:
    return {"now": services.clock(), "who": caller.name, "owner": caller.user_id}
