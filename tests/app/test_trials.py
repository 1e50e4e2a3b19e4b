"""Trials as pages and programs meet them: asked for from the form and the API, shown while they run, kept apart from
jobs of which something is left."""

import html
import re
from itertools import pairwise
from typing import Any

import pytest

from app.pages.trial import CHART_HEIGHT, LABEL_HEIGHT, draw_probe
from app.pages.trial import _apart as labels_apart
from core.certify import Curve, NotRun, Reference, Tried, compare, told
from core.trial import RateCurve, RateProbe, Suggestion
from core.wire import AttemptRef, WireEvent
from tests.app.conftest import House
from tests.app.scene import SPEC, FakeHost, connect_host, job_of, put_data, states_of, step, wire
from tests.app.test_pages import filled, hidden_inputs

CHOICES = {"compute.gradient_checkpointing": False, "parallel.zero_stage": 0, "parallel.offload": "none"}
PLAN = {
    "total_steps": 400, "steps_per_epoch": 100, "warmup_steps": 10, "peak_learning_rate": 2e-4, "decay": "cosine",
    "min_lr_ratio": 0.0, "max_length": 512, "row_length": 512, "num_samples": 20, "num_validation_samples": 0,
    "num_tokens": 100, "num_trained_tokens": 50, "num_rows": 4, "padding_efficiency": 1.0, "padded_efficiency": 0.5,
    "fill": 1.0, "planned_peak_bytes": 3 * 2**30, "trainable_parameters": 10, "total_parameters": 100,
    "attention": "flash", "counts": {},
    "choices": [{"field": field, "value": value, "code": "auto.dtype_cpu"} for field, value in CHOICES.items()],
}  # fmt: skip
RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)  # around what `auto` comes to for a LoRA of this model
GAINS = {2e-5: 0.01, 6e-5: 0.03, 2e-4: 0.1, 6e-4: 0.06}  # a step; the largest rate diverges


@pytest.fixture
def host(house: House) -> FakeHost:
    host = connect_host(house)
    put_data(house)
    return host


def try_out(house: House, kind: str, **more: Any) -> Any:
    body = {"spec": SPEC, "trial": {"kind": kind, **more}}
    reply = house.api("bob").post("/api/v1/jobs", json=body)
    assert reply.status_code == 201, reply.text
    return reply.json()


def begun(host: FakeHost) -> tuple[AttemptRef, Any]:
    """The one trial that waits, claimed and planned; the launch and what its host was told."""
    launch = host.launched()
    assignment = host.claim(launch)
    assert assignment.status_code == 200
    assert host.send(launch, [wire(1, "plan", **PLAN)]).status_code == 200
    return launch, assignment.json()


def probed(seq: int, rate: float, step: int) -> WireEvent:
    if rate not in GAINS:
        return wire(seq, "probe", learning_rate=rate, step=step, loss=9.5, grad_norm=80.0, diverged=step == 2)
    loss = 3.0 - GAINS[rate] * step
    return wire(seq, "probe", learning_rate=rate, step=step, loss=loss, grad_norm=1.0, diverged=False)


def probe_events(first_seq: int, rates: tuple[float, ...] = RATES, steps: int = 20) -> list[WireEvent]:
    made = [(rate, step) for rate in rates for step in range(1, (steps if rate in GAINS else 2) + 1)]
    return [probed(first_seq + place, rate, step) for place, (rate, step) in enumerate(made)]


# -- asked for -------------------------------------------------------------------------------------------------------


def test_a_trial_is_a_job_that_its_host_knows_for_a_trial(house: House, host: FakeHost) -> None:
    job = try_out(house, "dry_run")
    assert job["trial"] == {"kind": "dry_run", "steps": 10}
    assert job["name"] == "dry run of tiny-llama lora 2027-01-15" and job["spec"]["name"] == ""
    assert job["actions"] == ["cancel", "clone"]
    _, assignment = begun(host)
    assert assignment["trial"] == job["trial"]
    assert assignment["spec"] == job["spec"], "what is trained does not depend on its being tried"


