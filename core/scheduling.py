"""Which queued job gets which devices of which host, and why the others wait. A pure function: the dispatcher asks it
every second and after each change, inside the transaction that acts on its answer.

Jobs are looked at in one order: priority, then age, then id. A job runs on one host. What it asks for are ranks: on
GPUs each gets one of its own, on a CPU all of them run in one slot, a host's slots being equal shares of its CPUs. Of
the hosts that fit, one that already has the model comes first (a download costs more than a gap), then one with GPUs,
then the one on which the fewest devices stay free, so that large gaps are left for large jobs.

A job that has to wait does not hold up those behind it, with one exception, without which small jobs would
starve a big one for ever: it keeps the free devices of one host on which it would fit whole, the one where
it lacks the fewest. Jobs behind it don't get these. On that host what it lacks can only shrink, unless a job of
higher order comes. A host is kept for one job, a job keeps one host; the price is that these devices idle for
a while. Devices on all other hosts are used as ever.

Only what the server knows counts: ages are the server's clock, and a host offers what its last heartbeat said.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import Parameter, Reason, Translate


@dataclass(frozen=True)
class QueuedJob:
    """`may_fetch`: the model's name may be a hub's, so a host that reaches one will do. `host_pinned`: where its
    checkpoints are. `excluded_hosts`: where it failed to start, or which someone ruled out."""

    id: str
    priority: int
    queued_at: float  # seconds, the server's clock
    num_ranks: int
    model: str
    may_fetch: bool = False
    host_pinned: str | None = None
    needs: frozenset[str] = frozenset()  # features of a host, such as "gpu"
    excluded_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class HostOffer:
    """`accepts`: its last heartbeat is fresh and it is not being drained. `num_cpus`: so many ranks run there at most
    in a CPU slot; more would only take each other's time and memory."""

    id: str
    name: str
    device_kind: Literal["gpu", "cpu_slot"]
    all_devices: tuple[str, ...]
    free_devices: tuple[str, ...]
    models: frozenset[str]
    num_cpus: int = 1
    features: frozenset[str] = frozenset()
    reaches_hub: bool = False
    accepts: bool = True

    def __post_init__(self) -> None:
        assert set(self.free_devices) <= set(self.all_devices)
        assert len(set(self.all_devices)) == len(self.all_devices)

    def offers_model(self, job: QueuedJob) -> bool:
        return job.model in self.models or (job.may_fetch and self.reaches_hub)

    def devices_for(self, job: QueuedJob) -> int:
        return job.num_ranks if self.device_kind == "gpu" else 1

    @property
    def most_ranks(self) -> int:
        """Of one job."""
        if self.device_kind == "gpu" or not self.all_devices:
            return len(self.all_devices)
        return self.num_cpus


@dataclass(frozen=True)
class Assigned:
    job_id: str
    host_id: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Waiting:
    job_id: str
    position: int  # among those that wait, from 1
    reason: Reason

    def text(self, translate: Translate = str) -> str:
        return Reason("wait.position", {"position": self.position, "reason": self.reason.text(translate)}).text(
            translate
        )


Decision = Assigned | Waiting


def assign(queued: Sequence[QueuedJob], hosts: Sequence[HostOffer]) -> list[Decision]:
    """One decision a job, in the order of the queue, whatever the order of the arguments."""
    assert len({job.id for job in queued}) == len(queued) and len({host.id for host in hosts}) == len(hosts)
    hosts = sorted(hosts, key=lambda host: (host.name, host.id))
    free = {host.id: list(host.free_devices) for host in hosts}
    kept_for: dict[str, str] = {}  # host -> the waiting job that keeps its free devices
    decisions: list[Decision] = []
    position = 0
    for job in sorted(queued, key=lambda job: (-job.priority, job.queued_at, job.id)):
        able = _hosts_able_to_run(job, hosts)
        if isinstance(able, Reason):
            position += 1
            decisions.append(Waiting(job.id, position, able))
            continue
        fitting = [host for host in able if host.id not in kept_for and len(free[host.id]) >= host.devices_for(job)]
        if fitting:
            chosen = min(fitting, key=lambda host: _preference(job, host, len(free[host.id])))
            num_devices = chosen.devices_for(job)
            devices = tuple(free[chosen.id][:num_devices])
            del free[chosen.id][:num_devices]
            decisions.append(Assigned(job.id, chosen.id, devices))
            continue
        position += 1
        decisions.append(Waiting(job.id, position, _why_no_device(job, able, free, kept_for)))
        unkept = [host for host in able if host.id not in kept_for]
        if unkept:
            kept_for[min(unkept, key=lambda host: host.devices_for(job) - len(free[host.id])).id] = job.id
    return decisions


