"""What a form changes against what it began from, the lock on it, and fixes: in the panel, without JavaScript, and for
programs."""

import html
import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.forms import inputs_of, spec_of_form, state_of_spec
from core.fix import Fix, applied
from core.spec import parse_spec
from core.wire import ProfileResult
from tests.app.conftest import House
from tests.app.scene import connect_host, put_data, submit
from tests.app.test_pages import filled
from tests.app.test_profiles import facts_with_turns, measure, preflight

BY_ROWS = {"batch": "rows_per_step", "batch.rows_per_step": "4"}


@pytest.fixture
def measured(house: House) -> House:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(profile=facts_with_turns()))
    return house


def panel(browser: TestClient, **changed: str) -> str:
    sent = filled(browser) | changed
    return html.unescape(browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text)


def buttons(page: str) -> list[str]:
    """What each would send."""
    return re.findall(r"name=\"_fix\" value=\"(\{.*?\})\">", page)


def test_by_samples_the_panel_says_that_the_steps_stay_and_by_rows_what_keeps_them(measured: House) -> None:
    browser = measured.browser("bob")
    same = panel(browser)
    assert "Against plain padding" in same and "same optimisation" in same
    assert re.search(r"The same 6 steps on the same samples, 1\.\dx fewer slots", same)
    other = panel(browser, **BY_ROWS)
    assert "another optimisation" in other
    assert re.search(r"48 steps become \d+, the warm-up \d steps instead of 5", other)
    assert "To keep the optimisation set batch.samples_per_step 4" in other
    assert [json.loads(text) for text in buttons(other)] == [
        {"batch.samples_per_step": "4", "batch": "samples_per_step"}
    ]


def test_without_javascript_the_button_fills_the_form(measured: House) -> None:
    browser = measured.browser("bob")
    (fix,) = buttons(panel(browser, **BY_ROWS))
    page = browser.post("/jobs/preflight", data=filled(browser) | BY_ROWS | {"_fix": fix, "name": "kept"})
    assert page.status_code == 200 and "<html" in page.text
    assert re.search(r'value="samples_per_step" checked', page.text)
    assert 'name="batch.samples_per_step" value="4"' in page.text and 'name="name" value="kept"' in page.text
    assert "same optimisation" in page.text and "another optimisation" not in page.text


def test_a_preset_is_held_against_with_ones_own_data(measured: House) -> None:
    browser = measured.browser("bob")
    form = browser.get("/jobs/new?preset=demo").text
    assert '<input type="hidden" name="_preset" value="demo">' in form
    chosen = {"schedule.learning_rate": "1e-3", "schedule.duration": "epochs", "schedule.epochs": "1.5"}
    page = panel(browser, _preset="demo", **chosen)
    assert "Against the preset Tiny demo" in page
    assert "The learning rate rises to 0.001 instead of 0.003" in page
    assert {"schedule.learning_rate": "0.003"} in [json.loads(text) for text in buttons(page)]
    assert "not compared" not in page.lower()


def test_a_clone_is_held_against_its_job_and_says_what_was_never_measured(measured: House) -> None:
    browser = measured.browser("bob")
    job = submit(measured, name="first", method={"rank": 8})
    stored = measured.api("bob").get(f"/api/v1/jobs/{job}").json()["spec"]["data"]["train"][0]["dataset"]
    form = browser.get(f"/jobs/new?from={job}").text
    assert f'<input type="hidden" name="_job" value="{job}">' in form
    sent = {"_job": job, "data.train.dataset": stored, "method.rank": "8"}
    same = panel(browser, **sent, **{"packing.mode": "padded"})
    assert f'Against <a href="/jobs/{job}">first</a>' in same and "another optimisation" not in same
    assert "method.rank is 16 instead of 8" in html.unescape(panel(browser, **sent | {"method.rank": "16"}))

    elsewhere = submit(measured, name="reads otherwise", data={"train": [{"dataset": "sums"}], "train_on": "all"})
    page = panel(browser, _job=elsewhere, **{"data.train.dataset": stored})
    assert "Not compared: with data.train_on all the data would have to be measured anew" in page
    # Nobody was asked to measure it for a comparison.
    assert "Against plain padding" in page and preflight(measured).status_code == 200


def test_the_lock_warns_of_what_changes_the_optimisation_and_undoes_it(measured: House) -> None:
    browser = measured.browser("bob")
    locked = {"_lock": "on"}
    quiet = panel(browser, **locked, **{"packing.mode": "grouped", "parallel.devices": "2"})
    assert "optimisation is locked" not in quiet and "Ready to launch." in quiet
    warned = panel(browser, **locked, **BY_ROWS)
    assert "The optimisation is locked, and these settings change it: 48 steps become" in warned
    assert "set Samples per step to 4" in warned and len(buttons(warned)) == 2
    assert "locked" not in panel(browser, **BY_ROWS)
    # It stays on when the page comes back, and holds to the job rather than to padding.
    page = browser.post("/jobs/preflight", data=filled(browser) | locked | BY_ROWS).text
    assert re.search(r'name="_lock"[^>]* checked', page)
    job = submit(measured, batch={"rows_per_step": 4})
    assert "optimisation is locked" not in panel(browser, **locked, **BY_ROWS, _job=job)


