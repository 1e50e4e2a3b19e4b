"""A job's forecast, as programs and pages show it, and what is made of it when the job has ended."""

import re
from dataclasses import replace
from typing import Any

import pytest

from app.forecast import forecast_job
from app.profiles import plan_if_measured
from app.tables import Job
from core.run_totals import run_totals
from core.spec import parse_spec
from core.wire import AttemptRef, HostBeat, HostReport
from tests.app.conftest import House
from tests.app.scene import SPEC, FakeHost, connect_host, job_of, put_data, submit, wire
from tests.app.scene import step as step_event
from tests.app.test_pages import filled
from tests.app.test_preflight_memory import gpu, model, ready
from tests.app.test_profiles import preflight
from tests.app.test_recorder import PLAN
from tests.core.shapes import llama

SMALL = llama(hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128, vocabulary=512)


def small_host(house: House, name: str = "NVIDIA L40S") -> FakeHost:
    """With one GPU."""
    host = ready(house, gpu(48), SMALL)
    report = HostReport(
        host=host.id,
        name="large",
        devices=(gpu(48).model_copy(update={"name": name}),),
        models=(model(SMALL),),
        versions={"torch": "2.13.0"},
        num_cpus=2,
        memory_bytes=2**36,
    )
    assert host.post("/hosts/register", report).status_code == 200
    assert host.post(f"/hosts/{host.id}/beat", HostBeat(disk_free_bytes=10**9)).status_code == 200
    return host


def forecast_of(house: House, **spec: Any) -> dict[str, Any]:
    got: dict[str, Any] = preflight(house, **spec).json()["forecast"]
    return got


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def train(
    house: House, host: FakeHost, launch: AttemptRef, *, step_s: float = 2.0, outcome: str | None = "succeeded"
) -> None:
    """All steps as they were forecast, one of `step_s` seconds each."""
    spec = parse_spec(job_of(house.services, launch.job).spec)
    plan = plan_if_measured(house.services, spec)
    assert plan is not None and host.claim(launch).status_code == 200
    told = PLAN | plan.plan_event() | {"attention": "flash", "totals": run_totals(plan).model_dump()}
    host.send(launch, [wire(1, "plan", **told)])
    house.clock.now += 8
    seq = 1
    for number in range(1, plan.total_steps + 1):
        work = plan.step(number)
        made = {name: getattr(work.layout, name) for name in ("tokens", "slots", "rows", "padding_efficiency")}
        seq += 1
        house.clock.now += step_s
        event = step_event(seq, number, **made, trained_tokens=work.num_targets, step_s=step_s, memory_peak_bytes=10**9)
        assert host.send(launch, [event]).status_code == 200
    host.send(launch, [wire(seq + 1, "checkpoint", step=plan.total_steps, path="checkpoints/step-1", bytes=999_000)])
    if outcome is not None:
        assert host.finish(launch, outcome, final_seq=seq + 1).status_code == 200


def test_a_preflight_tells_time_cost_disk_and_place_with_their_basis(house: House) -> None:
    small_host(house)
    got = forecast_of(house)
    assert got["basis"] == "formula" and "30 % of 362 TFLOP/s" in got["why"]
    assert 0 < got["low_s"] < got["seconds"] < got["high_s"] and got["correction"] == 1 and got["corrected"] is None
    assert got["device_kind"] == "gpu" and got["devices"] == 1
    assert got["device_hours"] == pytest.approx(got["seconds"] / 3600)
    assert got["cost"] is None, "nobody has set a price"
    disk = got["disk"]
    assert disk["free_bytes"] == 10**9 and disk["fits"]
    parts = disk["most_checkpoints"] * disk["checkpoint_bytes"] + disk["result_bytes"] + disk["cache_bytes"]
    assert disk["total_bytes"] == parts
    assert got["position"] is None and got["place"] == "starts at once on gpu0 of large" and got["host"] == "large"


