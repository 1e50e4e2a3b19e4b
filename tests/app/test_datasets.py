"""Uploads: what is taken, and what is said about what isn't."""

import gzip
import io
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import pyarrow as arrow
import uvicorn
from fastapi.testclient import TestClient
from httpx2 import Response
from pyarrow import parquet

from app.datasets.examine import Examined, examine
from app.tables import Job
from tests.app.conftest import NOW, House

ROW = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
GOOD = json.dumps(ROW).encode() + b"\n"


def put(client: TestClient, content: bytes | Iterator[bytes], name: str = "sums", **headers: str) -> Response:
    return client.put(f"/api/v1/datasets/{name}", content=content, headers=headers)


def reasons(response: Response) -> list[str]:
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    return [error["detail"] for error in response.json()["errors"]]


def num_files(house: House) -> int:
    return sum(path.is_file() for path in house.services.settings.blob_dir.rglob("*"))


def test_a_file_becomes_a_data_set_whatever_its_content_type(house: House) -> None:
    bob = house.api("bob")
    response = put(bob, GOOD * 3, **{"Content-Type": "text/csv"})
    assert response.status_code == 201
    assert response.json().items() >= {"name": "sums", "format": "messages", "kind": "jsonl", "num_rows": 3}.items()
    assert response.json()["owner"] == "bob"
    assert response.json()["created_at"] == "2027-01-15T08:00:00.000Z"
    assert bob.get("/api/v1/datasets/sums").json()["preview"][0] == {"line": 1, "row": ROW}


def test_the_same_bytes_are_the_same_version_and_other_bytes_a_new_one(house: House) -> None:
    bob = house.api("bob")
    first = put(bob, GOOD)
    again = put(bob, GOOD)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    house.clock.now += 1
    second = put(bob, GOOD * 2).json()
    assert second["version"] != first.json()["version"]
    listed = bob.get("/api/v1/datasets").json()["data"]
    assert [each["version"] for each in listed] == [second["version"]]
    details = bob.get("/api/v1/datasets/sums").json()
    assert details["versions"] == [second["version"], first.json()["version"]]
    old = bob.get(f"/api/v1/datasets/sums@{first.json()['version']}").json()
    assert old["num_rows"] == 1


def test_a_broken_line_is_reported_with_its_number_and_the_rest_is_kept(house: House) -> None:
    bob = house.api("bob")
    response = put(bob, GOOD + b'{"messages": [}\n' + GOOD + b'{"messages": []}\n')
    assert response.status_code == 201
    assert (response.json()["num_rows"], response.json()["num_refused"]) == (4, 2)
    refused = bob.get("/api/v1/datasets/sums/report").json()["refused"]
    assert [(each["line"], each["code"]) for each in refused] == [(2, "data.row_broken"), (4, "data.expected")]
    assert refused[1]["text"] == "messages: messages is an empty list; a list of turns is expected"
    rows = bob.get("/api/v1/datasets/sums/rows?offset=1&limit=2").json()
    assert rows["data"][0].keys() == {"line", "refused"} and rows["data"][1] == {"line": 3, "row": ROW}
    assert (rows["has_more"], rows["next_cursor"]) == (True, "3")


def test_without_a_good_row_the_first_reasons_are_the_answer_and_nothing_is_kept(house: House) -> None:
    told = reasons(put(house.api("bob"), b"{]\n" * 2000))
    assert len(told) == 5 and told[0].startswith("line 1: this is not valid JSON")
    assert num_files(house) == 0
    assert house.api("bob").get("/api/v1/datasets").json()["data"] == []


def test_rows_that_parse_but_hold_nothing_to_learn_are_no_good_rows(house: House) -> None:
    row = {"messages": [{"role": "user", "content": "hello"}]}
    told = reasons(put(house.api("bob"), json.dumps(row).encode()))
    assert told == [
        "line 1: messages: messages holds no assistant turn, so there is nothing to learn; add one or drop the row"
    ]


def test_an_empty_file_and_a_file_of_blank_lines_have_no_row(house: House) -> None:
    for content in (b"", b"\n\n  \n", b"[]"):
        assert reasons(put(house.api("bob"), content)) == ["the data holds no row; one JSON object a row is expected"]


