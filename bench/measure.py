"""What benches share: a child process with its CPU time and peak memory, and tables that say where they come from."""

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".bench"  # ignored by git: models, peers, what a run leaves

# One thread for everything that would take more, and no network: runs are compared by the CPU seconds they use.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Usage:
    """Of a child process and all children that it waited for."""

    cpu_s: float
    wall_s: float
    peak_bytes: int  # resident, of the largest process


class ChildFailed(Exception):
    """The text holds the end of what the child printed."""


def run_child(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Usage:
    """Runs it to its end from the repository's root; raises ChildFailed where that was not 0."""
    began = datetime.now(UTC)
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ChildFailed(f"{' '.join(map(str, command))} ended with {child.returncode}:\n{tail}")
    wall_s = (datetime.now(UTC) - began).total_seconds()
    return Usage(usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1024)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def test_bed() -> str:
    """Where and when; no name of a machine."""
    now = datetime.now(UTC).date().isoformat()
    return f"{now}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """In Markdown, row by row as they come; the first column to the left, the others to the right."""
    print(f"| {' | '.join(columns)} |")
    print("|---|" + "---:|" * (len(columns) - 1), flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
