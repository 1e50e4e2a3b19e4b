"""What a trial's page shows: of a dry run a card with what it says of the whole job, of a probe its curves, of a
certificate each layout beside the reference.

The curves are SVG, drawn here anew whenever a step comes in, so that they need no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from app.forms import state_of_spec, written_spec
from app.pages import format
from app.pages.new_job import form_pairs, new_key
from app.tables import Job
from app.trials import is_through, read_dry_run, read_layouts, read_probe, steps_of, trial_of
from core.certify import Finding, Reference, deviation_text
from core.schedule import ceil_share
from core.spec import parse_spec
from core.states import JobState
from core.trial import LAST_SHARE, Certify, DryRun, RateCurve, RateProbe, Suggestion, probe_schedule

CHART_WIDTH, CHART_HEIGHT = 400, 230
LABEL_HEIGHT = 12  # of a curve's own name at its end
# With the colour, so that a curve is known without it.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
NUM_COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A rate's curve; lengths in the view box's units."""

    label: str
    points: str
    colour: int  # from 1
    dash: str
    label_x: float
    label_y: float
    is_suggested: bool


@dataclass(frozen=True)
class ProbeDrawing:
    lines: tuple[Line, ...]
    highest: str  # loss
    lowest: str
    steps: int
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT
    left: int = 8
    right: int = CHART_WIDTH - 64
    top: int = 20
    bottom: int = CHART_HEIGHT - 20


@dataclass(frozen=True)
class RateRow:
    """A rate in the table beside its curve."""

    rate: str
    steps: int
    last_loss: float | None
    state: str  # waits | runs | through | diverged
    is_suggested: bool


def trial_context(session: Session, job: Job) -> dict[str, Any]:
    """What the overview of a job shows if it is a trial, under `trial`; None there for any other job."""
    trial = trial_of(job)
    match trial:
        case None:
            return {"trial": None}
        case DryRun():
            report = read_dry_run(session, job)
            has_launch = report is not None and job.state == JobState.SUCCEEDED
            return {"trial": trial, "report": report, "launch": _form_of(job) if has_launch else None}
        case RateProbe():
            return {"trial": trial, "probe": _probe(session, job, trial)}
        case Certify():
            return {"trial": trial, "certificate": _certificate(session, job)}


@dataclass(frozen=True)
class LayoutRow:
    """A layout in the table, lengths and deviations as they are shown."""

    name: str
    steps: int
    ranks: int
    attention: str
    slots: int
    most_segments_in_a_row: int
    seconds: float
    loss_deviation: str  # "" of a reference
    norm_deviation: str
    state: str  # reference | equal | differs


def _certificate(session: Session, job: Job) -> dict[str, Any] | None:
    """None before its first layout."""
    certificate = read_layouts(session, job)
    if certificate is None:
        return None
    tried: list[Reference | Finding] = [*certificate.references, *certificate.findings]
    rows = [_layout_row(each) for each in tried]
    return {
        "verdict": certificate.verdict if is_through(job) and certificate.findings else None,
        "holds": certificate.holds,
        "is_telling": certificate.is_telling,
        "is_live": job.state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED),
        "num_tried": len(certificate.findings),
        "differing": [finding.name for finding in certificate.differing],
        "loss_deviation": deviation_text(certificate.loss_deviation),
        "norm_deviation": deviation_text(certificate.norm_deviation),
        "dtype": certificate.dtype,
        "steps": certificate.steps,
        "rows": rows,
        "not_run": certificate.not_run,
        "losses": [(each.name, list(zip(each.curve.losses, each.curve.grad_norms, strict=True))) for each in tried],
    }


def _layout_row(tried: Reference | Finding) -> LayoutRow:
    curve = tried.curve
    finding = tried if isinstance(tried, Finding) else None
    return LayoutRow(
        name=tried.name,
        steps=len(curve.losses),
        loss_deviation="" if finding is None else deviation_text(finding.loss_deviation),
        norm_deviation="" if finding is None else deviation_text(finding.norm_deviation),
        state="reference" if finding is None else "equal" if finding.holds else "differs",
        **curve.model_dump(include={"ranks", "attention", "slots", "most_segments_in_a_row", "seconds"}),
    )


