"""Where a job would run: the hosts that could take it, the likeliest first; the devices to plan it for; or why no known
host ever can.

The order is core.scheduling's own, so what a page plans for is what the dispatcher would give. A host that is silent or
draining may come back: it is waited for, and that is said. What is refused is what no host with the model can ever do,
whatever becomes free.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from core.errors import Parameter, Reason, UserError, UserErrors
from core.fix import Fix, fixes_of
from core.needs import lacking, needs_of
from core.placement import standing_for_all
from core.scheduling import HostOffer, QueuedJob, likeliest
from core.spec import JobSpec
from core.verdict import Remark
from core.wire import Device


@dataclass(frozen=True)
class KnownHost:
    offer: HostOffer
    devices: Mapping[str, Device]  # those that it offers, by id
    silent_s: float  # since it was heard of
    is_fresh: bool  # it was heard of lately enough to be given work

    def device_for(self, num_ranks: int) -> Device:
        """What stands for the devices that a job would get: free ones where there are enough."""
        offer = self.offer
        count = num_ranks if offer.device_kind == "gpu" else 1
        ids = offer.free_devices if len(offer.free_devices) >= count else offer.all_devices
        return standing_for_all([self.devices[id] for id in ids[:count]])


@dataclass(frozen=True)
class DeviceChoice:
    """One of the unlike devices that a job may come to."""

    key: str  # as one asks for it: the device's name, or a host's where names don't tell devices apart
    device: Device
    hosts: tuple[str, ...]  # names, the likeliest first


@dataclass(frozen=True)
class Prospects:
    choices: tuple[DeviceChoice, ...]  # the likeliest first
    chosen: DeviceChoice
    why: Reason
    remarks: tuple[Remark, ...]

    @property
    def device(self) -> Device:
        return self.chosen.device

    def looking_at(self, asked: str) -> "Prospects":
        """With another device to plan for, by its key, its name or a host's. Raises UserError host.unknown_device."""
        likeliest = self.choices[0]
        for is_meant in (
            lambda choice: asked == choice.key,
            lambda choice: asked in choice.hosts,
            lambda choice: asked == choice.device.name,
        ):
            chosen = next(filter(is_meant, self.choices), None)
            if chosen is likeliest:
                return self
            if chosen is not None:
                told: dict[str, Parameter] = {"host": likeliest.hosts[0], "device": likeliest.device.name}
                return replace(self, chosen=chosen, why=Reason("host.looked_at", told))
        known = ", ".join(choice.key for choice in self.choices)
        raise UserError("host.unknown_device", "device", name=asked, known=known)


def prospects_of(spec: JobSpec, hosts: Sequence[KnownHost], first: str | None) -> Prospects:
    """`hosts` are all that there are. `first` is the id of the one to which the dispatcher would give the job now, if
    any. Raises UserErrors for what no host can do."""
    job = queued(spec, 0.0)
    offers = [host.offer for host in hosts]
    ranked = sorted(likeliest(job, offers), key=lambda offer: offer.id != first)
    if not ranked:
        raise UserErrors(list(_faults(spec, [offer for offer in offers if offer.offers_model(job)])))
    by_id = {host.offer.id: host for host in hosts}
    able = [by_id[offer.id] for offer in ranked]
    choices = _choices(able, job.num_ranks)
    return Prospects(choices, choices[0], _why(job, ranked[0], choices), tuple(_remarks(spec, job, hosts, able)))


def queued(spec: JobSpec, now: float) -> QueuedJob:
    """The job as it would stand in the queue; it has no id yet, so this one sorts behind all."""
    return QueuedJob(
        id="~",
        priority=spec.priority,
        queued_at=now,
        num_ranks=spec.parallel.devices,
        model=spec.model.base,
        needs=frozenset(need.feature for need in needs_of(spec)),
    )


# -- what no host can do ---------------------------------------------------------------------------------------------


def _faults(spec: JobSpec, hosts: Sequence[HostOffer]) -> Iterator[UserError]:
    """`hosts` have the model. What none of them has is told for each; if each thing is somewhere, that nothing has all
    of it."""
    hosts = [host for host in hosts if host.all_devices]
    if not hosts:
        yield UserError("profile.no_device", "model.base", name=spec.model.base)
        return
    found = [*_lacking_everywhere(spec, hosts), *_too_few(spec, hosts)]
    yield from found
    if not found:
        offered = ", ".join(f"{host.name} ({', '.join(_has(host))})" for host in hosts)
        asked = [*dict.fromkeys(need.feature for need in needs_of(spec)), f"parallel.devices {spec.parallel.devices}"]
        yield UserError("host.together", "parallel.devices", asked=", ".join(asked), hosts=offered)


