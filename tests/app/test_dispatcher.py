"""Who gets which devices, what the others are told, and what the sweeper does about silence."""

import pytest
from sqlmodel import select

from app.dispatcher import Dispatcher, dispatch_once
from app.jobs.moves import QUEUE_TOPIC
from app.sweeper import LOST_S, sweep_once
from app.tables import IdempotentReply, Job
from core.wire import AttemptRef
from tests.app.conftest import House
from tests.app.scene import (
    FakeHost,
    checkpoint,
    connect_host,
    job_of,
    put_data,
    states_of,
    step,
    submit,
    with_launcher,
)


@pytest.fixture
def host(house: House) -> FakeHost:
    host = connect_host(house, num_slots=2)
    put_data(house)
    return host


def test_two_slots_run_two_jobs_and_the_third_says_why_it_waits(house: House, host: FakeHost) -> None:
    jobs = [submit(house) for _ in range(3)]
    assert [launch.job for launch in dispatch_once(house.services)] == jobs[:2]
    assert {tuple(job_of(house.services, job).devices or []) for job in jobs[:2]} == {("cpu0",), ("cpu1",)}
    wait = house.api("victor").get(f"/api/v1/jobs/{jobs[2]}").json()["wait"]
    assert wait["text"] == "waits for a free device: 2 of 2 CPU slots on name of host_a are busy"
    assert wait["position"] == 1


def test_ranks_on_a_cpu_take_one_slot_and_the_page_counts_them(house: House, host: FakeHost) -> None:
    job, next_one = submit(house), submit(house)
    with house.services.database.write() as session:
        for each in (job, next_one):
            row = session.get_one(Job, each)
            row.spec = row.spec | {"parallel": row.spec["parallel"] | {"devices": 2}}
    assert [launch.job for launch in dispatch_once(house.services)] == [job, next_one]
    assert [job_of(house.services, each).devices for each in (job, next_one)] == [["cpu0"], ["cpu1"]]
    assert house.browser("victor").get("/hosts").text.count("in 2 processes") == 2


def test_more_ranks_than_a_host_has_cpus_wait_and_say_so(house: House, host: FakeHost) -> None:
    job = submit(house)
    with house.services.database.write() as session:
        row = session.get_one(Job, job)
        row.spec = row.spec | {"parallel": row.spec["parallel"] | {"devices": 3}}
    assert dispatch_once(house.services) == []
    wait = house.api("victor").get(f"/api/v1/jobs/{job}").json()["wait"]
    assert wait["text"] == "asks for 3 devices, the largest host that could run it has 2"


def test_a_reason_that_has_not_changed_is_not_written_again(house: House, host: FakeHost) -> None:
    jobs = [submit(house) for _ in range(3)]
    dispatch_once(house.services)
    topic = f"job:{jobs[2]}"
    seen = house.services.wake.version(topic)
    dispatch_once(house.services)
    assert house.services.wake.version(topic) == seen
    first = next(job for job in jobs if job_of(house.services, job).state == "dispatching")
    house.api("bob").post(f"/api/v1/jobs/{first}/cancel")
    assert [launch.job for launch in dispatch_once(house.services)] == [jobs[2]]
    assert house.api("victor").get(f"/api/v1/jobs/{jobs[2]}").json()["wait"] is None


def test_the_launch_is_sent_once_the_database_has_it(house: House, host: FakeHost) -> None:
    services, sent = with_launcher(house.services)
    job = submit(house)
    (launch,) = dispatch_once(services)
    assert sent.launches == [("host_a", launch)]
    assert launch == AttemptRef(job=job, attempt=1, fence=1)
    assert dispatch_once(services) == [] and len(sent.launches) == 1


def test_a_higher_priority_goes_first(house: House, host: FakeHost) -> None:
    submit(house)
    submit(house)
    urgent = submit(house, priority=5)
    assert urgent in [launch.job for launch in dispatch_once(house.services)]


def test_a_silent_host_gets_no_work(house: House, host: FakeHost) -> None:
    job = submit(house)
    house.clock.now += 31
    assert dispatch_once(house.services) == []
    assert job_of(house.services, job).wait_code == "wait.no_host_accepts"
    host.beat()
    assert len(dispatch_once(house.services)) == 1


def test_a_device_is_free_only_when_the_trainer_of_the_old_attempt_is_gone(house: House, host: FakeHost) -> None:
    house_job = submit(house)
    old = host.running()
    house.clock.now += LOST_S
    sweep_once(house.services, house.clock.now - LOST_S)
    assert states_of(house.services, house_job)[-1] == "queued"
    submit(house)
    house.clock.now += 2
    host.beat(old)  # back, and its trainer still there
    assert len(dispatch_once(house.services)) == 1, "one of two slots still holds the old trainer"
    host.beat()
    assert len(dispatch_once(house.services)) == 1


def test_an_attempt_that_reported_its_end_frees_its_device_at_once(house: House, host: FakeHost) -> None:
    submit(house)
    first = host.running()
    submit(house)
    second = host.running()
    host.beat(first, second)
    host.finish(first, "failed", final_seq=1, reason="oom")
    submit(house)
    assert len(dispatch_once(house.services)) == 1


