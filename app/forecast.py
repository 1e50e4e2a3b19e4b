"""The forecast of a job: core.forecast, fed with what ran, the hosts as they are and the queue as it stands.

It is made at each keystroke in the form, so all that it reads is short. What a submit keeps of it is held against what
then happens (app.held)."""

from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy.orm import load_only
from sqlmodel import Session, col, select

from app.dispatcher import offers_of_hosts, queued_job
from app.history import read_history
from app.kept import kept_checkpoints
from app.profiles import plan_if_measured
from app.services import Services
from app.tables import Host, Job
from core.disk import DiskPlan
from core.errors import Reason
from core.events import RunTotals
from core.forecast import Forecast, Place, disk_of, forecast_time, likeness_of, memory_seen, work_of
from core.past_run import Basis
from core.placement import size
from core.preflight import JobPlan
from core.run_totals import run_totals
from core.scheduling import HostOffer, Waiting, assign, likeliest
from core.spec import JobSpec
from core.states import TERMINAL, JobState
from core.verdict import Remark
from core.wire import Device, HostBeat, HostReport

# What `queued_job` reads; a queue may be long, and its jobs hold more.
ASKED_OF_THE_QUEUE: tuple[Any, ...] = (Job.id, Job.priority, Job.queued_at, Job.not_before, Job.spec, Job.pinned_host)
NEW = "~"  # sorts behind every job of the queue
MOST_NAMED = 3  # jobs whose checkpoints could go


def forecast_job(services: Services, plan: JobPlan, spec: JobSpec, totals: RunTotals | None = None) -> Forecast:
    """`spec` as it was asked for. `totals` are those of all its steps, where they were laid out."""
    settings, disk = services.settings, disk_of(plan)
    with services.database.read() as session:
        place, offer = _place(session, spec, services.clock())
        host = session.get(Host, offer.id) if offer else None
        history = read_history(session)
    device, there = plan.device, _device(host, offer)
    # What this host did tells nothing of a device that is only looked at.
    host_id = offer.id if offer and there and there.name == device.name else None
    seen = memory_seen(history, likeness_of(plan, device))
    return Forecast(
        time=forecast_time(plan, work_of(plan, disk), device, host_id, history),
        device_kind=device.kind,
        num_devices=spec.parallel.devices if device.kind == "gpu" else 1,
        price=settings.price_per_gpu_hour,
        currency=settings.currency,
        disk=disk,
        disk_free_bytes=HostBeat.model_validate(host.beat or {}).disk_free_bytes if host else None,
        place=place,
        totals=totals or run_totals(plan, most_samples=0),
        steps_per_epoch=plan.run.steps_per_epoch,
        planned_peak_bytes=plan.memory.planned_peak_bytes,
        memory_ratio=seen[0] if seen else None,
        memory_seen=seen[1] if seen else None,
    )


def forecast_to_keep(services: Services, spec: JobSpec) -> dict[str, Any] | None:
    """Before a submit, and outside its transaction, for it takes a while: what its job is held to; None where its data
    is not measured. Raises UserError or UserErrors where the job can't run."""
    plan = plan_if_measured(services, spec)
    if plan is None:
        return None
    return forecast_job(services, plan, spec, run_totals(plan)).model_dump(mode="json")


def _place(session: Session, spec: JobSpec, now: float) -> tuple[Place, HostOffer | None]:
    """What the dispatcher would decide if the job were launched now, and the host that is likeliest to take it."""
    queued = select(Job).where(Job.state == JobState.QUEUED.value, col(Job.priority) >= spec.priority)
    queued = queued.options(load_only(*ASKED_OF_THE_QUEUE))
    ahead = [queued_job(job) for job in session.exec(queued) if job.not_before is None or job.not_before <= now]
    told: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "spec_sha256": "", "priority": spec.priority}
    mine = queued_job(Job(id=NEW, name="", **told, state=JobState.QUEUED.value, created_at=now, queued_at=now))
    offers = list(offers_of_hosts(session, now))
    decision = next(each for each in assign([*ahead, mine], offers) if each.job_id == NEW)
    if isinstance(decision, Waiting):
        likely = next(iter(likeliest(mine, offers)), None)
        name, id = (likely.name, likely.id) if likely else (None, None)
        return Place(position=decision.position, host=name, host_id=id, why=decision.reason), likely
    offer = next(offer for offer in offers if offer.id == decision.host_id)
    where: dict[str, str | int | float] = {"devices": ", ".join(decision.devices), "host": offer.name}
    return Place(position=None, host=offer.name, host_id=offer.id, why=Reason("forecast.starts", where)), offer


