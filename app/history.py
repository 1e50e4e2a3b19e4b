"""What jobs that ran say of the next one.

When an attempt ends, what a forecast may learn of its job is worked out once and kept in the job's summary
(`past_run`), so that a form reads a few hundred short entries and no metric. A job that runs says it as it stands.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from sqlmodel import Session, col, select

from app.tables import Attempt, Host, Job
from core.past_run import Likeness, PastRun, attention_class
from core.states import ON_A_HOST, Outcome
from core.wire import Device, HostReport

# Of the newest jobs; what ran before them ran long ago.
MOST_JOBS = 300
DRY_RUN = "dry_run"


def remember(session: Session, job: Job, attempt: Attempt, now: float) -> None:
    """Called when an attempt has ended."""
    if attempt.claimed_at is None:
        return
    before = job.summary or {}
    seconds = now - attempt.claimed_at
    has_succeeded = attempt.outcome == Outcome.SUCCEEDED.value
    is_in_one_go = has_succeeded and "busy_s" not in before
    noted: dict[str, Any] = {"busy_s": before.get("busy_s", 0.0) + seconds}
    device = _device(session.get(Host, attempt.host), attempt.devices)
    run = None
    if device is not None:
        run = past_run(
            job, device, attempt.host, seconds=seconds if is_in_one_go else None, has_succeeded=has_succeeded
        )
    if run is not None:
        noted["past_run"] = run.model_dump(mode="json")
    job.summary = before | noted
    session.add(job)
    session.flush()  # `move` reads the row again


def read_history(session: Session) -> list[PastRun]:
    """Newest first; those that run come before."""
    told = col(Job.summary)["past_run"]
    ended = session.exec(select(told).order_by(col(Job.id).desc()).limit(MOST_JOBS))
    return [*_running(session), *(run for stored in ended if (run := _read(stored)) is not None)]


def _running(session: Session) -> Iterator[PastRun]:
    states = [state.value for state in ON_A_HOST]
    jobs = session.exec(select(Job).where(col(Job.state).in_(states)).order_by(col(Job.id).desc()))
    for job in jobs:
        device = _device(session.get(Host, job.host), job.devices or [])
        run = None if device is None or job.host is None else past_run(job, device, job.host)
        if run is not None:
            yield run.model_copy(update={"memory_ratio": None})  # its peak may still come


def _read(stored: Any) -> PastRun | None:
    if stored is None:
        return None
    try:
        return PastRun.model_validate(stored)
    except ValidationError:  # of another release
        return None


def _device(host: Host | None, ids: list[str]) -> Device | None:
    """The first of those that a job has; they are alike."""
    if host is None:
        return None
    devices = HostReport.model_validate(host.report).devices
    return next((device for device in devices if device.id in ids), None)


def past_run(
    job: Job, device: Device, host: str, *, seconds: float | None = None, has_succeeded: bool = False
) -> PastRun | None:
    """`seconds` is given of a job that has succeeded in one go. None where it made no step, goes on from another job's
    steps, which may have been made elsewhere, or only probed learning rates; and where a worker of another release told
    its plan otherwise, for whoever tells its end must not be refused because of it."""
    try:
        return _past_run(job, device, host, seconds=seconds, has_succeeded=has_succeeded)
    except (KeyError, ValidationError):
        return None


def _past_run(job: Job, device: Device, host: str, *, seconds: float | None, has_succeeded: bool) -> PastRun | None:
    plan, summary = job.plan or {}, job.summary or {}
    is_trial = job.trial is not None
    if not summary.get("steps_s") or not plan or job.resume_jobs:
        return None
    if job.trial is not None and job.trial.get("kind") != DRY_RUN:
        return None
    flops = None
    if plan.get("num_flops") and plan.get("num_slots"):
        flops = plan["num_flops"] * summary["slots"] / plan["num_slots"]
    peak, planned_peak = summary.get("memory_peak_bytes"), plan.get("planned_peak_bytes")
    told = {} if is_trial else (job.forecast or {}).get("time", {})
    told_s = told.get("seconds")
    return PastRun(
        job=job.id,
        host=host,
        likeness=_likeness(job.spec, plan, device),
        packing=job.spec["packing"]["mode"],
        is_trial=is_trial,
        has_succeeded=has_succeeded,
        steps=summary["step"],
        step_s=summary["steps_s"],
        slots=summary["slots"],
        flops=flops,
        startup_s=summary.get("startup_s"),
        seconds=None if is_trial else seconds,
        basis=told.get("basis"),
        planned_s=None if told_s is None else told_s / told.get("correction", 1.0),
        told_s=told_s,
        memory_ratio=peak / planned_peak if peak and planned_peak else None,
    )


def _likeness(spec: Mapping[str, Any], plan: Mapping[str, Any], device: Device) -> Likeness:
    """As the trainer resolved what the spec leaves to `auto`."""
    chosen = {choice["field"]: choice["value"] for choice in plan.get("choices", ())}

    def value(part: str, name: str) -> Any:
        return chosen.get(f"{part}.{name}", spec[part][name])

    return Likeness(
        device=device.name,
        num_ranks=spec["parallel"]["devices"],
        model=spec["model"]["base"],
        method=spec["method"]["type"],
        attention=attention_class(plan["attention"]),
        dtype=value("compute", "dtype"),
        recomputes=value("compute", "gradient_checkpointing"),
        zero_stage=value("parallel", "zero_stage"),
        offload=value("parallel", "offload"),
    )
