"""/api/v1/jobs as a program meets it."""

from typing import Any

import pytest

from app.metrics import thin
from tests.app.conftest import House
from tests.app.scene import (
    ROW,
    SPEC,
    FakeHost,
    checkpoint,
    connect_host,
    job_of,
    log,
    put_data,
    states_of,
    step,
    submit,
    wire,
)
from tests.app.test_worker_api import upload


@pytest.fixture
def host(house: House) -> FakeHost:
    host = connect_host(house)
    put_data(house)
    return host


def problem_of(house: House, spec: dict[str, Any]) -> tuple[int, list[tuple[str, str]]]:
    response = house.api("bob").post("/api/v1/jobs", json={"spec": spec})
    errors = response.json().get("errors", [])
    return response.status_code, [(error["pointer"], error["code"]) for error in errors]


def test_a_job_is_created_with_its_data_pinned_and_its_owner_named(house: House, host: FakeHost) -> None:
    response = house.api("bob").post("/api/v1/jobs", json={"spec": SPEC | {"tags": ["a"], "notes": "why"}})
    assert response.status_code == 201
    job = response.json()
    assert (job["state"], job["owner"], job["tags"], job["notes"]) == ("queued", "bob", ["a"], "why")
    assert job["name"] == "tiny-llama lora 2027-01-15"
    assert job["created_at"] == "2027-01-15T08:00:00.000Z"
    assert job["actions"] == ["stop", "cancel", "clone"]
    reference = job["spec"]["data"]["train"][0]["dataset"]
    assert reference.startswith("sums@") and len(reference) == len("sums@") + 12
    assert house.api("victor").get(f"/api/v1/jobs/{job['id']}").json() == job


def test_a_viewer_may_read_and_copy_and_not_change(house: House, host: FakeHost) -> None:
    job = submit(house)
    victor = house.api("victor")
    assert victor.post("/api/v1/jobs", json={"spec": SPEC}).status_code == 403
    for action in ("cancel", "stop", "resume", "retry", "extend", "checkpoint"):
        assert victor.post(f"/api/v1/jobs/{job}/{action}").status_code == 403
    assert victor.patch(f"/api/v1/jobs/{job}", json={"name": "mine"}).status_code == 403
    assert victor.post(f"/api/v1/jobs/{job}/clone").json()["spec"] == job_of(house.services, job).spec
    assert victor.get("/api/v1/jobs").json()["data"][0]["id"] == job


