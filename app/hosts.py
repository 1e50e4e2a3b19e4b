"""/api/v1/hosts: what each host reported, and how it is."""

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlmodel import Session, col, select

from app.problems import not_found
from app.services import AnyServices
from app.tables import Host, Job
from app.times import Time
from core.states import ON_A_HOST
from core.wire import HOST_FRESH_S, Device, DeviceLoad, HostBeat, HostReport

router = APIRouter(prefix="/api/v1/hosts", tags=["hosts"])


class DeviceView(Device):
    job: str | None  # that holds it
    load: DeviceLoad | None


class HostView(BaseModel):
    id: str
    name: str
    is_connected: bool  # heard of within 30 s
    is_draining: bool
    devices: list[DeviceView]
    refused_devices: dict[str, str]  # device -> why it can't be used
    models: list[str]
    versions: dict[str, str]
    num_cpus: int
    memory_bytes: int
    reaches_hub: bool
    cpu_utilisation: float | None
    memory_used_bytes: int | None
    disk_free_bytes: int | None
    registered_at: Time
    beat_at: Time


class HostList(BaseModel):
    data: list[HostView]
    next_cursor: None = None
    has_more: Literal[False] = False


@router.get("")
def list_hosts(services: AnyServices) -> HostList:
    with services.database.read() as session:
        hosts = session.exec(select(Host).order_by(col(Host.name), col(Host.id))).all()
        return HostList(data=[_view(session, host, services.clock()) for host in hosts])


@router.get("/{host_id}")
def get_host(host_id: str, services: AnyServices) -> HostView:
    with services.database.read() as session:
        host = session.get(Host, host_id)
        if host is None:
            raise not_found("host", host_id)
        return _view(session, host, services.clock())


def _view(session: Session, host: Host, now: float) -> HostView:
    report, beat = HostReport.model_validate(host.report), HostBeat.model_validate(host.beat or {})
    loads = {load.id: load for load in beat.load}
    on_a_host = [state.value for state in ON_A_HOST]
    jobs = session.exec(select(Job).where(Job.host == host.id, col(Job.state).in_(on_a_host)))
    holders = {device: job.id for job in jobs for device in job.devices or []}
    shared: dict[str, Any] = report.model_dump(
        include={"refused_devices", "versions", "num_cpus", "memory_bytes", "reaches_hub"}
    ) | beat.model_dump(include={"cpu_utilisation", "memory_used_bytes", "disk_free_bytes"})
    return HostView(
        id=host.id,
        name=host.name,
        is_connected=now - host.beat_at < HOST_FRESH_S,
        is_draining=host.is_draining,
        devices=[
            DeviceView(**device.model_dump(), job=holders.get(device.id), load=loads.get(device.id))
            for device in report.devices
        ],
        models=sorted(model.name for model in report.models),
        registered_at=host.registered_at,
        beat_at=host.beat_at,
        **shared,
    )
