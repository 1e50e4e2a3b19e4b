"""`python -m worker.engine.inventory --model-root R ... [--cpu-slots N] [--gpus all|none|0,1] [--hash-cache FILE]`

Prints what this host offers, as one line of JSON: the fields of `core.wire.HostReport` that need torch or a look at the
models. The host agent, which must not import torch, runs it as a child; `pegbox doctor` may, too.

A GPU counts when torch has run something on it. One that the driver lists and torch can't use is refused aloud with
the reason and the remedy, and the host is not quietly taken for one without GPUs: then it offers CPU slots only where
they were asked for. On a GPU that is left out by --gpus nothing is tried.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from pydantic import BaseModel, ConfigDict

from core.profile import ModelProfile
from core.wire import Device
from worker.engine.demo_model import ensure_demo_model
from worker.engine.libraries import versions
from worker.engine.models import HashCache, find_models
from worker.engine.processor import cpu_slot
from worker.processes import MARK

HUB_PATIENCE_S = 3.0
DEFAULT_HUB = "https://huggingface.co"
# With more than this in use somebody computes on a GPU; a desktop's few hundred MB don't count. Memory tells, since in
# a container the driver doesn't list other people's processes.
BUSY_BYTES = 1 << 30


class Inventory(BaseModel):
    """A part of `core.wire.HostReport`; the agent adds who the host is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: tuple[Device, ...]
    refused_devices: dict[str, str]
    models: tuple[ModelProfile, ...]
    refused_models: dict[str, str]
    versions: dict[str, str]
    num_cpus: int
    memory_bytes: int
    reaches_hub: bool
    has_compiler: bool


@dataclass(frozen=True)
class ListedGpu:
    """A GPU as the driver knows it, whatever torch makes of it."""

    index: int
    name: str
    memory_bytes: int
    used_bytes: int


def take_inventory(
    model_roots: Sequence[Path], *, gpus: str = "all", cpu_slots: int | None = None, hash_cache: Path | None = None
) -> Inventory:
    """`gpus`: all, none, or indices as 0,1. `cpu_slots`: None gives one where the driver lists no GPU."""
    ensure_demo_model(model_roots[0])
    devices, refused = gpu_devices(gpus)
    if cpu_slots is None:
        cpu_slots = 0 if devices or refused else 1
    cache = HashCache.load(hash_cache) if hash_cache else HashCache()
    found = find_models(model_roots, cache)
    return Inventory(
        devices=(*devices, *cpu_devices(cpu_slots)),
        refused_devices=refused,
        models=found.models,
        refused_models=found.refused,
        versions=versions(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        reaches_hub=reaches_hub(),
        has_compiler=has_compiler(),
    )


# -- devices -------------------------------------------------------------------------------------------------------
def cpu_devices(slots: int) -> tuple[Device, ...]:
    """The processor as slots for one job each."""
    return tuple(cpu_slot(f"cpu{slot}", slots) for slot in range(slots))


def gpu_devices(wanted: str) -> tuple[tuple[Device, ...], dict[str, str]]:
    """The GPUs that torch can use, and why it can't use the others that the driver lists."""
    if wanted == "none":
        return (), {}
    # The driver counts along the bus, CUDA the fastest first unless it is told.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    listed = list_gpus()
    if wanted != "all":
        indices = {int(index) for index in wanted.split(",")}
        missing = indices - {gpu.index for gpu in listed}
        refused = {f"gpu{index}": "the driver lists no such GPU; see nvidia-smi -L" for index in sorted(missing)}
        listed = [gpu for gpu in listed if gpu.index in indices]
    else:
        refused = {}
    devices = []
    for gpu in listed:
        problem = why_unusable(gpu.index)
        if problem is not None:
            refused[f"gpu{gpu.index}"] = problem
        else:
            devices.append(_device(gpu))
    return tuple(devices), refused


def list_gpus() -> list[ListedGpu]:
    """All that the driver lists; none on a host without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_listed(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _listed(index: int) -> ListedGpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return ListedGpu(index, _text(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.used)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def why_unusable(index: int) -> str | None:
    """None if torch computes on this GPU; else a sentence with the remedy."""
    import torch

    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is built for CPUs only; install the CUDA build of torch, "
            "or start the worker with --gpus none"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        number = _torch_index(index)
        if number is None:
            return "CUDA_VISIBLE_DEVICES hides it; take it out of there, or leave it out of --gpus"
        one = torch.ones(8, device=f"cuda:{number}")
        if float((one + one).sum()) != 16.0:
            return "it computed 1 + 1 wrongly; have it checked, and leave it out of --gpus"
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().split("\n")[0]
        return (
            f"torch {torch.__version__} cannot use it: {problem}; install a driver for CUDA {torch.version.cuda} or "
            "newer, or a torch that is built for this driver and GPU"
        )
    return None


def _torch_index(index: int) -> int | None:
    """The driver's number as torch counts: among those that CUDA_VISIBLE_DEVICES shows."""
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return index if index < torch.cuda.device_count() else None
    names = [name.strip() for name in shown.split(",") if name.strip()]
    return names.index(str(index)) if str(index) in names else None


def _device(gpu: ListedGpu) -> Device:
    import torch

    number = _torch_index(gpu.index)
    assert number is not None
    capability = torch.cuda.get_device_capability(number)
    return Device(
        id=f"gpu{gpu.index}",
        kind="gpu",
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        has_bf16=capability >= (8, 0),  # earlier ones emulate it, slower than fp32
        in_use_by_stranger=gpu.used_bytes > BUSY_BYTES and gpu.index not in gpus_of_our_jobs(),
    )


def gpus_of_our_jobs() -> set[int]:
    """GPUs that running attempts were given, as their processes' environments say: after a restart of the worker
    their trainers still run."""
    indices: set[int] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if MARK in environment:
                shown = environment.get("CUDA_VISIBLE_DEVICES", "")
                indices |= {int(index) for index in shown.split(",") if index.isdigit()}
    return indices


def reaches_hub() -> bool:
    """Whether a model could be fetched from here; never tried under HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False

    hub = os.environ.get("HF_ENDPOINT") or DEFAULT_HUB
    if urlsplit(hub).scheme not in ("http", "https"):
        return False
    try:
        # urllib honours the proxies of the environment, as the download itself will.
        with urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=HUB_PATIENCE_S):  # noqa: S310
            return True
    except (OSError, ValueError):
        return False


def has_compiler() -> bool:
    """Whether DeepSpeed can have its CPU Adam: torch compiles it with c++ and ninja at its first use, unless it was
    built when DeepSpeed was installed."""
    package = importlib.util.find_spec("deepspeed")
    folders = package.submodule_search_locations if package else None
    if any(any(Path(folder).glob("ops/adam/cpu_adam_op*.so")) for folder in folders or ()):
        return True
    return all(shutil.which(tool) for tool in ("c++", "ninja"))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.engine.inventory", allow_abbrev=False)
    parser.add_argument("--model-root", type=Path, action="append", required=True)
    parser.add_argument("--cpu-slots", type=int)
    parser.add_argument("--gpus", default="all")
    parser.add_argument("--hash-cache", type=Path)
    given = parser.parse_args(arguments)
    inventory = take_inventory(
        given.model_root, gpus=given.gpus, cpu_slots=given.cpu_slots, hash_cache=given.hash_cache
    )
    print(inventory.model_dump_json())  # noqa: T201  the agent reads it


if __name__ == "__main__":
    main(sys.argv[1:])
