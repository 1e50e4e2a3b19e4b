"""Hosts: what they offer, what they run, and what they refuse."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlmodel import Session, col, select

from app.history import read_history
from app.pages.environment import fragment
from app.pages.job_row import JobRow, read_rows
from app.services import AnyServices, Services
from app.tables import Host, Job
from core.past_run import Accuracy, PastRun, accuracy
from core.states import ON_A_HOST, JobState
from core.wire import HOST_FRESH_S, DeviceLoad, HostBeat, HostReport

LAST_JOBS = 20  # of a host, whose forecasts are looked back at

router = APIRouter(include_in_schema=False)


@router.get("/hosts")
def hosts_page(request: Request, services: AnyServices) -> Response:
    now = services.clock()
    with services.database.read() as session:
        running = read_rows(session, _jobs_on_hosts(session), now)
        queue = read_rows(session, _queue(session), now)
        on_host: dict[str, list[tuple[JobRow, tuple[str, ...]]]] = {}
        for job, row in zip(_jobs_on_hosts(session), running, strict=True):
            on_host.setdefault(job.host or "", []).append((row, tuple(job.devices or ())))
        history = read_history(session)
        hosts = [
            _host(host, on_host.get(host.id, []), now) | {"kept_to": kept_to(host.id, history)}
            for host in session.exec(select(Host).order_by(col(Host.name), col(Host.id)))
        ]
    devices = [device for host in hosts for device in host["devices"]]
    context = {
        "hosts": hosts,
        "queue": queue,
        "num_devices": len(devices),
        "num_busy": sum(device["job"] is not None or device["in_use_by_stranger"] for device in devices),
        "join_command": join_command(services),
    }
    if "hx-request" in request.headers:
        return fragment(services.templates, request, "hosts.html", "hosts", context)
    return services.templates.TemplateResponse(request, "hosts.html", context)


def join_command(services: Services) -> str:
    return f"pegbox worker --server {services.settings.url}{services.settings.root_path} --token TOKEN --gpus all"


def _jobs_on_hosts(session: Session) -> list[Job]:
    states = [state.value for state in ON_A_HOST]
    return list(session.exec(select(Job).where(col(Job.state).in_(states)).order_by(col(Job.id))))


def _queue(session: Session) -> list[Job]:
    order = (col(Job.priority).desc(), col(Job.queued_at), col(Job.id))
    return list(session.exec(select(Job).where(Job.state == JobState.QUEUED.value).order_by(*order).limit(100)))


def kept_to(host: str, history: Sequence[PastRun]) -> list[tuple[str, Accuracy]]:
    """How far forecasts of its last jobs were off, by what was forecast; nothing where none was."""
    own = [run for run in history if run.host == host]
    times = [ratio for run in own if (ratio := run.time_ratio) is not None]
    peaks = [run.memory_ratio for run in own if run.memory_ratio is not None]
    found = ((what, accuracy(ratios[:LAST_JOBS])) for what, ratios in (("time", times), ("memory", peaks)))
    return [(what, each) for what, each in found if each is not None]


def _host(host: Host, jobs: list[tuple[JobRow, tuple[str, ...]]], now: float) -> dict[str, Any]:
    report = HostReport.model_validate(host.report)
    beat = HostBeat.model_validate(host.beat) if host.beat else HostBeat()
    load_of = {load.id: load for load in beat.load}
    job_of = {device: row for row, devices in jobs for device in devices}
    age_s = max(0.0, now - host.beat_at)
    return {
        "id": host.id,
        "name": host.name,
        "is_fresh": age_s <= HOST_FRESH_S,
        "is_draining": host.is_draining,
        "age_s": age_s,
        "registered_at": host.registered_at,
        "devices": [
            {
                **device.model_dump(),
                **load_of.get(device.id, DeviceLoad(id=device.id)).model_dump(exclude={"id"}),
                "job": job_of.get(device.id),
            }
            for device in report.devices
        ],
        "refused_devices": sorted(report.refused_devices.items()),
        "models": sorted(report.models, key=lambda model: model.name),
        "versions": sorted(report.versions.items()),
        "num_cpus": report.num_cpus,
        "memory_bytes": report.memory_bytes,
        "cpu_utilisation": beat.cpu_utilisation,
        "memory_used_bytes": beat.memory_used_bytes,
        "disk_free_bytes": beat.disk_free_bytes,
    }