def likeliest(job: QueuedJob, hosts: Sequence[HostOffer]) -> list[HostOffer]:
    """Hosts that could ever run it, in the order in which `assign` would give it to them if nothing else waited: those
    where it would start now, then those that have to become free, the one that lacks the fewest devices first, then
    those that are silent or draining."""
    able = [
        host
        for host in sorted(hosts, key=lambda host: (host.name, host.id))
        if host.offers_model(job) and job.needs <= host.features and job.num_ranks <= host.most_ranks
    ]

    def order(host: HostOffer) -> tuple[bool, int, tuple[bool, bool, int]]:
        num_free = len(host.free_devices)
        lacks = max(0, host.devices_for(job) - num_free)
        return not host.accepts, lacks, _preference(job, host, num_free if not lacks else 0)

    return sorted(able, key=order)


def _preference(job: QueuedJob, host: HostOffer, num_free: int) -> tuple[bool, bool, int]:
    """The host for which this is the smallest is taken."""
    return job.model not in host.models, host.device_kind != "gpu", num_free


def _hosts_able_to_run(job: QueuedJob, hosts: Sequence[HostOffer]) -> list[HostOffer] | Reason:
    """Hosts that could run it once enough of their devices are free, or what ruled the last of them out."""
    if not hosts:
        return Reason("wait.no_host", {})
    if job.host_pinned is not None:
        return _pinned_host(job, hosts)
    rules: list[tuple[Callable[[HostOffer], bool], str, dict[str, Parameter]]] = [
        (lambda host: host.offers_model(job), "wait.no_model", {"model": job.model}),
        (lambda host: job.needs <= host.features, "wait.features", {"features": ", ".join(sorted(job.needs))}),
        (
            lambda host: job.num_ranks <= host.most_ranks,
            "wait.too_many_devices",
            {"num_devices": job.num_ranks},
        ),
        (lambda host: host.id not in job.excluded_hosts, "wait.excluded", {}),
        (lambda host: host.accepts, "wait.no_host_accepts", {}),
    ]
    able = list(hosts)
    for obeys, code, parameters in rules:
        obeying = [host for host in able if obeys(host)]
        if not obeying:
            largest = max(host.most_ranks for host in able)
            return Reason(code, {"hosts": _names(able), "largest": largest, **parameters})
        able = obeying
    return able


def _pinned_host(job: QueuedJob, hosts: Sequence[HostOffer]) -> list[HostOffer] | Reason:
    """The host with its checkpoints, which counts even if excluded: a person who wants another starts over there."""
    pinned = [host for host in hosts if host.id == job.host_pinned]
    if not pinned or not pinned[0].accepts:
        return Reason("wait.host_gone", {"host": _names(pinned) or str(job.host_pinned)})
    host = pinned[0]
    if host.offers_model(job) and job.needs <= host.features and job.num_ranks <= host.most_ranks:
        return pinned
    return Reason("wait.host_unfit", {"host": host.name, "model": job.model, "num_devices": job.num_ranks})


def _why_no_device(
    job: QueuedJob, able: Sequence[HostOffer], free: Mapping[str, Sequence[str]], kept_for: Mapping[str, str]
) -> Reason:
    kept = [host for host in able if len(free[host.id]) >= host.devices_for(job)]
    if kept:
        return Reason("wait.kept", {"ahead": kept_for[kept[0].id], "host": kept[0].name})
    total = sum(len(host.all_devices) for host in able)
    busy = total - sum(len(free[host.id]) for host in able)
    counts: dict[str, Parameter] = {"busy": busy, "total": total}
    if job.host_pinned is not None:
        return Reason("wait.host_full", {"host": able[0].name, **counts})
    num_devices = max(host.devices_for(job) for host in able)
    plural: dict[str, Parameter] = {} if num_devices == 1 else {"num_devices": num_devices}
    if len(able) > 1:
        return Reason("wait.devices" if plural else "wait.device", {"num_hosts": len(able), **plural, **counts})
    return Reason(f"wait.{able[0].device_kind}{'s' if plural else ''}", {"host": able[0].name, **plural, **counts})


def _names(hosts: Sequence[HostOffer]) -> str:
    return ", ".join(host.name for host in hosts)
