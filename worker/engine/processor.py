"""The processor as a host offers it: in slots, each for one job."""

import platform
from pathlib import Path

import psutil

from core.wire import Device


def cpu_slot(name: str, num_slots: int) -> Device:
    """As the host reports it, so that what a job chooses by its memory is what the form showed: what each slot has if
    all are busy."""
    memory_bytes = psutil.virtual_memory().total // num_slots
    return Device(id=name, kind="cpu", name=_processor_name(), memory_bytes=memory_bytes)


def _processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