def _lacking_everywhere(spec: JobSpec, hosts: Sequence[HostOffer]) -> Iterator[UserError]:
    names = ", ".join(host.name for host in hosts)
    absent = [need for need in needs_of(spec) if not any(need.feature in host.features for host in hosts)]
    # What has to run on a GPU is told once, not with what it would need there.
    without_gpu = {need.field for need in absent if need.feature == "gpu"}
    for need in absent:
        if need.feature == "gpu" or need.field not in without_gpu:
            yield lacking(need, names)


def _too_few(spec: JobSpec, hosts: Sequence[HostOffer]) -> Iterator[UserError]:
    devices, largest = spec.parallel.devices, max(hosts, key=lambda host: host.most_ranks)
    if devices > largest.most_ranks:
        counts = ", ".join(f"{host.name}: {host.most_ranks}" for host in hosts)
        code = "host.too_few_gpus" if largest.device_kind == "gpu" else "host.too_few_cpus"
        yield UserError(code, "parallel.devices", devices=devices, most=largest.most_ranks, hosts=counts)


def _has(host: HostOffer) -> Iterator[str]:
    yield from sorted(host.features - {"gpu"})
    yield f"{host.most_ranks} {'GPU' if host.device_kind == 'gpu' else 'CPU'}"


# -- which device ----------------------------------------------------------------------------------------------------


def _choices(hosts: Sequence[KnownHost], num_ranks: int) -> tuple[DeviceChoice, ...]:
    unlike: dict[tuple[object, ...], list[tuple[Device, str]]] = {}
    for host in hosts:
        device = host.device_for(num_ranks)
        facts = (device.kind, device.name, device.memory_bytes, device.has_bf16)
        unlike.setdefault(facts, []).append((device, host.offer.name))
    names = [found[0][0].name for found in unlike.values()]
    return tuple(
        DeviceChoice(
            key=device.name if names.count(device.name) == 1 else found[0][1],
            device=device,
            hosts=tuple(host for _, host in found),
        )
        for found in unlike.values()
        for device in (found[0][0],)
    )


def _why(job: QueuedJob, likely: HostOffer, choices: Sequence[DeviceChoice]) -> Reason:
    if len(choices) == 1:
        return Reason("host.all_alike", {})
    return Reason("host.starts" if _starts(job, likely) else "host.likeliest", {"host": likely.name})


# -- what should be known --------------------------------------------------------------------------------------------


def _remarks(spec: JobSpec, job: QueuedJob, hosts: Sequence[KnownHost], able: Sequence[KnownHost]) -> Iterator[Remark]:
    if not any(host.offer.accepts for host in able):
        yield Remark("warning", "model.base", _absence(able))
        return
    if any(_starts(job, host.offer) for host in able):
        return
    unable = [host.offer for host in hosts if host not in able and host.offer.offers_model(job)]
    eager = next((offer for offer in unable if offer.accepts and offer.free_devices), None)
    if eager is None:
        return
    missing = [need for need in needs_of(spec) if need.feature not in eager.features]
    lacks: list[str] = [*dict.fromkeys(need.feature for need in missing)]
    fixes: list[Fix] = [fix for need in missing[:1] for fix in fixes_of(lacking(need, eager.name))]
    if job.num_ranks > eager.most_ranks:
        lacks.append(f"parallel.devices {job.num_ranks} ({eager.most_ranks})")
        fixes = [] if missing else [{"parallel.devices": eager.most_ranks}]
    said: dict[str, Parameter] = {
        "host": eager.name,
        "lacks": ", ".join(lacks),
        "hosts": ", ".join(host.offer.name for host in able),
    }
    field = missing[0].field if missing else "parallel.devices"
    yield Remark("warning", field, Reason("verdict.host_lacks", said), tuple(fixes) if len(lacks) == 1 else ())


def _starts(job: QueuedJob, offer: HostOffer) -> bool:
    return offer.accepts and len(offer.free_devices) >= offer.devices_for(job)


def _absence(able: Sequence[KnownHost]) -> Reason:
    """None of them takes work now."""
    if len(able) > 1:
        return Reason("verdict.hosts_absent", {"hosts": ", ".join(host.offer.name for host in able)})
    (host,) = able
    if host.is_fresh:
        return Reason("verdict.host_draining", {"host": host.offer.name})
    minutes = max(1, round(host.silent_s / 60))
    return Reason("verdict.host_silent", {"host": host.offer.name, "minutes": minutes})
