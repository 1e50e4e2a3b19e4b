"""How much of a GPU's arithmetic a fine-tune uses: `python -m bench.gpu.mfu [--shapes llama-1b,llama-8b]`.

Random weights in real shapes, LoRA and QLoRA, packed rows of several lengths. The operations counted are those that
learning takes (core.flops): pads, recomputed activations and quantisation are time that earns nothing. So a run that
recomputes its activations cannot reach more than about three quarters.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu.rig import WARM_UP_STEPS, Rig, long_talks, run_bench, step_seconds, tokens_a_second
from bench.measure import ChildFailed, mebibytes, print_table
from bench.models import demo_model
from bench.training import ADAPTER, Talk, planned_order, prepare_ours, run_ours
from core.architecture import Architecture
from core.flops import step_flops
from core.memory import count_adapter_parameters
from core.spec import Lora
from worker.engine.models import profile_model

# Dense bf16 with fp32 sums, by the makers' data sheets, in FLOP/s; a part of the name as the driver gives it.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
REHEARSAL_PEAK = 1e11
LENGTHS = (2048, 8192)  # tokens of a row
METHODS = ("lora", "qlora")


def peak_flops(rig: Rig, given_tflops: float | None) -> float:
    if given_tflops is not None:
        return given_tflops * 1e12
    if rig.is_rehearsal:
        return REHEARSAL_PEAK
    import torch

    name = torch.cuda.get_device_name(0)
    for part, peak in PEAKS.items():
        if part in name:
            return peak
    raise SystemExit(f"no peak is known here for {name}; give its dense bf16 figure as --peak-tflops")


def measure(rig: Rig, options: argparse.Namespace) -> None:
    peak = peak_flops(rig, options.peak_tflops)
    print_table(
        ("model", "method", "row", "samples a step", "step s", "tokens / s", "TFLOP/s", "MFU", "peak MiB"),
        (row for shape in options.shapes.split(",") for row in rows_of(rig, shape, peak)),
    )


def rows_of(rig: Rig, shape_name: str, peak: float) -> Iterator[Sequence[str]]:
    for method in METHODS[:1] if rig.is_rehearsal else METHODS:
        for row_length in LENGTHS[:1] if rig.is_rehearsal else LENGTHS:
            samples_per_step = 4 if rig.is_rehearsal else 32
            talks = long_talks(rig, samples_per_step * (rig.steps + WARM_UP_STEPS), row_length)
            task = rig.task(shape_name, talks, row_length, method=method, samples_per_step=samples_per_step)
            folder = rig.folder / f"{shape_name}-{method}-{row_length}"
            try:
                run = run_ours(task, folder)
            except ChildFailed as problem:
                yield [shape_name, method, f"{row_length:,}", f"failed: {str(problem).splitlines()[-1]}", *[""] * 5]
                continue
            flops = _flops_a_second(run.step_s, task.model, talks, planned_order(prepare_ours(task, folder / "plan")))
            yield [
                shape_name if not rig.is_rehearsal else demo_model().name,
                method,
                f"{task.max_length:,}",
                f"{task.samples_per_step}",
                f"{step_seconds(run):.3f}",
                f"{tokens_a_second(run):,.0f}",
                f"{flops / 1e12:.1f}",
                f"{flops / peak:.1%}",
                mebibytes(run.gpu_allocated_bytes),
            ]


def _flops_a_second(
    step_s: Sequence[float], model: Path, talks: Sequence[Talk], order: Sequence[Sequence[int]]
) -> float:
    """Over the steps behind the warm-up."""
    shape = profile_model(model, model.name).shape
    assert isinstance(shape, Architecture) and not shape.missing
    adapters = count_adapter_parameters(shape, Lora(**ADAPTER))
    total = 0
    for step in order[WARM_UP_STEPS:]:
        samples = [talks[row] for row in step]
        flops = step_flops(
            shape,
            [sample.length for sample in samples],
            sum(sample.trained for sample in samples),
            num_adapter_parameters=adapters,
        )
        assert flops is not None
        total += flops
    return total / sum(step_s[WARM_UP_STEPS:])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="llama-1b,llama-8b")
    parser.add_argument("--peak-tflops", type=float, help="of this GPU, dense bf16; known for the usual ones")


if __name__ == "__main__":
    run_bench(__doc__, measure, None, add_options)
