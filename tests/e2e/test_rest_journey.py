"""A fine-tune over REST: data in, launched, followed, downloaded; and what happens when the rest dies under it."""

import hashlib
import json
import signal

import httpx
import pytest
import redis

from tests.e2e.house import House, wait_until
from worker.settings import WorkerSettings

pytestmark = pytest.mark.timeout(400)


def arithmetic(count: int) -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus {number % 7}?"},
                {
                    "role": "assistant",
                    "content": f"{number} plus {number % 7} is {number + number % 7}. " * (1 + number % 5),
                },
            ]
        }
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def spec_of(dataset: str, **parts: object) -> dict[str, object]:
    return {
        "model": {"base": "demo/tiny-llama"},
        "data": {"train": [{"dataset": dataset}], "max_length": 512},
        "batch": {"samples_per_step": 16},
        "schedule": {"learning_rate": 3e-3, "epochs": 2},
        **parts,
    }


@pytest.fixture(scope="module", autouse=True)
def dataset(house: House) -> None:
    house.put_dataset("arithmetic", arithmetic(600))


def test_a_job_succeeds_and_its_result_downloads_whole(house: House) -> None:
    job = house.launch(spec_of("arithmetic"))
    done = house.wait_for_state(job, "succeeded")
    losses = house.losses(job)
    assert [step for step, _ in losses] == list(range(1, done["summary"]["total_steps"] + 1))
    assert losses[-1][1] < losses[0][1] * 0.7
    planned = next(event for event in house.get(f"/jobs/{job}/events")["data"] if event["kind"] == "plan")["data"]
    assert planned["total_steps"] == len(losses)
    series = house.get(f"/jobs/{job}/metrics", names="padding_efficiency,padded_efficiency", x="step")["series"]
    assert min(value for _, value in series["padding_efficiency"]) == 1.0
    assert max(value for _, value in series["padded_efficiency"]) < 1.0
    artifacts = {entry["name"]: entry for entry in house.get(f"/jobs/{job}/artifacts")["data"]}
    assert "adapter_model.safetensors" in artifacts
    for name, entry in artifacts.items():
        reply = httpx.get(f"{house.url}/api/v1/jobs/{job}/artifacts/{name}", headers=house.headers)
        assert hashlib.sha256(reply.content).hexdigest() == entry["sha256"] and len(reply.content) == entry["bytes"]
    assert house.post(f"/jobs/{job}/cancel").status_code == 409


def test_two_jobs_run_at_a_time_and_the_third_says_why_it_waits(house: House) -> None:
    long = spec_of("arithmetic", schedule={"learning_rate": 1e-3, "max_steps": 2000})
    jobs = [house.launch(long) for _ in range(3)]
    try:
        for job in jobs[:2]:
            house.wait_for_state(job, "running")
        waiting = wait_until(lambda: (house.job(jobs[2])["wait"] or {}).get("text"), "the third says why it waits")
        assert "2 of 2 CPU slots" in waiting
    finally:
        for job in reversed(jobs):
            house.post(f"/jobs/{job}/cancel")
        for job in jobs:
            house.wait_for_state(job, "cancelled")


def test_stop_pauses_with_a_checkpoint_and_resume_goes_on_from_it(house: House) -> None:
    job = house.launch(spec_of("arithmetic", schedule={"learning_rate": 1e-3, "max_steps": 150}))
    house.wait_for_step(job, 20)
    assert house.post(f"/jobs/{job}/stop").status_code == 200
    house.wait_for_state(job, "paused")
    stopped_at = house.losses(job)[-1][0]
    assert stopped_at < 150 and house.get(f"/jobs/{job}/checkpoints")["data"]
    assert house.post(f"/jobs/{job}/resume").status_code == 200
    house.wait_for_state(job, "succeeded")
    assert [step for step, _ in house.losses(job)] == list(range(1, 151))
    attempts = house.get(f"/jobs/{job}/attempts")["data"]
    assert len(attempts) == 2
    first_of_second = min(
        event["data"]["step"]
        for event in house.get(f"/jobs/{job}/events", limit=1000)["data"]
        if event["kind"] == "step" and event["attempt"] == 2
    )
    assert first_of_second == stopped_at + 1, "nothing was trained twice"