def test_a_probe_is_stored_with_the_rates_that_it_will_try(house: House, host: FakeHost) -> None:
    assert try_out(house, "lr_probe")["trial"] == {"kind": "lr_probe", "rates": list(RATES), "steps": 20}
    mine = try_out(house, "lr_probe", rates=["1e-3", 1e-2], steps=6)
    assert mine["trial"] == {"kind": "lr_probe", "rates": [1e-3, 1e-2], "steps": 6}
    given = house.api("bob").post(
        "/api/v1/jobs",
        json={"spec": SPEC | {"schedule": {"learning_rate": 1e-3}}, "trial": {"kind": "lr_probe"}},
    )
    assert given.json()["trial"]["rates"] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def test_a_plain_job_is_no_trial(house: House, host: FakeHost) -> None:
    job = house.api("bob").post("/api/v1/jobs", json={"spec": SPEC}).json()
    assert job["trial"] is None and "stop" in job["actions"]
    assert begun(host)[1]["trial"] is None
    assert house.api("bob").get(f"/api/v1/jobs/{job['id']}/trial").status_code == 404


@pytest.mark.parametrize(
    ("trial", "errors"),
    [
        ({"kind": "wet_run"}, [("/trial/kind", "spec.choice")]),
        ({"kind": "dry_run", "steps": 0}, [("/trial/steps", "spec.at_least")]),
        ({"kind": "dry_run", "rates": [1]}, [("/trial/rates", "trial.unknown_key")]),
        ({"kind": "lr_probe", "rates": [1e-3, "fast"]}, [("/trial/rates/1", "spec.number")]),
        ({"kind": "lr_probe", "rates": [1e-3, 1e-3]}, [("/trial/rates", "trial.rate_twice")]),
        ({"kind": "certify", "steps": 6}, [("/trial/steps", "spec.at_most")]),
    ],
)
def test_a_fault_in_the_trial_is_told_with_its_place(
    house: House, host: FakeHost, trial: dict[str, Any], errors: list[tuple[str, str]]
) -> None:
    bob = house.api("bob")
    reply = bob.post("/api/v1/jobs", json={"spec": SPEC, "trial": trial})
    assert reply.status_code == 422 and reply.headers["content-type"] == "application/problem+json"
    assert [(error["pointer"], error["code"]) for error in reply.json()["errors"]] == errors
    assert bob.get("/api/v1/jobs").json()["data"] == []
    wrong = bob.post("/api/v1/jobs", json={"spec": SPEC | {"seed": -1}, "trial": {"kind": "dry_run"}}).json()
    assert [error["pointer"] for error in wrong["errors"]] == ["/spec/seed"], "faults of the spec keep their place"


def test_a_viewer_tries_nothing(house: House, host: FakeHost) -> None:
    body = {"spec": SPEC, "trial": {"kind": "dry_run"}}
    assert house.api("victor").post("/api/v1/jobs", json=body).status_code == 403
    browser = house.browser("victor")
    assert browser.post("/jobs/new", data=filled(browser, _trial="dry_run")).status_code == 403


def test_the_buttons_of_the_form_ask_for_a_trial_and_its_own_launch_is_none(house: House, host: FakeHost) -> None:
    browser = house.browser("bob")
    page = browser.get("/jobs/new").text
    buttons = re.findall(r'<button[^>]*name="_trial" value="(\w+)"', page)
    assert buttons == ["dry_run", "lr_probe", "certify"]
    assert page.index('id="launch"') < page.index('name="_trial"'), "Enter in a field launches"
    form = filled(browser)
    for kind in buttons:
        sent = browser.post("/jobs/new", data=form | {"_trial": kind})
        assert sent.status_code == 303
        job = job_of(house.services, sent.headers["location"].removeprefix("/jobs/"))
        assert (job.trial or {})["kind"] == kind and job.name.endswith(" of mine")
    sent = browser.post("/jobs/new", data=form)
    assert job_of(house.services, sent.headers["location"].removeprefix("/jobs/")).trial is None


def test_a_button_pressed_twice_is_one_trial_and_a_changed_form_another(house: House, host: FakeHost) -> None:
    browser = house.browser("bob")
    form = filled(browser, _trial="dry_run")
    first, again = (browser.post("/jobs/new", data=form).headers["location"] for _ in range(2))
    changed = browser.post("/jobs/new", data=form | {"seed": "7"}).headers["location"]
    assert first == again != changed


def test_what_is_wrong_with_the_form_is_said_beside_its_fields(house: House, host: FakeHost) -> None:
    browser = house.browser("bob")
    reply = browser.post("/jobs/new", data=filled(browser, _trial="dry_run", **{"schedule.learning_rate": "fast"}))
    assert reply.status_code == 422 and 'id="schedule.learning_rate-error"' in reply.text
    assert browser.post("/jobs/new", data=filled(browser, _trial="wet_run")).status_code == 422


