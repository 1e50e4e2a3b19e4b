"""Points of the charts: which numbers of an event are points, and how a job's curve is read back.

A step that was made twice (once before a kill, once after the resume) stands twice in the table, under its attempt's
number; a curve takes the newest. A job that continues another one's checkpoints begins where those end, so its curve
shows that job's points for the steps before its own first one: what the model learned, from step 1 on.

A curve with more points than asked for is cut into as many buckets as give two points each: the least and the greatest
of every bucket stay, in their order, so that no spike is lost.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlmodel import Session, col, func, select

from app.tables import Job, Metric
from core.errors import UserError
from core.events import EVAL_METRICS, KNOWN_KINDS, STEP_METRICS, Eval, Step

NAMES_BY_KIND: dict[str, tuple[str, ...]] = {"step": STEP_METRICS, "eval": EVAL_METRICS}
NAMES = (*STEP_METRICS, *EVAL_METRICS)
# Null there means that the number was none (NaN), and is a point; elsewhere it means that nothing was measured.
NULL_IS_A_POINT = frozenset(
    name
    for kind, names in NAMES_BY_KIND.items()
    for name in names
    if KNOWN_KINDS[kind].model_fields[name].is_required()
)

Point = tuple[int, float | None]


def points_of(kind: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Point]]:
    """(name, (step, value)) of a stored event."""
    for name in NAMES_BY_KIND.get(kind, ()):
        value = data.get(name)
        if value is not None or name in NULL_IS_A_POINT:
            yield name, (data["step"], value)


def points_of_event(event: Step | Eval) -> list[tuple[str, Point]]:
    """Raises OverflowError where a number is too large to be stored."""
    points = points_of(event.kind, event.model_dump())
    return [(name, (step, None if value is None else float(value))) for name, (step, value) in points]


def read_curve(session: Session, job: Job, name: str) -> list[Point]:
    """In the order of the steps, one point a step."""
    points: dict[int, float | None] = {}
    below: int | None = None
    for job_id in (job.id, *(job.resume_jobs or [])):
        rows = select(Metric.step, Metric.value).where(Metric.job == job_id, Metric.name == name)
        if below is not None:
            rows = rows.where(col(Metric.step) < below)
        # Along the primary key, so that of two attempts at one step the newer is read last.
        found: dict[int, float | None] = dict(session.exec(rows.order_by(col(Metric.step), col(Metric.attempt))).all())
        points |= found
        first = first_step(session, job_id)
        below = first if below is None else below if first is None else min(below, first)
    return sorted(points.items())


def first_step(session: Session, job: str) -> int | None:
    return session.exec(select(func.min(Metric.step)).where(Metric.job == job, Metric.name == STEP_METRICS[0])).one()


def thin(points: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points` of them, the first and the last among them."""
    assert max_points >= 4
    if len(points) <= max_points:
        return list(points)
    inner = points[1:-1]
    num_buckets = (max_points - 2) // 2
    kept = [points[0]]
    for bucket in range(num_buckets):
        part = inner[bucket * len(inner) // num_buckets : (bucket + 1) * len(inner) // num_buckets]
        numbers = [point for point in part if point[1] is not None]
        if not numbers:
            kept += part[:1]
            continue
        least = min(numbers, key=lambda point: point[1] or 0.0)
        greatest = max(numbers, key=lambda point: point[1] or 0.0)
        kept += sorted({least, greatest})
    return [*kept, points[-1]]


def parse_names(text: str) -> tuple[str, ...]:
    """`loss,learning_rate`; empty = all. Raises UserError on a name that is no metric."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise UserError("metrics.unknown_name", "names", name=name, known=", ".join(NAMES))
    return names or NAMES
