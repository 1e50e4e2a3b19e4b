"""A live stream over a real server: cut at any point and taken up again, it has no gap and no duplicate."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from sqlmodel import col, select

from app.auth import create_token, revoke_token
from app.jobs.attempts import finish
from app.main import create_app
from app.services import Services
from app.tables import ApiToken, Attempt, Event, Job
from core.wire import AttemptRef, Finish
from tests.app.conftest import Clock, settings_in
from tests.app.ledger import Ledger, add_host
from tests.app.scene import log, step, wait_until, wire


class Plain:
    """Fragments that are easy to read back."""

    def job(self, request: object, job: Job, events: list[Event]) -> str:
        lines = [event.data["text"] for event in events if event.kind == "log"]
        return f"{job.state} {job.wait_code} {' '.join(lines)}".rstrip()

    def jobs(self, request: object, jobs: list[Job]) -> str:
        return "\n".join(f"{job.id} {job.state}" for job in jobs)


@dataclass
class Served:
    ledger: Ledger
    url: str
    token: str
    server: uvicorn.Server

    @property
    def services(self) -> Services:
        return self.ledger.services

    def connect(self, path: str, **headers: str) -> "Stream":
        return Stream(self.url + path, {"Authorization": f"Bearer {self.token}", **headers})


@dataclass
class Message:
    id: int | None
    event: str
    data: str


class Stream:
    """An EventSource: reads messages, remembers the last id."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._client = httpx.Client(timeout=20, trust_env=False)
        self._context = self._client.stream("GET", url, headers={"Accept": "text/event-stream", **headers})
        self.response = self._context.__enter__()
        self._lines = self.response.iter_lines()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()
        self._client.close()

    def __iter__(self) -> Iterator[Message]:
        fields: dict[str, list[str]] = {}
        for line in self._lines:
            if line:
                name, _, value = line.partition(": ")
                fields.setdefault(name, []).append(value)
            elif "data" in fields:
                id = int(fields["id"][0]) if "id" in fields else None
                yield Message(id, fields.get("event", ["message"])[0], "\n".join(fields["data"]))
                fields = {}
            else:
                fields = {}

    def read(self, number: int) -> list[Message]:
        messages = iter(self)
        return [next(messages) for _ in range(number)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    clock = Clock()
    app = create_app(settings_in(tmp_path), clock, is_leader=False)
    app.state.fragments = Plain()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    services: Services = app.state.services
    add_host(services)
    port = server.servers[0].sockets[0].getsockname()[1]
    token = create_token(services.database, "reader", "viewer")
    yield Served(Ledger(services, clock), f"http://127.0.0.1:{port}", token, server)
    services.wake.close()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def finish_job(served: Served, launch: AttemptRef) -> None:
    with served.services.database.write() as session:
        attempt = session.get_one(Attempt, (launch.job, launch.attempt))
        message = Finish(fence=launch.fence, outcome="succeeded", final_seq=attempt.acked_seq)
        finish(session, session.get_one(Job, launch.job), attempt, message, served.ledger.clock())
    served.services.wake.notify(f"job:{launch.job}")


def stored(served: Served, job: str) -> list[int]:
    with served.services.database.read() as session:
        return [id or 0 for id in session.exec(select(Event.id).where(Event.job == job).order_by(col(Event.id)))]


def test_a_stream_cut_after_every_event_is_whole(served: Served) -> None:
    ledger = served.ledger
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, *(step(n, n) for n in range(1, 6)), log(6, "a line"))
    seen: list[int] = []
    total = len(stored(served, launch.job))
    assert total >= 9
    while len(seen) < total:
        after = {"Last-Event-ID": str(seen[-1])} if seen else {}
        with served.connect(f"/api/v1/jobs/{launch.job}/events", **after) as stream:
            (message,) = stream.read(1)
        assert message.id is not None
        assert json.loads(message.data)["id"] == message.id
        seen.append(message.id)
    assert seen == stored(served, launch.job)


def test_replay_turns_into_live_without_a_seam(served: Served) -> None:
    """Events are being recorded while the stream opens, so some of them are old and some are new to it."""
    ledger = served.ledger
    launch = ledger.claimed(ledger.add_job())

    def train() -> None:
        for n in range(1, 101):
            ledger.record(launch, step(n, n))
        finish_job(served, launch)

    trainer = threading.Thread(target=train)
    trainer.start()
    wait_until(lambda: ledger.attempts(launch.job)[0].acked_seq > 10)
    with served.connect(f"/api/v1/jobs/{launch.job}/events") as stream:
        behind = ledger.attempts(launch.job)[0].acked_seq
        messages = list(stream)
    trainer.join()
    assert 0 < behind < 100, "nothing was replayed, or nothing came live"
    assert messages[-1].event == "end"
    assert [message.id for message in messages[:-1]] == stored(served, launch.job)


def test_a_long_history_is_replayed_in_pages(served: Served) -> None:
    ledger = served.ledger
    launch = ledger.claimed(ledger.add_job())
    ledger.record(launch, *(log(n, "x") for n in range(1, 2301)))
    finish_job(served, launch)
    with served.connect(f"/api/v1/jobs/{launch.job}/events") as stream:
        messages = list(stream)
    assert [message.id for message in messages[:-1]] == stored(served, launch.job)


