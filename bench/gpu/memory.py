"""The memory plan beside what torch held on a GPU: `python -m bench.gpu.memory [--shapes llama-1b,llama-8b]`.

Reserved is what torch took from the driver, at most; allocated what tensors held of it. The plan (core.memory) counts
the CUDA context and libraries too, which torch does not: its term `process` is left out of the comparison. Each case is
a process of its own that makes a few steps, of rows filled to their length.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.gpu.rig import Rig, long_talks, run_bench
from bench.measure import ChildFailed, mebibytes, print_table
from bench.training import Task, run_ours
from core.memory import Load, MemoryPlan, estimate_memory
from core.spec import parse_spec
from worker.engine.models import profile_model

STEPS = 2  # the second has the moments that the first made


@dataclass(frozen=True)
class Case:
    method: Literal["lora", "qlora", "full"]
    row_length: int  # tokens
    recomputes: bool


CASES = (
    Case("lora", 2048, recomputes=False),
    Case("lora", 2048, recomputes=True),
    Case("lora", 8192, recomputes=True),
    Case("qlora", 2048, recomputes=True),
    Case("full", 2048, recomputes=True),
)


def measure(rig: Rig, options: argparse.Namespace) -> None:
    columns = (
        "model",
        "method",
        "row",
        "recomputed",
        "planned MiB",
        "allocated MiB",
        "reserved MiB",
        "reserved / plan",
    )
    print_table(columns, (row for shape in options.shapes.split(",") for row in rows_of(rig, shape)))


def rows_of(rig: Rig, shape: str) -> Iterator[list[str]]:
    for number, case in enumerate(CASES[:2] if rig.is_rehearsal else CASES):
        talks = long_talks(rig, 4 * STEPS, case.row_length)
        task = rig.task(
            shape,
            talks,
            case.row_length,
            method=case.method,
            samples_per_step=4,
            max_steps=STEPS,
            gradient_checkpointing=case.recomputes,
        )
        plan = plan_of(task, max(talk.length for talk in talks))
        planned = plan.total - plan.terms.get("process", 0)
        first = [shape, case.method, f"{task.max_length:,}", "yes" if case.recomputes else "no", mebibytes(planned)]
        try:
            run = run_ours(task, rig.folder / f"{shape}-{number}")
        except ChildFailed as problem:
            yield [*first, f"failed: {str(problem).splitlines()[-1]}", "", ""]
            continue
        ratio = f"{run.gpu_reserved_bytes / planned:.2f}"
        yield [*first, mebibytes(run.gpu_allocated_bytes), mebibytes(run.gpu_reserved_bytes), ratio]


def plan_of(task: Task, longest_sample: int) -> MemoryPlan:
    spec = parse_spec(task.spec())
    shape = profile_model(task.model, task.model.name).shape
    assert shape is not None and not shape.missing
    return estimate_memory(
        Load(
            shape=shape,
            method=spec.method,
            dtype="fp32" if task.dtype == "fp32" else "bf16",
            attention="flash",
            optimizer=spec.optimizer.name,
            gradient_checkpointing=task.gradient_checkpointing,
            num_ranks=1,
            zero_stage=0,
            offload="none",
            tokens=task.max_length,
            longest_row=task.max_length,
            longest_sample=longest_sample,
            on_gpu=task.device != "cpu",
        )
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="llama-1b,llama-8b")


if __name__ == "__main__":
    run_bench(__doc__, measure, None, add_options)
