"""Live streams (server-sent events): what was stored since, and then what is being stored, by one query.

A stream has a cursor, the id of the last event that it sent, and repeats three steps: note the version of its topic,
read what lies behind the cursor, sleep until the version is another one. It holds nothing but the cursor, so a stream
that was cut goes on at another connection, after a restart of this service, or from a page that was rendered an hour
ago (`?after=`), without a gap and without a duplicate: the browser names the last id it saw (`Last-Event-ID`). The
ids are given by the one recorder in the order of its commits, so nothing ever appears behind a cursor.

What a job page's stream sends for each look that found something:
    event: points   {"series": {"loss": [[12, 2.31], ...]}}   the new points of the charts, whole looks at once
    (unnamed)       HTML, from the `Fragments` that the pages registered; also without an event, when what is derived
                    from the clock or the queue changed: a badge, the reason why the job waits
    event: end      the job has ended and all is sent; the browser shall not come back
A look's points carry the id of the look before, its HTML the new one. If the stream is cut between the two, the points
come again (a chart puts a point where its step is) and the lines of the log do not.

A stream asks every 60 s whether its caller is still admitted, says something every 15 s so that no proxy takes it for
dead, and ends when the browser is gone or this service stops.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from sqlmodel import Session, col, func, select

from app.auth import admit
from app.jobs import JOBS_TOPIC, badges, get_job, topic_of
from app.metrics import Point, points_of
from app.problems import LogInFirst, Problem
from app.services import AnyServices, Services
from app.tables import Event, Job
from core.states import TERMINAL

router = APIRouter()

PAGE_EVENTS = 1000  # of one look; a longer history is replayed in so many looks
RETRY_MS = 2000
COMMENT_EVERY_S = 15.0
ADMIT_EVERY_S = 60.0
# Two looks are at least so far apart: a hundred commits a second are still one message.
SHORTEST_LOOK_S = 0.1
MEDIA_TYPE = "text/event-stream"

After = Annotated[int | None, Query(ge=0, description="The id of the last event that is known already.")]
LastEventId = Annotated[str | None, Header()]


class EventView(BaseModel):
    """An event as programs get it, in a list or in a stream."""

    id: int
    attempt: int
    seq: int
    ts: float
    kind: str
    data: dict[str, Any]


class Fragments(Protocol):
    """How the pages show what happened: HTML that swaps itself into place, "" for nothing. Called in a thread."""

    def job(self, request: Request, job: Job, events: Sequence[Event]) -> str: ...

    def jobs(self, request: Request, jobs: Sequence[Job]) -> str: ...


class NoFragments:
    def job(self, request: Request, job: Job, events: Sequence[Event]) -> str:
        return ""

    def jobs(self, request: Request, jobs: Sequence[Job]) -> str:
        return ""


@dataclass(frozen=True)
class Look:
    """What lay behind the cursor."""

    cursor: int
    messages: tuple[bytes, ...]
    is_full: bool = False  # there is more, look again at once
    is_over: bool = False


Looker = Callable[[int], Look]


@router.get("/jobs/live", include_in_schema=False)
def jobs_live(
    request: Request, services: AnyServices, after: After = None, last_event_id: LastEventId = None
) -> StreamingResponse:
    """Without a cursor it begins now: the list has been rendered a moment ago."""
    with services.database.read() as session:
        newest = newest_id(session)
    cursor = cursor_from(after, last_event_id)
    page = JobsPage(request, services)
    return stream(request, services, JOBS_TOPIC, page.look, min(cursor, newest) if cursor else newest)


@router.get("/jobs/{job_id}/live", include_in_schema=False)
def job_live(
    request: Request, job_id: str, services: AnyServices, after: After = None, last_event_id: LastEventId = None
) -> StreamingResponse:
    with services.database.read() as session:
        get_job(session, job_id)
    page = JobPage(request, services, job_id)
    return stream(request, services, topic_of(job_id), page.look, cursor_from(after, last_event_id))


def api_events(request: Request, services: Services, job_id: str, cursor: int) -> StreamingResponse:
    """Each event as one unnamed message: the same JSON as in the list of the same route."""

    def look(cursor: int) -> Look:
        with services.database.read() as session:
            job, events = _job_and_events(session, job_id, cursor)
        views = [EventView.model_validate(event, from_attributes=True) for event in events]
        told = tuple(message(event.id, event.model_dump_json()) for event in views)
        return _with_end(Look(_last_id(events, cursor), told, len(events) == PAGE_EVENTS), job)

    return stream(request, services, topic_of(job_id), look, cursor)


def wants_stream(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "")


def cursor_from(after: int | None, last_event_id: str | None) -> int:
    """The header wins: a browser that reconnects repeats the address it began with, and knows more by now."""
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
        return int(last_event_id)
    return after or 0


def message(id: int, data: str, event: str | None = None) -> bytes:
    return format_sse_event(data_str=data, event=event, id=str(id))


# -- the loop ------------------------------------------------------------------------------------------------------


def stream(request: Request, services: Services, topic: str, look: Looker, cursor: int) -> StreamingResponse:
    return StreamingResponse(
        _follow(request, services, topic, look, cursor),
        media_type=MEDIA_TYPE,
        # A proxy that gathers the body before it passes it on would make the page look frozen.
        headers={"X-Accel-Buffering": "no", "Cache-Control": "no-store"},
    )


async def _follow(request: Request, services: Services, topic: str, look: Looker, cursor: int) -> AsyncIterator[bytes]:
    yield format_sse_event(retry=RETRY_MS, comment="pegbox")
    spoken_at = admitted_at = time.monotonic()
    while not services.wake.is_closed:
        seen = services.wake.version(topic)
        looked_at = time.monotonic()
        if looked_at - admitted_at >= ADMIT_EVERY_S:
            if not await _is_admitted(request):
                return
            admitted_at = looked_at
        found = await run_in_threadpool(look, cursor)
        cursor = found.cursor
        for each in found.messages:
            yield each
        if found.is_over:
            return
        now = time.monotonic()
        if found.messages:
            spoken_at = now
        elif now - spoken_at >= COMMENT_EVERY_S:
            yield format_sse_event(comment="alive")
            spoken_at = now
        if not found.is_full:
            await services.wake.wait_async(topic, seen, COMMENT_EVERY_S)
            await asyncio.sleep(max(0.0, looked_at + SHORTEST_LOOK_S - time.monotonic()))


async def _is_admitted(request: Request) -> bool:
    try:
        await admit(request)
    except (Problem, LogInFirst):
        return False
    return True


# -- looks ---------------------------------------------------------------------------------------------------------


def _job_and_events(session: Session, job_id: str, cursor: int) -> tuple[Job, list[Event]]:
    events = session.exec(
        select(Event).where(Event.job == job_id, col(Event.id) > cursor).order_by(col(Event.id)).limit(PAGE_EVENTS)
    ).all()
    return get_job(session, job_id), list(events)


class JobPage:
    """One stream of one job page."""

    def __init__(self, request: Request, services: Services, job_id: str) -> None:
        self._request = request
        self._services = services
        self._job_id = job_id
        self._fragments = _fragments(request)
        self._shown: object = None

    def look(self, cursor: int) -> Look:
        with self._services.database.read() as session:
            job, events = _job_and_events(session, self._job_id, cursor)
        face = _face(job, self._services.clock())
        html = self._fragments.job(self._request, job, events) if events or self._shown != face else ""
        self._shown = face
        series: dict[str, list[Point]] = {}
        for event in events:
            for name, point in points_of(event.kind, event.data):
                series.setdefault(name, []).append(point)
        last = _last_id(events, cursor)
        messages = []
        if series:
            points = json.dumps({"series": series}, allow_nan=False)
            messages.append(message(cursor if html else last, points, "points"))
        if html:
            messages.append(message(last, html))
        return _with_end(Look(last, tuple(messages), len(events) == PAGE_EVENTS), job)


class JobsPage:
    """One stream of the list: the rows of jobs that changed."""

    def __init__(self, request: Request, services: Services) -> None:
        self._request = request
        self._services = services
        self._fragments = _fragments(request)
        self._shown: dict[str, object] = {}

    def look(self, cursor: int) -> Look:
        with self._services.database.read() as session:
            newest = newest_id(session)
            changed = self._changed_jobs(session, cursor)
        html = self._fragments.jobs(self._request, changed) if changed else ""
        return Look(newest, (message(newest, html),) if html else ())

    def _changed_jobs(self, session: Session, cursor: int) -> list[Job]:
        """Jobs with an event behind the cursor, and those that look otherwise than when they were last sent."""
        now = self._services.clock()
        with_events = select(Event.job).where(col(Event.id) > cursor).distinct()
        is_over = col(Job.state).in_([state.value for state in TERMINAL])
        jobs = session.exec(select(Job).where(~is_over | col(Job.id).in_(with_events)).order_by(col(Job.id))).all()
        changed = [job for job in jobs if self._shown.get(job.id) != _face(job, now)]
        self._shown |= {job.id: _face(job, now) for job in changed}
        return changed


def newest_id(session: Session) -> int:
    return session.exec(select(func.max(Event.id))).one() or 0


def _fragments(request: Request) -> Fragments:
    fragments: Fragments | None = getattr(request.app.state, "fragments", None)
    return fragments or NoFragments()


def _with_end(look: Look, job: Job) -> Look:
    """Job and events are of one snapshot: if the job has ended, its last move is among what was sent."""
    if look.is_full or job.state not in TERMINAL:
        return look
    end = message(look.cursor, json.dumps({"state": job.state}), "end")
    return Look(look.cursor, (*look.messages, end), is_over=True)


def _face(job: Job, now: float) -> object:
    """All of a job that a list or a head shows."""
    return (job.rev, job.desired, job.name, job.wait_code, job.wait_parameters, job.summary, badges(job, now))


def _last_id(events: Sequence[Event], cursor: int) -> int:
    return (events[-1].id or cursor) if events else cursor
