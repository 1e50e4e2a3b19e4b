"""What a host may ask, and how often, and what an old fence is worth."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlmodel import select

from app.dispatcher import dispatch_once
from app.tables import Attempt, Job
from core.wire import ADAPTER_FILES, AttemptRef
from tests.app.conftest import House
from tests.app.scene import (
    SPEC,
    FakeHost,
    checkpoint,
    connect_host,
    events_of,
    job_of,
    path_of,
    put_data,
    states_of,
    step,
    submit,
    wire,
)


@pytest.fixture
def host(house: House) -> FakeHost:
    host = connect_host(house)
    put_data(house)
    return host


def upload(host: FakeHost, launch: AttemptRef, content: bytes, fence: int | None = None) -> tuple[str, int]:
    sha256 = hashlib.sha256(content).hexdigest()
    response = host.client.put(
        f"/worker/v1{path_of(launch)}/artifacts/{sha256}",
        params={"fence": launch.fence if fence is None else fence},
        content=content,
    )
    return sha256, response.status_code


def succeed(host: FakeHost, launch: AttemptRef, *names: str) -> list[str]:
    """Ends a running attempt with these artifacts, each holding its name; returns their hashes."""
    end = wire(2, "end", outcome="succeeded", steps=1, trained_tokens=100, seconds=1.0)
    assert host.send(launch, [end]).status_code == 200
    hashes = [upload(host, launch, name.encode())[0] for name in names]
    artifacts = [
        {"name": name, "bytes": len(name), "sha256": sha256} for name, sha256 in zip(names, hashes, strict=True)
    ]
    assert host.finish(launch, "succeeded", final_seq=2, artifacts=artifacts).status_code == 200
    return hashes


def test_a_job_that_starts_from_an_adapter_is_given_its_files(house: House, host: FakeHost) -> None:
    first = submit(house)
    hashes = succeed(host, host.running(), *ADAPTER_FILES, "README.md")
    second = submit(house, model={"adapter": first})
    assignment = host.claim(host.launched()).json()
    assert [(file["name"], file["sha256"]) for file in assignment["adapter"]] == list(
        zip(ADAPTER_FILES, hashes[:2], strict=True)
    )
    assert host.client.get(f"/worker/v1/blobs/{hashes[1]}").content == b"adapter_model.safetensors"
    assert job_of(house.services, second).spec["model"]["adapter"] == first


def test_only_a_finished_jobs_adapter_can_be_started_from(house: House, host: FakeHost) -> None:
    def refusal(adapter: str) -> tuple[str, str]:
        body = {"spec": SPEC | {"model": {"adapter": adapter}}}
        response = house.api("bob").post("/api/v1/jobs", json=body)
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert error["pointer"] == "/spec/model/adapter"
        return error["code"], error["detail"]

    unfinished = submit(house)
    launch = host.running()
    assert refusal(unfinished)[0] == "job.adapter_not_finished"
    assert "is running" in refusal(unfinished)[1]
    succeed(host, launch, "model.safetensors", "adapter_config.json")
    code, text = refusal(unfinished)
    assert code == "job.adapter_missing" and f"{unfinished} left no adapter_model.safetensors" in text
    assert refusal("job_nowhere")[0] == "job.adapter_unknown"


def test_a_job_goes_from_the_queue_to_success_over_http(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.launched()
    assert host.beat().json()["launches"] == [launch.model_dump()]
    assignment = host.claim(launch).json()
    assert assignment["devices"] == ["cpu0"]
    assert assignment["resume_from"] == [job]
    assert assignment["spec"]["data"]["train"][0]["dataset"] == assignment["data"][0]["dataset"]
    data = host.client.get(f"/worker/v1/blobs/{assignment['data'][0]['sha256']}")
    assert hashlib.sha256(data.content).hexdigest() == assignment["data"][0]["sha256"]
    assert host.beat().json() | {"redis_url": None, "profiles": []} == {
        "redis_url": None, "launches": [], "profiles": [], "attempts": [launch.model_dump()],
    }  # fmt: skip

    assert host.send(launch, [step(1, 1), step(2, 2)]).json() == {"acked_seq": 2}
    assert job_of(house.services, job).state == "running"
    end = wire(3, "end", outcome="succeeded", steps=2, trained_tokens=200, seconds=1.0)
    assert host.send(launch, [end]).json() == {"acked_seq": 3}
    assert job_of(house.services, job).state == "finalizing"

    sha256, status = upload(host, launch, b"weights")
    assert status == 204
    artifacts = [{"name": "adapter_model.safetensors", "bytes": 7, "sha256": sha256}]
    assert host.finish(launch, "succeeded", final_seq=3, artifacts=artifacts).json() == {"state": "succeeded"}
    assert states_of(house.services, job) == [
        "queued", "dispatching", "starting", "running", "finalizing", "succeeded",
    ]  # fmt: skip
    downloaded = house.api("victor").get(f"/api/v1/jobs/{job}/artifacts/adapter_model.safetensors")
    assert downloaded.content == b"weights"
    assert downloaded.headers["content-disposition"].startswith("attachment")


def test_a_range_of_a_data_file_can_be_fetched(house: House, host: FakeHost) -> None:
    submit(house)
    file = host.claim(host.launched()).json()["data"][0]
    part = host.client.get(f"/worker/v1/blobs/{file['sha256']}", headers={"Range": "bytes=10-19"})
    assert (part.status_code, len(part.content)) == (206, 10)


def test_eight_claims_at_once_start_the_attempt_once(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.launched()
    stranger = connect_host(house, "host_b")
    racers = [host, host, host, host, stranger, stranger, stranger, stranger]
    with ThreadPoolExecutor(len(racers)) as pool:
        statuses = list(pool.map(lambda racer: racer.claim(launch).status_code, racers))
    assert statuses == [200, 200, 200, 200, 404, 404, 404, 404]
    assert states_of(house.services, job).count("starting") == 1


def test_a_claim_is_repeated_by_its_host_and_refused_with_an_old_fence(house: House, host: FakeHost) -> None:
    submit(house)
    launch = host.launched()
    first, again = host.claim(launch), host.claim(launch)
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    stale = host.claim(launch, fence=launch.fence - 1)
    assert (stale.status_code, stale.json()["current_fence"]) == (409, launch.fence)


def test_a_launch_that_arrives_after_the_cancel_is_refused(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.launched()
    assert house.api("bob").post(f"/api/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    stale = host.claim(launch)
    assert (stale.status_code, stale.json()["current_fence"]) == (409, launch.fence + 1)
    assert host.beat().json()["launches"] == []


def test_a_token_reaches_only_the_host_that_registered_first_with_it(house: House, host: FakeHost) -> None:
    submit(house)
    launch = host.launched()
    host.claim(launch)
    impostor = FakeHost("host_x", host.client, house.services)
    assert impostor.register().status_code == 403
    stranger = connect_host(house, "host_b")
    taker = FakeHost("host_a", stranger.client, house.services)
    assert taker.register().status_code == 403
    assert taker.beat().status_code == 404
    for response in (
        stranger.claim(launch),
        stranger.heartbeat(launch),
        stranger.send(launch, [step(1, 1)]),
        stranger.finish(launch, "failed"),
    ):
        assert response.status_code == 404
    assert upload(stranger, launch, b"weights")[1] == 404
    assert host.heartbeat(launch).status_code == 200


def test_people_and_workers_have_separate_doors(house: House, host: FakeHost) -> None:
    job = submit(house)
    assert host.client.get(f"/api/v1/jobs/{job}").status_code == 403
    assert house.api("alice").post(f"/worker/v1/hosts/{host.id}/beat", json={}).status_code == 403


def test_finish_waits_until_every_event_is_recorded(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    early = host.finish(launch, "failed", final_seq=2, reason="oom", text="out of memory", exit_code=71)
    assert (early.status_code, early.json()["acked_seq"]) == (425, 1)
    assert job_of(house.services, job).state == "running"
    host.send(launch, [wire(2, "failure", reason="oom", text="out of memory", remedy="a smaller batch")])
    for _ in range(2):  # a repeat gets the same answer
        done = host.finish(launch, "failed", final_seq=2, reason="oom", text="out of memory", exit_code=71)
        assert (done.status_code, done.json()) == (200, {"state": "failed"})
    stored = job_of(house.services, job)
    assert (stored.reason, stored.text, stored.remedy) == ("oom", "out of memory", "a smaller batch")
    assert states_of(house.services, job)[-1] == "failed"


def test_success_needs_every_artifact(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    artifacts = [{"name": "a.safetensors", "bytes": 7, "sha256": sha256}]
    assert host.finish(launch, "succeeded", final_seq=1, artifacts=artifacts).status_code == 422
    assert job_of(house.services, job).state == "running"
    upload(host, launch, b"weights")
    wrong_size = [{"name": "a.safetensors", "bytes": 8, "sha256": sha256}]
    assert host.finish(launch, "succeeded", final_seq=1, artifacts=wrong_size).status_code == 422
    assert host.finish(launch, "succeeded", final_seq=1, artifacts=artifacts).status_code == 200


def test_an_artifact_must_have_the_bytes_that_its_name_says(house: House, host: FakeHost) -> None:
    submit(house)
    launch = host.running()
    url = f"/worker/v1{path_of(launch)}/artifacts/{'0' * 64}"
    assert host.client.put(url, params={"fence": launch.fence}, content=b"weights").status_code == 422


def test_a_lost_attempt_is_followed_by_another_and_its_events_are_still_kept(house: House, host: FakeHost) -> None:
    job = submit(house)
    first = host.running()
    assert host.send(first, [checkpoint(2, 1)]).json() == {"acked_seq": 2}
    lost = host.finish(first, "lost", final_seq=2, reason="killed", exit_code=137)
    assert lost.json() == {"state": "queued"}
    stored = job_of(house.services, job)
    assert (stored.infra_left, stored.pinned_host, stored.wait_code) == (2, host.id, "wait.retry")
    assert dispatch_once(house.services) == []  # backs off
    house.clock.now += 2
    second = host.launched()
    assert (second.attempt, second.fence) == (2, first.fence + 1)

    assert host.heartbeat(first).status_code == 409
    assert host.finish(first, "lost", final_seq=2, reason="killed").json() == {"state": "dispatching"}
    assert upload(host, first, b"old weights")[1] == 409
    assert host.send(first, [step(3, 2)]).json() == {"acked_seq": 3}
    assert [event.kind for event in events_of(house.services, job, 1)] == ["step", "checkpoint", "step"]
    assert host.claim(second).json()["acked_seq"] == 0


def test_retries_are_counted_and_end(house: House, host: FakeHost) -> None:
    job = submit(house)
    delays = []
    for _ in range(3):
        launch = host.launched()
        host.claim(launch)
        assert host.finish(launch, "lost", reason="killed").json() == {"state": "queued"}
        not_before = job_of(house.services, job).not_before
        assert not_before is not None
        delays.append(not_before - house.clock.now)
        house.clock.now = not_before
        host.beat()
    assert delays == [2, 10, 60]
    launch = host.launched()
    host.claim(launch)
    assert host.finish(launch, "lost", reason="killed", text="killed from outside").json() == {"state": "failed"}
    stored = job_of(house.services, job)
    assert (stored.reason, stored.text) == ("lost", "killed from outside")


def test_a_hang_is_tried_again_once(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    assert host.finish(launch, "lost", final_seq=1, reason="hang").json() == {"state": "queued"}
    house.clock.now += 2
    launch = host.launched()
    host.claim(launch)
    assert host.finish(launch, "lost", reason="hang").json() == {"state": "failed"}
    assert job_of(house.services, job).reason == "hang"


def test_a_preempted_job_goes_back_at_once_and_for_free(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    assert host.finish(launch, "preempted", final_seq=1, exit_code=75).json() == {"state": "queued"}
    stored = job_of(house.services, job)
    assert (stored.infra_left, stored.not_before) == (3, None)
    assert host.launched().attempt == 2


@pytest.mark.parametrize(("action", "state"), [("cancel", "cancelled"), ("stop", "paused")])
@pytest.mark.parametrize("outcome", ["stopped", "lost"])
def test_a_stop_travels_with_the_heartbeat_and_its_end_is_as_asked(
    house: House, host: FakeHost, action: str, state: str, outcome: str
) -> None:
    job = submit(house)
    launch = host.running()
    assert host.heartbeat(launch).json()["desired"] == "run"
    assert house.api("bob").post(f"/api/v1/jobs/{job}/{action}").json()["state"] == "stopping"
    assert host.heartbeat(launch).json()["desired"] == action
    assert host.finish(launch, outcome, final_seq=1, exit_code=75).json() == {"state": state}


def test_a_stop_that_comes_too_late_leaves_a_success(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    assert house.api("bob").post(f"/api/v1/jobs/{job}/cancel").json()["state"] == "stopping"
    assert host.finish(launch, "succeeded", final_seq=1).json() == {"state": "succeeded"}
    assert house.api("bob").post(f"/api/v1/jobs/{job}/cancel").status_code == 409


def test_cancel_and_success_race_to_one_end(house: House, host: FakeHost) -> None:
    """Whichever commits first, the job ends once, and both callers hear how."""
    ends = set()
    with ThreadPoolExecutor(2) as pool:
        for round in range(30):
            job = submit(house)
            launch = host.running()
            cancels_first = round % 2 == 0
            calls = [
                lambda job=job: house.api("bob").post(f"/api/v1/jobs/{job}/cancel"),
                lambda launch=launch: host.finish(launch, "succeeded", final_seq=1),
            ]
            futures = [pool.submit(call) for call in (calls if cancels_first else calls[::-1])]
            replies = [future.result() for future in (futures if cancels_first else futures[::-1])]
            cancelled, finished = replies
            assert (finished.status_code, finished.json()) == (200, {"state": "succeeded"})
            assert cancelled.status_code in (200, 409)
            ends.add(cancelled.status_code)
            states = states_of(house.services, job)
            assert [state for state in states if state in ("succeeded", "cancelled", "failed")] == ["succeeded"]
            assert states[-1] == "succeeded"
            with house.services.database.read() as session:
                outcomes = session.exec(select(Attempt.outcome).where(Attempt.job == job)).all()
            assert outcomes == ["succeeded"]
    assert ends == {200, 409}, "the race went one way only, so it showed nothing"


def test_a_checkpoint_request_counts_up_and_travels_with_the_heartbeat(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    assert host.heartbeat(launch).json()["checkpoint_request"] == 0
    house.api("bob").post(f"/api/v1/jobs/{job}/checkpoint")
    assert host.heartbeat(launch).json()["checkpoint_request"] == 1


def test_a_heartbeat_prolongs_the_lease(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    house.clock.now += 61
    assert house.api("victor").get(f"/api/v1/jobs/{job}").json()["badges"] == ["unreachable"]
    assert host.heartbeat(launch).json()["lease_s"] == 60.0
    assert house.api("victor").get(f"/api/v1/jobs/{job}").json()["badges"] == []


def test_a_job_that_makes_no_progress_is_shown_as_stalled(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    house.clock.now += 601
    host.heartbeat(launch)
    assert house.api("victor").get(f"/api/v1/jobs/{job}").json()["badges"] == ["stalled"]
    host.send(launch, [step(2, 2)])
    assert house.api("victor").get(f"/api/v1/jobs/{job}").json()["badges"] == []


def test_the_version_of_the_data_is_the_one_of_the_submit(house: House, host: FakeHost) -> None:
    job = submit(house)
    before = job_of(house.services, job).spec["data"]["train"][0]["dataset"]
    put_data(
        house, content=b'{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n' * 9
    )
    other = submit(house)
    assert job_of(house.services, other).spec["data"]["train"][0]["dataset"] != before
    launch = next(launch for launch in dispatch_once(house.services) if launch.job == job)
    assert host.claim(launch).json()["data"][0]["dataset"] == before


def test_an_unclaimed_attempt_that_fails_fails_its_job(house: House, host: FakeHost) -> None:
    """A supervisor that cannot even start says so; asking again would only find the same."""
    job = submit(house)
    launch = host.launched()
    assert host.finish(launch, "failed", reason="internal", text="cannot be started").json() == {"state": "failed"}
    with house.services.database.read() as session:
        assert session.get_one(Job, job).text == "cannot be started"