def test_a_warning_links_to_its_field_and_its_buttons_remove_it(measured: House) -> None:
    browser = measured.browser("bob")
    short = {"data.max_length": "100", "data.overlong": "drop"}
    page = panel(browser, **short)
    assert '<a href="#data.max_length">Maximum length</a>' in page and "are dropped" in page
    assert "set Maximum length to 103" in page and "set Overlong samples to split" in page
    fixes = [fix for fix in buttons(page) if "rank" not in fix]
    assert len(fixes) == 2
    for fix in fixes:
        mended = browser.post("/jobs/preflight", data=filled(browser) | short | {"_fix": fix}).text
        assert "are dropped" not in mended and "<svg" in mended


def test_an_error_has_its_button_too(measured: House) -> None:
    browser = measured.browser("bob")
    wrong = {"data.max_length": "9000"}
    page = panel(browser, **wrong)
    assert "Not yet" in page and "set Maximum length to 4096" in page
    (fix,) = buttons(page)
    mended = browser.post("/jobs/preflight", data=filled(browser) | wrong | {"_fix": fix})
    assert mended.status_code == 200 and 'name="data.max_length" value="4096"' in mended.text
    longer = {"schedule.warmup": "warmup_epochs", "schedule.warmup_epochs": "9"}
    (fix,) = buttons(panel(browser, **longer))
    assert json.loads(fix) == {"schedule.warmup_steps": "1", "schedule.warmup": "warmup_steps"}
    assert browser.post("/jobs/preflight", data=filled(browser) | longer | {"_fix": fix}).status_code == 200


@pytest.mark.parametrize("sent", ["{", "[1]", '{"name": 1}', "[" * 30_000])
def test_a_fix_that_no_button_sends_is_refused(measured: House, sent: str) -> None:
    browser = measured.browser("bob")
    assert browser.post("/jobs/preflight", data=filled(browser) | {"_fix": sent}).status_code == 422


def test_a_program_gets_the_change_and_the_fixes_as_fields(measured: House) -> None:
    got = preflight(measured, batch={"rows_per_step": 4}).json()
    (change,) = got["change"]
    assert change["against"] == "plain_padding" and change["is_same_optimisation"] is False
    assert change["keeps"] == {"batch.samples_per_step": 4, "batch.rows_per_step": None}
    spec = {"data": {"train": [{"dataset": "sums"}]}, "method": {"rank": 8}}
    body: dict[str, Any] = {"spec": spec, "preset": "lora"}
    compared = measured.api("bob").post("/api/v1/jobs/preflight", json=body).json()["change"]
    assert [(each["against"], each["is_same_optimisation"]) for each in compared] == [
        ("preset", False),
        ("plain_padding", True),
    ]
    assert compared[0]["keeps"] == {"method.rank": 16}
    for unknown in ({"preset": "none"}, {"job": "job_none"}):
        reply = measured.api("bob").post("/api/v1/jobs/preflight", json={"spec": spec, **unknown})
        assert reply.status_code == 404

    short = {"train": [{"dataset": "sums"}], "max_length": 100}
    (remark,) = [
        each for each in preflight(measured, data={**short, "overlong": "drop"}).json()["verdict"] if each["fixes"]
    ]
    assert remark["fixes"] == [{"data.max_length": 103}, {"data.overlong": "split"}]
    (error,) = preflight(measured, data=short | {"max_length": 9000}).json()["errors"]
    assert error["fixes"] == [{"data.max_length": 4096}]


@pytest.mark.parametrize(
    "fix",
    [
        {"batch.tokens_per_step": 4096, "batch.samples_per_step": None},
        {"schedule.warmup_steps": 5, "schedule.warmup_ratio": None},
        {"schedule.max_steps": 9, "schedule.epochs": None},
        {"method": {"type": "full"}},
        {"method": {"type": "qlora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}},
        {"data.validation": {"fraction": 0.1}},
        {"data.validation": None},
        {"data.validation": "auto", "data.overlong": None, "optimizer.max_grad_norm": None},
        {"data.train.0.weight": 2.0, "optimizer.betas": [0.9, 0.95], "compute.gradient_checkpointing": True},
        {"parallel.zero_stage": 2, "seed": 7, "model.adapter": None},
    ],
)
def test_a_fix_in_the_form_is_the_fix_in_the_spec(fix: Fix) -> None:
    given = parse_spec(
        {
            "data": {"train": [{"dataset": "d"}], "overlong": "drop", "validation": {"fraction": 0.2}},
            "schedule": {"warmup_ratio": 0.2, "epochs": 2},
            "method": {"type": "lora", "rank": 8},
        }
    )
    texts = inputs_of(fix)
    assert texts
    filled_in = state_of_spec(given.model_dump(mode="json")).with_inputs(texts)
    expected = applied(given, fix)
    assert parse_spec(spec_of_form(filled_in)) == parse_spec(expected)


def test_a_field_without_an_input_gives_no_button() -> None:
    assert inputs_of({"optimizer.betas.0": 0.5, "seed": 1}) == {}