# -- what may be asked of it -----------------------------------------------------------------------------------------


def test_nothing_goes_on_from_a_trial(house: House, host: FakeHost) -> None:
    job = try_out(house, "dry_run")["id"]
    bob = house.api("bob")
    launch, _ = begun(host)
    host.send(launch, [step(2, 1)])
    for action in ("stop", "checkpoint", "resume"):
        reply = bob.post(f"/api/v1/jobs/{job}/{action}")
        assert reply.status_code == 409, action
        assert f"a trial does not take {action}" in reply.json()["detail"]
    assert bob.post(f"/api/v1/jobs/{job}/cancel").status_code == 200
    assert host.heartbeat(launch).json()["desired"] == "cancel"
    assert host.finish(launch, "stopped", final_seq=2).json()["state"] == "cancelled"
    browser = house.browser("bob")
    csrf = {"_csrf": hidden_inputs(browser.get("/jobs/new").text)["_csrf"]}
    for action in ("retry", "extend", "resume"):
        assert bob.post(f"/api/v1/jobs/{job}/{action}").status_code == 409
        assert browser.post(f"/jobs/{job}/{action}", data=csrf).status_code == 409
    assert bob.post(f"/api/v1/jobs/{job}/clone").json()["spec"] == job_of(house.services, job).spec


