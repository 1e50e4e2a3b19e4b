"""What a trial has told so far, read from what is stored of it."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel
from sqlmodel import Session, col, select

from app.metrics import read_curve
from app.tables import Event, Job
from core.certify import Certificate, Finding, Reference, read_certificate
from core.events import FailureReason, Layout, finite
from core.states import JobState
from core.trial import (
    AnyTrial,
    Certify,
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


class VerdictView(BaseModel):
    code: str
    text: str
    is_equal: bool


class LayoutView(BaseModel):
    """A layout's first steps; deviations are relative, the largest of all steps, null where a number was none."""

    name: str
    losses: tuple[float | None, ...]  # of steps 1, 2, ...
    grad_norms: tuple[float | None, ...]
    ranks: int
    attention: str
    slots: int
    most_segments_in_a_row: int
    seconds: float
    loss_deviation: float | None = None
    norm_deviation: float | None = None
    allowed: float | None = None
    is_equal: bool | None = None


class NotRunView(BaseModel):
    name: str
    reason: str
    cause: FailureReason


class ToldByCertificate(BaseModel):
    kind: Literal["certify"] = "certify"
    steps: int
    dtype: str | None  # of the job's arithmetic; known with the first layout
    verdict: VerdictView | None  # once all layouts are through
    references: tuple[LayoutView, ...]  # what the others are held against
    layouts: tuple[LayoutView, ...]
    not_run: tuple[NotRunView, ...]


Told = ToldByDryRun | ToldByProbe | ToldByCertificate


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
    events = _events(session, job, "probe")
    curves = [_curve(rate, events) for rate in probe.rates]
    steps = steps_of(job, probe)
    is_through = job.plan is not None and all(curve.is_through(steps) for curve in curves)
    return curves, suggest(curves) if is_through else None


def _events(session: Session, job: Job, kind: str) -> Sequence[Event]:
    """Of the newest attempt, for each begins anew."""
    return session.exec(
        select(Event)
        .where(Event.job == job.id, Event.attempt == job.attempt, Event.kind == kind)
        .order_by(col(Event.id))
    ).all()


def _curve(rate: float, events: Sequence[Event]) -> RateCurve:
    made = [event.data for event in events if event.data["learning_rate"] == rate]
    return RateCurve(
        learning_rate=rate,
        losses=tuple(step["loss"] for step in made),
        grad_norms=tuple(step["grad_norm"] for step in made),
        has_diverged=bool(made) and bool(made[-1].get("diverged")),
    )


def read_layouts(session: Session, job: Job) -> Certificate | None:
    """As far as the newest attempt has come; None before its first layout."""
    return read_certificate(
        [Layout(seq=event.seq, ts=event.ts, **event.data) for event in _events(session, job, "layout")]
    )


def is_through(job: Job) -> bool:
    """Whether a certificate has all its layouts. It fails where one ended by a fault, and has them all the same."""
    summary = job.summary or {}
    is_last = summary.get("phase") == "certify" and summary.get("phase_done") == summary.get("phase_total")
    return is_last and job.state in (JobState.SUCCEEDED, JobState.FAILED)


def told_by(session: Session, job: Job, trial: AnyTrial) -> Told:
    """As programs get it."""
    if isinstance(trial, DryRun):
        return ToldByDryRun(report=read_dry_run(session, job))
    if isinstance(trial, Certify):
        return _told_by_certificate(trial, read_layouts(session, job), is_through=is_through(job))
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


def _told_by_certificate(trial: Certify, certificate: Certificate | None, *, is_through: bool) -> ToldByCertificate:
    if certificate is None:
        return ToldByCertificate(steps=trial.steps, dtype=None, verdict=None, references=(), layouts=(), not_run=())
    verdict = certificate.verdict if is_through and certificate.findings else None
    return ToldByCertificate(
        steps=certificate.steps,
        dtype=certificate.dtype,
        verdict=verdict
        and VerdictView(code=verdict.code, text=verdict.text(), is_equal=certificate.holds and certificate.is_telling),
        references=tuple(map(_layout_view, certificate.references)),
        layouts=tuple(map(_layout_view, certificate.findings)),
        not_run=tuple(NotRunView(name=run.name, reason=run.reason, cause=run.cause) for run in certificate.not_run),
    )


def _layout_view(tried: Reference | Finding) -> LayoutView:
    curve = tried.curve
    view = LayoutView(
        name=tried.name,
        losses=tuple(map(finite, curve.losses)),
        grad_norms=tuple(map(finite, curve.grad_norms)),
        **curve.model_dump(exclude={"losses", "grad_norms"}),
    )
    if isinstance(tried, Reference):
        return view
    return view.model_copy(
        update={
            "loss_deviation": finite(tried.loss_deviation),
            "norm_deviation": finite(tried.norm_deviation),
            "allowed": tried.allowed,
            "is_equal": tried.holds,
        }
    )
