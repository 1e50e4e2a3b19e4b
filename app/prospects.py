"""Where a job would run, from the hosts as they are and the queue as it stands: core.prospects, fed with both."""

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel
from sqlmodel import Session, col, select

from app.dispatcher import offers_of_hosts, queued_job
from app.models import resolve_model
from app.services import Services
from app.tables import Host, Job
from core.errors import USER_FAULTS, UserErrors
from core.prospects import KnownHost, Prospects, prospects_of, queued
from core.refusals import faults_of_model
from core.scheduling import Assigned, HostOffer, assign
from core.spec import JobSpec
from core.states import JobState
from core.wire import HOST_FRESH_S, HostReport
from core.zero import Loaded


class PlannedFor(BaseModel):
    """The device that numbers are worked out for: the likeliest, unless another was asked for."""

    device: str
    kind: Literal["gpu", "cpu"]
    memory_bytes: int
    hosts: list[str]  # that have it and could run the job, the likeliest first
    why: str
    choices: list[str]  # what `device` of the request may be


def view_of(prospects: Prospects) -> PlannedFor:
    chosen = prospects.chosen
    return PlannedFor(
        device=chosen.device.name,
        kind=chosen.device.kind,
        memory_bytes=chosen.device.memory_bytes,
        hosts=list(chosen.hosts),
        why=prospects.why.text(),
        choices=[choice.key for choice in prospects.choices],
    )


def look_out(services: Services, spec: JobSpec) -> Prospects:
    """Raises UserErrors with all that is known to be impossible before a row of data is measured: of hosts and of the
    model."""
    now = services.clock()
    with services.database.read() as session:
        model = resolve_model(session, spec.model.base).profile
        hosts = list(_known_hosts(session, now))
        first = _taker(session, spec, [host.offer for host in hosts], now)
    faults = list(faults_of_model(spec, model, Loaded.of(model.shape)))
    try:
        prospects = prospects_of(spec, hosts, first)
    except USER_FAULTS as fault:
        raise UserErrors([*fault.errors, *faults]) from None
    if faults:
        raise UserErrors(faults)
    return prospects


def _known_hosts(session: Session, now: float) -> Iterator[KnownHost]:
    for offer in offers_of_hosts(session, now):
        host = session.get_one(Host, offer.id)
        devices = {device.id: device for device in HostReport.model_validate(host.report).devices}
        silent_s = now - host.beat_at
        yield KnownHost(offer, devices, silent_s, is_fresh=silent_s < HOST_FRESH_S)


def _taker(session: Session, spec: JobSpec, offers: Sequence[HostOffer], now: float) -> str | None:
    """The host to which the dispatcher would give the job if it were launched now; None where it would wait."""
    waiting = select(Job).where(Job.state == JobState.QUEUED.value, col(Job.priority) >= spec.priority)
    ahead = [queued_job(job) for job in session.exec(waiting) if job.not_before is None or job.not_before <= now]
    mine = queued(spec, now)
    return next(
        (
            decision.host_id
            for decision in assign([*ahead, mine], offers)
            if isinstance(decision, Assigned) and decision.job_id == mine.id
        ),
        None,
    )