def test_a_trial_that_its_host_lost_begins_again(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe")["id"]
    launch, _ = begun(host)
    host.send(launch, probe_events(2, RATES[:2]))
    assert host.finish(launch, "lost", reason="killed", final_seq=41).json()["state"] == "queued"
    house.clock.now += 60
    assert host.beat().status_code == 200
    second, assignment = begun(host)
    assert second.attempt == 2 and assignment["trial"]["rates"] == list(RATES)
    host.send(second, probe_events(2, RATES[:1], steps=3))
    told = house.api("bob").get(f"/api/v1/jobs/{job}/trial").json()
    assert [len(rate["losses"]) for rate in told["rates"]] == [3, 0, 0, 0, 0], "the new attempt's steps alone"


# -- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_how_long_the_whole_job_takes(house: House, host: FakeHost) -> None:
    job = try_out(house, "dry_run")["id"]
    bob, browser = house.api("bob"), house.browser("bob")
    assert bob.get(f"/api/v1/jobs/{job}/trial").json() == {"kind": "dry_run", "report": None}
    assert "Known once it has made a step." in browser.get(f"/jobs/{job}").text
    launch, _ = begun(host)
    seconds = [5.0, 3.0, 0.5, 0.5, 0.7, 0.5, 0.9, 0.5, 0.5, 0.6]
    steps = [
        step(number + 1, number, step_s=step_s, memory_peak_bytes=2**30 + number)
        for number, step_s in enumerate(seconds, 1)
    ]
    host.send(launch, steps)
    assert states_of(house.services, job)[-1] == "running"
    report = bob.get(f"/api/v1/jobs/{job}/trial").json()["report"]
    assert (report["seconds_per_step"], report["seconds_in_all"]) == (0.5, 200.0)
    assert report["tokens_per_s"] == pytest.approx(8 * 200 / sum(seconds[2:]))
    assert (report["memory_peak_bytes"], report["planned_peak_bytes"]) == (2**30 + 10, 3 * 2**30)
    assert (report["first_loss"], report["last_loss"]) == (3.0, 0.3)
    page = browser.get(f"/jobs/{job}").text
    assert (
        "<dd>0.5</dd>" in page
        and "3 min 20 s" in page
        and "400 steps at this pace" in page
        and "planned 3.00 GiB" in page
    )
    assert "Launch the whole job" not in page
    assert "<small>/ 10</small>" in page, "it is through after its own steps, not the job's"
    assert 'id="charts"' in page


def test_the_whole_job_is_launched_from_its_dry_run_once(house: House, host: FakeHost) -> None:
    spec = SPEC | {"method": {"type": "lora", "rank": 8}, "name": "short", "tags": ["a", "b"]}
    tried = house.api("bob").post("/api/v1/jobs", json={"spec": spec, "trial": {"kind": "dry_run"}}).json()
    launch, _ = begun(host)
    host.send(launch, [step(2, 1)])
    assert host.finish(launch, "succeeded", final_seq=2).json()["state"] == "succeeded"
    browser = house.browser("bob")
    page = browser.get(f"/jobs/{tried['id']}").text
    assert "Launch the whole job" in page
    form = hidden_inputs(page.split("What the dry run says")[1].split("</section>")[0])
    places = {browser.post("/jobs/new", data=form).headers["location"] for _ in range(2)}
    (place,) = places
    whole = job_of(house.services, place.removeprefix("/jobs/"))
    assert whole.trial is None and whole.name == "short" and whole.spec == tried["spec"]
    assert "Launch the whole job" not in house.browser("victor").get(f"/jobs/{tried['id']}").text


# -- a probe ---------------------------------------------------------------------------------------------------------


def test_a_probes_curves_come_step_by_step_and_the_best_rate_at_the_end(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe")["id"]
    bob, browser = house.api("bob"), house.browser("bob")
    launch, _ = begun(host)
    events = probe_events(2)
    host.send(launch, events[:45])
    told = bob.get(f"/api/v1/jobs/{job}/trial").json()
    assert [len(rate["losses"]) for rate in told["rates"]] == [20, 20, 5, 0, 0] and told["suggestion"] is None
    assert states_of(house.services, job)[-1] == "running"
    page = browser.get(f"/jobs/{job}").text
    assert page.count("<polyline") == 3 and "once all are through" in page and "Use " not in page

    host.send(launch, events[45:])
    assert host.finish(launch, "succeeded", final_seq=events[-1].seq).json()["state"] == "succeeded"
    told = bob.get(f"/api/v1/jobs/{job}/trial").json()
    assert told["suggestion"]["learning_rate"] == 2e-4 and told["suggestion"]["is_settled"] is True
    assert [rate["has_diverged"] for rate in told["rates"]] == [False] * 4 + [True]
    assert told["rates"][2]["last_loss"] == pytest.approx(3.0 - 0.1 * 18)
    page = html.unescape(browser.get(f"/jobs/{job}").text)
    assert page.count("<polyline") == 5 and told["suggestion"]["text"].removeprefix("2e-4") in page
    assert f'href="/jobs/new?from={job}&learning_rate=2e-4"' in page
    assert "data-chart" not in page and 'class="tiles"' not in page, "a probe has no curve of its own"
    form = browser.get(f"/jobs/new?from={job}&learning_rate=2e-4").text
    assert re.search(r'name="schedule.learning_rate" value="2e-4"', form)


def test_a_probes_losses_are_no_metrics_of_the_job(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe")["id"]
    launch, _ = begun(host)
    host.send(launch, probe_events(2))
    series = house.api("bob").get(f"/api/v1/jobs/{job}/metrics").json()["series"]
    assert set(map(tuple, series.values())) == {()}
    kept = house.api("bob").get(f"/api/v1/jobs/{job}/events").json()["data"]
    assert sum(event["kind"] == "probe" for event in kept) == 82


def test_a_probe_that_ended_early_suggests_nothing(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe")["id"]
    launch, _ = begun(host)
    host.send(launch, probe_events(2, RATES[:2]))
    house.api("bob").post(f"/api/v1/jobs/{job}/cancel")
    host.finish(launch, "stopped", final_seq=41)
    assert "suggests none" in house.browser("bob").get(f"/jobs/{job}").text


def test_lists_tell_trials_from_jobs(house: House, host: FakeHost) -> None:
    kinds = {"dry_run": "dry run", "lr_probe": "probe", "certify": "certify"}
    jobs = {try_out(house, kind)["id"]: tag for kind, tag in kinds.items()}
    page = house.browser("bob").get("/jobs").text
    for job, tag in jobs.items():
        (row,) = re.findall(rf'<tr id="{job}">.*?</tr>', page, re.DOTALL)
        assert f'<span class="tag">{tag}</span>' in row


def test_a_streams_fragment_holds_the_probe(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe")["id"]
    launch, _ = begun(host)
    host.send(launch, probe_events(2, RATES[:1]))
    host.send(launch, [])
    house.api("bob").post(f"/api/v1/jobs/{job}/cancel")
    host.finish(launch, "stopped", final_seq=21)
    stream = house.browser("bob").get(f"/jobs/{job}/live").text
    assert '<hx-partial hx-target="#trial"' in stream and "<polyline" in stream


# -- a certificate ---------------------------------------------------------------------------------------------------


def curve_of(*losses: float, in_a_row: int = 3) -> Curve:
    return Curve(
        losses=losses,
        grad_norms=(1.0,) * len(losses),
        slots=640,
        most_segments_in_a_row=in_a_row,
        ranks=1,
        attention="flash",
        seconds=0.25,
    )


ALONE = Reference("each sample alone, fp32", curve_of(3.0, 2.5, 2.0, in_a_row=1))
EQUAL = compare("the job as it is", curve_of(3.0, 2.5, 2.0 * (1 + 2e-7)), ALONE.curve, None)
DIFFERENT = compare("packed, sequential", curve_of(3.0, 2.5, 2.2), ALONE.curve, None)
REFUSED = NotRun("packed, attention flex", "flex_attention has no backward pass on a <CPU>", "bad_spec")


def layout_events(first_seq: int, *all_tried: Tried, total: int = 3) -> list[WireEvent]:
    """Each with the phase behind it, as they are told."""
    made = []
    for number, each in enumerate(all_tried):
        made.append(wire(first_seq + 2 * number, "layout", **told(each, "fp32")))
        made.append(wire(first_seq + 2 * number + 1, "phase", name="certify", done=number + 1, total=total))
    return made


def certified(house: House, host: FakeHost) -> tuple[str, AttemptRef]:
    job = try_out(house, "certify")
    assert job["trial"] == {"kind": "certify", "steps": 3} and job["name"].startswith("certificate of ")
    launch = host.launched()
    assert host.claim(launch).json()["trial"] == job["trial"]
    return job["id"], launch


def test_a_certificates_layouts_come_one_by_one_and_its_verdict_at_the_end(house: House, host: FakeHost) -> None:
    job, launch = certified(house, host)
    bob, browser = house.api("bob"), house.browser("bob")
    assert bob.get(f"/api/v1/jobs/{job}/trial").json()["dtype"] is None
    assert "Known once it has made the first" in browser.get(f"/jobs/{job}").text
    events = layout_events(1, ALONE, EQUAL, REFUSED)
    host.send(launch, events[:4])
    assert states_of(house.services, job)[-1] == "running"
    told = bob.get(f"/api/v1/jobs/{job}/trial").json()
    assert (told["verdict"], told["dtype"], told["steps"], len(told["layouts"])) == (None, "fp32", 3, 1)
    page = browser.get(f"/jobs/{job}").text
    assert "1 layout so far; losses differ by at most 2e-7" in page and "Left out" not in page

    host.send(launch, events[4:])
    assert host.finish(launch, "succeeded", final_seq=6).json()["state"] == "succeeded"
    told = bob.get(f"/api/v1/jobs/{job}/trial").json()
    assert told["verdict"]["is_equal"] is True and told["verdict"]["code"] == "certify.equal"
    assert told["references"][0]["losses"] == [3.0, 2.5, 2.0] and told["references"][0]["is_equal"] is None
    assert told["layouts"][0]["loss_deviation"] == pytest.approx(2e-7) and told["layouts"][0]["is_equal"] is True
    assert told["not_run"] == [{"name": REFUSED.name, "reason": REFUSED.reason, "cause": "bad_spec"}]
    page = browser.get(f"/jobs/{job}").text
    assert '<div class="notice ok"><p><strong>Equal: 1 layouts make the same steps;' in page
    assert "on a &lt;CPU&gt;" in page and "data-chart" not in page and 'class="tiles"' not in page
    assert page.index("Equal: 1 layouts") < page.index('<th scope="row">each sample alone') < page.index("Left out")
    stream = browser.get(f"/jobs/{job}/live").text
    assert '<hx-partial hx-target="#trial"' in stream and "Equal: 1 layouts" in stream


def test_a_layout_that_differs_is_seen_at_once_and_big_at_the_end(house: House, host: FakeHost) -> None:
    job, launch = certified(house, host)
    browser = house.browser("bob")
    events = layout_events(1, ALONE, EQUAL, DIFFERENT)
    host.send(launch, events[:-1])
    page = browser.get(f"/jobs/{job}").text
    assert "These differ: packed, sequential." in page
    host.send(launch, events[-1:])
    assert host.finish(launch, "succeeded", final_seq=6).json()["state"] == "succeeded"
    verdict = house.api("bob").get(f"/api/v1/jobs/{job}/trial").json()["verdict"]
    assert verdict["is_equal"] is False and "NOT equal: 1 of 2 layouts" in verdict["text"]
    page = browser.get(f"/jobs/{job}").text
    assert '<div class="notice bad"><p><strong>NOT equal' in page and "1e-1" in page


def test_a_certificate_that_ended_early_proves_nothing(house: House, host: FakeHost) -> None:
    job, launch = certified(house, host)
    host.send(launch, layout_events(1, ALONE, EQUAL))
    house.api("bob").post(f"/api/v1/jobs/{job}/cancel")
    host.finish(launch, "stopped", final_seq=4)
    assert "so it proves nothing" in house.browser("bob").get(f"/jobs/{job}").text
    assert house.api("bob").get(f"/api/v1/jobs/{job}/trial").json()["verdict"] is None


def test_a_certificate_that_failed_by_a_fault_keeps_what_it_found(house: House, host: FakeHost) -> None:
    job, launch = certified(house, host)
    fault = NotRun("packed, 2 ranks, ZeRO 2", "killed by the kernel", "killed")
    host.send(launch, layout_events(1, ALONE, EQUAL, fault))
    host.finish(launch, "failed", reason="internal", text="a layout fell", final_seq=6)
    told = house.api("bob").get(f"/api/v1/jobs/{job}/trial").json()
    assert told["verdict"]["code"] == "certify.fault" and told["verdict"]["is_equal"] is False
    assert "Not proven: packed, 2 ranks, ZeRO 2" in house.browser("bob").get(f"/jobs/{job}").text


# -- drawn -----------------------------------------------------------------------------------------------------------


def curve(rate: float, *losses: float | None) -> RateCurve:
    diverged = losses[-1] is None
    return RateCurve(learning_rate=rate, losses=losses, grad_norms=(1.0,) * len(losses), has_diverged=diverged)


def test_a_rate_that_diverges_does_not_press_the_others_flat() -> None:
    drawing = draw_probe([curve(1e-4, 3.0, 2.5, 2.0), curve(1e-2, 3.0, 90.0, None)], 3, None)
    assert drawing is not None and (drawing.highest, drawing.lowest) == ("3.0000", "2.0000")
    heights = [[float(point.split(",")[1]) for point in line.points.split()] for line in drawing.lines]
    assert heights == [[drawing.top, (drawing.top + drawing.bottom) / 2, drawing.bottom], [drawing.top] * 3]


def test_nothing_is_drawn_before_the_first_step_or_of_what_never_was_a_number() -> None:
    assert draw_probe([], 20, None) is None
    assert draw_probe([curve(1.0, None)], 20, None) is None


def test_a_curve_of_one_step_and_one_height_is_drawn() -> None:
    suggestion = Suggestion(learning_rate=1.0, is_settled=True, code="trial.best_lies_between", parameters={})
    drawing = draw_probe([curve(1.0, 2.0)], 1, suggestion)
    assert drawing is not None and [line.is_suggested for line in drawing.lines] == [True]


@pytest.mark.parametrize("wanted", [[100.0] * 5, [20.0, 21.0, 200.0, 205.0, 206.0], [206.0] * 12])
def test_names_at_the_ends_of_curves_do_not_lie_on_each_other(wanted: list[float]) -> None:
    places = sorted(labels_apart(wanted, 20, CHART_HEIGHT - 20))
    gaps = [after - before for before, after in pairwise(places)]
    assert min(gaps) >= LABEL_HEIGHT - 1e-9 and max(places) <= CHART_HEIGHT - 20


def test_a_job_shorter_than_the_probe_is_through_with_its_own_steps(house: House, host: FakeHost) -> None:
    job = try_out(house, "lr_probe", rates=[1e-4, 2e-4], steps=20)["id"]
    launch = host.launched()
    host.claim(launch)
    losses = {(1e-4, 1): 3.0, (1e-4, 2): 2.9, (2e-4, 1): 3.0, (2e-4, 2): 2.0}
    events = [
        wire(seq, "probe", learning_rate=rate, step=step, loss=loss, grad_norm=1.0)
        for seq, ((rate, step), loss) in enumerate(losses.items(), 2)
    ]
    host.send(launch, [wire(1, "plan", **PLAN | {"total_steps": 2}), *events])
    told = house.api("bob").get(f"/api/v1/jobs/{job}/trial").json()
    assert told["steps"] == 2 and told["suggestion"]["learning_rate"] == 2e-4
    assert RateProbe.model_validate(job_of(house.services, job).trial).steps == 20
