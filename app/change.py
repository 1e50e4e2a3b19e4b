"""What a spec is held against before launch: the job or the preset that its form began from, and plain padding.

A baseline costs no measuring. It is planned with the profiles that are there; one that would read the data otherwise,
so that a host had to measure it anew, is not compared, and says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from app.jobs import get_job
from app.problems import not_found
from app.profiles import plan_if_measured
from app.services import Services
from core.change import Change, against_plain_padding, compare
from core.errors import USER_FAULTS, Reason, UserError, UserErrors
from core.fix import Value, told
from core.preflight import JobPlan
from core.presets import PRESETS
from core.spec import JobSpec, parse_spec

# What a preset leaves to its user: the model, and which rows there are.
OWN_DATA = ("train", "validation", "format")
# What decides a profile.
READING = (
    "model.base",
    "model.chat_template",
    "data.train",
    "data.validation",
    "data.format",
    "data.train_on",
    "data.multi_turn",
)


@dataclass(frozen=True)
class Origin:
    """What a form began from, by key and id; empty: nothing."""

    preset: str = ""
    job: str = ""


@dataclass(frozen=True)
class Comparison:
    """`change`, or why there is none."""

    against: Literal["job", "preset", "plain_padding"]
    key: str  # the job's id, the preset's key
    name: str
    change: Change | None
    why_not: Reason | None = None

    @property
    def is_same(self) -> bool:
        return self.change is not None and self.change.is_same_optimisation


class ChangeView(BaseModel):
    """What the settings change against one baseline."""

    against: Literal["job", "preset", "plain_padding"]
    key: str  # the job's id, the preset's key
    is_same_optimisation: bool | None  # null: not compared
    lines: list[str]  # in words; where nothing is compared, why
    keeps: dict[str, Any]  # fields of the spec that give the baseline's optimisation; null gives a field up


def comparisons(services: Services, plan: JobPlan, spec: JobSpec, origin: Origin) -> tuple[Comparison, ...]:
    """The one that a lock holds to is the first. `spec` is the plan's as it was given. Raises Problem 404 on a job or
    preset that isn't there."""
    return tuple(_compare(services, plan, spec, origin))


def _compare(services: Services, plan: JobPlan, spec: JobSpec, origin: Origin) -> Iterator[Comparison]:
    if origin.job:
        with services.database.read() as session:
            job = get_job(session, origin.job)
        change, why_not = _against(services, plan, spec, parse_spec(job.spec))
        yield Comparison("job", job.id, job.name, change, why_not)
    if origin.preset:
        preset = next((each for each in PRESETS if each.key == origin.preset), None)
        if preset is None:
            raise not_found("preset", origin.preset)
        change, why_not = _against(services, plan, spec, _with_own_data(preset.spec, spec))
        yield Comparison("preset", preset.key, preset.title, change, why_not)
    padding = against_plain_padding(plan)
    if padding is not None:
        yield Comparison("plain_padding", "", "", padding)


def _with_own_data(preset: Any, spec: JobSpec) -> JobSpec:
    written = spec.model_dump(mode="json")
    data = {**preset.get("data", {}), **{name: written["data"][name] for name in OWN_DATA}}
    return parse_spec({**preset, "model": written["model"], "data": data})


def _against(
    services: Services, plan: JobPlan, spec: JobSpec, baseline: JobSpec
) -> tuple[Change | None, Reason | None]:
    try:
        planned = plan_if_measured(services, baseline)
    except USER_FAULTS as fault:
        return None, Reason("change.not_runnable", {"problem": _sentence(fault)})
    if planned is None:
        return None, Reason("change.not_measured", {"settings": told(dict(_read_otherwise(spec, baseline)))})
    return compare(plan, planned), None


def _sentence(fault: UserError | UserErrors) -> str:
    return fault.errors[0].text()


def _read_otherwise(spec: JobSpec, baseline: JobSpec) -> Iterator[tuple[str, Value]]:
    mine, theirs = spec.model_dump(mode="json"), baseline.model_dump(mode="json")
    for field in READING:
        part, name = field.split(".")
        if mine[part][name] != theirs[part][name]:
            yield field, theirs[part][name]


def view_of(comparison: Comparison) -> ChangeView:
    change = comparison.change
    lines = change.lines if change is not None else (comparison.why_not,)
    return ChangeView(
        against=comparison.against,
        key=comparison.key,
        is_same_optimisation=None if change is None else change.is_same_optimisation,
        lines=[line.text() for line in lines if line is not None],
        keeps={} if change is None else dict(change.keeps),
    )