def test_the_queue_that_is_ahead_decides_the_place(house: House) -> None:
    host = small_host(house)
    submit(house)
    host.launched()
    first = forecast_of(house)
    assert first["position"] == 1 and first["host"] == "large"
    assert first["place"] == "waits for a free device: 1 of 1 GPUs on large are busy"
    submit(house)
    assert forecast_of(house)["position"] == 2
    assert forecast_of(house, priority=3)["position"] == 1


def test_with_a_price_money_is_told(house: House) -> None:
    small_host(house)
    priced = replace(
        house.services, settings=replace(house.services.settings, price_per_gpu_hour=3600.0, currency="EUR")
    )
    spec = parse_spec(SPEC)
    plan = plan_if_measured(priced, spec)
    assert plan is not None
    forecast = forecast_job(priced, plan, spec)
    assert forecast.cost(2.0) == 2.0 and forecast.currency == "EUR"
    house.app.state.services = priced
    got = forecast_of(house)
    assert got["cost"] == pytest.approx(got["seconds"])
    browser = house.browser("bob")
    panel = text_of(browser.post("/jobs/preflight", data=filled(browser), headers={"HX-Request": "true"}).text)
    assert "3,600.00 EUR an hour" in panel


def test_the_panel_says_it_in_words(house: House) -> None:
    small_host(house)
    browser = house.browser("bob")
    panel = text_of(browser.post("/jobs/preflight", data=filled(browser), headers={"HX-Request": "true"}).text)
    assert "Time, cost, place" in panel and "right within a factor of 3" in panel
    assert "Starts at once on gpu0 of large" in panel and "are free on large" in panel and "on 1 GPU" in panel


def test_what_was_learned_of_jobs_is_told_and_counted_in(house: House) -> None:
    host = small_host(house)
    planned = forecast_of(house)
    for _ in range(2):
        submit(house)
        train(house, host, host.launched())
    job = house.api("bob").get("/api/v1/jobs").json()["data"][0]
    got = forecast_of(house)
    assert got["basis"] == "history" and "the last 2 jobs like this on NVIDIA L40S" in got["why"]
    steps = job["plan"]["total_steps"]
    assert got["steps_s"] == pytest.approx(2.0 * steps)
    # The second was forecast by the first one's pace; what was still off is learned, that of the formula is not.
    assert job["forecast"]["time"]["basis"] == "history" and job["forecast"]["time"]["correction"] == 1
    took = job["summary"]["past_run"]["seconds"]
    assert took == pytest.approx(8 + 2.0 * steps)
    ratio = took / job["forecast"]["time"]["seconds"]
    assert got["correction"] == pytest.approx(ratio) and "that is included" in got["corrected"]
    assert got["seconds"] == pytest.approx(took) and got["seconds"] > 10 * planned["steps_s"]
    assert got["memory_ratio"] == pytest.approx(10**9 / job["forecast"]["planned_peak_bytes"])


def test_a_job_is_held_to_its_forecast_on_its_page_and_in_the_api(house: House) -> None:
    host = small_host(house)
    job_id = submit(house)
    launch = host.launched()
    assert house.api("bob").get(f"/api/v1/jobs/{job_id}").json()["held_to"]["is_over"] is False
    train(house, host, launch)
    held = house.api("bob").get(f"/api/v1/jobs/{job_id}").json()["held_to"]
    assert held["is_over"] and held["why_none"] is None
    lines = {line["name"]: line for line in held["lines"]}
    for name in ("steps", "steps_per_epoch", "rows", "slots", "padding_efficiency", "trained_tokens"):
        assert lines[name]["predicted"] == lines[name]["actual"] is not None and lines[name]["deviation"] == 0, name
    assert lines["seconds"]["actual"] == 8 + lines["steps_s"]["actual"] and lines["seconds"]["predicted"] > 0
    assert lines["memory_peak_bytes"]["actual"] == 10**9
    assert lines["checkpoint_bytes"]["actual"] == lines["kept_bytes"]["actual"] == 999_000
    assert lines["checkpoint_bytes"]["predicted"] > 0 and lines["result_bytes"]["actual"] is None
    page = text_of(house.browser("bob").get(f"/jobs/{job_id}").text)
    assert "Predicted and actual" in page and "padding efficiency" in page and "There is no forecast" not in page


