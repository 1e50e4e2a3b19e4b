"""/worker/v1, the sure road between a host and this service: the table in core.wire, route by route.

A worker's token belongs to the first host that registers with it, and reaches the attempts of that host alone; for
everything else the answer is 404, as if it did not exist. Every message may be repeated. Events are never refused for
their fence: what an old attempt lived through is history. Everything else with an old fence gets 409.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, status
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from sqlmodel import Session, col, select

from app.auth import Caller, Worker
from app.blobs import record_blob
from app.datasets.references import data_of
from app.jobs import JOBS_TOPIC, QUEUE_TOPIC, topic_of
from app.jobs.adapters import adapter_of
from app.jobs.attempts import CLAIMED, NotRecorded, StaleFence, beat, check_fence, claim, finish
from app.problems import Problem, not_found
from app.profiles import (
    claim_profile,
    packed_facts,
    store_measured,
    store_progress,
    store_result,
    topic_of_profile,
    wanted_profiles,
)
from app.recorder import Batch, record
from app.services import AnyServices, Services
from app.tables import ApiToken, ArtifactRow, Attempt, Blob, Host, Job
from core.errors import UserError
from core.spec import parse_spec
from core.states import JobState, Outcome
from core.trial import as_trial
from core.wire import (
    HEARTBEAT_S,
    PROTOCOL,
    WORKER_PREFIX,
    Artifact,
    Assignment,
    AttemptOrders,
    AttemptRef,
    Claim,
    DataFile,
    EventBatch,
    Finish,
    Finished,
    Heartbeat,
    HostBeat,
    HostOrders,
    HostReport,
    MeasuredProfile,
    ProfileOrder,
    ProfileProgress,
    ProfileResult,
    Recorded,
    Welcome,
)

router = APIRouter(prefix=WORKER_PREFIX, tags=["workers"])

Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$")]
MAX_ARTIFACT_BYTES = 2**40  # the disk is the limit; this only keeps a broken worker from writing for ever


# -- hosts ---------------------------------------------------------------------------------------------------------
@router.post("/hosts/register")
def register(report: HostReport, caller: Worker, services: AnyServices) -> Welcome:
    if report.protocol != PROTOCOL:
        raise Problem(status.HTTP_409_CONFLICT, UserError("worker.protocol", "", theirs=report.protocol, ours=PROTOCOL))
    now = services.clock()
    with services.database.write() as session:
        token = session.get_one(ApiToken, caller.id)
        host = session.get(Host, report.host)
        if token.host not in (None, report.host):
            raise Problem(status.HTTP_403_FORBIDDEN, UserError("worker.token_of_other_host"))
        if host is not None and host.token != token.id and _is_valid(session, host.token):
            raise Problem(status.HTTP_403_FORBIDDEN, UserError("worker.host_of_other_token", "", host=report.name))
        token.host = report.host
        session.add(token)
        if host is None:
            host = Host(id=report.host, name=report.name, token=token.id, registered_at=now, beat_at=now)
        host.name, host.token, host.beat_at = report.name, token.id, now
        host.report = report.model_dump(mode="json")
        host.beat = {**(host.beat or {}), "is_leaving": False}
        session.add(host)
    services.wake.notify(QUEUE_TOPIC)
    return Welcome(host=report.host, redis_url=services.settings.redis_url or None)


def _is_valid(session: Session, token: str) -> bool:
    return session.get_one(ApiToken, token).revoked_at is None


@router.post("/hosts/{host_id}/beat")
def host_beat(host_id: str, message: HostBeat, caller: Worker, services: AnyServices) -> HostOrders:
    now = services.clock()
    with services.database.write() as session:
        host = session.get(Host, host_id)
        if host is None or host.token != caller.id:
            raise not_found("host", host_id)
        was_silent_s = now - host.beat_at
        host.beat, host.beat_at = message.model_dump(mode="json"), now
        session.add(host)
        launches = _on_host(session, host_id, (JobState.DISPATCHING,))
        attempts = _on_host(session, host_id, tuple(CLAIMED))
        profiles = wanted_profiles(session, host_id)
    if was_silent_s > 2 * HEARTBEAT_S:
        services.wake.notify(QUEUE_TOPIC)
    return HostOrders(
        redis_url=services.settings.redis_url or None, launches=launches, attempts=attempts, profiles=profiles
    )


def _on_host(session: Session, host: str, states: tuple[JobState, ...]) -> tuple[AttemptRef, ...]:
    jobs = session.exec(
        select(Job).where(Job.host == host, col(Job.state).in_([state.value for state in states])).order_by(col(Job.id))
    )
    return tuple(AttemptRef(job=job.id, attempt=job.attempt, fence=job.fence) for job in jobs)


# -- attempts ------------------------------------------------------------------------------------------------------
@router.post("/attempts/{job_id}/{number}/claim")
def claim_attempt(job_id: str, number: int, message: Claim, caller: Worker, services: AnyServices) -> Assignment:
    with services.database.write() as session, _fenced():
        job, attempt = _own(session, caller, job_id, number)
        if message.host != attempt.host:
            raise not_found("attempt", f"{job_id}/{number}")
        claim(session, job, attempt, message.fence, services.clock())
        spec = parse_spec(job.spec)
        files = data_of(session, spec)
        adapter = () if spec.model.adapter is None else adapter_of(session, spec.model.adapter)
    _tell(services, job_id)
    return Assignment(
        spec=job.spec,
        data=tuple(DataFile(dataset=name, sha256=file.sha256, bytes=file.bytes) for name, file in files),
        devices=tuple(attempt.devices),
        adapter=adapter,
        resume_from=(job.id, *(job.resume_jobs or [])),
        redis_url=services.settings.redis_url or None,
        acked_seq=attempt.acked_seq,
        trial=as_trial(job.trial),
    )


@router.post("/attempts/{job_id}/{number}/heartbeat")
def heartbeat(job_id: str, number: int, message: Heartbeat, caller: Worker, services: AnyServices) -> AttemptOrders:
    now = services.clock()
    with services.database.write() as session, _fenced():
        job, attempt = _own(session, caller, job_id, number)
        was_unreachable = job.lease_until is not None and job.lease_until < now
        desired = beat(session, job, attempt, message.fence, now)
    if was_unreachable:
        _tell(services, job_id)
    return AttemptOrders(
        lease_s=max(0.0, (job.lease_until or now) - now),
        desired=desired,
        acked_seq=attempt.acked_seq,
        redis_url=services.settings.redis_url or None,
        checkpoint_request=job.checkpoint_request,
    )


@router.post("/attempts/{job_id}/{number}/events")
def post_events(job_id: str, number: int, message: EventBatch, caller: Worker, services: AnyServices) -> Recorded:
    with services.database.read() as session:
        _own(session, caller, job_id, number)
    watermarks = record(services, [Batch(job=job_id, attempt=number, events=message.events)])
    return Recorded(acked_seq=watermarks[job_id, number])


@router.put("/attempts/{job_id}/{number}/artifacts/{sha256}", status_code=status.HTTP_204_NO_CONTENT)
async def put_artifact(
    *,
    job_id: str,
    number: int,
    sha256: Sha256,
    fence: Annotated[int, Query()],
    request: Request,
    caller: Worker,
    services: AnyServices,
) -> None:
    """The fence is looked at before the bytes are taken and again when all are there: a long upload may outlive it."""

    def check() -> None:
        with services.database.read() as session, _fenced():
            check_fence(*_own(session, caller, job_id, number), fence)

    def keep() -> None:
        with services.database.write() as session, _fenced():
            check_fence(*_own(session, caller, job_id, number), fence)
            blob.keep()
            record_blob(session, blob.stored, services.clock())

    await run_in_threadpool(check)
    async with services.blobs.incoming(request.stream(), max_bytes=MAX_ARTIFACT_BYTES) as blob:
        if blob.stored.sha256 != sha256:
            error = UserError("upload.other_bytes", expected=sha256, found=blob.stored.sha256)
            raise Problem(status.HTTP_422_UNPROCESSABLE_CONTENT, error)
        await run_in_threadpool(keep)


@router.post("/attempts/{job_id}/{number}/finish")
def finish_attempt(job_id: str, number: int, message: Finish, caller: Worker, services: AnyServices) -> Finished:
    with services.database.write() as session, _fenced():
        job, attempt = _own(session, caller, job_id, number)
        finish(session, job, attempt, message, services.clock())
        if message.outcome is Outcome.SUCCEEDED:
            _keep_artifacts(session, job, message.artifacts)
    _tell(services, job_id)
    services.wake.notify(QUEUE_TOPIC)
    return Finished(state=job.state)


def _keep_artifacts(session: Session, job: Job, artifacts: tuple[Artifact, ...]) -> None:
    """Raises Problem 422 unless every file has arrived whole; the end is then undone with the transaction."""
    for artifact in artifacts:
        blob = session.get(Blob, artifact.sha256)
        if blob is None or blob.bytes != artifact.bytes:
            raise Problem(
                status.HTTP_422_UNPROCESSABLE_CONTENT,
                UserError("worker.artifact_missing", "artifacts", name=artifact.name, sha256=artifact.sha256),
            )
        session.merge(ArtifactRow(job=job.id, name=artifact.name, sha256=artifact.sha256, bytes=artifact.bytes))


@router.post("/attempts/{job_id}/{number}/profile")
def post_profile(
    job_id: str, number: int, message: MeasuredProfile, caller: Worker, services: AnyServices
) -> dict[str, str]:
    """Facts of the data, whoever's attempt measured them: a fence has no say in them."""
    packed = packed_facts(message.profile)
    with services.database.write() as session:
        job, _ = _own(session, caller, job_id, number)
        store_measured(session, job, message.dataset, packed, services.clock())
    return {}