def _device(host: Host | None, offer: HostOffer | None) -> Device | None:
    if host is None or offer is None:
        return None
    devices = HostReport.model_validate(host.report).devices
    return next((device for device in devices if device.id in offer.all_devices), None)


# -- room on the disk ------------------------------------------------------------------------------------------------


def remarks_on_disk(services: Services, forecast: Forecast, spec: JobSpec) -> list[Remark]:
    """One where the host's disk has no room for what the job writes."""
    disk, free = forecast.disk, forecast.disk_free_bytes
    if disk is None or free is None or disk.total_bytes <= free:
        return []
    place = forecast.place
    assert place.host is not None and place.host_id is not None, "whose disk it is"
    told: dict[str, str | int | float] = {"needed": size(disk.total_bytes), "free": size(free), "host": place.host}
    fix = {"checkpoint.keep_last": 1, "checkpoint.keep_best": 0}
    fixes = (fix,) if _with_few(disk).total_bytes <= free and spec.checkpoint.keep_last > 1 else ()
    with services.database.read() as session:
        old = _old_checkpoints(session, place.host_id)
    code = "forecast.disk_short_old" if old else "forecast.disk_short"
    told["names"] = ", ".join(f"{name} ({size(num_bytes)})" for name, num_bytes in old)
    return [Remark("warning", "checkpoint.keep_last", Reason(code, told), fixes)]


def _with_few(disk: DiskPlan) -> DiskPlan:
    return disk.model_copy(update={"most_checkpoints": min(disk.most_checkpoints, 2)})


def _old_checkpoints(session: Session, host: str) -> list[tuple[str, int]]:
    """The jobs that have ended and hold the most bytes of checkpoints on this host."""
    ended = select(Job).where(Job.pinned_host == host)
    jobs = session.exec(ended.where(col(Job.state).in_([state.value for state in TERMINAL]))).all()
    held = [(job.name, sum(row.bytes for row in kept_checkpoints(session, job))) for job in jobs]
    return sorted((each for each in held if each[1]), key=lambda each: -each[1])[:MOST_NAMED]


# -- for programs ----------------------------------------------------------------------------------------------------


class DiskView(BaseModel):
    checkpoint_bytes: int  # each
    most_checkpoints: int  # at a time, with the one that is being written
    kept_checkpoints: int  # in the end, at most
    kept_bytes: int
    result_bytes: int
    cache_bytes: int
    total_bytes: int  # at the moment of most
    free_bytes: int | None  # on the host
    fits: bool | None


class ForecastView(BaseModel):
    """Estimates. Seconds are from the start on a host to the end, `low` and `high` what they may be as well."""

    seconds: float | None
    low_s: float | None
    high_s: float | None
    steps_s: float | None  # of the steps alone, by their pace
    basis: Basis | None
    why: str
    correction: float  # that is in the first three
    corrected: str | None  # what it was learned from
    device_kind: Literal["gpu", "cpu"]
    devices: int
    device_hours: float | None
    cost: float | None  # null without a price of a GPU-hour, and on a CPU
    currency: str
    disk: DiskView | None
    position: int | None  # in the queue, from 1; null where it would start at once
    host: str | None
    place: str
    memory_ratio: float | None
    memory: str | None


def view_of(forecast: Forecast) -> ForecastView:
    time, disk = forecast.time, forecast.disk
    return ForecastView(
        **time.model_dump(include={"seconds", "low_s", "high_s", "steps_s", "basis", "correction"}),
        why=time.why.text(),
        corrected=time.corrected.text() if time.corrected else None,
        device_kind=forecast.device_kind,
        devices=forecast.num_devices,
        device_hours=forecast.device_hours(time.seconds),
        cost=forecast.cost(time.seconds),
        currency=forecast.currency,
        disk=disk and _disk_view(disk, forecast.disk_free_bytes),
        position=forecast.place.position,
        host=forecast.place.host,
        place=forecast.place.why.text(),
        memory_ratio=forecast.memory_ratio,
        memory=forecast.memory_seen.text() if forecast.memory_seen else None,
    )


def _disk_view(disk: DiskPlan, free: int | None) -> DiskView:
    return DiskView(
        **disk.model_dump(),
        kept_bytes=disk.kept_bytes,
        total_bytes=disk.total_bytes,
        free_bytes=free,
        fits=None if free is None else disk.total_bytes <= free,
    )
