"""What a job would do, for programs: POST /api/v1/jobs/preflight, and a data set's profile."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from app.change import ChangeView, Comparison, Origin, comparisons
from app.change import view_of as view_of_change
from app.forecast import ForecastView, forecast_job, remarks_on_disk
from app.forecast import view_of as view_of_forecast
from app.preflight_memory import Memory, memory_of
from app.preflight_packing import (
    CostBasis,
    Cut,
    FirstRow,
    LengthBin,
    Lengths,
    Way,
    cost_basis,
    lengths_of,
    row_of,
    way_of,
    ways_of,
)
from app.problems import faults_lie_in_spec
from app.profiles import Wanted, plan_for, read_result, want_profiles
from app.prospects import PlannedFor, look_out
from app.prospects import view_of as view_of_prospects
from app.services import AnyServices
from core.curve_report import report_curve
from core.lengths import bin_lengths, compare_cuts
from core.packing import as_lengths
from core.packing_report import busiest_share, first_row, report_lengths
from core.preflight import JobPlan
from core.profile import DataProfile, Duplicates, TokenPreview
from core.schedule import lr_at
from core.spec import parse_spec
from core.unbuilt import refuse_unbuilt
from core.verdict import Remark as Said
from core.verdict import verdict as verdict_of

router = APIRouter()

RETRY_AFTER_S = 1
MAX_CURVE_STEPS = 100_000


class PreflightRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    spec: dict[str, Any]
    # What it is held against beside plain padding:
    preset: str = ""
    job: str = ""  # the id of one that it was cloned from
    device: str = ""  # to plan for: a device's name or a host's; empty: the likeliest to get the job


class Remark(BaseModel):
    level: Literal["warning", "info"]
    field: str
    code: str
    text: str
    fixes: list[dict[str, Any]]  # fields of the spec with values, any one of which mends it; null gives a field up


class Choice(BaseModel):
    field: str
    value: str | int | float | bool | None
    reason: str


class Preflight(BaseModel):
    total_steps: int
    steps_per_epoch: int
    rows: int  # of the first epoch
    warmup_steps: int
    padding_efficiency: float
    padded_efficiency: float
    fill: float
    learning_rate: list[float]  # of the steps 0, stride, 2 x stride, ... up to total_steps
    learning_rate_stride: int  # 1 up to 100,000 steps
    warmup_tokens: int
    warmup_trained_tokens: int
    evaluation_steps: list[int]
    checkpoint_steps: list[int]  # that are certain: a best loss and the clock may add some
    verdict: list[Remark]  # empty: nothing to remark. What can't run is a 422 instead
    change: list[ChangeView]  # against the job, the preset and plain padding, as far as there are any
    choices: list[Choice]  # what each `auto` became, and why
    counts: dict[str, int]  # every row, sample and trained token under what becomes of it
    ways: list[Way]  # the job's own is the first
    baseline: Way  # plain padding, 8 samples to a batch in their order: what costs are relative to
    cost_basis: CostBasis  # slots where the model's sizes are not known
    busiest_rank_share: float | None  # of the slots of the first steps; null with one rank
    first_row: FirstRow
    histogram: Lengths
    planned_for: PlannedFor
    memory: Memory
    forecast: ForecastView
    max_length: int
    row_length: int
    samples: int
    validation_samples: int
    tokens: int  # of one epoch
    trained_tokens: int  # of one epoch


class Profiling(BaseModel):
    state: Literal["profiling"] = "profiling"
    profiles: dict[str, str]  # data set -> wanted | running | ready
    progress: dict[str, float]  # of those that run the share that is done


class ProfileQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    max_length: Annotated[int | None, Field(ge=1)] = None  # tokens
    train_on: str = "assistant"
    multi_turn: str = "auto"
    format: str = "auto"
    chat_template: str | None = None


class ProfileView(BaseModel):
    state: Literal["ready"] = "ready"
    format: str
    multi_turn: str
    multi_turn_reason: str
    rows: int
    refused_rows: int
    samples: int
    tokens: int
    trained_tokens: int
    longest: int  # tokens
    samples_beyond: int | None  # longer than the max_length that was asked about
    histogram: list[LengthBin]  # of all samples
    cuts: list[Cut]  # at lengths worth comparing, of the samples that have something to teach
    duplicates: Duplicates | None  # null where a job measured the data on its way, which does not look for them
    preview: tuple[TokenPreview, ...]


@router.post(
    "/api/v1/jobs/preflight",
    tags=["jobs"],
    responses={202: {"model": Profiling}},
    dependencies=[Depends(faults_lie_in_spec)],
)
def preflight(body: PreflightRequest, services: AnyServices) -> Preflight:
    """202 while a host measures the data, then 200; 422 with every fault where the job can't run."""
    spec = parse_spec(body.spec)
    refuse_unbuilt(spec)
    prospects = look_out(services, spec)
    if body.device:
        prospects = prospects.looking_at(body.device)
    plan = plan_for(services, spec, prospects.device)
    if isinstance(plan, Wanted):
        return _profiling(plan)  # type: ignore[return-value]  # a Response
    forecast = forecast_job(services, plan, spec)
    remarks = [*verdict_of(plan), *prospects.remarks, *remarks_on_disk(services, forecast, spec)]
    compared = comparisons(services, plan, spec, Origin(body.preset, body.job))
    return preflight_of(plan, compared, remarks, view_of_forecast(forecast), view_of_prospects(prospects))


