"""What devices can compute at most, for shares of it and for guesses of a job's time.

Peaks are the vendor's dense figures at boost clock, without sparsity (NVIDIA's data sheets and architecture white
papers; their bf16 and fp16 are alike on tensor cores of these generations). fp32 is what plain cores do: TF32 is off
here. A GPU that the table lacks, a slice of one (MIG) and a CPU have no figure.
"""

from core.wire import Device

# 10^12 FLOP/s: bf16 and fp16, fp32. By a part of the name that torch reports, the longest first.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 75),
    "GH200": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 NVL": (835, 60),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165, 10.3),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "RTX A6000": (155, 38.7),
    # GeForce: with fp32 accumulation, at half the rate of fp16's.
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
# No bf16 there.
FP16_PEAKS: dict[str, tuple[float, float]] = {"V100": (125, 15.7), "T4": (65, 8.1)}


def peak_flops(device: Device, dtype: str) -> float | None:
    """FLOP/s of one device in bf16, fp16 or fp32; None where it is not known."""
    if device.kind != "gpu" or "MIG" in device.name:
        return None
    known = PEAKS if dtype == "bf16" else PEAKS | FP16_PEAKS
    words = f" {device.name.replace('-', ' ')} "
    found = max((name for name in known if f" {name} " in words), key=len, default=None)
    if found is None:
        return None
    half, single = known[found]
    return 1e12 * (single if dtype == "fp32" else half)
