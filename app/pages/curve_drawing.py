"""The planned learning rate as a picture: the curve, its warm-up, its floor, and when the run looks up."""

from collections.abc import Iterable
from dataclasses import dataclass

from core.curve_report import CurveReport, report_curve
from core.preflight import JobPlan
from core.schedule import Schedule, lr_at

MOST_POINTS = 240
LEAST_GAP = 3  # between two ticks: closer ones are drawn as one


@dataclass(frozen=True)
class CurveDrawing:
    """Lengths in the view box's units. Ticks stand below the axis, those of evaluations above those of checkpoints."""

    report: CurveReport
    points: str
    warmup_width: float
    floor_y: float | None  # where it is neither 0 nor the peak
    evaluations: str  # a path
    checkpoints: str
    evaluations_y: int
    checkpoints_y: int
    width: int = 360
    height: int = 140
    left: int = 4
    right: int = 356
    top: int = 18
    bottom: int = 98


def draw_curve(plan: JobPlan) -> CurveDrawing:
    report = report_curve(plan)
    empty = CurveDrawing(report, "", 0, None, "", "", 0, 0)
    x_unit = (empty.right - empty.left) / report.total_steps
    y_unit = (empty.bottom - empty.top) / report.peak
    points = " ".join(
        f"{empty.left + step * x_unit:.1f},{empty.bottom - lr_at(plan.schedule, step) * y_unit:.1f}"
        for step in curve_steps(plan.schedule, MOST_POINTS)
    )

    def ticks(steps: Iterable[int], y: int) -> str:
        return "".join(f"M{x} {y}v6" for x in _apart(empty.left + step * x_unit for step in steps))

    evaluations_y, checkpoints_y = empty.bottom + 4, empty.bottom + 14
    return CurveDrawing(
        report,
        points,
        warmup_width=round(report.warmup_steps * x_unit, 1),
        floor_y=round(empty.bottom - report.floor * y_unit, 1) if 0 < report.floor < report.peak else None,
        evaluations=ticks(report.evaluation_steps, evaluations_y),
        checkpoints=ticks(report.checkpoint_steps, checkpoints_y),
        evaluations_y=evaluations_y,
        checkpoints_y=checkpoints_y,
    )


def _apart(places: Iterable[float]) -> Iterable[float]:
    last = None
    for place in places:
        if last is None or place - last >= LEAST_GAP:
            last = place
            yield round(place, 1)


def curve_steps(schedule: Schedule, most: int) -> list[int]:
    """Steps to draw the curve at: all, or `most` evenly spread ones; the curve's corners are always among them."""
    stride = max(1, -(-schedule.total_steps // most))
    corners = {schedule.warmup_steps, schedule.decay_start, schedule.total_steps}
    return sorted({*range(0, schedule.total_steps + 1, stride), *corners})
