"""One job: its head, tiles, charts, log, config, files and history, and the buttons that change it.

The page is rendered whole from one snapshot of the database and names the last event in it; the stream goes on from
there. So a reload at any moment shows all that was, and what comes after is neither missing nor there twice.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session, col, func, select

from app.auth import Member
from app.held import held_to
from app.jobs import (
    JOBS_TOPIC,
    QUEUE_TOPIC,
    cancel,
    checkpoint,
    extend,
    get_job,
    legal_actions,
    resume,
    retry,
    stop,
    topic_of,
)
from app.pages.curve_drawing import curve_steps
from app.pages.environment import frame_context, has_vendor_files, translate
from app.pages.format import count, exact, size
from app.pages.job_row import count_states, read_rows
from app.pages.preflight import told_choices
from app.pages.spec_texts import spec_texts
from app.pages.trial import trial_context
from app.services import AnyServices, Services
from app.tables import ArtifactRow, Attempt, CheckpointRow, Event, Host, Job
from core.errors import N_
from core.schedule import Decay, Schedule, lr_at
from core.spec import parse_spec
from core.states import TERMINAL, JobState

router = APIRouter(include_in_schema=False)

Tab = Literal["overview", "config", "files", "timeline"]
CHART_METRICS = ("loss", "eval_loss", "learning_rate", "padding_efficiency", "padded_efficiency")
MOST_POINTS = 2000
LOG_LINES = 500
LAST_LINES = 12
# Kinds of events that stand in the log beside what the processes printed.
LOGGED = ("log", "warning", "eval", "checkpoint", "failure")
LEVELS = {"warning": "warning", "failure": "error", "phase": "note", "eval": "note", "checkpoint": "note"}

# What the trainer found in the loaded model, in words; the keys are the plan's.
PARAMETERS: dict[str, str] = {
    "total_parameters": N_("parameters"),
    "trainable_parameters": N_("of them trained"),
    "quantised_parameters": N_("of them in 4 bits"),
}

# What became of every row and sample, in words; the keys are the plan's.
COUNTS: dict[str, str] = {
    "rows": N_("rows in the data"),
    "rows_refused": N_("refused rows"),
    "rows_beyond_max_samples": N_("rows beyond the maximum"),
    "rows_held_out": N_("rows held out for validation"),
    "rows_taken": N_("rows to train on"),
    "samples": N_("samples made of them"),
    "samples_without_trained_tokens": N_("samples without a trained token, left out"),
    "samples_too_long": N_("samples over the maximum length, left out"),
    "samples_truncated": N_("samples truncated to the maximum length"),
    "samples_split": N_("samples split to the maximum length"),
    "samples_cut_to_nothing": N_("samples without a trained token in what is left, left out"),
    "samples_trained": N_("samples trained an epoch"),
    "pieces": N_("pieces of them, a step's samples"),
    "pieces_without_targets": N_("pieces without a trained token, left out"),
    "targets": N_("trained tokens of these samples"),
    "targets_too_long": N_("trained tokens in samples over the maximum length"),
    "targets_lost": N_("trained tokens lost by cutting samples"),
    "targets_trained": N_("trained tokens left"),
    "cuts": N_("cuts at the ends of wrapped rows"),
    "targets_lost_at_row_ends": N_("trained tokens lost by these cuts"),
    "rows_without_targets": N_("wrapped rows without a trained token, left out"),
    "calls_dropped": N_("conversations whose tool calls the template leaves out, among the first rows"),
    "calls_looked_at": N_("conversations with tool calls among the first rows"),
    "tokens_if_whole": N_("tokens of whole conversations"),
    "tokens_if_split": N_("tokens if each turn were a sample"),
    "samples_validation": N_("samples for validation"),
    "samples_validation_dropped": N_("samples for validation, left out"),
}


@router.get("/jobs/{job_id}")
def job_page(request: Request, services: AnyServices, job_id: str, tab: Tab = "overview") -> Response:
    with services.database.read() as session:
        job = get_job(session, job_id)
        context = job_context(session, services, job, tab)
        context["after"] = _last_event(session, job_id)
        if tab == "overview":
            context["log"] = _log(session, job_id, LOG_LINES)
    root_path = request.scope.get("root_path", "")
    context["live_url"] = ""
    if has_vendor_files() and job.state not in TERMINAL:
        context["live_url"] = f"{root_path}/jobs/{job_id}/live?after={context['after']}&tab={tab}"
    names = ",".join(CHART_METRICS)
    context["metrics_url"] = f"{root_path}/api/v1/jobs/{job_id}/metrics?names={names}&x=step&max_points={MOST_POINTS}"
    return services.templates.TemplateResponse(request, "job.html", context)


@router.post("/jobs/{job_id}/{action}")
def change_job(
    *,
    request: Request,
    services: AnyServices,
    caller: Member,
    job_id: str,
    action: Literal["cancel", "stop", "resume", "checkpoint", "retry", "extend"],
) -> Response:
    now, who = services.clock(), caller.name
    with services.database.write() as session:
        job = get_job(session, job_id)
        shown = job
        match action:
            case "cancel":
                cancel(session, job, now=now, who=who)
            case "stop":
                stop(session, job, now=now, who=who)
            case "resume":
                resume(session, job, now=now, who=who)
            case "checkpoint":
                checkpoint(session, job, now=now, who=who)
            case "retry":
                shown = retry(session, job, now=now, who=who, owner=caller.user_id)
            case "extend":
                shown = extend(session, job, now=now, who=who, owner=caller.user_id, epochs=None, max_steps=None)
        shown_id = shown.id
    services.wake.notify(JOBS_TOPIC, QUEUE_TOPIC, topic_of(job_id))
    return RedirectResponse(f"{request.scope.get('root_path', '')}/jobs/{shown_id}", 303)


def job_context(session: Session, services: Services, job: Job, tab: str) -> dict[str, Any]:
    row = read_rows(session, [job], services.clock())[0]
    parent = session.get(Job, job.parent) if job.parent else None
    context: dict[str, Any] = {
        "job": row,
        "tab": tab,
        "actions": legal_actions(job),
        "parent": parent,
        "trial": None,
        "last_lines": [],
    }
    if job.state == JobState.FAILED:
        # The failure itself is the card that they stand in.
        lines = _log(session, job.id, LAST_LINES + 1)
        context["last_lines"] = [line for line in lines if line["kind"] != "failure"][-LAST_LINES:]
    match tab:
        case "overview":
            context |= {"plan": planned(job)} | trial_context(session, job)
            context["held"] = held_to(session, job, services.clock())
        case "config":
            spec = parse_spec(job.spec)
            context |= {
                "spec_texts": spec_texts(services, spec),
                "choices": told_choices((job.plan or {}).get("choices", [])),
                "weights": weight_facts(job.plan or {}),
                "data_counts": [
                    (translate(COUNTS.get(name, name)), number)
                    for name, number in (job.plan or {}).get("counts", {}).items()
                    if number
                ],
            }
        case "files":
            context |= _files(session, job.id)
        case "timeline":
            context |= _history(session, job.id)
    return context


def weight_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Parameters and bytes of the loaded model; those of a kind of layer where they are trained."""
    facts = [(translate(title), exact(plan[name])) for name, title in PARAMETERS.items() if plan.get(name)]
    kinds = plan.get("trainable_by_kind", {})
    if kinds:
        facts.append((translate(N_("trained by layer")), ", ".join(f"{kind} {count(kinds[kind])}" for kind in kinds)))
    held = plan.get("weight_bytes", {})
    if held:
        facts.append((translate(N_("memory of the weights")), ", ".join(f"{size(held[kind])} {kind}" for kind in held)))
    return facts


