"""Each packing mode on a GPU, the same steps in each: `python -m bench.gpu.packing [--model llama-1b] [--data FILE]`.

Losses are the same up to rounding; what differs is how many slots a step computes, and so its time and its memory.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.rig import Rig, long_talks, run_bench, step_seconds, tokens_a_second
from bench.measure import mebibytes, print_table
from bench.training import Run, run_ours


@dataclass(frozen=True)
class Layout:
    name: str
    mode: str
    micro_batch_size: int  # rows; samples where nothing is packed


# Eight samples a pass is what padding is usually run with; padding-free flattens the same eight.
LAYOUTS = (
    Layout("packed", "packed", 1),
    Layout("padding-free, 8 samples", "padding_free", 8),
    Layout("grouped by length, 8 samples", "grouped", 8),
    Layout("padded, 8 samples", "padded", 8),
)


def measure(rig: Rig, options: argparse.Namespace) -> None:
    max_length = options.max_length
    count = 4 if rig.is_rehearsal else 32
    talks = long_talks(rig, count * (rig.steps + 3), max_length, options.data)
    task = rig.task(options.model, talks, max_length)

    def runs() -> Sequence[tuple[Layout, Run]]:
        found = []
        for number, layout in enumerate(LAYOUTS):
            batch = {"samples_per_step": task.samples_per_step, "micro_batch_size": layout.micro_batch_size}
            run = run_ours(task, rig.folder / f"layout-{number}", packing={"mode": layout.mode}, batch=batch)
            found.append((layout, run))
        return found

    measured = runs()
    slowest = tokens_a_second(measured[-1][1])
    print_table(
        (
            "layout",
            "attention",
            "slots",
            "tokens / slots",
            "step s",
            "tokens / s",
            "of padded",
            "peak MiB",
            "last loss",
        ),
        (
            (
                layout.name,
                run.attention,
                f"{run.slots:,}",
                f"{sum(run.step_tokens) / run.slots:.1%}",
                f"{step_seconds(run):.3f}",
                f"{tokens_a_second(run):,.0f}",
                f"{tokens_a_second(run) / slowest:.2f}x",
                mebibytes(run.gpu_allocated_bytes),
                f"{run.losses[-1]:.5f}",
            )
            for layout, run in measured
        ),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-1b")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens")
    parser.add_argument("--data", type=Path)


if __name__ == "__main__":
    run_bench(__doc__, measure, None, add_options)
