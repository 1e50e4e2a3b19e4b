"""The list of jobs: filtered and sorted in the address, its rows kept fresh by one stream; and as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import false
from sqlmodel import col, func, select

from app.auth import AnyCaller
from app.forms import state_of_spec
from app.jobs.search import NEWEST, SORTS, Condition, condition, order
from app.pages.environment import fragment, has_vendor_files
from app.pages.job_row import JobRow, count_states, read_rows
from app.pages.new_job import form_pairs, new_key
from app.services import AnyServices, Services
from app.tables import Event, Job
from core.errors import N_, UserError
from core.filter import FIELDS, parse_filter
from core.presets import PRESETS
from core.states import JobState

router = APIRouter(include_in_schema=False)

# Of the table: title, what it is sorted by, whether it holds numbers.
COLUMNS: tuple[tuple[str, str, bool], ...] = (
    (N_("Name"), "name", False),
    (N_("State"), "state", False),
    (N_("Progress"), "", False),
    (N_("Loss"), "loss", True),
    (N_("Eval loss"), "eval_loss", True),
    (N_("Method"), "", False),
    (N_("Packing efficiency"), "efficiency", True),
    (N_("Tokens/s"), "tokens_per_s", True),
    (N_("Host"), "", False),
    (N_("Owner"), "", False),
    (N_("Created"), "created", False),
)
# Sorted by these for the first time, the largest comes first.
LARGEST_FIRST = frozenset({"created", "efficiency", "tokens_per_s"})
EXAMPLE = 'state:queued,running (tag:prod OR priority>0) NOT name~test learning_rate>=1e-4 created<7d "free text"'
CSV_FIELDS = (
    "id", "name", "state", "owner", "host", "model", "method", "num_ranks", "tags", "step", "total_steps", "epoch",
    "loss", "eval_loss", "learning_rate", "trained_tokens", "tokens_per_s", "padding_efficiency", "padded_efficiency",
    "memory_peak_bytes", "created_at", "started_at", "ended_at",
)  # fmt: skip
CSV_PAGE = 500
ROWS_A_PAGE = 100


class View(BaseModel):
    """A state of the list, as its address has it."""

    model_config = ConfigDict(frozen=True)

    q: str = ""
    state: str = ""
    sort: str = NEWEST
    page: Annotated[int, Field(ge=1, le=100_000)] = 1

    @field_validator("state")
    @classmethod
    def _known_state(cls, state: str) -> str:
        return state if state in [each.value for each in JobState] else ""

    @field_validator("sort")
    @classmethod
    def _known_sort(cls, sort: str) -> str:
        return sort if sort.removeprefix("-") in SORTS else NEWEST

    @property
    def address(self) -> dict[str, str]:
        """Without the page, which another filter or order begins anew."""
        given = {"q": self.q, "state": self.state, "sort": "" if self.sort == NEWEST else self.sort}
        return {name: value for name, value in given.items() if value}

    @property
    def query(self) -> str:
        return self.at(self.page)

    def at(self, page: int) -> str:
        """The address of a page of it."""
        given = {**self.address, **({} if page == 1 else {"page": page})}
        return f"?{urlencode(given)}" if given else ""

    def conditions(self, now: float) -> list[Condition]:
        """Raises UserError filter.*"""
        of_state = [col(Job.state) == self.state] if self.state else []
        return [condition(parse_filter(self.q, now), now), *of_state]

    def place_of(self, fault: UserError) -> tuple[str, str, str] | None:
        """What stands before the fault in the filter, the word that it is, and what stands behind."""
        at = fault.parameters.get("at")
        if not isinstance(at, int):
            return None
        word = self.q[at - 1 :].split(" ")[0] or " "
        return self.q[: at - 1], word, self.q[at - 1 + len(word) :]

    def sorted_by(self, column: str) -> str:
        """The address that a column's title leads to: the other way round where it is sorted by that already."""
        down = f"-{column}"
        sort = down if column in LARGEST_FIRST else column
        if self.sort in (column, down):
            sort = column if self.sort == down else down
        return f"?{urlencode({**self.address, 'sort': sort})}"


AnyView = Annotated[View, Query()]


@router.get("/jobs")
def jobs_page(request: Request, services: AnyServices, caller: AnyCaller, view: AnyView) -> Response:
    now = services.clock()
    fault: UserError | None = None
    conditions: Sequence[Condition] = [false()]
    try:
        conditions = view.conditions(now)
    except UserError as found:
        fault = found
    with services.database.read() as session:
        newest = session.exec(select(func.max(Event.id))).one() or 0
        statement = select(Job).where(*conditions).order_by(*order(view.sort, now)).limit(ROWS_A_PAGE)
        statement = statement.offset(ROWS_A_PAGE * (view.page - 1))
        context: dict[str, Any] = {
            "rows": read_rows(session, session.exec(statement).all(), now),
            "num_found": session.exec(select(func.count()).select_from(Job).where(*conditions)).one(),
            "counts": count_states(session),
        }
    context |= {
        "view": view,
        "fault": fault,
        "first": ROWS_A_PAGE * (view.page - 1) + 1,
        "place": None if fault is None else view.place_of(fault),
        "columns": COLUMNS,
        "fields": FIELDS,
        "example": EXAMPLE,
        "states": [each.value for each in JobState],
        "num_all": sum(number for _, number in context["counts"]),
        "demo": form_pairs(state_of_spec(next(preset.spec for preset in PRESETS if preset.key == "demo"))),
        "key": new_key(),
    }
    is_live = has_vendor_files() and context["num_all"] > 0
    context["live_url"] = f"{request.scope.get('root_path', '')}/jobs/live?after={newest}" if is_live else ""
    if "hx-request" in request.headers:
        return fragment(services.templates, request, "jobs.html", "job_rows", context)
    return services.templates.TemplateResponse(request, "jobs.html", context)


# -- as a table for elsewhere ----------------------------------------------------------------------------------------
@router.get("/jobs.csv")
def jobs_csv(services: AnyServices, caller: AnyCaller, view: AnyView) -> StreamingResponse:
    """All that are found, however many. Raises UserError filter.*"""
    now = services.clock()
    lines = _lines(services, view, view.conditions(now), now)
    headers = {"Content-Disposition": 'attachment; filename="jobs.csv"'}
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def _lines(services: Services, view: View, conditions: Sequence[Condition], now: float) -> Iterator[str]:
    statement = select(Job).where(*conditions).order_by(*order(view.sort, now)).limit(CSV_PAGE)
    yield _line(CSV_FIELDS)
    for start in count(0, CSV_PAGE):
        with services.database.read() as session:
            rows = read_rows(session, session.exec(statement.offset(start)).all(), now)
        yield from (_line([_cell(row, field) for field in CSV_FIELDS]) for row in rows)
        if len(rows) < CSV_PAGE:
            return


def _cell(row: JobRow, field: str) -> str:
    value = getattr(row, field)
    if value is None:
        return ""
    if field.endswith("_at"):
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    if isinstance(value, tuple):
        value = " ".join(value)
    text = str(value)
    # A spreadsheet takes what begins like this for a formula.
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t") else text


def _line(cells: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()
