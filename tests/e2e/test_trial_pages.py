"""The pages of trials in a real chromium: in both themes and at both ends of the widths, and while steps come in."""

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from app.vendor import VENDOR, is_current
from core.certify import Curve, Reference, Tried, compare, layouts, left_out, told
from core.spec import parse_spec
from tests.e2e.stage import Part, Stage, raised
from tests.e2e.test_pages import WCAG

pytestmark = pytest.mark.browser

RATES = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)
NUM_STEPS = 20


@dataclass
class Trials:
    dry_run: str
    probe: str
    running: str  # a probe in its third rate
    part: Part
    certificate: str
    certifying: str  # has its reference and the first layouts
    certifying_part: Part


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    assert is_current(), "the browser files are missing: python -m app.vendor"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with raised(tmp_path_factory.mktemp("trials"), port) as stage:
        yield stage


@pytest.fixture(scope="module")
def trials(stage: Stage) -> Trials:
    now = time.time()
    stage.open_host()
    stage.upload("demo-dialogues")
    dry_run, part, schedule = begin(stage, "dry_run", now - 900)
    stage.play_steps(part, schedule, 1, 10, now - 890)
    end(stage, part, now - 880)
    probe, part, _ = begin(stage, "lr_probe", now - 600)
    for rate in RATES:
        say_rate(part, rate, NUM_STEPS, now - 590)
    end(stage, part, now - 500)
    running, part, _ = begin(stage, "lr_probe", now - 60)
    for rate in RATES[:2]:
        say_rate(part, rate, NUM_STEPS, now - 50)
    stage.send(part)
    certificate, layouts_part = begin_certificate(stage, now - 400)
    say_layouts(layouts_part, LAYOUTS, now - 300)
    end(stage, layouts_part, now - 200)
    certifying, certifying_part = begin_certificate(stage, now - 60)
    say_layouts(certifying_part, LAYOUTS[:3], now - 50)
    stage.send(certifying_part)
    return Trials(dry_run, probe, running, part, certificate, certifying, certifying_part)


def begin(stage: Stage, kind: str, at: float) -> tuple[str, Part, Any]:
    spec = {"name": "support tone", "data": {"train": [{"dataset": "demo-dialogues"}]}}
    reply = stage.api.post("/jobs", json={"spec": spec, "trial": {"kind": kind}})
    assert reply.status_code == 201, reply.text
    part = stage.take(reply.json()["id"])
    return part.job, part, stage.play_plan(part, 600, at)


def end(stage: Stage, part: Part, at: float) -> None:
    part.say("end", at, outcome="succeeded", steps=10, trained_tokens=1000, seconds=9.0)
    stage.end(part, "succeeded")


def say_rate(part: Part, rate: float, num_steps: int, at: float) -> None:
    """As a model of this size learns; the largest rate diverges in its seventh step."""
    for step in range(1, num_steps + 1):
        diverges = rate == RATES[-1]
        learned = 1.4 * (1 - math.exp(-step * rate * 400)) + 0.1 * math.sin(3 * step)
        loss = 2.9 + (step - 1) ** 1.4 if diverges else 3.0 - learned
        is_last = diverges and step == 7
        part.say("probe", at, learning_rate=rate, step=step, loss=loss, grad_norm=1.0, diverged=is_last)
        if is_last:
            return


def begin_certificate(stage: Stage, at: float) -> tuple[str, Part]:
    spec = {"name": "support tone", "data": {"train": [{"dataset": "demo-dialogues"}]}}
    reply = stage.api.post("/jobs", json={"spec": spec, "trial": {"kind": "certify"}})
    assert reply.status_code == 201, reply.text
    part = stage.take(reply.json()["id"])
    part.say("phase", at, name="certify", done=0, total=len(LAYOUTS))
    return part.job, part


def curve(number: int) -> Curve:
    """As a layout makes them, which is off by some last bits."""
    off = 1 + number * 1e-8
    return Curve(
        losses=(3.0012 * off, 2.9121 * off, 2.7741 * off),
        grad_norms=(1.1 * off, 1.2 * off, 1.3 * off),
        slots=7_424 if number else 8_192,
        most_segments_in_a_row=7 if number else 1,
        ranks=1,
        attention="flash",
        seconds=1.34,
    )


SPEC = parse_spec({"data": {"train": [{"dataset": "demo-dialogues"}]}})
ALONE = Reference("each sample alone, fp32", curve(0))
LAYOUTS: list[Tried] = [
    ALONE,
    *(compare(layout.name, curve(n), ALONE.curve, None) for n, layout in enumerate(layouts(SPEC, 1), 1)),
]


def say_layouts(part: Part, all_tried: list[Tried], at: float) -> None:
    for tried in all_tried:
        part.say("layout", at, **told(tried, "fp32"))
        part.say("phase", at, name="certify", done=LAYOUTS.index(tried) + 1, total=len(LAYOUTS))
    if tried is LAYOUTS[-1]:
        for run in left_out(SPEC, 1):
            part.say("layout", at, **told(run, "fp32"))