def _form_of(job: Job) -> list[tuple[str, str]]:
    """The whole job as a filled form. Its key is of this rendering, so a button that is pressed twice is one job."""
    return [*form_pairs(state_of_spec(written_spec(parse_spec(job.spec)))), ("_key", new_key())]


def _probe(session: Session, job: Job, probe: RateProbe) -> dict[str, Any]:
    curves, suggestion = read_probe(session, job, probe)
    steps = steps_of(job, probe)
    is_live = job.state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
    return {
        "drawing": draw_probe(curves, steps, suggestion),
        "rows": _rows(curves, steps, suggestion),
        "suggestion": suggestion,
        "losses": [(step, [_at(curve.losses, step) for curve in curves]) for step in range(1, _longest(curves) + 1)],
        "is_live": is_live,
        "steps": steps,
        "warmup_steps": probe_schedule(probe.rates[0], steps).warmup_steps,
        "last_steps": ceil_share(LAST_SHARE, steps),
    }


def _rows(curves: Sequence[RateCurve], steps: int, suggestion: Suggestion | None) -> list[RateRow]:
    return [
        RateRow(
            rate=format.rate(curve.learning_rate),
            steps=len(curve.losses),
            last_loss=curve.last_loss if curve.is_through(steps) else None,
            state="diverged"
            if curve.has_diverged
            else "through"
            if curve.is_through(steps)
            else "runs"
            if curve.losses
            else "waits",
            is_suggested=_is_suggested(curve, suggestion),
        )
        for curve in curves
    ]


def _is_suggested(curve: RateCurve, suggestion: Suggestion | None) -> bool:
    return suggestion is not None and suggestion.learning_rate == curve.learning_rate


def _longest(curves: Sequence[RateCurve]) -> int:
    return max((len(curve.losses) for curve in curves), default=0)


def _at(losses: Sequence[float | None], step: int) -> float | None:
    return losses[step - 1] if step <= len(losses) else None


def draw_probe(curves: Sequence[RateCurve], steps: int, suggestion: Suggestion | None) -> ProbeDrawing | None:
    """None before the first step. What lies above where all began is cut off: a rate that diverges would press the
    others flat."""
    told = [loss for curve in curves for loss in curve.losses if loss is not None]
    if not told:
        return None
    sound = [loss for curve in curves if not curve.has_diverged for loss in curve.losses if loss is not None]
    highest = max([*sound, *(curve.losses[0] or 0.0 for curve in curves if curve.losses)])
    lowest = min(told)
    spread = (highest - lowest) or 1.0
    frame = ProbeDrawing((), format.loss(highest), format.loss(lowest), steps)
    x_unit = (frame.right - frame.left) / max(1, steps - 1)

    def y(loss: float | None) -> float:
        inside = highest if loss is None else min(loss, highest)
        return frame.bottom - (frame.bottom - frame.top) * (inside - lowest) / spread

    begun = [(number, curve) for number, curve in enumerate(curves) if curve.losses]
    ends = [y(curve.losses[-1]) for _, curve in begun]
    lines = []
    for (number, curve), label_y in zip(begun, _apart(ends, frame.top, frame.bottom), strict=True):
        points = [(frame.left + place * x_unit, y(loss)) for place, loss in enumerate(curve.losses)]
        lines.append(
            Line(
                label=format.rate(curve.learning_rate),
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points),
                colour=number % NUM_COLOURS + 1,
                dash=DASHES[number % len(DASHES)],
                label_x=round(points[-1][0] + 5, 1),
                label_y=round(label_y + 4, 1),
                is_suggested=_is_suggested(curve, suggestion),
            )
        )
    return ProbeDrawing(tuple(lines), frame.highest, frame.lowest, steps)


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places for labels near where they are wanted, none on another: pushed down in their order, then back up from the
    bottom."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    places = [0.0] * len(wanted)
    at = -math.inf
    for number in order:
        at = places[number] = max(wanted[number], at + LABEL_HEIGHT, top)
    at = bottom + LABEL_HEIGHT
    for number in reversed(order):
        at = places[number] = min(places[number], at - LABEL_HEIGHT)
    return places
