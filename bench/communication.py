"""What ZeRO stages send, measured: `python -m bench.communication`.

    --short         fewer layouts, for `make bench`
    --model NAME    demo, a shape of bench.models, or a folder; `wide` by default

Two ranks on this CPU train a few steps in each layout, one after the other. Every collective of torch.distributed is
counted at this rank as the trainer counts it in each step's event: an all_reduce twice its payload, everything else its
full payload once. The table divides by what stage 0 sends in the same layout; a last column has its bytes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import ONE_THREAD, ROOT, print_table, test_bed
from bench.models import find_model

RANKS = 2
STEPS = 3  # of which the last is read: stage 3 learns in the first in which order weights are wanted
STAGES = (0, 1, 2, 3)
TEXTBOOK = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.5}
ROWS = 64


@dataclass(frozen=True)
class Layout:
    """`zero` overrides what core.zero says to DeepSpeed; `stages` are those that it concerns."""

    name: str
    passes: int = 1  # a rank and step
    method: dict[str, Any] = field(default_factory=lambda: {"type": "full"})
    checkpointing: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = STAGES


LORA = {"type": "lora", "rank": 16, "alpha": 32}
# A real model exceeds what stays gathered in any case, one small enough for a bench does not.
CUT = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
LAYOUTS = (
    Layout("full, 1 pass"),
    Layout("full, 1 pass, weights let go after each layer", zero=CUT, stages=(0, 3)),
    Layout("full, 2 passes", passes=2),
    Layout("full, 2 passes, weights let go", passes=2, zero=CUT, stages=(0, 3)),
    Layout("full, 4 passes", passes=4),
    Layout("full, 1 pass, weights let go, checkpointed", checkpointing=True, zero=CUT, stages=(0, 3)),
    Layout("LoRA, 1 pass", method=LORA),
    Layout("LoRA, 1 pass, weights let go", method=LORA, zero=CUT, stages=(0, 3)),
    Layout("full, 1 pass, DeepSpeed's own buckets", zero={"use_multi_rank_bucket_allreduce": True}, stages=(0, 1, 2)),
)
SHORT = ("full, 1 pass", "full, 1 pass, weights let go after each layer", "LoRA, 1 pass")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.communication", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wide")
    parser.add_argument("--short", action="store_true")
    asked = parser.parse_args()
    layouts = [layout for layout in LAYOUTS if not asked.short or layout.name in SHORT]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_rows(root / "rows.jsonl")
        orders = {"model": str(find_model(asked.model)), "layouts": [layout.name for layout in layouts]}
        (root / "orders.json").write_text(json.dumps(orders))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        ended = subprocess.run(
            [*command, "-m", "bench.communication", "--on-ranks", str(root)],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            logs = [log.read_text()[-2000:] for log in sorted(root.glob("rank-*.log"))]
            print("\n".join([ended.stderr[-1000:], *logs]), file=sys.stderr)
            return 1
        sent = json.loads((root / "sent.json").read_text())
    print(f"{test_bed()}; {asked.model}, {RANKS} gloo ranks, fp32; in units of what stage 0 sends\n")
    columns = ("layout", *(f"stage {stage}" for stage in STAGES), "stage 0, bytes")
    textbook = ("textbook", *(f"{TEXTBOOK[stage]:.1f}" for stage in STAGES), "")
    print_table(columns, [textbook, *(row(layout, sent[layout.name]) for layout in layouts)])
    return 0


def row(layout: Layout, sent: dict[str, int]) -> tuple[str, ...]:
    shares = (f"{sent[str(stage)] / sent['0']:.2f}" if str(stage) in sent else "" for stage in STAGES)
    return (layout.name, *shares, f"{sent['0']:,}")


def write_rows(path: Path) -> None:
    with path.open("w") as file:
        for number in range(ROWS):
            turns = [
                {"role": "user", "content": f"What is {number} twice?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


# -- on the ranks ----------------------------------------------------------------------------------------------------


def on_ranks(root: Path) -> None:
    from worker.engine.ranks import joined

    orders = json.loads((root / "orders.json").read_text())
    by_name = {layout.name: layout for layout in LAYOUTS}
    with joined(root) as ranks:
        sent: dict[str, dict[int, int]] = {}
        for name in orders["layouts"]:
            sent[name] = {
                stage: measure(root, orders["model"], by_name[name], stage, ranks) for stage in by_name[name].stages
            }
        if ranks.is_first:
            (root / "sent.json").write_text(json.dumps(sent))


def measure(root: Path, model: str, layout: Layout, stage: int, ranks: Any) -> int:
    """Bytes that this rank puts through collectives in the last step."""
    from core import zero as config
    from core.spec import parse_spec
    from worker.by_hand import prepare_directory
    from worker.engine import zero
    from worker.engine.emit import Emitter, NoEmitter
    from worker.engine.signals import Signals
    from worker.engine.train import Run, train

    spec = parse_spec(
        {
            "model": {"base": model},
            "data": {"train": [{"dataset": str(root / "rows.jsonl")}], "validation": None, "max_length": 128},
            "packing": {"mode": "padded"},
            "batch": {"samples_per_step": RANKS * layout.passes, "micro_batch_size": 1},
            "method": layout.method,
            "parallel": {"devices": RANKS, "zero_stage": stage, "offload": "none"},
            "schedule": {"learning_rate": 1e-4, "max_steps": STEPS},
            "compute": {"dtype": "fp32", "gradient_checkpointing": layout.checkpointing},
            "checkpoint": {"every_epoch": False},
        }
    )
    out = root / layout.name / str(stage)
    if ranks.is_first:
        prepare_directory(spec, out, (), root / "cache", fresh=False)
    ranks.wait_for_all()

    def with_overrides(*arguments: Any) -> dict[str, Any]:
        given = config.deepspeed_config(*arguments)
        return {**given, "zero_optimization": {**given["zero_optimization"], **layout.zero}}

    zero.deepspeed_config = with_overrides
    emitter = Emitter(out / "events.jsonl") if ranks.is_first else NoEmitter()
    train(Run(out, emitter, Signals(), ranks))
    if not ranks.is_first:
        return 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return int([event for event in events if event["kind"] == "step"][-1]["comm_bytes"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--on-ranks"]:
        on_ranks(Path(sys.argv[2]))
    else:
        sys.exit(main())
