"""One run of our trainer as a person gets it, with the CPU clock read at its events: `python -m bench.ours JOB_DIR`.

It calls the `main` that `python -m worker.engine.train JOB_DIR` calls. Its events say what happened at which second of
the wall clock; here each also gets the process's CPU time and memory, in JOB_DIR/clock.jsonl.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Loop:
    """The training steps of a run, without what comes before and after them."""

    cpu_s: float
    wall_s: float
    rss_before_bytes: int  # resident when the model stood ready, before the first forward pass with a gradient
    gpu_allocated_bytes: int  # by torch, at most in the whole run; 0 on a CPU
    gpu_reserved_bytes: int


def main(job_dir: Path) -> int:
    import torch

    from core.events import BaseEvent
    from worker.engine import train
    from worker.engine.emit import Emitter

    process = psutil.Process()
    real = Emitter.emit
    with (job_dir / "clock.jsonl").open("w") as clock:

        def emit(self: Emitter, kind: type[BaseEvent], **fields: Any) -> None:
            real(self, kind, **fields)
            moment = {
                "kind": kind.model_fields["kind"].default,
                "name": fields.get("name"),
                "cpu_s": time.process_time(),
                "wall_s": time.perf_counter(),
                "rss_bytes": process.memory_info().rss,
            }
            clock.write(json.dumps(moment) + "\n")

        Emitter.emit = emit  # type: ignore[method-assign]
        code = train.main(job_dir)
        has_gpu = torch.cuda.is_available()
        held = {
            "kind": "exit",
            "name": None,
            "gpu_allocated_bytes": torch.cuda.max_memory_allocated() if has_gpu else 0,
            "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if has_gpu else 0,
        }
        clock.write(json.dumps(held) + "\n")
        return code


def read_loop(job_dir: Path) -> Loop:
    moments = [json.loads(line) for line in (job_dir / "clock.jsonl").read_text().splitlines()]
    begin = next(moment for moment in moments if moment["name"] == "train")
    end = next(moment for moment in reversed(moments) if moment["kind"] == "step")
    ready = next(moment for moment in moments if moment["name"] == "longest_batch")
    held = moments[-1]
    return Loop(
        cpu_s=end["cpu_s"] - begin["cpu_s"],
        wall_s=end["wall_s"] - begin["wall_s"],
        rss_before_bytes=ready["rss_bytes"],
        gpu_allocated_bytes=held["gpu_allocated_bytes"],
        gpu_reserved_bytes=held["gpu_reserved_bytes"],
    )


def read_steps(job_dir: Path) -> list[dict[str, Any]]:
    """The step events, in their order."""
    found = [json.loads(line) for line in (job_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == "step"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
