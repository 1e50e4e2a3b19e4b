"""Trials in a whole Pegbox: real steps of the built-in model, from the API to what they say."""

import pytest

from core.trial import RateCurve, suggest
from tests.e2e.house import House
from tests.e2e.test_rest_journey import arithmetic, spec_of

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def dataset(house: House) -> None:
    house.put_dataset("sums-to-try", arithmetic(600))


def try_out(house: House, **trial: object) -> str:
    reply = house.post("/jobs", {"spec": spec_of("sums-to-try"), "trial": trial})
    assert reply.status_code == 201, reply.text
    return str(reply.json()["id"])


def kinds(house: House, job: str) -> set[str]:
    return {event["kind"] for event in house.get(f"/jobs/{job}/events", limit=1000)["data"]}


def test_a_dry_run_makes_the_first_steps_of_the_job_that_it_is_of(house: House) -> None:
    dry, whole = try_out(house, kind="dry_run", steps=5), house.launch(spec_of("sums-to-try"))
    done = house.wait_for_state(dry, "succeeded")
    house.wait_for_state(whole, "succeeded", timeout_s=240)
    assert house.losses(dry) == house.losses(whole)[:5] and len(house.losses(whole)) > 5
    report = house.get(f"/jobs/{dry}/trial")["report"]
    assert report["total_steps"] == len(house.losses(whole)) == done["plan"]["total_steps"]
    assert report["steps"] == 5 and report["seconds_in_all"] == report["seconds_per_step"] * report["total_steps"]
    assert house.get(f"/jobs/{dry}/artifacts")["data"] == house.get(f"/jobs/{dry}/checkpoints")["data"] == []
    assert kinds(house, dry).isdisjoint({"eval", "checkpoint", "sample"})


def test_a_probe_tries_every_rate_on_the_same_samples_and_suggests_one(house: House) -> None:
    job = try_out(house, kind="lr_probe", rates=[1e-5, 3e-3, 10], steps=8)
    house.wait_for_state(job, "succeeded", timeout_s=240)
    told = house.get(f"/jobs/{job}/trial")
    slow, good, wild = told["rates"]
    assert slow["losses"][0] == good["losses"][0] == wild["losses"][0], "all begin alike"
    assert wild["has_diverged"] and len(wild["losses"]) < 8 == len(slow["losses"]) == len(good["losses"])
    assert good["last_loss"] < slow["last_loss"]
    assert told["suggestion"]["learning_rate"] == 3e-3 and told["suggestion"]["is_settled"]
    own = suggest(
        [RateCurve.model_validate({name: rate[name] for name in RateCurve.model_fields}) for rate in told["rates"]]
    )
    assert told["suggestion"]["text"] == own.why.text()
    assert house.losses(job) == [] and kinds(house, job).isdisjoint({"step", "checkpoint"})
    assert house.get(f"/jobs/{job}/artifacts")["data"] == []


def test_a_probe_is_cancelled_within_a_step(house: House) -> None:
    job = try_out(house, kind="lr_probe", rates=[1e-4, 1e-3, 2e-3], steps=200)
    house.wait_for_state(job, "running")
    assert house.post(f"/jobs/{job}/stop").status_code == 409
    assert house.post(f"/jobs/{job}/cancel").status_code == 200
    house.wait_for_state(job, "cancelled")
    assert house.get(f"/jobs/{job}/trial")["suggestion"] is None
