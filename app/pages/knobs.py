"""A knob explained: on a page of its own, and beside its input with figures of the job that the form describes."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from app.auth import AnyCaller
from app.forms import FormState, spec_of_form, state_of_form
from app.knobs import TITLES, knob_html
from app.pages.environment import fragment
from app.problems import not_found
from app.profiles import plan_for
from app.services import AnyServices, Services
from core.errors import USER_FAULTS, Reason
from core.knob_figures import figures
from core.preflight import JobPlan
from core.spec import parse_spec

router = APIRouter(include_in_schema=False)


@router.get("/knobs/{name}")
def knob_page(request: Request, services: AnyServices, name: str) -> Response:
    return services.templates.TemplateResponse(request, "knob.html", _context(request, name))


@router.post("/knobs/{name}")
async def knob_beside_form(request: Request, services: AnyServices, caller: AnyCaller, name: str) -> Response:
    """The same as a fragment, with what it means for the form that was sent along."""
    context = _context(request, name)
    pairs = [(key, value) for key, value in (await request.form()).multi_items() if isinstance(value, str)]
    context["figures"] = await run_in_threadpool(_figures, services, state_of_form(pairs), name)
    return fragment(services.templates, request, "knob.html", "knob", context)


def _context(request: Request, name: str) -> dict[str, Any]:
    if name not in TITLES:
        raise not_found("knob", name)
    base = f"{request.scope.get('root_path', '')}/knobs"
    return {"name": name, "title": TITLES[name], "titles": TITLES, "html": knob_html(name, base), "figures": None}


def _figures(services: Services, state: FormState, name: str) -> tuple[Reason, ...]:
    """None where the form can't be planned yet, which the panel says why."""
    try:
        plan = plan_for(services, parse_spec(spec_of_form(state)))
    except USER_FAULTS:
        return ()
    return figures(name, plan) if isinstance(plan, JobPlan) else ()
