"""What a trainer needs on this host: its model's folder, its data files, where it may resume, its devices.

Names are the server's, paths are ours: nothing that came over the network becomes a path without a check.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import wire
from core.errors import UserError
from core.spec import JobSpec
from worker.blobs import WrongBytes, fetch_blob
from worker.job_directory import InputFile, Inputs
from worker.server import Server, Unknown
from worker.settings import JOB_ID, WorkerSettings


def find_model(roots: Iterable[Path], name: str) -> Path:
    for root in roots:
        folder = (root / name).resolve()
        if folder.is_relative_to(root.resolve()) and (folder / "config.json").is_file():
            return folder
    raise UserError("worker.model_not_here", "model.base", model=name, roots=", ".join(map(str, roots)))


@dataclass(frozen=True)
class Downloads:
    """Files of the server's as this host's own, fetched where it doesn't have them yet."""

    settings: WorkerSettings
    server: Server
    is_unwanted: Callable[[], bool]
    on_progress: Callable[[int], None] = lambda num_bytes: None

    def data(self, file: wire.DataFile) -> InputFile:
        path = self._blob(
            file.sha256,
            gone=UserError("worker.data_gone", "data", dataset=file.dataset),
            damaged=UserError("worker.data_damaged", "data", dataset=file.dataset),
        )
        return InputFile(dataset=file.dataset, path=str(path), sha256=file.sha256)

    def adapter(self, folder: Path, job: str, files: Iterable[wire.AdapterFile]) -> Path:
        """Lays the adapter of `job` into `folder`: its files are links to this host's copies, under the names they
        need."""
        folder.mkdir(exist_ok=True)
        for file in files:
            path = self._blob(
                file.sha256,
                gone=UserError("worker.adapter_gone", "model.adapter", job=job),
                damaged=UserError("worker.adapter_damaged", "model.adapter", job=job),
            )
            os.link(path, folder / file.name)
        return folder

    def _blob(self, sha256: str, *, gone: UserError, damaged: UserError) -> Path:
        try:
            return fetch_blob(
                self.server,
                self.settings.blobs_dir,
                sha256,
                is_unwanted=self.is_unwanted,
                longest_back_off_s=self.settings.longest_back_off_s,
                on_progress=self.on_progress,
            )
        except Unknown as error:
            raise gone from error
        except WrongBytes as error:
            raise damaged from error


def gather_inputs(
    settings: WorkerSettings,
    server: Server,
    attempt: wire.AttemptRef,
    assignment: wire.Assignment,
    spec: JobSpec,
    *,
    is_unwanted: Callable[[], bool],
    on_progress: Callable[[int, int], None],
) -> Inputs:
    """Raises UserError for what this host or the server lacks; `on_progress` gets bytes done and in all."""
    model = find_model(settings.model_roots, spec.model.base)
    num_bytes = sum(file.bytes for file in assignment.data) + sum(file.bytes for file in assignment.adapter)
    num_fetched = 0

    def count(new_bytes: int) -> None:
        nonlocal num_fetched
        num_fetched += new_bytes
        on_progress(num_fetched, num_bytes)

    downloads = Downloads(settings, server, is_unwanted, count)
    data = tuple(map(downloads.data, assignment.data))
    adapter = ""
    if spec.model.adapter is not None:
        if len(assignment.adapter) < len(wire.ADAPTER_FILES):
            raise UserError("worker.adapter_gone", "model.adapter", job=spec.model.adapter)
        folder = settings.attempt_dir(attempt) / "adapter"
        adapter = str(downloads.adapter(folder, spec.model.adapter, assignment.adapter))
    return Inputs(
        model_path=str(model),
        model_name=spec.model.base,
        data=data,
        adapter_path=adapter,
        resume=tuple(map(str, _checkpoints(settings, attempt, assignment.resume_from))),
        devices=assignment.devices,
        cpu_slots=settings.num_devices or 1,
        ranks=spec.parallel.devices,
        cache_dir=str(settings.cache_dir),
        threads=threads_per_rank(settings.num_devices or 1, assignment.devices, spec.parallel.devices),
        trial=assignment.trial,
    )


def _checkpoints(settings: WorkerSettings, attempt: wire.AttemptRef, jobs: Iterable[str]) -> Iterator[Path]:
    """Finished checkpoints of the given jobs on this host, the newest attempt and step of each job first.

    The trainer takes the first that verifies."""
    this = settings.attempt_dir(attempt)
    for job in jobs:
        if not JOB_ID.fullmatch(job):
            raise ValueError(f"{job!r} is not a job id")
        attempts = (settings.worker_dir / "jobs" / job).glob("a*")
        for folder in sorted((each for each in attempts if each != this), key=_number, reverse=True):
            yield from sorted((folder / "checkpoints").glob("step-*"), key=_number, reverse=True)


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("step-").removeprefix("a")
    return int(digits) if digits.isdigit() else -1


def threads_per_rank(num_host_devices: int, devices: Sequence[str], num_ranks: int) -> int:
    """An equal share of this host's CPUs for each of its devices, so that full hosts are not slowed down by their
    threads; ranks that share a CPU slot share what falls to it."""
    share = len(os.sched_getaffinity(0)) // num_host_devices
    return max(1, share * len(devices) // num_ranks)


def device_environment(devices: Iterable[str]) -> dict[str, str]:
    """What confines a trainer to its devices: GPU numbers are those of the PCI bus, as NVML counts them."""
    gpus = ",".join(device.removeprefix("gpu") for device in devices if device.startswith("gpu"))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus}
