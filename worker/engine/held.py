"""What a run was planned to be beside what it was, for report.json: like with like, over the steps that this process
made."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.deviation import TITLES, Deviation, of_steps
from core.events import RunTotals
from core.forecast import disk_of, forecast_time, work_of
from core.preflight import JobPlan
from core.run_totals import run_totals
from worker.engine.checkpoint import Unverified, checkpoints_in, read_manifest
from worker.engine.run import Run


def held_to(run: Run, seconds: float) -> list[dict[str, Any]] | None:
    """A line for each number that was planned, in the order of core.deviation's titles; None where no step was to be
    made. Times are planned by formula alone, for a trainer knows no other run; one that was resumed or ended early has
    no time in all to be held to."""
    plan = run.plan
    if plan is None:
        return None
    order = list(TITLES)
    lines = [*_of_steps(run, plan), *_of_time(run, plan, seconds), *_of_disk(run, plan)]
    return [line.model_dump() for line in sorted(lines, key=lambda line: order.index(line.name))]


def _of_steps(run: Run, plan: JobPlan) -> Iterator[Deviation]:
    measured, first = run.measured, run.first_step
    made = RunTotals(
        steps=measured.steps,
        rows=measured.rows,
        tokens=measured.tokens,
        trained_tokens=measured.trained_tokens,
        slots=measured.slots,
        is_exact=True,
    )
    yield Deviation(name="steps", predicted=plan.total_steps - first + 1, actual=made.steps)
    yield from of_steps(run_totals(plan, first, first + made.steps - 1), made)
    planned_peak = plan.memory.planned_peak_bytes
    yield Deviation(name="memory_peak_bytes", predicted=planned_peak, actual=measured.memory_peak_bytes or None)


def _of_time(run: Run, plan: JobPlan, seconds: float) -> Iterator[Deviation]:
    time = forecast_time(plan, work_of(plan, disk_of(plan)), plan.device, None, ())
    share = run.measured.steps / plan.total_steps
    steps_s = None if time.steps_s is None else share * time.steps_s
    yield Deviation(name="steps_s", predicted=steps_s, actual=run.measured.step_s)
    yield Deviation(name="seconds", predicted=time.seconds if share == 1 else None, actual=seconds)


def _of_disk(run: Run, plan: JobPlan) -> Iterator[Deviation]:
    disk = disk_of(plan)
    sizes = list(_checkpoint_sizes(run.checkpoints))
    result = _num_bytes(run.directory / "result")
    yield Deviation(name="checkpoint_bytes", predicted=disk and disk.checkpoint_bytes, actual=max(sizes, default=None))
    yield Deviation(name="kept_bytes", predicted=disk and disk.kept_bytes, actual=sum(sizes) if sizes else None)
    yield Deviation(name="result_bytes", predicted=disk and disk.result_bytes, actual=result)


def _checkpoint_sizes(folder: Path) -> Iterator[int]:
    for path in checkpoints_in(folder):
        with suppress(Unverified):  # what cannot be read has been told of, and ends no run that is over
            yield read_manifest(path).bytes


def _num_bytes(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
