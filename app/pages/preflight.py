"""The panel beside the form: what will happen, worked out by the functions that the trainer runs."""

from contextlib import suppress
from typing import Any

from app.change import Origin, comparisons
from app.forecast import forecast_job, remarks_on_disk
from app.forms import FormState, as_text, spec_of_form
from app.pages.curve_drawing import draw_curve
from app.pages.environment import translate
from app.pages.memory_bars import draw_memory
from app.pages.model_details import model_details
from app.pages.packing_drawing import packing_context
from app.pages.spec_texts import spec_texts
from app.pages.verdict import button_of, lines_of_errors, lines_of_lock, lines_of_plan, lines_of_remarks
from app.profiles import Wanted, estimate_plan, plan_for
from app.prospects import look_out
from app.services import Services
from core.errors import TEXTS, USER_FAULTS, Reason, UserError
from core.preflight import JobPlan
from core.spec import JobSpec, parse_spec
from core.unbuilt import refuse_unbuilt
from core.verdict import saved_by_whole

OF_HOSTS = ("host.", "model.", "profile.")  # errors that end without anything being typed


def preflight_context(
    services: Services, state: FormState, origin: Origin | None = None, *, is_locked: bool = False, device: str = ""
) -> dict[str, Any]:
    """What the panel shows of a form as it stands, held against what it began from; planned for `device` where the job
    may come to it, else for the likeliest."""
    context: dict[str, Any] = {
        "state": state,
        "is_profiling": False,
        "prospects": None,
        "device": device,
        "waiting": None,
        "model": None,
        "may_pass": False,
        "verdict": [],
        "changes": [],
        "report": None,
        "forecast": None,
        "curve": None,
        "spec_texts": [],
    }
    try:
        spec = parse_spec(spec_of_form(state))
        context["spec_texts"] = spec_texts(services, spec)
        refuse_unbuilt(spec)
        prospects = look_out(services, spec)
        if device:
            with suppress(UserError):  # one that it could come to before something else was changed
                prospects = prospects.looking_at(device)
        context["prospects"] = prospects
        plan = plan_for(services, spec, prospects.device)
    except USER_FAULTS as fault:
        # A host that has the model may come at any moment; what was typed stays wrong until it is changed.
        may_pass = all(error.code.startswith(OF_HOSTS) for error in fault.errors)
        state = state.with_errors(fault.errors)
        return context | {"state": state, "verdict": lines_of_errors(state), "may_pass": may_pass}
    if not isinstance(plan, JobPlan):
        return context | {"is_profiling": True} | _while_waiting(services, spec, plan)
    compared = comparisons(services, plan, spec, origin or Origin())
    forecast = forecast_job(services, plan, spec)
    on_disk = lines_of_remarks(remarks_on_disk(services, forecast, spec))
    return context | {
        "forecast": forecast,
        "verdict": [
            *lines_of_plan(plan),
            *lines_of_remarks(prospects.remarks),
            *on_disk,
            *(lines_of_lock(compared) if is_locked else ()),
        ],
        "changes": [(each, each.change and button_of(each.change.keeps)) for each in compared],
        "report": _report(plan),
        "curve": draw_curve(plan),
        "model": model_details(plan.model, spec.model.chat_template),
    }


def _while_waiting(services: Services, spec: JobSpec, wanted: Wanted) -> dict[str, Any]:
    """How far the measuring is, and what a sample of the rows shows meanwhile."""
    estimate = estimate_plan(services, spec, wanted)
    shown: dict[str, Any] = {
        "waiting": {"progress": min(wanted.progress.values(), default=None), "estimate": estimate},
        "model": model_details(wanted.model.profile, spec.model.chat_template),
    }
    if estimate is not None:
        plan = estimate.plan
        shown |= {
            "verdict": lines_of_plan(plan),
            "report": _report(plan),
            "curve": draw_curve(plan),
            "forecast": forecast_job(services, plan, spec),
        }
    return shown


def _report(plan: JobPlan) -> dict[str, Any]:
    facts = plan.plan_event()
    saved = saved_by_whole(plan.all_counts)
    return facts | {
        "saved_by_whole": None if saved is None else saved.text(translate),
        "choices": told_choices(facts["choices"]),
        "packing": packing_context(plan),
        "memory": draw_memory(plan.memory),
        "why_no_memory": plan.memory.unknown,
    }


def told_choices(choices: Any) -> list[dict[str, Any]]:
    """What each `auto` became, with its reason in words; a code of a newer trainer's has none here."""
    return [
        {
            "field": choice["field"],
            "value": as_text(choice["value"]),
            "why": Reason(choice["code"], choice["parameters"]).text(translate) if choice["code"] in TEXTS else "",
        }
        for choice in choices
    ]
