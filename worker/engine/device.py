"""The device that a job was given, as torch names it and as the plan wants to know it."""

import os

import torch

from core.errors import UserError
from core.wire import Device
from worker.engine.processor import cpu_slot


def find_device(name: str, place: int = 0, cpu_slots: int = 1) -> tuple[torch.device, Device]:
    """`name` as in inputs.json: cpu0, gpu3; `place` is where it stands in that list. With CUDA_VISIBLE_DEVICES set, the
    job's GPUs are the ones that are left, in the list's order. `cpu_slots` share the processor.

    Raises UserError engine.no_device where torch cannot use it; it never falls back to the CPU."""
    if not name.startswith("gpu"):
        return torch.device("cpu"), cpu_slot(name, cpu_slots)
    index = place if os.environ.get("CUDA_VISIBLE_DEVICES") else int(name.removeprefix("gpu"))
    try:
        properties = torch.cuda.get_device_properties(index)
        torch.zeros(1, device=torch.device("cuda", index))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        problem = str(error).split("\n")[0]
        raise UserError("engine.no_device", "parallel.devices", device=name, problem=problem) from error
    device = Device(
        id=name,
        kind="gpu",
        name=properties.name,
        memory_bytes=properties.total_memory,
        has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )
    torch.cuda.set_device(index)
    return torch.device("cuda", index), device