def test_a_job_whose_data_was_not_measured_is_held_to_its_trainers_plan_and_says_why(house: House) -> None:
    host = small_host(house)
    job_id = submit(house)
    with house.services.database.write() as session:
        stored = session.get_one(Job, job_id)
        stored.forecast = None
        session.add(stored)
    launch = host.launched()
    train(house, host, launch)
    held = house.api("bob").get(f"/api/v1/jobs/{job_id}").json()["held_to"]
    lines = {line["name"]: line for line in held["lines"]}
    assert held["why_none"]["code"] == "forecast.not_measured"
    assert lines["rows"]["deviation"] == lines["steps"]["deviation"] == 0
    assert lines["seconds"]["predicted"] is None and lines["seconds"]["actual"] > 0
    page = text_of(house.browser("bob").get(f"/jobs/{job_id}").text)
    assert "its data had not been measured when it was launched" in page


def test_a_submit_without_a_profile_keeps_no_forecast(house: House) -> None:
    connect_host(house)
    put_data(house)
    job_id = submit(house)
    job = house.api("bob").get(f"/api/v1/jobs/{job_id}").json()
    assert job["forecast"] is None and job["held_to"]["lines"] == []
    page = text_of(house.browser("bob").get(f"/jobs/{job_id}").text)
    assert "There is no forecast of time and disk: its data had not been measured" in page


def test_a_disk_without_room_warns_and_names_what_could_go(house: House) -> None:
    host = small_host(house)
    job_id = submit(house, name="an old one")
    train(house, host, host.launched())
    assert forecast_of(house)["disk"]["fits"]
    disk = forecast_of(house)["disk"]
    # Room for two checkpoints, not for those that are asked for.
    free = disk["total_bytes"] - disk["checkpoint_bytes"]
    asked = {"checkpoint": {"keep_last": 3, "every_epoch": True}, "schedule": {"epochs": 6.0}}
    assert host.post(f"/hosts/{host.id}/beat", HostBeat(disk_free_bytes=free)).status_code == 200
    reply = preflight(house, **asked).json()
    assert reply["forecast"]["disk"]["fits"] is False
    (remark,) = [each for each in reply["verdict"] if each["code"].startswith("forecast.")]
    assert remark["code"] == "forecast.disk_short_old" and remark["level"] == "warning"
    assert "an old one (999000 B)" in remark["text"] or "an old one (0.999 MB)" in remark["text"]
    assert remark["fixes"] == [{"checkpoint.keep_last": 1, "checkpoint.keep_best": 0}]
    mended = preflight(house, **asked | {"checkpoint": {"keep_last": 1, "keep_best": 0}}).json()
    assert mended["forecast"]["disk"]["fits"]
    assert job_of(house.services, job_id).state == "succeeded"
    browser = house.browser("bob")
    typed = {"checkpoint.keep_last": "3", "schedule.epochs": "6"}
    panel = browser.post("/jobs/preflight", data=filled(browser, **typed), headers={"HX-Request": "true"}).text
    assert "the largest of an old one" in text_of(panel)


def test_a_host_says_how_far_forecasts_of_its_jobs_were_off(house: House) -> None:
    host = small_host(house)
    browser = house.browser("bob")
    assert "No job has ended here yet that could be held to one." in text_of(browser.get("/hosts").text)
    for _ in range(2):
        submit(house)
        train(house, host, host.launched())
    page = text_of(browser.get("/hosts").text)
    assert re.search(r"The last 2 jobs took [\d,]+ % of their forecast time, as a median; [\d,]+ % at worst\.", page)
    assert "Peak memory of the last 2 jobs was" in page
