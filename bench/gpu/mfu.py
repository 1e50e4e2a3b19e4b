"""How much of a GPU's arithmetic a fine-tune uses: `python -m bench.gpu.mfu [--shapes llama-1b,llama-8b]`.

Random weights in real shapes, LoRA and QLoRA, packed rows of two lengths. The figure is the trainer's own, of its step
events (core.flops over the peak of worker.engine.utilisation): the operations that learning takes, in relation to the
maker's figure for dense bf16. Pads, recomputed activations and unpacking 4 bits are time that earns nothing, so a run
that recomputes cannot reach more than about two thirds under LoRA.
"""

import argparse
from collections.abc import Iterator, Sequence

from bench import ours
from bench.gpu.rig import WARM_UP_STEPS, Rig, long_talks, run_bench, step_seconds, tokens_a_second
from bench.measure import ChildFailed, mebibytes, median, print_table
from bench.training import run_ours

LENGTHS = (2048, 8192)  # tokens of a row
METHODS = ("lora", "qlora")


def measure(rig: Rig, options: argparse.Namespace) -> None:
    print_table(
        ("model", "method", "row", "samples a step", "step s", "tokens / s", "MFU", "peak MiB"),
        (row for shape in options.shapes.split(",") for row in rows_of(rig, shape)),
    )


def rows_of(rig: Rig, shape: str) -> Iterator[Sequence[str]]:
    samples_per_step = 4 if rig.is_rehearsal else 32
    for method in METHODS[:1] if rig.is_rehearsal else METHODS:
        for row_length in LENGTHS[:1] if rig.is_rehearsal else LENGTHS:
            talks = long_talks(rig, samples_per_step * (rig.steps + WARM_UP_STEPS), row_length)
            task = rig.task(shape, talks, row_length, method=method, samples_per_step=samples_per_step)
            first = [shape, method, f"{task.max_length:,}", f"{task.samples_per_step}"]
            folder = rig.folder / f"{shape}-{method}-{row_length}"
            try:
                run = run_ours(task, folder)
            except ChildFailed as problem:
                yield [*first, f"failed: {str(problem).splitlines()[-1]}", "", "", ""]
                continue
            shares = [step["mfu"] for step in ours.read_steps(folder / "job")[WARM_UP_STEPS:]]
            mfu = "no peak is known of this device" if None in shares else f"{median(shares):.1%}"
            speed = [f"{step_seconds(run):.3f}", f"{tokens_a_second(run):,.0f}"]
            yield [*first, *speed, mfu, mebibytes(run.gpu_allocated_bytes)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="llama-1b,llama-8b")


if __name__ == "__main__":
    run_bench(__doc__, measure, None, add_options)