def test_keys_that_fit_no_format_are_named(house: House) -> None:
    (told,) = reasons(put(house.api("bob"), b'{"question": "?", "answer": "!"}\n'))
    assert "the rows have the keys question, answer" in told and "alpaca" in told


def test_csv_is_taken_with_the_line_of_each_refused_row(house: House) -> None:
    bob = house.api("bob")
    content = b'prompt,completion\nhello,world\n"a\nb",c\nalone\n'
    for kind, body in (("csv", content), ("csv.gz", gzip.compress(content))):
        stored = put(bob, body).json()
        assert stored.items() >= {"kind": kind, "format": "prompt_completion", "num_rows": 3, "num_refused": 1}.items()
        (refused,) = bob.get("/api/v1/datasets/sums/report").json()["refused"]
        assert (refused["line"], refused["code"]) == (5, "data.csv_cells")
        assert bob.get("/api/v1/datasets/sums/rows").json()["data"][0]["row"] == {
            "prompt": "hello",
            "completion": "world",
        }


def parquet_of(rows: list[dict[str, object]]) -> bytes:
    target = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), target)
    return target.getvalue()


def test_parquet_is_taken_by_its_footer_and_its_rows_are_left_to_a_host(house: House) -> None:
    bob = house.api("bob")
    content = parquet_of([ROW] * 7)
    for kind, body in (("parquet", content), ("parquet.gz", gzip.compress(content))):
        response = put(bob, body)
        assert response.status_code == 201, response.text
        assert response.json().items() >= {"kind": kind, "format": "messages", "num_rows": 7}.items()
        assert reasons(bob.get("/api/v1/datasets/sums/rows"))[0].startswith("the rows of a Parquet file are read by")
    page = house.browser("bob").get("/datasets/sums").text
    assert "known when a host has read them" in page
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    assert put(bob, parquet_of([{"conversations": turns}]), name="turns").json()["format"] == "sharegpt"


def test_parquet_of_no_use_is_refused_with_the_reason(house: House) -> None:
    bob = house.api("bob")
    (unknown,) = reasons(put(bob, parquet_of([{"question": "?", "answer": "!"}])))
    assert "the rows have the keys question, answer" in unknown
    (torn,) = reasons(put(bob, parquet_of([ROW])[:-9]))
    assert torn.startswith("this Parquet file cannot be read: it has no footer")


def test_a_job_on_a_hubs_data_set_is_told_how_it_comes_here(house: House) -> None:
    for name, words in (("hf:org/set:test", "upload it as a file"), ("hf:set", "write hf:ORG/NAME")):
        spec = {"model": {"base": "demo/tiny-llama"}, "data": {"train": [{"dataset": name}]}}
        response = house.api("bob").post("/api/v1/jobs", json={"spec": spec})
        assert response.status_code == 422
        told = [error for error in response.json()["errors"] if words in error["detail"]]
        assert told and told[0]["pointer"] == "/spec/data/train/0/dataset", response.text


def test_a_form_is_refused_with_the_way_to_send_a_file(house: House) -> None:
    response = house.api("bob").put("/api/v1/datasets/sums", files={"file": GOOD})
    assert response.status_code == 415 and "send the file itself as the body" in response.json()["detail"]


def a_line_of_a_hundred_megabytes() -> Iterator[bytes]:
    yield GOOD + b'{"text": "'
    for _ in range(100):
        yield b"x" * 2**20
    yield b'"}\n' + GOOD


def test_a_line_of_a_hundred_megabytes_is_refused_alone(house: House) -> None:
    response = put(house.api("bob"), a_line_of_a_hundred_megabytes())
    assert response.status_code == 201, response.text
    assert (response.json()["num_rows"], response.json()["num_refused"]) == (3, 1)
    assert response.json()["bytes"] > 100 * 2**20
    (refused,) = house.api("bob").get("/api/v1/datasets/sums/report").json()["refused"]
    assert refused["line"] == 2 and "104,857,612 bytes; at most 33,554,432 are allowed" in refused["text"]


