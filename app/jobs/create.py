"""A job spec becomes a job in the queue.

Everything that the server can know is settled here, once: the spec is parsed, what this release lacks is refused, the
base model is one that a host has, the adapter to start from is there, and each data set becomes `NAME@VERSION` in the
stored spec. So a version uploaded while the job waits, or before it is resumed, retried or cloned, does not change what
it learns from.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlmodel import Session

from app.datasets.references import find_version, references
from app.datasets.store import VERSION_DIGITS
from app.ids import new_id
from app.jobs.adapters import require_adapter
from app.jobs.moves import enter
from app.models import resolve_model
from app.tables import Job
from core.errors import UserError, UserErrors
from core.presets import auto_learning_rate, refuse_above_context
from core.spec import JobSpec, ValidationDataset, job_name, parse_spec
from core.states import JobState
from core.trial import AnyTrial, RateProbe, rates_around, trial_name
from core.unbuilt import refuse_unbuilt


@dataclass(frozen=True)
class Origin:
    """Where a job comes from: the job that it retries or extends, and whose checkpoints it may start from."""

    parent: str | None = None
    kind: str | None = None
    resume_jobs: tuple[str, ...] = ()
    pinned_host: str | None = None


def create_job(
    session: Session,
    spec: object,
    *,
    now: float,
    who: str | None,
    owner: str | None,
    trial: AnyTrial | None = None,
    forecast: dict[str, Any] | None = None,
) -> Job:
    """The job, or a trial of it; `forecast` is what a job will be held to, a trial is not. Raises UserError or
    UserErrors, whose fields are the spec's keys."""
    parsed = parse_spec(spec)
    refuse_unbuilt(parsed)
    return insert_job(session, parsed, now=now, who=who, owner=owner, trial=trial, forecast=forecast)


def insert_job(
    session: Session,
    spec: JobSpec,
    *,
    now: float,
    who: str | None,
    owner: str | None,
    origin: Origin | None = None,
    trial: AnyTrial | None = None,
    forecast: dict[str, Any] | None = None,
) -> Job:
    origin = origin or Origin()
    spec = settle(session, spec)
    trial = settle_trial(session, spec, trial)
    name = job_name(spec, datetime.fromtimestamp(now, UTC).date().isoformat())
    stored = spec.model_dump(mode="json")
    job = Job(
        id=new_id("job"),
        name=name if trial is None else trial_name(trial, name),
        owner=owner,
        spec=stored,
        spec_sha256=hashlib.sha256(json.dumps(stored, sort_keys=True, ensure_ascii=False).encode()).hexdigest(),
        tags=list(spec.tags),
        notes=spec.notes,
        priority=spec.priority,
        trial=None if trial is None else trial.model_dump(mode="json"),
        forecast=forecast if trial is None else None,
        state=JobState.QUEUED.value,
        parent=origin.parent,
        parent_kind=origin.kind,
        resume_jobs=list(origin.resume_jobs),
        pinned_host=origin.pinned_host,
        created_at=now,
        queued_at=now,
        rev=1,
    )
    enter(session, job, now=now, who=who)
    return job


def settle(session: Session, spec: JobSpec) -> JobSpec:
    """The spec with its data sets pinned to versions. Raises UserErrors on a model, adapter or data that isn't there,
    and on a length that the model can't take."""
    faults: list[UserError] = []
    pinned: dict[str, str] = {}
    try:
        model = resolve_model(session, spec.model.base)
        if isinstance(spec.data.max_length, int):
            refuse_above_context(spec.data.max_length, model.profile.context_length)
    except UserError as fault:
        faults.append(fault)
    if spec.model.adapter is not None:
        try:
            require_adapter(session, spec.model.adapter)
        except UserError as fault:
            faults.append(fault)
    for field, reference in references(spec):
        try:
            found = find_version(session, reference, field)
        except UserError as fault:
            faults.append(fault)
        else:
            pinned[reference] = f"{found.dataset.name}@{found.version.sha256[:VERSION_DIGITS]}"
    if faults:
        raise UserErrors(faults)
    stored: dict[str, Any] = spec.model_dump(mode="json")
    for part in stored["data"]["train"]:
        part["dataset"] = pinned[part["dataset"]]
    if isinstance(spec.data.validation, ValidationDataset):
        stored["data"]["validation"]["dataset"] = pinned[spec.data.validation.dataset]
    return parse_spec(stored)


def settle_trial(session: Session, spec: JobSpec, trial: AnyTrial | None) -> AnyTrial | None:
    """With the rates that a probe will try: around the spec's own, where it names none."""
    if not isinstance(trial, RateProbe) or trial.rates:
        return trial
    rate = spec.schedule.learning_rate
    if rate == "auto":
        rate, _ = auto_learning_rate(spec.method, resolve_model(session, spec.model.base).profile.num_parameters)
    return trial.model_copy(update={"rates": rates_around(rate)})
