"""A job held to its forecast: what was predicted of it beside what it did, as far as that is known.

The prediction is the one that was kept when the job was submitted. Where there is none, the plan that the trainer made
before its first step stands in for what it covers, and why there is none is said."""

from typing import Any

from pydantic import BaseModel, ValidationError
from sqlmodel import Session, col, func, select

from app.kept import kept_checkpoints
from app.tables import ArtifactRow, Attempt, CheckpointRow, Job
from core.deviation import TITLES, Deviation, of_steps
from core.errors import Reason
from core.events import RunTotals
from core.forecast import Forecast


class HeldTo(BaseModel):
    lines: tuple[Deviation, ...]
    is_over: bool  # else what is known so far
    why_none: Reason | None  # why nothing was forecast


def held_to(session: Session, job: Job, now: float) -> HeldTo | None:
    """None of a trial, which is not made for its end."""
    forecast = read_forecast(job)
    if job.trial is not None:
        return None
    predicted, actual = _predicted(job, forecast), _actual(session, job, now)
    made = _made(job.summary or {})
    lines = [Deviation(name=name, predicted=predicted.get(name), actual=actual.get(name)) for name in TITLES]
    if made is not None:
        of_made = {line.name: line for line in of_steps(_totals(job, forecast), made)}
        lines = [of_made.get(line.name, line) for line in lines]
    known = tuple(line for line in lines if line.predicted is not None or line.actual is not None)
    return HeldTo(lines=known, is_over=job.ended_at is not None, why_none=None if forecast else _why_none(job))


def read_forecast(job: Job) -> Forecast | None:
    try:
        return None if job.forecast is None else Forecast.model_validate(job.forecast)
    except ValidationError:  # of another release
        return None


def _why_none(job: Job) -> Reason:
    return Reason("forecast.continues" if job.parent is not None else "forecast.not_measured", {})


def _totals(job: Job, forecast: Forecast | None) -> RunTotals | None:
    if forecast is not None:
        return forecast.totals
    stored = (job.plan or {}).get("totals")
    return None if stored is None else RunTotals.model_validate(stored)


def _made(summary: dict[str, Any]) -> RunTotals | None:
    """All steps up to the newest, those redone after a resume counted once."""
    if "steps_s" not in summary:
        return None
    sums = {name: summary[name] for name in ("rows", "tokens", "trained_tokens", "slots")}
    return RunTotals(steps=summary["step"], **sums, is_exact=True)


def _predicted(job: Job, forecast: Forecast | None) -> dict[str, float | None]:
    """What is not counted by steps."""
    if forecast is None:
        plan = job.plan or {}
        return {
            "steps": plan.get("total_steps"),
            "memory_peak_bytes": plan.get("planned_peak_bytes"),
        }
    time, disk = forecast.time, forecast.disk
    share = _share_of_steps(job, forecast)
    told: dict[str, float | None] = {
        "steps": forecast.totals.steps,
        "steps_per_epoch": forecast.steps_per_epoch,
        "memory_peak_bytes": forecast.planned_peak_bytes,
        "steps_s": None if time.steps_s is None else share * time.steps_s,
        "seconds": time.seconds,
    }
    if disk is not None:
        told |= {
            "checkpoint_bytes": disk.checkpoint_bytes,
            "kept_bytes": disk.kept_bytes,
            "result_bytes": disk.result_bytes,
        }
    return told


def _share_of_steps(job: Job, forecast: Forecast) -> float:
    """That were made, where any was."""
    made = (job.summary or {}).get("step")
    return made / forecast.totals.steps if made else 1.0


def _actual(session: Session, job: Job, now: float) -> dict[str, float | None]:
    summary, plan = job.summary or {}, job.plan or {}
    result = session.exec(select(func.sum(ArtifactRow.bytes)).where(ArtifactRow.job == job.id)).one()
    largest = session.exec(select(func.max(CheckpointRow.bytes)).where(CheckpointRow.job == job.id)).one()
    return {
        "steps": summary.get("step"),
        "steps_per_epoch": plan.get("steps_per_epoch"),
        "memory_peak_bytes": summary.get("memory_peak_bytes"),
        "steps_s": summary.get("steps_s"),
        "seconds": _busy_s(session, job, now),
        "checkpoint_bytes": largest,
        "kept_bytes": sum(row.bytes for row in kept_checkpoints(session, job)) if largest else None,
        "result_bytes": result,
    }


def _busy_s(session: Session, job: Job, now: float) -> float | None:
    """On hosts, all attempts together."""
    attempts = session.exec(select(Attempt).where(Attempt.job == job.id, col(Attempt.claimed_at).is_not(None)))
    spans = [(each.ended_at or now) - (each.claimed_at or 0.0) for each in attempts]
    return sum(spans) if spans else None