def open_page(browser: Browser, stage: Stage, **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(stage.login_link())
    page.click("main button")
    return page


@pytest.mark.parametrize(("scheme", "width"), [("light", 1360), ("dark", 360)])
def test_pages_of_trials_are_accessible_and_fit(
    browser: Browser, stage: Stage, trials: Trials, scheme: Any, width: int
) -> None:
    axe = (VENDOR / "axe.js").read_text(encoding="utf-8")
    page = open_page(browser, stage, color_scheme=scheme, viewport={"width": width, "height": 760})
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    found: dict[str, Any] = {}
    paths = (f"/jobs/{trials.dry_run}", f"/jobs/{trials.probe}", f"/jobs/{trials.running}")
    paths += (f"/jobs/{trials.certificate}", f"/jobs/{trials.certifying}", "/jobs")
    for path in paths:
        page.goto(stage.url + path)
        if path.endswith(trials.dry_run):
            page.locator("#charts[data-loaded]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        page.evaluate(axe)
        result = page.evaluate("tags => axe.run(document, {runOnly: tags, resultTypes: ['violations']})", WCAG)
        assert result["passes"], "the checks ran"
        found |= {f"{path}: {each['id']}": [node["target"] for node in each["nodes"]] for each in result["violations"]}
    page.context.close()
    assert found == {} and complaints == []


def test_a_probes_curves_grow_while_one_looks_and_the_rate_is_one_click_from_the_form(
    browser: Browser, stage: Stage, trials: Trials
) -> None:
    page = open_page(browser, stage)
    page.goto(f"{stage.url}/jobs/{trials.running}")
    lines = page.locator("#trial polyline")
    assert lines.count() == 2
    details = page.locator("#probe-losses")
    details.locator("summary").click()
    say_rate(trials.part, RATES[2], 5, time.time())
    stage.send(trials.part)
    lines.nth(2).wait_for()
    assert page.locator("#trial tbody tr").nth(2).inner_text().split()[:2] == ["2e-4", "5"]
    assert details.get_attribute("open") is not None, "what a reader opened stays open"
    assert details.locator("tbody tr").count() == NUM_STEPS and details.locator("tbody tr td").nth(2).is_visible()
    page.goto(f"{stage.url}/jobs/{trials.probe}")
    page.locator("#trial a.button").click()
    page.wait_for_url("**/jobs/new?**")
    assert page.locator('[id="schedule.learning_rate"]').input_value() == "6e-4"
    page.context.close()


def test_a_certificates_layouts_come_while_one_looks_and_its_verdict_at_the_end(
    browser: Browser, stage: Stage, trials: Trials
) -> None:
    page = open_page(browser, stage)
    page.goto(f"{stage.url}/jobs/{trials.certifying}")
    rows = page.locator("#trial table").first.locator("tbody tr")
    assert rows.count() == 3 and "2 layouts so far" in page.locator("#trial").inner_text()
    page.click("#certificate-losses summary")
    say_layouts(trials.certifying_part, LAYOUTS[3:5], time.time())
    stage.send(trials.certifying_part)
    rows.nth(4).wait_for()
    assert rows.nth(4).inner_text().split("\t")[1] == "equal"
    assert page.locator("#certificate-losses").get_attribute("open") is not None
    say_layouts(trials.certifying_part, LAYOUTS[5:], time.time())
    end(stage, trials.certifying_part, time.time())
    page.locator("#trial .notice.ok").wait_for()
    assert page.locator("#trial .notice").inner_text().startswith(f"Equal: {len(LAYOUTS) - 1} layouts make the same")
    assert "several ranks" in page.locator("#trial dl.facts").inner_text()
    page.context.close()


def test_without_a_script_a_trial_begins_and_its_whole_job_is_launched(
    browser: Browser, stage: Stage, trials: Trials
) -> None:
    page = open_page(browser, stage, java_script_enabled=False)
    page.goto(f"{stage.url}/jobs/{trials.probe}")
    assert page.locator("#trial polyline").count() == len(RATES)
    page.goto(f"{stage.url}/jobs/new?from={trials.probe}")
    page.click('button[name="_trial"][value="dry_run"]')
    assert page.locator("h1").inner_text() == "dry run of support tone"
    page.goto(f"{stage.url}/jobs/new?from={trials.certificate}")
    page.click('button[name="_trial"][value="certify"]')
    assert page.locator("h1").inner_text() == "certificate of support tone"
    page.goto(f"{stage.url}/jobs/{trials.certificate}")
    assert page.locator("#trial .notice.ok").count() == 1
    page.goto(f"{stage.url}/jobs/{trials.dry_run}")
    page.click("text=Launch the whole job")
    assert page.locator("h1").inner_text() == "support tone"
    page.context.close()
