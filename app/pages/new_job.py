"""The form of a new job, and the panel beside it that says what will happen.

Whatever is wrong with what was typed is said beside the input, and what was typed stays. The launch is one
transaction with the form's key: a button pressed twice, or a reply that got lost and a form sent again, is one job.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session, select

from app.auth import AnyCaller, Caller, Member
from app.change import Origin
from app.forecast import forecast_to_keep
from app.forms import (
    ALTERNATIVES,
    CONTROLS,
    SECTIONS,
    FormState,
    spec_of_form,
    state_of_form,
    state_of_spec,
    written_spec,
)
from app.jobs import JOBS_TOPIC, QUEUE_TOPIC, create_job, get_job
from app.pages.preflight import preflight_context
from app.pages.verdict import read_fix
from app.services import AnyServices, Services
from app.tables import Dataset, IdempotentReply, Job
from core.errors import USER_FAULTS, UserError
from core.presets import PRESETS
from core.spec import JobSpec, parse_spec
from core.trial import AnyTrial, parse_trial

router = APIRouter(include_in_schema=False)

ROUTE = "POST /jobs/new"  # of the form's keys
MOST_YAML_CHARACTERS = 200_000
# Open from the start; a group with an error or a value that isn't the default opens by itself.
OPEN_GROUPS = frozenset({"Job", "Model", "Data", "Packing", "Batch", "Method", "Schedule and optimizer"})


@dataclass(frozen=True)
class Beginning:
    """What a form was filled from, and whether that optimisation is to be kept; it travels with the form."""

    preset: str = ""  # or "yaml"
    job: str = ""
    is_locked: bool = False

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]]) -> "Beginning":
        given = dict(pairs)
        return cls(given.get("_preset", ""), given.get("_job", ""), "_lock" in given)

    @property
    def origin(self) -> Origin:
        is_preset = any(each.key == self.preset for each in PRESETS)
        return Origin(self.preset if is_preset else "", self.job)


@router.get("/jobs/new")
def new_job_page(
    request: Request, services: AnyServices, preset: str = "", dataset: str = "", learning_rate: str = ""
) -> Response:
    origin_id = request.query_params.get("from")
    origin = None
    spec: Mapping[str, Any] = {}
    if origin_id:
        with services.database.read() as session:
            origin = get_job(session, origin_id)
        spec = written_spec(parse_spec(origin.spec))
    for each in PRESETS:
        if each.key == preset:
            spec = each.spec
    if dataset:
        spec = {**spec, "data": {**spec.get("data", {}), "train": [{"dataset": dataset}]}}
    began = Beginning(preset, origin.id if origin else "")
    state = state_of_spec(spec)
    if learning_rate:  # as a probe suggests it
        state = state.with_inputs({"schedule.learning_rate": learning_rate})
    return _page(request, services, state, began)


@router.post("/jobs/new/yaml")
async def fill_from_yaml(request: Request, services: AnyServices) -> Response:
    """Pasted YAML becomes a filled form; nothing is launched."""
    text = str((await request.form()).get("_yaml", ""))
    try:
        spec = read_yaml(text)
    except UserError as error:
        return _page(request, services, state_of_spec({}), Beginning("yaml"), yaml_text=text, yaml_error=error)
    state = state_of_spec(spec)
    try:
        parse_spec(spec)
    except USER_FAULTS as fault:
        state = state.with_errors(fault.errors)
    return _page(request, services, state, Beginning("yaml"), yaml_text=text)


@router.post("/jobs/new")
async def launch(request: Request, services: AnyServices, caller: Member) -> Response:
    pairs = await _pairs(request)
    key = next((value for name, value in pairs if name == "_key" and 0 < len(value) <= 64), new_key())
    state = state_of_form(pairs)
    try:
        spec = parse_spec(spec_of_form(state))
        trial = _trial_of(pairs)
        forecast = await run_in_threadpool(forecast_to_keep, services, spec)
        job_id = await run_in_threadpool(_launch_once, services, caller, key, spec, trial=trial, forecast=forecast)
    except USER_FAULTS as fault:
        return _page(request, services, state.with_errors(fault.errors), Beginning.of(pairs), key=key)
    services.wake.notify(QUEUE_TOPIC, JOBS_TOPIC)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/jobs/{job_id}", 303)


@router.post("/jobs/preflight")
async def preflight(request: Request, services: AnyServices, caller: AnyCaller) -> Response:
    """The panel; without JavaScript the page with it, and with the fix of the button that was pressed."""
    pairs = await _pairs(request)
    state, began = state_of_form(pairs), Beginning.of(pairs)
    for fix in (value for name, value in pairs if name == "_fix"):
        state = state.with_inputs(read_fix(fix))
    device = dict(pairs).get("_device", "")
    context = await run_in_threadpool(
        preflight_context, services, state, began.origin, is_locked=began.is_locked, device=device
    )
    if "hx-request" in request.headers:
        return services.templates.TemplateResponse(request, "preflight.html", context | {"is_page": False})
    return _page(request, services, context["state"], began, preflight=context)


def _trial_of(pairs: Sequence[tuple[str, str]]) -> AnyTrial | None:
    """What the button that was pressed asks for, where it wasn't the launch."""
    kind = dict(pairs).get("_trial")
    return None if kind is None else parse_trial({"kind": kind})


