"""What the GPUs of this host are doing, by NVML; nothing on a host without one."""

from dataclasses import dataclass
from functools import cache
from types import ModuleType


@dataclass(frozen=True)
class GpuSample:
    index: int
    utilisation: float  # 0..1
    memory_used_bytes: int
    memory_total_bytes: int
    temperature_c: float


@cache
def _nvml() -> ModuleType | None:
    """None where there is no driver to ask: that is a host without GPUs, not a fault."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml  # type: ignore[no-any-return]  # pynvml has no types


def sample_gpus() -> tuple[GpuSample, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    samples = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            samples.append(
                GpuSample(
                    index=index,
                    utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                    memory_used_bytes=memory.used,
                    memory_total_bytes=memory.total,
                    temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                )
            )
        except nvml.NVMLError:  # one that fell off the bus must not hide the others
            continue
    return tuple(samples)