def test_kills_under_a_running_job_leave_the_curve_that_an_undisturbed_one_has(house: House) -> None:
    """kill -9 of web, of host agent and Celery, of the trainer, and FLUSHALL: one curve, no point twice."""
    spec = spec_of(
        "arithmetic", schedule={"learning_rate": 1e-3, "max_steps": 240}, checkpoint={"every_steps": 20, "keep_last": 2}
    )
    undisturbed = house.launch(spec)
    job = house.launch(spec)
    house.wait_for_step(job, 25)
    (trainer,) = [p for p in house.matching(r"worker\.engine\.train") if job in p.cwd()]

    (web,) = house.matching(r"pegbox web")
    web.send_signal(signal.SIGKILL)
    wait_until(lambda: not web.is_running() or web.status() == "zombie", "web is dead")
    house.wait_until_ready()
    assert trainer.is_running(), "training was not disturbed"

    address = _redis_url(house)
    for process in [*house.matching(r"pegbox worker"), *house.matching(r"worker\.celery_app")]:
        process.send_signal(signal.SIGKILL)
    with redis.Redis.from_url(address) as client:
        client.flushall()
    house.wait_for_step(job, 60)
    assert trainer.is_running(), "training was not disturbed"

    trainer.send_signal(signal.SIGKILL)
    house.wait_for_state(job, "succeeded", timeout_s=240)
    house.wait_for_state(undisturbed, "succeeded", timeout_s=240)
    attempts = house.get(f"/jobs/{job}/attempts")["data"]
    assert sorted((a["number"], a["outcome"]) for a in attempts) == [(1, "lost"), (2, "succeeded")]
    assert house.losses(job) == house.losses(undisturbed)
    assert len(house.losses(job)) == 240

    def hashes(name: str) -> dict[str, str]:
        return {entry["name"]: entry["sha256"] for entry in house.get(f"/jobs/{name}/artifacts")["data"]}

    weights = "adapter_model.safetensors"
    assert hashes(job)[weights] == hashes(undisturbed)[weights], "resumed is bit for bit the same"
    assert not house.matching(r"worker\.engine\.train"), "no trainer is left behind"


def _redis_url(house: House) -> str:
    (worker,) = wait_until(lambda: house.matching(r"worker\.celery_app .* launch"), "Celery runs again")[:1]
    return str(worker.environ()["PEGBOX_REDIS_URL"])


def test_the_worker_token_is_in_no_file_that_others_can_read(house: House) -> None:
    path = house.data_dir / "worker" / "settings.json"
    assert path.stat().st_mode & 0o077 == 0
    assert WorkerSettings.load(house.data_dir).token.startswith("pegbox_")


@pytest.mark.parametrize(
    ("parts", "pointer", "words"),
    [
        ({"schedule": {"learning_rate": -1}}, "/spec/schedule/learning_rate", "above 0"),
        ({"model": {"base": "team/unknown"}}, "/spec/model/base", "demo/tiny-llama"),
        ({"lerning_rate": 1}, "/spec/lerning_rate", "did you mean"),
        ({"batch": {"samples_per_step": 1, "rows_per_step": 2}}, "/spec/batch/samples_per_step", "rows_per_step"),
        ({"data": {"train": [{"dataset": "arithmetics"}]}}, "/spec/data/train/0/dataset", "arithmetic"),
        ({"model": {"revision": "main"}}, "/spec/model/revision", "not built yet"),
    ],
)
def test_a_bad_spec_is_refused_with_field_and_remedy(
    house: House, parts: dict[str, object], pointer: str, words: str
) -> None:
    reply = house.post("/jobs", {"spec": spec_of("arithmetic", **parts)})
    assert reply.status_code == 422 and reply.headers["content-type"] == "application/problem+json"
    (error,) = reply.json()["errors"]
    assert error["pointer"] == pointer and words in error["detail"] + (error.get("fix") or "")


def test_what_the_data_forbids_fails_at_the_start_and_once_it_is_measured_at_submit(house: House) -> None:
    house.put_dataset("unmeasured", arithmetic(80))
    spec = spec_of("unmeasured", data={"train": [{"dataset": "unmeasured"}], "max_length": 32})
    failed = house.wait_for_state(house.launch(spec), "failed")
    assert failed["reason"] == "bad_spec" and "would be dropped" in failed["text"]
    reply = house.post("/jobs", {"spec": spec})
    assert reply.status_code == 422
    (error,) = reply.json()["errors"]
    assert error["pointer"] == "/spec/data/max_length" and error["detail"] in failed["text"]


def test_the_same_idempotency_key_makes_one_job(house: House) -> None:
    body = {"spec": spec_of("arithmetic", schedule={"max_steps": 1})}
    first = house.post("/jobs", body, **{"Idempotency-Key": "once"})
    again = house.post("/jobs", body, **{"Idempotency-Key": "once"})
    assert first.json()["id"] == again.json()["id"] and again.headers["Idempotent-Replayed"] == "true"
    other = house.post("/jobs", {"spec": spec_of("arithmetic")}, **{"Idempotency-Key": "once"})
    assert other.status_code == 422
    house.wait_for_state(first.json()["id"], "succeeded")
