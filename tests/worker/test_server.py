"""What an answer means to a worker: only the service itself can take an attempt away."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core import wire
from worker.server import Away, Interrupted, Server, Stale, TooEarly, Unknown, insist
from worker.settings import WorkerSettings

ATTEMPT = wire.AttemptRef(job="j", attempt=1, fence=1)


@dataclass
class Answer:
    status: int = 200
    content_type: str = "application/json"
    body: bytes = b'{"acked_seq": 7}'
    port: int = 0


@pytest.fixture
def answer() -> Iterator[Answer]:
    answer = Answer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        answer.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield answer
        server.shutdown()
        thread.join()


@pytest.fixture
def server(answer: Answer, tmp_path: Path) -> Iterator[Server]:
    url = f"http://127.0.0.1:{answer.port}"
    with Server(WorkerSettings(data_dir=tmp_path, server=url, token="t", model_roots=(), http_timeout_s=2)) as server:
        yield server


def test_a_good_answer_is_an_answer(server: Server) -> None:
    assert server.send_events(ATTEMPT, ()) == 7


@pytest.mark.parametrize(
    ("status", "content_type", "error"),
    [
        (409, "application/problem+json", Stale),
        (404, "application/problem+json; charset=utf-8", Unknown),
        (425, "application/problem+json", TooEarly),
        (404, "text/html", Away),
        (409, "text/html", Away),
        (401, "application/problem+json", Away),
        (403, "application/problem+json", Away),
        (422, "application/problem+json", Away),
        (429, "application/problem+json", Away),
        (500, "application/problem+json", Away),
        (502, "text/html", Away),
        (302, "text/html", Away),
    ],
)
def test_what_a_refusal_means(
    server: Server, answer: Answer, status: int, content_type: str, error: type[Exception]
) -> None:
    answer.status, answer.content_type, answer.body = status, content_type, b"no"
    with pytest.raises(error) as raised:
        server.send_events(ATTEMPT, ())
    assert type(raised.value) is error


@pytest.mark.parametrize("body", [b"", b"<html>welcome to the hotel's network</html>", b"[]", b"{}"])
def test_a_page_that_is_no_answer_is_none(server: Server, answer: Answer, body: bytes) -> None:
    answer.body = body
    with pytest.raises(Away):
        server.send_events(ATTEMPT, ())


def test_insisting_tells_the_first_failure_and_returns_the_first_success() -> None:
    failures = [Away("one"), Away("two"), None]
    notes: list[str] = []

    def call() -> str:
        failure = failures.pop(0)
        if failure:
            raise failure
        return "done"

    assert insist(call, is_unwanted=lambda: False, longest_back_off_s=0.01, note=notes.append) == "done"
    assert notes == ["one"]


def test_insisting_ends_when_nobody_wants_it_any_more() -> None:
    wanted = [True, True, False]

    def away() -> None:
        raise Away("for ever")

    with pytest.raises(Interrupted):
        insist(away, is_unwanted=lambda: not (wanted.pop(0) if wanted else False), longest_back_off_s=0.01)


def test_insisting_does_not_repeat_what_can_never_succeed() -> None:
    def stale() -> None:
        raise Stale("gone")

    with pytest.raises(Stale):
        insist(stale, is_unwanted=lambda: False, longest_back_off_s=0.01)