def test_a_job_with_a_checkpoint_waits_for_the_host_that_has_it(house: House, host: FakeHost) -> None:
    job = submit(house)
    launch = host.running()
    host.send(launch, [checkpoint(2, 1)])
    host.finish(launch, "preempted", final_seq=2, exit_code=75)
    house.clock.now += 31
    other = connect_host(house, "host_b")
    assert dispatch_once(house.services) == []
    assert job_of(house.services, job).wait_code == "wait.host_gone"
    other.beat()
    host.beat()
    dispatch_once(house.services)
    assert job_of(house.services, job).host == "host_a"


def test_a_launch_that_nobody_claims_is_sent_again_and_then_taken_back(house: House, host: FakeHost) -> None:
    services, sent = with_launcher(house.services)
    started_at = house.clock.now
    job = submit(house)
    (launch,) = dispatch_once(services)
    house.clock.now += 29
    sweep_once(services, started_at)
    assert len(sent.launches) == 1
    house.clock.now += 1
    sweep_once(services, started_at)
    sweep_once(services, started_at)
    assert sent.launches == [("host_a", launch)] * 2, "the same attempt and fence, once in thirty seconds"
    house.clock.now = started_at + 120
    sweep_once(services, started_at)
    taken_back = job_of(house.services, job)
    assert (taken_back.state, taken_back.fence, taken_back.infra_left) == ("queued", launch.fence + 1, 3)
    assert host.claim(launch).status_code == 409
    host.beat()
    (again,) = dispatch_once(services)
    assert (again.attempt, again.fence) == (2, launch.fence + 2)


def test_a_silent_attempt_is_left_alone_while_its_host_may_have_a_checkpoint(house: House, host: FakeHost) -> None:
    started_at = house.clock.now
    job = submit(house)
    launch = host.running()
    host.send(launch, [checkpoint(2, 1)])
    house.clock.now += 10 * LOST_S
    sweep_once(house.services, started_at)
    assert job_of(house.services, job).state == "running"
    assert host.heartbeat(launch).status_code == 200


def test_a_silent_attempt_without_a_checkpoint_is_given_up_after_a_quarter_of_an_hour(
    house: House, host: FakeHost
) -> None:
    started_at = house.clock.now
    job = submit(house)
    launch = host.running()
    house.clock.now += LOST_S - 1
    sweep_once(house.services, started_at)
    assert job_of(house.services, job).state == "running"
    house.clock.now += 1
    sweep_once(house.services, started_at)
    lost = job_of(house.services, job)
    assert (lost.state, lost.infra_left, lost.fence) == ("queued", 2, launch.fence + 1)
    stale = host.heartbeat(launch)
    assert (stale.status_code, stale.json()["current_fence"]) == (409, launch.fence + 1)
    assert host.send(launch, [step(2, 2)]).json() == {"acked_seq": 2}, "what it lived through is still taken"


def test_silence_is_counted_from_the_start_of_the_server(house: House, host: FakeHost) -> None:
    job = submit(house)
    host.running()
    house.clock.now += 10 * LOST_S
    sweep_once(house.services, house.clock.now)
    assert job_of(house.services, job).state == "running"


def test_a_cancel_of_a_job_whose_host_is_gone_ends_it_in_the_end(house: House, host: FakeHost) -> None:
    started_at = house.clock.now
    job = submit(house)
    launch = host.running()
    host.send(launch, [checkpoint(2, 1)])
    house.api("bob").post(f"/api/v1/jobs/{job}/cancel")
    house.clock.now += LOST_S
    sweep_once(house.services, started_at)
    assert states_of(house.services, job)[-2:] == ["stopping", "cancelled"]


def test_old_replies_are_forgotten(house: House, host: FakeHost) -> None:
    body = {"spec": {"data": {"train": [{"dataset": "sums"}]}}}
    bob = house.api("bob")
    first = bob.post("/api/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()["id"]
    house.clock.now += 24 * 3600 + 1
    sweep_once(house.services, house.clock.now)
    with house.services.database.read() as session:
        assert session.exec(select(IdempotentReply)).all() == []
    host.beat()
    again = bob.post("/api/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()["id"]
    assert again != first


def test_the_thread_wakes_for_a_submit_and_stops_when_asked(house: House, host: FakeHost) -> None:
    dispatcher = Dispatcher(house.services)
    dispatcher.start()
    try:
        job = submit(house)
        topic, seen = f"job:{job}", 0
        while job_of(house.services, job).state == "queued":
            seen = house.services.wake.wait(topic, seen, 5)
        assert states_of(house.services, job) == ["queued", "dispatching"]
    finally:
        dispatcher.stop()
    assert not dispatcher.is_alive()
    assert house.services.wake.version(QUEUE_TOPIC) > 0
    with house.services.database.read() as session:
        assert session.get_one(Job, job).attempt == 1
