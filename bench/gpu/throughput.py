"""The same training by us and by TRL on a GPU: `python -m bench.gpu.throughput [--model llama-1b] [--data FILE]`.

    --peer-python PATH  an interpreter that has TRL, and what else is to be compared: flash-attn, liger-kernel, unsloth.
                        Default: this one where it has TRL, else the peers' own environment.

TRL packs (bfd), one pack a pass, with FlashAttention where that is installed, with Liger's kernels, and through
Unsloth. Padding alone is no yardstick on a GPU. Activations are recomputed in all (TRL's default), weights are frozen
in bf16 under LoRA of rank 16. What is not installed has a row that says so.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench import peers
from bench.gpu.rig import Rig, long_talks, run_bench, step_seconds, tokens_a_second
from bench.measure import ChildFailed, mebibytes, print_table
from bench.training import Run, Way, run_ours, run_trl

MODULES = ("flash_attn", "liger_kernel", "unsloth")


@dataclass(frozen=True)
class Rival:
    way: Way
    needs: tuple[str, ...]  # modules


PACKED = Way("TRL bfd", packing=True, batch_size=1, accumulation=1)
FLASH = "flash_attention_2"
RIVALS = (
    Rival(replace(PACKED, name="TRL bfd, sdpa", attention="sdpa"), ()),
    Rival(replace(PACKED, name="TRL bfd, FlashAttention", attention=FLASH), ("flash_attn",)),
    Rival(
        replace(PACKED, name="TRL bfd, FlashAttention, Liger", attention=FLASH, use_liger_kernel=True),
        ("flash_attn", "liger_kernel"),
    ),
    Rival(replace(PACKED, name="TRL bfd, Unsloth", uses_unsloth=True), ("unsloth",)),
)


def measure(rig: Rig, options: argparse.Namespace) -> None:
    samples_per_step = 4 if rig.is_rehearsal else 32
    talks = long_talks(rig, samples_per_step * (rig.steps + 3), options.max_length, options.data)
    task = rig.task(options.model, talks, options.max_length, samples_per_step=samples_per_step)
    per_pack = task.max_length * len(talks) / sum(talk.length for talk in talks)
    accumulation = max(1, round(samples_per_step / per_pack))

    ours = run_ours(task, rig.folder / "ours")

    def row(name: str, run: Run) -> list[str]:
        return [
            name,
            run.attention,
            f"{len(run.losses)}",
            f"{step_seconds(run):.3f}",
            f"{tokens_a_second(run):,.0f}",
            "" if run is ours else f"{tokens_a_second(ours) / tokens_a_second(run):.2f}x",
            mebibytes(run.gpu_allocated_bytes),
            f"{run.usage.wall_s:.1f}",
            f"{run.losses[-1]:.4f}",
        ]

    def rows() -> Iterator[list[str]]:
        yield row("Pegbox, packed", ours)
        if options.without_peers:
            return
        try:
            python = _peer_python(options.peer_python)
        except peers.Missing as problem:
            yield ["TRL", f"not to be had here: {problem}", *[""] * 7]
            return
        there = _modules_of(python)
        for number, rival in enumerate(RIVALS):
            lacking = [module for module in rival.needs if module not in there]
            if lacking:
                yield [rival.way.name, f"not installed: {', '.join(lacking)}", *[""] * 7]
                continue
            way = replace(rival.way, accumulation=accumulation)
            try:
                yield row(way.name, run_trl(task, way, rig.folder / f"trl-{number}", python=python))
            except ChildFailed as problem:
                yield [way.name, f"failed: {str(problem).splitlines()[-1]}", *[""] * 7]

    columns = ("way", "attention", "steps", "step s", "tokens / s", "ours is", "peak MiB", "end to end s", "last loss")
    print_table(columns, rows())


def _peer_python(given: Path | None) -> Path:
    """Raises peers.Missing."""
    if given is not None:
        return given
    return Path(sys.executable) if importlib.util.find_spec("trl") else peers.python_of(peers.TRL)


def _modules_of(python: Path) -> set[str]:
    code = f"import importlib.util; print(*(name for name in {MODULES} if importlib.util.find_spec(name)))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-1b")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--without-peers", action="store_true")


if __name__ == "__main__":
    run_bench(__doc__, measure, None, add_options)
