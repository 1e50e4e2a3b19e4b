"""What a trial has told so far, read from what is stored of it."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel
from sqlmodel import Session, col, select

from app.metrics import read_curve
from app.tables import Event, Job
from core.trial import (
    AnyTrial,
    DryRun,
    DryRunReport,
    DryStep,
    RateCurve,
    RateProbe,
    Suggestion,
    as_trial,
    report_dry_run,
    suggest,
)

# Of a step's numbers, those that a dry run is judged by.
DRY_METRICS = ("loss", "step_s", "tokens", "memory_peak_bytes")


class ToldByDryRun(BaseModel):
    kind: Literal["dry_run"] = "dry_run"
    report: DryRunReport | None  # none before its first step


class CurveView(BaseModel):
    learning_rate: float
    losses: tuple[float | None, ...]  # of steps 1, 2, ...
    grad_norms: tuple[float | None, ...]
    has_diverged: bool
    last_loss: float | None  # smoothed; what is compared


class SuggestionView(BaseModel):
    learning_rate: float
    is_settled: bool
    code: str
    text: str


class ToldByProbe(BaseModel):
    kind: Literal["lr_probe"] = "lr_probe"
    steps: int  # of each rate that does not diverge
    rates: tuple[CurveView, ...]  # also those whose turn has not come
    suggestion: SuggestionView | None  # once all are through


Told = ToldByDryRun | ToldByProbe


def trial_of(job: Job) -> AnyTrial | None:
    return as_trial(job.trial)


def steps_of(job: Job, trial: AnyTrial) -> int:
    """How many it makes, of a probe for each rate: never more than the job itself."""
    total_steps = (job.plan or {}).get("total_steps")
    return trial.steps if total_steps is None else min(trial.steps, total_steps)


def read_dry_run(session: Session, job: Job) -> DryRunReport | None:
    """None before its first step."""
    curves = {name: dict(read_curve(session, job, name)) for name in DRY_METRICS}
    made = [
        DryStep(
            loss=curves["loss"][step],
            step_s=curves["step_s"].get(step) or 0.0,
            tokens=curves["tokens"].get(step) or 0.0,
            memory_peak_bytes=curves["memory_peak_bytes"].get(step),
        )
        for step in curves["loss"]
    ]
    if not made or job.plan is None:
        return None
    return report_dry_run(made, job.plan["total_steps"], job.plan.get("planned_peak_bytes"))


def read_probe(session: Session, job: Job, probe: RateProbe) -> tuple[list[RateCurve], Suggestion | None]:
    """A curve for each rate, in the order of the probe, as the newest attempt has made them; what they suggest, once
    all are through."""
    events = session.exec(
        select(Event)
        .where(Event.job == job.id, Event.attempt == job.attempt, Event.kind == "probe")
        .order_by(col(Event.id))
    ).all()
    curves = [_curve(rate, events) for rate in probe.rates]
    steps = steps_of(job, probe)
    is_through = job.plan is not None and all(curve.is_through(steps) for curve in curves)
    return curves, suggest(curves) if is_through else None


def _curve(rate: float, events: Sequence[Event]) -> RateCurve:
    made = [event.data for event in events if event.data["learning_rate"] == rate]
    return RateCurve(
        learning_rate=rate,
        losses=tuple(step["loss"] for step in made),
        grad_norms=tuple(step["grad_norm"] for step in made),
        has_diverged=bool(made) and bool(made[-1].get("diverged")),
    )


def told_by(session: Session, job: Job, trial: AnyTrial) -> Told:
    """As programs get it."""
    if isinstance(trial, DryRun):
        return ToldByDryRun(report=read_dry_run(session, job))
    curves, suggestion = read_probe(session, job, trial)
    return ToldByProbe(
        steps=steps_of(job, trial),
        rates=tuple(CurveView(**curve.model_dump(), last_loss=curve.last_loss) for curve in curves),
        suggestion=None
        if suggestion is None
        else SuggestionView(
            learning_rate=suggestion.learning_rate,
            is_settled=suggestion.is_settled,
            code=suggestion.code,
            text=suggestion.why.text(),
        ),
    )
