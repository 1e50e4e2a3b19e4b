import pytest

from core.architecture import ParametersByKind
from core.layout import lay_out
from core.packing import PlanSettings, Segment, Step
from core.preflight import StepWork
from core.wire import Device
from tests.engine import tiny
from worker.engine.utilisation import Utilisation, peak_flops


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


def test_utilisation_is_the_steps_flops_over_what_all_ranks_could_do() -> None:
    shape = tiny.SHAPE.model_copy(update={"parameters": ParametersByKind(mlp=1000)})
    segments = (Segment(0, 0, 10), Segment(1, 5, 10))
    layout = lay_out(Step(1, 0, 1, segments), PlanSettings("packed", 32, "samples", 2, 1))
    work = StepWork(1, 1.0, segments, {segments[0]: 9, segments[1]: 4}, layout)
    flops = 6 * (15 * 1000 + 13 * 8 * 10) + 12 * 8 * 2 * (55 + 15)
    assert Utilisation(shape, None, 1e6, 2).of(work, 0.5) == pytest.approx(flops / 1e6)
    assert Utilisation(None, None, 1e6, 2).of(work, 0.5) is None
    assert Utilisation(shape, None, None, 2).of(work, 0.5) is None