def test_a_line_of_a_hundred_megabytes_is_never_held(house: House) -> None:
    async def body() -> AsyncIterator[bytes]:
        for chunk in a_line_of_a_hundred_megabytes():
            yield chunk

    async def receive() -> Examined:
        async with house.services.blobs.incoming(body(), max_bytes=2**30) as blob:
            return examine(blob.read)

    tracemalloc.start()
    try:
        examined = anyio.run(receive)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert examined.num_refused == 1
    assert peak < 50 * 2**20


def test_a_report_keeps_the_first_thousand_refusals(house: House) -> None:
    response = put(house.api("bob"), GOOD + b"nonsense\n" * 1500)
    assert response.json()["num_refused"] == 1500
    refused = house.api("bob").get("/api/v1/datasets/sums/report").json()["refused"]
    assert len(refused) == 1000 and refused[-1]["line"] == 1001


def test_long_texts_are_cut_in_the_preview_but_not_in_the_file(house: House) -> None:
    row = {"text": "long " * 10_000}
    put(house.api("bob"), json.dumps(row).encode())
    shown = house.api("bob").get("/api/v1/datasets/sums").json()["preview"][0]["row"]["text"]
    assert len(shown) == 4001 and shown.endswith("…")


def test_a_name_that_is_no_name_is_refused_before_the_body_is_read(house: House) -> None:
    for name in ("Sums", "..", ".hidden", "a b", "x" * 129, "a%00b", "%2e%2e%2fetc", "naïve"):
        response = put(house.api("bob"), GOOD, name=name)
        assert response.status_code in (404, 405, 422), name
        if response.status_code == 422:
            assert "is no name for a data set" in response.json()["detail"]
    assert num_files(house) == 0


def test_an_unknown_data_set_is_404(house: House) -> None:
    for path in ("", "/rows", "/report"):
        response = house.api("bob").get(f"/api/v1/datasets/nothing{path}")
        assert response.status_code == 404
        assert response.json()["detail"] == "there is no data set nothing"


def test_a_deleted_data_set_is_gone_with_its_files_but_not_with_those_of_another(house: House) -> None:
    bob = house.api("bob")
    put(bob, GOOD, name="mine")
    put(bob, GOOD, name="same")
    put(bob, GOOD * 2, name="mine")
    assert num_files(house) == 2
    assert bob.delete("/api/v1/datasets/mine").status_code == 204
    assert num_files(house) == 1
    assert bob.get("/api/v1/datasets/mine").status_code == 404
    assert bob.get("/api/v1/datasets/same/rows").json()["data"] == [{"line": 1, "row": ROW}]
    assert bob.delete("/api/v1/datasets/mine").status_code == 404


def test_a_data_set_that_a_job_still_reads_is_kept(house: House) -> None:
    bob = house.api("bob")
    put(bob, GOOD)
    with house.services.database.write() as session:
        spec = {"data": {"train": [{"dataset": "sums@0123456789ab"}], "validation": "auto"}}
        job = Job(
            id="job_1", name="night run", spec=spec, spec_sha256="", state="paused", created_at=NOW, queued_at=NOW
        )
        session.add(job)
    refused = bob.delete("/api/v1/datasets/sums")
    assert refused.status_code == 409
    assert "sums is read by the job night run, which is paused" in refused.json()["detail"]
    with house.services.database.write() as session:
        session.get_one(Job, "job_1").state = "cancelled"
    assert bob.delete("/api/v1/datasets/sums").status_code == 204


def test_what_a_killed_process_left_of_an_upload_is_removed_at_the_next_start(house: House) -> None:
    incoming = house.services.settings.blob_dir / "incoming"
    (incoming / "half").write_bytes(b"half a file")
    house.services.blobs.remove_unfinished()
    assert list(incoming.iterdir()) == []


def test_an_upload_that_is_cut_leaves_nothing_and_the_server_goes_on(house: House) -> None:
    """Over a real socket: a client that goes away is what no in-process client can play."""
    server = uvicorn.Server(uvicorn.Config(house.app, lifespan="off", log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        head = (
            "PUT /api/v1/datasets/sums HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
            f"Authorization: Bearer {house.tokens['bob']}\r\n\r\n"
        )
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(head.encode() + GOOD)
            wait_until(lambda: num_files(house) == 1)
        wait_until(lambda: num_files(house) == 0)
        assert put(house.api("bob"), GOOD).status_code == 201
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_until(condition: Callable[[], bool], patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)