# -- profiles ------------------------------------------------------------------------------------------------------
@router.post("/profiles/{profile_id}/claim")
def post_profile_claim(profile_id: str, caller: Worker, services: AnyServices) -> ProfileOrder:
    with services.database.write() as session:
        return claim_profile(session, profile_id, _host_of(session, caller), services.clock())


@router.post("/profiles/{profile_id}/progress")
def post_profile_progress(
    profile_id: str, message: ProfileProgress, caller: Worker, services: AnyServices
) -> dict[str, str]:
    packed = None if message.sampled is None else packed_facts(message.sampled)
    with services.database.write() as session:
        host_id = _host_of(session, caller)
        now = services.clock()
        store_progress(session, profile_id, host_id, fraction=message.fraction, packed=packed, now=now)
    return {}


@router.post("/profiles/{profile_id}/result")
def post_profile_result(
    profile_id: str, message: ProfileResult, caller: Worker, services: AnyServices
) -> dict[str, str]:
    packed = None if message.profile is None else packed_facts(message.profile)
    with services.database.write() as session:
        host_id = _host_of(session, caller)
        store_result(session, profile_id, host_id, packed=packed, error=message.error, now=services.clock())
    services.wake.notify(topic_of_profile(profile_id))
    return {}


# -- data ----------------------------------------------------------------------------------------------------------
@router.get("/blobs/{sha256}")
def get_blob(sha256: Sha256, caller: Worker, services: AnyServices) -> FileResponse:
    if not services.blobs.has(sha256):
        raise not_found("file", sha256)
    return services.blobs.response(sha256, filename=sha256)