def planned(job: Job) -> dict[str, Any] | None:
    """The planned curve, by the function that the trainer asks before each step."""
    plan = job.plan
    if not plan or plan["decay"] not in get_args(Decay):
        return None
    schedule = Schedule(
        peak=plan["peak_learning_rate"],
        total_steps=plan["total_steps"],
        warmup_steps=plan["warmup_steps"],
        decay=plan["decay"],
        min_lr_ratio=plan["min_lr_ratio"],
    )
    return {
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "curve": [[step, lr_at(schedule, step)] for step in curve_steps(schedule, MOST_POINTS)],
    }


def _last_event(session: Session, job_id: str) -> int:
    return session.exec(select(func.max(Event.id)).where(Event.job == job_id)).one() or 0


def _log(session: Session, job_id: str, most: int) -> list[dict[str, Any]]:
    """What was logged, and between it what happened; of a phase only its beginning."""
    begins = (Event.kind == "phase") & (col(Event.data)["done"].as_integer() == 0)
    events = session.exec(
        select(Event)
        .where(Event.job == job_id, col(Event.kind).in_(LOGGED) | begins)
        .order_by(col(Event.id).desc())
        .limit(most)
    ).all()
    return [log_line(event) for event in reversed(events)]


def is_logged(event: Event) -> bool:
    return event.kind in LOGGED or (event.kind == "phase" and event.data.get("done") == 0)


