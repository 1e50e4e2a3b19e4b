import pytest

from core.peaks import peak_flops
from core.wire import Device


def gpu(name: str) -> Device:
    return Device(id="gpu0", kind="gpu", name=name, memory_bytes=1)


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla T4", "fp32", 8.1),
    ],
)
def test_a_peak_is_found_by_the_name_that_torch_reports(name: str, dtype: str, tera: float) -> None:
    assert peak_flops(gpu(name), dtype) == tera * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 9999", "fp32"),
    ],
)
def test_what_is_not_in_the_table_has_no_peak(name: str, dtype: str) -> None:
    assert peak_flops(gpu(name), dtype) is None


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(Device(id="cpu0", kind="cpu", name="CPU", memory_bytes=1), "fp32") is None
