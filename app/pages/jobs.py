"""The list of jobs: filtered in the address, its rows kept fresh by one stream."""

from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy import ColumnElement, exists, or_
from sqlmodel import col, func, select

from app.auth import AnyCaller
from app.forms import state_of_spec
from app.pages.environment import fragment, has_vendor_files
from app.pages.job_row import MOST_ROWS, count_states, read_rows
from app.pages.new_job import form_pairs, new_key
from app.services import AnyServices
from app.tables import Event, Job, User
from core.presets import PRESETS
from core.states import JobState

router = APIRouter(include_in_schema=False)


@router.get("/jobs")
def jobs_page(request: Request, services: AnyServices, caller: AnyCaller, q: str = "", state: str = "") -> Response:
    state = state if state in [each.value for each in JobState] else ""
    conditions = [_matches(word) for word in q.split()]
    if state:
        conditions.append(col(Job.state) == state)
    with services.database.read() as session:
        newest = session.exec(select(func.max(Event.id))).one() or 0
        found = session.exec(
            select(Job).where(*conditions).order_by(col(Job.created_at).desc(), col(Job.id).desc()).limit(MOST_ROWS)
        ).all()
        context: dict[str, Any] = {
            "rows": read_rows(session, found, services.clock()),
            "num_found": session.exec(select(func.count()).select_from(Job).where(*conditions)).one(),
            "counts": count_states(session),
        }
    given = {name: value for name, value in (("q", q), ("state", state)) if value}
    context |= {
        "q": q,
        "state": state,
        "states": [each.value for each in JobState],
        "num_all": sum(number for _, number in context["counts"]),
        "query": f"?{urlencode(given)}" if given else "",
        "demo": form_pairs(state_of_spec(next(preset.spec for preset in PRESETS if preset.key == "demo"))),
        "key": new_key(),
    }
    is_live = has_vendor_files() and context["num_all"] > 0
    context["live_url"] = f"{request.scope.get('root_path', '')}/jobs/live?after={newest}" if is_live else ""
    if "hx-request" in request.headers:
        return fragment(services.templates, request, "jobs.html", "job_rows", context)
    return services.templates.TemplateResponse(request, "jobs.html", context)


def _matches(word: str) -> ColumnElement[bool]:
    tag = func.json_each(Job.tags).table_valued("value", name="tag")
    model = col(Job.spec)["model"]["base"].as_string()
    owner = select(User.id).where(User.id == Job.owner, col(User.name).icontains(word, autoescape=True))
    return or_(
        col(Job.name).icontains(word, autoescape=True),
        col(Job.id).icontains(word, autoescape=True),
        model.icontains(word, autoescape=True),
        exists(select(1).select_from(tag).where(tag.c.value.icontains(word, autoescape=True))),
        exists(owner),
    )