def test_a_page_gets_points_and_html_and_the_end(served: Served) -> None:
    ledger = served.ledger
    launch = ledger.claimed(ledger.add_job())
    after = stored(served, launch.job)[-1]
    with served.connect(f"/jobs/{launch.job}/live?after={after}") as stream:
        messages = iter(stream)
        assert next(messages).data == "starting None"  # what may have changed since the page was rendered
        ledger.record(launch, step(1, 1), step(2, 2), log(3, "one"), log(4, "two"))
        points, html = next(messages), next(messages)
        assert points.event == "points"
        series = json.loads(points.data)["series"]
        assert series["loss"] == [[1, 3.0], [2, 1.5]]
        assert "mfu" not in series
        assert (html.event, html.data) == ("message", "running None one two")
        assert (points.id, html.id) == (after, stored(served, launch.job)[-1])
        finish_job(served, launch)
        rest = list(messages)
    assert [message.event for message in rest] == ["message", "end"]
    assert json.loads(rest[-1].data) == {"state": "succeeded"}


def test_a_reason_to_wait_reaches_the_page_though_it_is_no_event(served: Served) -> None:
    job = served.ledger.add_job()
    with served.connect(f"/jobs/{job}/live?after={stored(served, job)[-1]}") as stream:
        messages = iter(stream)
        assert next(messages).data == "queued None"
        with served.services.database.write() as session:
            session.get_one(Job, job).wait_code = "wait.no_host"
        served.services.wake.notify(f"job:{job}")
        assert next(messages).data == "queued wait.no_host"


def test_the_list_hears_of_every_job_that_changes_and_of_no_other(served: Served) -> None:
    ledger = served.ledger
    quiet, busy = ledger.add_job(), ledger.add_job()
    with served.connect("/jobs/live") as stream:
        messages = iter(stream)
        assert set(next(messages).data.splitlines()) == {f"{quiet} queued", f"{busy} queued"}
        ledger.claimed(busy)
        served.services.wake.notify("jobs")
        assert next(messages).data == f"{busy} starting"
        newest = max(stored(served, busy))
    ledger.record(AttemptRef(job=busy, attempt=1, fence=1), step(1, 1))
    with served.connect("/jobs/live", **{"Last-Event-ID": str(newest)}) as stream:
        assert f"{busy} running" in next(iter(stream)).data.splitlines()


def test_a_reader_that_goes_away_is_forgotten(served: Served) -> None:
    job = served.ledger.add_job()
    topic = f"job:{job}"
    with served.connect(f"/api/v1/jobs/{job}/events") as stream:
        stream.read(1)
        wait_until(lambda: topic in served.services.wake._sleepers)
    wait_until(lambda: topic not in served.services.wake._sleepers)


def test_a_revoked_token_loses_its_open_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.live.ADMIT_EVERY_S", 0.0)
    ledger = served.ledger
    launch = ledger.claimed(ledger.add_job())
    with served.connect(f"/api/v1/jobs/{launch.job}/events") as stream:
        stream.read(len(stored(served, launch.job)))
        with served.services.database.read() as session:
            token = session.exec(select(ApiToken.id).where(ApiToken.name == "reader")).one()
        assert revoke_token(served.services.database, token, served.ledger.clock())
        ledger.record(launch, log(1, "secret?"))
        ledger.record(launch, log(2, "secret!"))
        rest = list(stream)
    assert rest == []
    with served.connect(f"/api/v1/jobs/{launch.job}/events") as stream:
        assert stream.response.status_code == 401


def test_open_streams_do_not_keep_the_server_from_stopping(served: Served) -> None:
    job = served.ledger.add_job()
    with served.connect(f"/api/v1/jobs/{job}/events") as stream:
        stream.read(1)
        served.services.wake.close()
        assert list(stream) == []


def test_a_stream_of_a_job_that_does_not_exist_is_refused_before_it_begins(served: Served) -> None:
    for path in ("/jobs/job_x/live", "/api/v1/jobs/job_x/events"):
        with served.connect(path) as stream:
            assert stream.response.status_code == 404


def test_silence_is_broken_by_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.live.COMMENT_EVERY_S", 0.05)
    job = served.ledger.add_job()
    with served.connect(f"/api/v1/jobs/{job}/events") as stream:
        first = [line for _, line in zip(range(12), stream._lines, strict=False)]
    assert first[:2] == [": pegbox", "retry: 2000"]
    assert ": alive" in first


def test_an_unreadable_last_event_id_counts_as_none(served: Served) -> None:
    launch = served.ledger.claimed(served.ledger.add_job())
    served.ledger.record(launch, wire(1, "phase", name="tokenise"))
    with served.connect(f"/api/v1/jobs/{launch.job}/events", **{"Last-Event-ID": "; drop"}) as stream:
        assert stream.read(1)[0].id == stored(served, launch.job)[0]