def test_the_same_key_makes_one_job(house: House, host: FakeHost) -> None:
    bob = house.api("bob")
    replies = [bob.post("/api/v1/jobs", json={"spec": SPEC}, headers={"Idempotency-Key": "once"}) for _ in range(2)]
    assert replies[0].json() == replies[1].json()
    assert replies[1].headers["idempotent-replayed"] == "true"
    other = bob.post("/api/v1/jobs", json={"spec": SPEC | {"seed": 1}}, headers={"Idempotency-Key": "once"})
    assert other.status_code == 422
    assert len(bob.get("/api/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize(
    ("change", "errors"),
    [
        ({"data": {"train": [{"dataset": "sum"}]}}, [("/spec/data/train/0/dataset", "job.unknown_dataset")]),
        ({"data": {"train": [{"dataset": "sums@000000"}]}}, [("/spec/data/train/0/dataset", "job.unknown_version")]),
        ({"data": {"train": [{"dataset": "../etc"}]}}, [("/spec/data/train/0/dataset", "job.unknown_dataset")]),
        (
            {"data": {"train": [{"dataset": "sums"}], "validation": {"dataset": "nope"}}},
            [("/spec/data/validation/dataset", "job.unknown_dataset")],
        ),
        ({"model": {"base": "demo/tiny-lama"}}, [("/spec/model/base", "model.unknown")]),
        (
            {"model": {"base": "x"}, "data": {"train": [{"dataset": "y"}]}},
            [("/spec/model/base", "model.unknown"), ("/spec/data/train/0/dataset", "job.unknown_dataset")],
        ),
        ({"schedule": {"learning_rate": -1}}, [("/spec/schedule/learning_rate", "spec.above")]),
        ({"data": SPEC["data"] | {"max_length": 1_000_000}}, [("/spec/data/max_length", "plan.above_context")]),
        ({"model": {"adapter": "/etc"}}, [("/spec/model/adapter", "job.adapter_unknown")]),
        ({"model": {"revision": "main"}}, [("/spec/model/revision", "spec.not_built")]),
        ({"lora_rank": 8}, [("/spec/lora_rank", "spec.unknown_key_hint")]),
    ],
)
def test_a_fault_in_the_spec_is_told_with_its_key(
    house: House, host: FakeHost, change: dict[str, Any], errors: list[tuple[str, str]]
) -> None:
    assert problem_of(house, SPEC | change) == (422, errors)
    assert house.api("bob").get("/api/v1/jobs").json()["data"] == []


def test_close_names_are_offered(house: House, host: FakeHost) -> None:
    put_data(house, "somes")
    response = house.api("bob").post("/api/v1/jobs", json={"spec": {"data": {"train": [{"dataset": "suns"}]}}})
    assert "known are: sums" in response.json()["detail"]


def test_the_list_is_paged_and_filtered(house: House, host: FakeHost) -> None:
    jobs = [submit(house) for _ in range(5)]
    house.api("bob").post(f"/api/v1/jobs/{jobs[1]}/cancel")
    seen: list[str] = []
    cursor = None
    while True:
        page = house.api("bob").get("/api/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if not page["has_more"]:
            break
    assert seen == jobs[::-1] and cursor is None
    cancelled = house.api("bob").get("/api/v1/jobs", params={"state": "cancelled"}).json()["data"]
    assert [job["id"] for job in cancelled] == [jobs[1]]
    assert house.api("bob").get("/api/v1/jobs", params={"state": "asleep"}).status_code == 422


def test_an_action_that_the_state_does_not_allow_says_what_it_does(house: House, host: FakeHost) -> None:
    job = submit(house)
    bob = house.api("bob")
    refused = bob.post(f"/api/v1/jobs/{job}/resume")
    assert refused.status_code == 409
    assert refused.json()["detail"] == "a job that is queued does not take resume; it takes: stop, cancel, clone"
    assert bob.post(f"/api/v1/jobs/{job}/stop").json()["state"] == "paused"
    assert bob.post(f"/api/v1/jobs/{job}/resume").json()["state"] == "queued"
    assert bob.post(f"/api/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    again = bob.post(f"/api/v1/jobs/{job}/cancel")
    assert (again.status_code, again.json()["errors"][0]["code"]) == (409, "job.illegal_action")
    assert bob.post("/api/v1/jobs/job_x/cancel").status_code == 404
    moves = bob.get(f"/api/v1/jobs/{job}/events").json()["data"]
    assert [(move["data"]["state"], move["data"]["who"]) for move in moves] == [
        (state, "bob's") for state in ("queued", "paused", "queued", "cancelled")
    ]


def test_a_stop_can_still_become_a_cancel(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    bob = house.api("bob")
    bob.post(f"/api/v1/jobs/{job}/stop")
    assert bob.post(f"/api/v1/jobs/{job}/stop").status_code == 409
    for _ in range(2):
        assert bob.post(f"/api/v1/jobs/{job}/cancel").json()["desired"] == "cancel"
    assert host.finish(launch, "stopped", final_seq=1).json() == {"state": "cancelled"}


def test_a_retry_starts_from_the_checkpoint_where_it_lies(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    host.send(launch, [step(2, 2), checkpoint(3, 2), step(4, 3)])
    host.finish(launch, "failed", final_seq=4, reason="oom")
    reply = house.api("bob").post(f"/api/v1/jobs/{job}/retry")
    assert reply.status_code == 201
    again = reply.json()["id"]
    stored = job_of(house.services, again)
    assert (stored.parent, stored.parent_kind, stored.pinned_host) == (job, "retry", "host_a")
    launch = host.launched()
    assert host.claim(launch).json()["resume_from"] == [again, job]
    host.send(launch, [step(1, 3, loss=0.5)])
    metrics = house.api("bob").get(f"/api/v1/jobs/{again}/metrics", params={"names": "loss"}).json()
    assert metrics == {"x": "step", "series": {"loss": [[1, 3.0], [2, 1.5], [3, 0.5]]}}
    assert job_of(house.services, again).summary["trained_tokens"] == 300
    host.finish(launch, "failed", final_seq=1, reason="oom")
    third = house.api("bob").post(f"/api/v1/jobs/{again}/retry").json()["id"]
    assert job_of(house.services, third).resume_jobs == [again, job]


def test_a_retry_of_a_job_without_a_checkpoint_may_run_anywhere(house: House, host: FakeHost) -> None:
    job = submit(house)
    house.api("bob").post(f"/api/v1/jobs/{job}/cancel")
    again = job_of(house.services, house.api("bob").post(f"/api/v1/jobs/{job}/retry").json()["id"])
    assert (again.pinned_host, again.resume_jobs, again.parent) == (None, [], job)


def test_extending_trains_longer_from_the_last_checkpoint(house: House, host: FakeHost) -> None:
    job = submit(house, schedule={"epochs": 2})
    launch = host.running()
    host.send(launch, [checkpoint(2, 1)])
    host.finish(launch, "succeeded", final_seq=2)
    bob = house.api("bob")
    longer = bob.post(f"/api/v1/jobs/{job}/extend", json={"epochs": 5}).json()
    assert (longer["spec"]["schedule"]["epochs"], longer["parent"], longer["parent_kind"]) == (5.0, job, "extend")
    assert bob.post(f"/api/v1/jobs/{job}/extend").json()["spec"]["schedule"]["epochs"] == 4.0
    for body, code in (
        ({"epochs": 2}, "job.not_longer"),
        ({"max_steps": 9}, "job.other_length"),
        ({"epoch": 9}, "request.unknown_key"),
        ({"epochs": 1e9}, "spec.at_most"),
    ):
        refused = bob.post(f"/api/v1/jobs/{job}/extend", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, code)


def test_names_tags_and_notes_can_be_changed(house: House, host: FakeHost) -> None:
    job = submit(house)
    changed = house.api("bob").patch(f"/api/v1/jobs/{job}", json={"name": "better", "tags": ["x", "y"]}).json()
    assert (changed["name"], changed["tags"], changed["notes"]) == ("better", ["x", "y"], "")
    for body in ({"name": ""}, {"state": "succeeded"}, {"tags": ["x" * 65]}):
        assert house.api("bob").patch(f"/api/v1/jobs/{job}", json=body).status_code == 422
    assert states_of(house.services, job) == ["queued"]


def test_metrics_of_a_resumed_job_begin_at_one(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    host.send(launch, [step(n, n) for n in range(2, 7)])
    host.finish(launch, "preempted", final_seq=6)
    launch = host.launched()
    host.claim(launch)
    host.send(
        launch, [step(1, 4, loss=9.0), wire(2, "eval", step=4, eval_loss=1.0, perplexity=2.7, token_accuracy=0.5)]
    )
    reply = house.api("bob").get(
        f"/api/v1/jobs/{job}/metrics", params={"names": "loss,learning_rate,eval_loss", "x": "step"}
    )
    series = reply.json()["series"]
    assert series["loss"] == [[1, 3.0], [2, 1.5], [3, 1.0], [4, 9.0], [5, 0.6], [6, 0.5]]
    assert len(series["learning_rate"]) == 6
    assert series["eval_loss"] == [[4, 1.0]]
    unknown = house.api("bob").get(f"/api/v1/jobs/{job}/metrics", params={"names": "loss,los"})
    assert (unknown.status_code, unknown.json()["errors"][0]["code"]) == (422, "metrics.unknown_name")
    assert "mfu" in house.api("bob").get(f"/api/v1/jobs/{job}/metrics").json()["series"]


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(n, float(n % 7)) for n in range(1, 10_001)]
    points[4321] = (4322, 1000.0)
    points[7000] = (7001, -1000.0)
    thinned = thin(points, 200)
    assert 150 <= len(thinned) <= 200
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert {(4322, 1000.0), (7001, -1000.0)} <= set(thinned)
    assert thinned == sorted(thinned) and set(thinned) <= set(points)
    assert thin(points[:200], 200) == points[:200]


def test_max_points_is_obeyed(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    host.send(launch, [step(n, n) for n in range(2, 101)])
    for asked in (4, 5, 10, 50):
        series = house.api("bob").get(
            f"/api/v1/jobs/{job}/metrics", params={"names": "loss", "max_points": asked}
        ).json()["series"]  # fmt: skip
        assert 3 <= len(series["loss"]) <= asked
    assert house.api("bob").get(f"/api/v1/jobs/{job}/metrics", params={"max_points": 100_001}).status_code == 422


def test_logs_are_searched_and_paged(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    texts = ["Loading 50% of_it", "loading more", "done", "50 per cent"]
    host.send(launch, [log(n, text) for n, text in enumerate(texts, 2)])
    get = house.api("bob").get
    found = get(f"/api/v1/jobs/{job}/logs", params={"q": "LOADING"}).json()["data"]
    assert [line["text"] for line in found] == texts[:2]
    assert [line["text"] for line in get(f"/api/v1/jobs/{job}/logs", params={"q": "50%"}).json()["data"]] == texts[:1]
    page = get(f"/api/v1/jobs/{job}/logs", params={"limit": 3}).json()
    rest = get(f"/api/v1/jobs/{job}/logs", params={"after": page["next_cursor"]}).json()
    assert [line["text"] for line in page["data"] + rest["data"]] == texts
    assert (page["has_more"], rest["has_more"]) == (True, False)


def test_events_attempts_and_checkpoints_are_listed(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    host.send(launch, [checkpoint(2, 1, best=True)])
    host.finish(launch, "failed", final_seq=2, reason="nan", text="the loss is NaN", exit_code=72)
    get = house.api("bob").get
    events = get(f"/api/v1/jobs/{job}/events").json()
    assert [event["kind"] for event in events["data"]] == [
        "state", "state", "state", "state", "step", "checkpoint", "state",
    ]  # fmt: skip
    after = events["data"][4]["id"]
    assert [event["id"] for event in get(f"/api/v1/jobs/{job}/events?after={after}").json()["data"]] == [
        event["id"] for event in events["data"][5:]
    ]
    (attempt,) = get(f"/api/v1/jobs/{job}/attempts").json()["data"]
    assert (attempt["outcome"], attempt["reason"], attempt["exit_code"], attempt["acked_seq"]) == (
        "failed", "nan", 72, 2,
    )  # fmt: skip
    (saved,) = get(f"/api/v1/jobs/{job}/checkpoints").json()["data"]
    assert (saved["step"], saved["is_best"]) == (1, True)


def test_artifacts_are_downloaded_by_name_and_in_parts(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    sha256, _ = upload(host, launch, b"0123456789")
    names = ["adapter_model.safetensors", "logs/<b>run</b> 1.txt"]
    artifacts = [{"name": name, "bytes": 10, "sha256": sha256} for name in names]
    host.finish(launch, "succeeded", final_seq=1, artifacts=artifacts)
    get = house.api("victor").get
    assert get(f"/api/v1/jobs/{job}/artifacts").json() == {"data": artifacts}
    part = get(f"/api/v1/jobs/{job}/artifacts/adapter_model.safetensors", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    odd = get(f"/api/v1/jobs/{job}/artifacts/logs/%3Cb%3Erun%3C%2Fb%3E 1.txt")
    assert odd.status_code == 200
    assert odd.headers["content-disposition"].startswith("attachment")
    assert odd.headers["x-content-type-options"] == "nosniff"
    for evil in ("../../pegbox.sqlite3", "%2e%2e%2fpegbox.sqlite3", sha256, "", "/etc/passwd", "a%00b", "x" * 5000):
        assert get(f"/api/v1/jobs/{job}/artifacts/{evil}").status_code in (404, 400)


def test_a_refused_row_does_not_keep_a_job_from_starting(house: House, host: FakeHost) -> None:
    put_data(house, "half", ROW * 3 + b"{broken\n")
    assert problem_of(house, {"data": {"train": [{"dataset": "half"}]}})[0] == 201