def _launch_once(
    services: Services,
    caller: Caller,
    key: str,
    spec: JobSpec,
    *,
    trial: AnyTrial | None,
    forecast: dict[str, Any] | None,
) -> str:
    if trial is not None:
        # One form is tried, changed and tried again, and launched in the end: what is tried is part of the key.
        key = hashlib.sha256(f"{key} {trial.model_dump_json()} {spec.model_dump_json()}".encode()).hexdigest()
    author: dict[str, Any] = {"who": caller.name, "owner": caller.user_id}
    with services.database.write() as session:
        before = session.get(IdempotentReply, (key, caller.owner, ROUTE))
        if before is not None and before.body is not None:
            return before.body.decode()
        job = create_job(session, spec, now=services.clock(), **author, trial=trial, forecast=forecast)
        session.add(
            IdempotentReply(
                key=key,
                owner=caller.owner,
                route=ROUTE,
                body_sha256="",  # the key belongs to one rendering of the form, whatever is sent with it
                status=303,
                body=job.id.encode(),
                created_at=services.clock(),
            )
        )
        return job.id


def new_key() -> str:
    return uuid.uuid4().hex


async def _pairs(request: Request) -> list[tuple[str, str]]:
    return [(name, value) for name, value in (await request.form()).multi_items() if isinstance(value, str)]


def read_yaml(text: str) -> dict[str, Any]:
    """A mapping, maybe below `spec:` as the API takes it. Raises UserError."""
    if len(text) > MOST_YAML_CHARACTERS:
        raise UserError("spec.too_long", "_yaml", length=len(text), limit=MOST_YAML_CHARACTERS)
    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or "it cannot be read")
        raise UserError("spec.yaml", "_yaml", problem=problem, line=mark.line + 1 if mark else 1) from error
    except RecursionError as error:
        raise UserError("spec.yaml", "_yaml", problem="it is nested too deep", line=1) from error
    if isinstance(spec, dict) and set(spec) == {"spec"}:
        spec = spec["spec"]
    if not isinstance(spec, dict):
        raise UserError("spec.not_a_mapping", "_yaml", kind=type(spec).__name__)
    return spec


def form_pairs(state: FormState) -> list[tuple[str, str]]:
    """A filled form as hidden inputs."""
    train = [
        pair for name, weight in state.train for pair in (("data.train.dataset", name), ("data.train.weight", weight))
    ]
    return [*state.values.items(), *train]


def _page(
    request: Request,
    services: Services,
    state: FormState,
    began: Beginning,
    *,
    key: str | None = None,
    yaml_text: str = "",
    yaml_error: UserError | None = None,
    preflight: Mapping[str, Any] | None = None,
) -> Response:
    with services.database.read() as session:
        datasets = _dataset_names(session)
        origin = session.get(Job, began.job) if began.job else None
    shown_advanced = _notable(state)
    faulty = {group_of(input) for input, found in state.errors.items() if found}
    context = {
        **(preflight or {}),
        "is_page": True,
        "state": state,
        "sections": SECTIONS,
        "presets": PRESETS,
        "preset": began.preset,
        "origin": origin,
        "is_locked": began.is_locked,
        "datasets": datasets,
        "key": key or new_key(),
        "yaml_text": yaml_text,
        "yaml_error": yaml_error,
        "shown_advanced": shown_advanced,
        "open_groups": OPEN_GROUPS | faulty | {CONTROLS[key].group for key in shown_advanced},
        "has_preflight": preflight is not None,
    }
    status = 422 if state.all_errors or yaml_error else 200
    return services.templates.TemplateResponse(request, "new_job.html", context, status_code=status)


def group_of(input: str) -> str:
    if input in CONTROLS:
        return CONTROLS[input].group
    return next((choice.group for choice in ALTERNATIVES if choice.key == input), "Data")


def _notable(state: FormState) -> list[str]:
    """Advanced knobs that must be seen: set to something else than the default, or wrong."""
    return [
        control.key
        for section in SECTIONS
        for control in section.advanced
        if state.value(control.key) != control.default or state.of(control.key)
    ]


def _dataset_names(session: Session) -> Sequence[str]:
    return session.exec(select(Dataset.name).order_by(Dataset.name)).all()
