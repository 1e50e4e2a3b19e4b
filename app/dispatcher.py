"""Gives queued jobs free devices, each second and whenever something changed.

It looks at a snapshot, asks core.scheduling, and then makes each assignment in a transaction of its own: a new
attempt, a new fence, the job in `dispatching`. There is one dispatcher, so devices can only become free between the
look and the act; a job that left the queue meanwhile fails its compare-and-swap and is left alone. The launch message
goes out after the commit. If the process dies in between, the host learns of the launch by its beat, and the sweeper
sends it again.

A device is taken by the job that the database says holds it, and by an attempt that its host still reports alive
though the job has moved on: its trainer is about to be killed, but until then its memory is not free.
"""

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Literal

from sqlmodel import Session, col, select

from app.jobs.attempts import dispatch
from app.jobs.moves import JOBS_TOPIC, QUEUE_TOPIC, topic_of
from app.services import Services
from app.tables import Attempt, Host, Job
from core.needs import features_of, needs_of
from core.scheduling import Assigned, HostOffer, QueuedJob, Waiting, assign
from core.spec import parse_spec
from core.states import ON_A_HOST, JobState
from core.wire import HOST_FRESH_S, PROTOCOL, AttemptRef, HostBeat, HostReport

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Dispatcher(threading.Thread):
    def __init__(self, services: Services) -> None:
        super().__init__(name="dispatcher", daemon=True)
        self._services = services
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self._services.wake.notify(QUEUE_TOPIC)
        self.join()

    def run(self) -> None:
        while not self._stopping.is_set():
            seen = self._services.wake.version(QUEUE_TOPIC)
            try:
                dispatch_once(self._services)
            except Exception:
                # The border of this loop: whatever went wrong once is looked at again in a second.
                log.exception("the dispatcher's round failed")
            self._services.wake.wait(QUEUE_TOPIC, seen, PERIOD_S)


def dispatch_once(services: Services) -> list[AttemptRef]:
    """One round; what was dispatched."""
    now = services.clock()
    with services.database.read() as session:
        jobs = {job.id: job for job in session.exec(select(Job).where(Job.state == JobState.QUEUED.value))}
        ready = [queued_job(job) for job in jobs.values() if job.not_before is None or job.not_before <= now]
        offers = list(offers_of_hosts(session, now)) if ready else []
    launched: list[AttemptRef] = []
    waiting: list[Waiting] = []
    for decision in assign(ready, offers):
        if isinstance(decision, Waiting):
            waiting.append(decision)
        elif (launch := _carry_out(services, decision, now)) is not None:
            launched.append(launch)
    _tell_why(services, jobs, waiting)
    return launched


def queued_job(job: Job) -> QueuedJob:
    return QueuedJob(
        id=job.id,
        priority=job.priority,
        queued_at=job.queued_at,
        num_ranks=job.spec["parallel"]["devices"],
        model=job.spec["model"]["base"],
        host_pinned=job.pinned_host,
        needs=_needs_of(json.dumps(job.spec)),
    )


@lru_cache(maxsize=4096)  # a queue is looked at each second
def _needs_of(spec: str) -> frozenset[str]:
    return frozenset(need.feature for need in needs_of(parse_spec(json.loads(spec))))


def offers_of_hosts(session: Session, now: float) -> Iterator[HostOffer]:
    hosts = session.exec(select(Host)).all()
    beats = {host.id: HostBeat.model_validate(host.beat or {}) for host in hosts}
    taken = _taken_devices(session, beats)
    for host in hosts:
        report = HostReport.model_validate(host.report)
        kind: Literal["gpu", "cpu"] = "gpu" if any(device.kind == "gpu" for device in report.devices) else "cpu"
        devices = [device for device in report.devices if device.kind == kind]
        free = [each.id for each in devices if not each.in_use_by_stranger and each.id not in taken[host.id]]
        takes_work = not host.is_draining and not beats[host.id].is_leaving and report.protocol == PROTOCOL
        yield HostOffer(
            id=host.id,
            name=host.name,
            device_kind="gpu" if kind == "gpu" else "cpu_slot",
            all_devices=tuple(device.id for device in devices),
            free_devices=tuple(free),
            models=frozenset(model.name for model in report.models),
            num_cpus=report.num_cpus,
            features=features_of(report),
            reaches_hub=report.reaches_hub,
            accepts=takes_work and now - host.beat_at < HOST_FRESH_S,
        )


def _taken_devices(session: Session, beats: Mapping[str, HostBeat]) -> dict[str, set[str]]:
    taken: dict[str, set[str]] = defaultdict(set)
    on_a_host = [state.value for state in ON_A_HOST]
    for job in session.exec(select(Job).where(col(Job.state).in_(on_a_host))):
        assert job.host is not None
        taken[job.host] |= set(job.devices or [])
    for host, beat in beats.items():
        for reference in beat.attempts:
            attempt = session.get(Attempt, (reference.job, reference.attempt))
            # An attempt that said itself that it ended (final_seq) has nothing left on the device.
            if attempt is not None and attempt.host == host and attempt.final_seq is None:
                taken[host] |= set(attempt.devices)
    return taken


def _carry_out(services: Services, decision: Assigned, now: float) -> AttemptRef | None:
    with services.database.write() as session:
        job = session.get_one(Job, decision.job_id)
        launch = dispatch(session, job, decision.host_id, decision.devices, now)
    if launch is not None:
        services.wake.notify(JOBS_TOPIC, topic_of(launch.job))
        services.launcher.send_launch(decision.host_id, launch.job, launch.attempt, launch.fence)
    return launch


def _tell_why(services: Services, jobs: Mapping[str, Job], waiting: Iterable[Waiting]) -> None:
    """Stores each reason that is not the one stored already, so that an idle queue writes nothing."""
    told = {
        decision.job_id: (decision.reason.code, {**decision.reason.parameters, "position": decision.position})
        for decision in waiting
    }
    new = {job: reason for job, reason in told.items() if reason != (jobs[job].wait_code, jobs[job].wait_parameters)}
    if not new:
        return
    with services.database.write() as session:
        for job_id, (code, parameters) in new.items():
            job = session.get_one(Job, job_id)
            if job.state == JobState.QUEUED:
                job.wait_code, job.wait_parameters = code, parameters
                session.add(job)
    services.wake.notify(JOBS_TOPIC, *(topic_of(job) for job in new))