def log_line(event: Event) -> dict[str, Any]:
    clock = datetime.fromtimestamp(event.ts, UTC).strftime("%H:%M:%S")
    level = event.data.get("level", LEVELS.get(event.kind, "info"))
    return {"ts": event.ts, "clock": clock, "level": level, "kind": event.kind, "data": event.data}


def _files(session: Session, job_id: str) -> dict[str, Any]:
    artifacts = select(ArtifactRow).where(ArtifactRow.job == job_id).order_by(ArtifactRow.name)
    checkpoints = (
        select(CheckpointRow)
        .where(CheckpointRow.job == job_id)
        .order_by(col(CheckpointRow.attempt).desc(), col(CheckpointRow.step).desc())
    )
    return {"artifacts": session.exec(artifacts).all(), "checkpoints": session.exec(checkpoints).all()}


def _history(session: Session, job_id: str) -> dict[str, Any]:
    attempts = session.exec(
        select(Attempt, Host.name)
        .join(Host, col(Host.id) == Attempt.host, isouter=True)
        .where(Attempt.job == job_id)
        .order_by(col(Attempt.number).desc())
    ).all()
    moves = session.exec(
        select(Event).where(Event.job == job_id, Event.attempt == 0).order_by(col(Event.id).desc())
    ).all()
    told = ("state", "desired", "who", "actor", "text")
    return {
        "attempts": [
            {
                **attempt.model_dump(include={"number", "outcome", "created_at", "ended_at", "text"}),
                "host": name or attempt.host,
                "devices": ", ".join(attempt.devices or ()),
            }
            for attempt, name in attempts
        ],
        "moves": [{"ts": move.ts, **{name: move.data.get(name) for name in told}} for move in moves],
    }


class LiveFragments:
    """What the streams send as HTML: see app.live."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def job(self, request: Request, job: Job, events: Sequence[Event]) -> str:
        tab = request.query_params.get("tab", "overview")
        with self._services.database.read() as session:
            context = job_context(session, self._services, job, tab)
        context["log"] = [log_line(event) for event in events if is_logged(event)] if tab == "overview" else []
        if not any(event.kind == "plan" for event in events):
            context["plan"] = None
        template = self._services.templates.get_template("job_live.html")
        return template.render(context | frame_context(request))

    def jobs(self, request: Request, jobs: Sequence[Job]) -> str:
        with self._services.database.read() as session:
            rows = read_rows(session, jobs, self._services.clock())
            counts = count_states(session)
        return self._services.templates.get_template("jobs_live.html").render(
            {"rows": rows, "counts": counts} | frame_context(request)
        )