# -- shared --------------------------------------------------------------------------------------------------------
def _own(session: Session, caller: Caller, job_id: str, number: int) -> tuple[Job, Attempt]:
    """Raises Problem 404 for an attempt of another host as for one that doesn't exist."""
    attempt = session.get(Attempt, (job_id, number))
    if attempt is None or attempt.host != _host_of(session, caller):
        raise not_found("attempt", f"{job_id}/{number}")
    return session.get_one(Job, job_id), attempt


def _host_of(session: Session, caller: Caller) -> str:
    """Raises Problem 404 for a token with which no host registered yet; a worker registers at that."""
    host = session.get_one(ApiToken, caller.id).host
    if host is None:
        raise not_found("host", caller.name)
    return host


def _tell(services: Services, job: str) -> None:
    services.wake.notify(JOBS_TOPIC, topic_of(job))


@contextmanager
def _fenced() -> Iterator[None]:
    try:
        yield
    except StaleFence as stale:
        error = UserError("worker.stale_fence", "", current_fence=stale.current_fence)
        raise Problem(status.HTTP_409_CONFLICT, error, current_fence=stale.current_fence) from stale
    except NotRecorded as early:
        error = UserError("worker.not_recorded", "", acked_seq=early.acked_seq, final_seq=early.final_seq)
        raise Problem(status.HTTP_425_TOO_EARLY, error, acked_seq=early.acked_seq) from early
