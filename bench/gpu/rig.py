"""What the GPU benches share: the GPU, or one line that there is none; long conversations; runs of a few steps.

Every bench here drives the whole trainer on a job directory, as bench/throughput.py does on a CPU, and reads what it
took off its events. `--device cpu` (not in the help: it measures nothing) runs the same code on a tiny model, so that
a change can be tried where there is no GPU.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.measure import ONE_THREAD, SCRATCH, median
from bench.models import demo_model, find_model
from bench.training import Run, Talk, Task, read_talks, write_messages

WARM_UP_STEPS = 3  # allocator, kernels chosen and loaded
REHEARSAL_SHAPE = "wide"


@dataclass(frozen=True)
class Rig:
    device: str  # cuda | cpu
    folder: Path
    steps: int

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    def model(self, name: str) -> Path:
        return demo_model() if self.is_rehearsal else find_model(name, self.device)

    def length(self, tokens: int) -> int:
        """So many tokens, or few enough for a rehearsal."""
        return min(tokens, 256) if self.is_rehearsal else tokens

    def task(self, model: str, talks: Sequence[Talk], max_length: int, **values: object) -> Task:
        """Of `steps` steps after the warm-up; every run reads the same file."""
        data = self.folder / f"talks-{len(list(self.folder.glob('talks-*')))}.jsonl"
        write_messages(talks, data)
        return replace(
            Task(
                model=self.model(model),
                data=data,
                max_length=self.length(max_length),
                samples_per_step=4 if self.is_rehearsal else 32,
                max_steps=WARM_UP_STEPS + self.steps,
                device="cpu" if self.is_rehearsal else "gpu",
                dtype="fp32" if self.is_rehearsal else "bf16",
                gradient_checkpointing=not self.is_rehearsal,
            ),
            **values,  # type: ignore[arg-type]  # fields of Task
        )


def run_bench(
    document: str | None,
    measure: Callable[[Rig, argparse.Namespace], None],
    arguments: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Parses, refuses where there is no GPU, says what it runs on, measures, and leaves nothing behind."""
    import os

    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps measured, after the warm-up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args(arguments)
    print(_refuse_or_describe(options.device))
    if options.device == "cpu":
        os.environ.update(ONE_THREAD, CUDA_VISIBLE_DEVICES="")
    SCRATCH.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir=SCRATCH))
    try:
        measure(Rig(options.device, folder, options.steps), options)
    finally:
        shutil.rmtree(folder)


def _refuse_or_describe(device: str) -> str:
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cpu":
        return f"rehearsal on a CPU: these figures say nothing; {versions}\n"
    if not torch.cuda.is_available():
        sys.exit("this bench needs an NVIDIA GPU that torch can use; torch.cuda.is_available() says there is none here")
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {versions}\n"


def long_talks(rig: Rig, count: int, max_length: int, data: Path | None = None, seed: int = 0) -> list[Talk]:
    """`count` conversations in the shape of chat logs, none above `max_length` tokens: those of a file, or our own
    dialogues joined until they reach a drawn length (log-normal, median a sixth of the limit)."""
    limit = rig.length(max_length)
    talks = [talk for talk in read_talks(data, demo_model(), limit).kept if talk.length <= limit]
    draw = random.Random(seed)
    if data is not None:
        return [talks[number % len(talks)] for number in range(count)]
    # Turns of ChatML stand one after the other, so lengths add up; a system prompt may only stand at the beginning.
    further = [talk for talk in talks if talk.messages[0]["role"] != "system"]
    joined = []
    for _ in range(count):
        wanted = min(limit, max(32, draw.lognormvariate(0.0, 0.9) * limit / 6))
        whole = draw.choice(talks)
        while whole.length < wanted:
            more = draw.choice(further)
            if whole.length + more.length > limit:
                break
            messages = (*whole.messages, *more.messages)
            whole = Talk(messages, whole.length + more.length, whole.trained + more.trained)
        joined.append(whole)
    return joined


def step_seconds(run: Run) -> float:
    """The median of the steps behind the warm-up."""
    return median(run.step_s[WARM_UP_STEPS:])


def tokens_a_second(run: Run) -> float:
    measured = range(WARM_UP_STEPS, len(run.step_s))
    return sum(run.step_tokens[number] for number in measured) / sum(run.step_s[number] for number in measured)
