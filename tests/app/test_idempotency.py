"""A POST that is sent again does its work once."""

import threading

from fastapi.testclient import TestClient
from httpx2 import Response
from pydantic import BaseModel
from sqlmodel import Session, select

from app.idempotency import OnlyOnce
from app.tables import Dataset
from core.errors import UserError
from tests.app.conftest import House


class Made(BaseModel):
    number: int


def add_route(house: House) -> None:
    """A route that makes a row, such as POST /jobs, small."""

    @house.app.post("/api/v1/test")
    def make(once: OnlyOnce) -> object:
        def act(session: Session) -> Made:
            number = len(session.exec(select(Dataset)).all()) + 1
            session.add(Dataset(id=f"ds_{number}", name=f"made-{number}", created_at=0.0))
            if number == 3:
                raise UserError("dataset.name", "name", name="three")
            return Made(number=number)

        return once.reply(201, act)


def post(client: TestClient, key: str | None, body: object = None) -> Response:
    return client.post("/api/v1/test", json=body, headers={"Idempotency-Key": key} if key is not None else {})


def test_the_same_key_and_body_get_the_same_reply(house: House) -> None:
    add_route(house)
    first, again = post(house.api("bob"), "k", {"a": 1}), post(house.api("bob"), "k", {"a": 1})
    assert (first.status_code, first.json(), first.headers.get("idempotent-replayed")) == (201, {"number": 1}, None)
    assert (again.status_code, again.json(), again.headers["idempotent-replayed"]) == (201, {"number": 1}, "true")


def test_another_body_under_the_same_key_is_refused(house: House) -> None:
    add_route(house)
    post(house.api("bob"), "k", {"a": 1})
    refused = post(house.api("bob"), "k", {"a": 2})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["code"] == "request.other_body"


def test_a_key_is_its_owners_and_without_one_each_request_counts(house: House) -> None:
    add_route(house)
    assert post(house.api("bob"), "k").json() == {"number": 1}
    assert post(house.api("alice"), "k").json() == {"number": 2}
    with house.services.database.read() as session:
        assert len(session.exec(select(Dataset)).all()) == 2


def test_what_failed_is_kept_neither_as_work_nor_as_a_reply(house: House) -> None:
    add_route(house)
    for key in ("a", "b"):
        post(house.api("bob"), key)
    for _ in range(2):
        failed = post(house.api("bob"), "c")
        assert failed.status_code == 422 and "idempotent-replayed" not in failed.headers
    with house.services.database.read() as session:
        assert len(session.exec(select(Dataset)).all()) == 2


def test_a_key_is_forgotten_after_a_day(house: House) -> None:
    add_route(house)
    post(house.api("bob"), "k")
    house.clock.now += 24 * 3600 - 1
    assert post(house.api("bob"), "k").json() == {"number": 1}
    house.clock.now += 2
    assert post(house.api("bob"), "k").json() == {"number": 2}


def test_of_many_at_once_one_does_the_work(house: House) -> None:
    add_route(house)
    replies: list[Response] = []
    threads = [threading.Thread(target=lambda: replies.append(post(house.api("bob"), "k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.json() for reply in replies] == [{"number": 1}] * 8
    assert sum("idempotent-replayed" in reply.headers for reply in replies) == 7


def test_a_key_that_is_none_is_refused(house: House) -> None:
    add_route(house)
    for key in ("", "x" * 256):
        assert post(house.api("bob"), key).status_code == 400