def preflight_of(
    plan: JobPlan,
    compared: Sequence[Comparison],
    remarks: Sequence[Said],
    forecast: ForecastView,
    planned_for: PlannedFor,
) -> Preflight:
    facts, curve = plan.plan_event(), report_curve(plan)
    stride = -(-plan.total_steps // MAX_CURVE_STEPS)
    renamed = {
        "rows": "num_rows",
        "samples": "num_samples",
        "validation_samples": "num_validation_samples",
        "tokens": "num_tokens",
        "trained_tokens": "num_trained_tokens",
    }
    return Preflight.model_validate(
        {
            **facts,
            **{name: facts[source] for name, source in renamed.items()},
            "learning_rate": [lr_at(plan.schedule, step) for step in range(0, plan.total_steps + 1, stride)],
            "learning_rate_stride": stride,
            "warmup_tokens": curve.warmup_tokens,
            "warmup_trained_tokens": curve.warmup_trained_tokens,
            "evaluation_steps": curve.evaluation_steps,
            "checkpoint_steps": curve.checkpoint_steps,
            "verdict": [_remark(remark) for remark in remarks],
            "change": [view_of_change(comparison) for comparison in compared],
            "ways": ways_of(plan.packing),
            "baseline": way_of(plan.packing, plan.packing.baseline),
            "cost_basis": cost_basis(plan.packing),
            "busiest_rank_share": busiest_share(plan),
            "first_row": row_of(first_row(plan)),
            "histogram": lengths_of(report_lengths(plan)),
            "planned_for": planned_for,
            "memory": memory_of(plan.memory),
            "forecast": forecast,
            "choices": [Choice(field=c.field, value=c.value, reason=c.text()) for c in plan.choices],
        }
    )


def _remark(said: Said) -> Remark:
    return Remark(
        level=said.level,
        field=said.field,
        code=said.said.code,
        text=said.said.text(),
        fixes=[dict(fix) for fix in said.fixes],
    )


def _profiling(wanted: Wanted) -> Response:
    states = {name: profile.state for name, profile in wanted.profiles.items()}
    body = Profiling(profiles=states, progress=wanted.progress)
    return JSONResponse(body.model_dump(), status_code=202, headers={"Retry-After": str(RETRY_AFTER_S)})


@router.get("/api/v1/datasets/{name}/profile", tags=["datasets"], responses={202: {"model": Profiling}})
def get_profile(name: str, asked: Annotated[ProfileQuery, Query()], services: AnyServices) -> ProfileView:
    """A data set as this model would see it. 202 while a host measures it."""
    policy = asked.model_dump(include={"train_on", "multi_turn", "format"})
    spec = parse_spec(
        {
            "model": {"base": asked.model, "chat_template": asked.chat_template},
            "data": {"train": [{"dataset": name}], **policy},
        }
    )
    wanted = want_profiles(services, spec)
    wanted.refuse_failed()
    if not wanted.is_ready:
        return _profiling(wanted)  # type: ignore[return-value]  # a Response
    context_length = wanted.model.profile.context_length
    return view_of(read_result(wanted.profiles[name]), asked.max_length, context_length)


def view_of(profile: DataProfile, max_length: int | None, context_length: int) -> ProfileView:
    lengths = profile.sample_length
    bins = bin_lengths(as_lengths(lengths), as_lengths(profile.sample_trained))
    return ProfileView(
        format=profile.format,
        multi_turn=profile.multi_turn,
        multi_turn_reason=profile.multi_turn_reason,
        rows=profile.num_rows,
        refused_rows=profile.num_refused,
        samples=len(lengths),
        tokens=sum(lengths),
        trained_tokens=sum(profile.sample_trained),
        longest=max(lengths, default=0),
        samples_beyond=None if max_length is None else sum(length > max_length for length in lengths),
        histogram=[LengthBin.model_validate(each) for each in bins],
        cuts=[Cut.model_validate(cut) for cut in compare_cuts(profile, context_length).cuts],
        duplicates=profile.duplicates,
        preview=profile.preview,
    )
