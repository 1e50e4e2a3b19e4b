"""The pages in a real chromium over the real web service: looked at in both themes and at both ends of the widths,
used with and without JavaScript, and left open while the service behind them goes and comes back."""

import gzip
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Response

from app.vendor import VENDOR, is_current
from tests.e2e.stage import Scenes, Stage, make_profile, play, raised, wait_until

pytestmark = pytest.mark.browser

WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
HOSTILE = """<img src=x onerror="document.title='owned'"><div hx-get="/jobs" hx-trigger="load">{{7*7}}</div>"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    assert is_current(), "the browser files are missing: python -m app.vendor"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with raised(tmp_path_factory.mktemp("stage"), port) as stage:
        yield stage


@pytest.fixture(scope="module")
def scenes(stage: Stage) -> Scenes:
    return play(stage)


@dataclass
class Visit:
    """A browser of one person. What its console complains of is a failure, save what a test expects."""

    stage: Stage
    context: BrowserContext
    page: Page
    complaints: list[str] = field(default_factory=list)

    def go(self, path: str) -> Response:
        reply = self.page.goto(self.stage.url + path)
        assert reply is not None
        return reply

    def wait_for_text(self, selector: str, text: str) -> None:
        self.page.locator(selector).filter(has_text=text).first.wait_for(timeout=15_000)


@pytest.fixture
def visit(stage: Stage, scenes: Scenes, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    options: dict[str, Any] = getattr(request, "param", {})
    context = browser.new_context(**options)
    page = context.new_page()
    visit = Visit(stage, context, page)
    page.on("console", lambda said: visit.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.goto(stage.login_link())
    page.click("main button")
    yield visit
    context.close()
    assert visit.complaints == []


def addresses(scenes: Scenes) -> dict[str, str]:
    return {
        "jobs": "/jobs",
        "nothing found": "/jobs?q=nothing-of-the-kind",
        "new": "/jobs/new?preset=demo",
        "yaml": "/jobs/new?preset=yaml",
        "clone": f"/jobs/new?from={scenes.failed}",
        "running": f"/jobs/{scenes.running}",
        "succeeded": f"/jobs/{scenes.succeeded}",
        "failed": f"/jobs/{scenes.failed}",
        "starting": f"/jobs/{scenes.starting}",
        "waiting": f"/jobs/{scenes.waiting}",
        "config": f"/jobs/{scenes.succeeded}?tab=config",
        "files": f"/jobs/{scenes.succeeded}?tab=files",
        "timeline": f"/jobs/{scenes.paused}?tab=timeline",
        "data sets": "/datasets",
        "data set": "/datasets/demo-dialogues",
        "hosts": "/hosts",
        "settings": "/settings",
    }


@pytest.mark.parametrize(
    "visit",
    [
        {"color_scheme": "light", "viewport": {"width": 1360, "height": 800}},
        {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
    ],
    indirect=True,
    ids=["light and wide", "dark and narrow"],
)
def test_every_page_is_accessible_fits_and_keeps_to_the_policy(visit: Visit, scenes: Scenes) -> None:
    axe = (VENDOR / "axe.js").read_text(encoding="utf-8")
    page = visit.page
    found: dict[str, list[str]] = {}
    visit.stage.measure()
    for name, path in addresses(scenes).items():
        assert visit.go(path).status == 200, name
        if name == "new":
            # The panel asks for the profile, the host measures it, the panel finds it by itself.
            wait_until(
                lambda: visit.stage.beat()["profiles"] or page.locator("svg.curve").count(), "the data is wanted"
            )
            visit.stage.measure()
            page.locator("svg.curve").wait_for()
        if name in ("running", "succeeded", "failed"):
            page.locator("#charts[data-loaded]").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], name  # type: ignore[index]
        page.evaluate(axe)
        result = page.evaluate("tags => axe.run(document, {runOnly: tags, resultTypes: ['violations']})", WCAG)
        assert result["passes"], "the checks ran"
        found |= {f"{name}: {each['id']}": [node["target"] for node in each["nodes"]] for each in result["violations"]}
    assert found == {}


def test_the_first_load_is_small(visit: Visit, scenes: Scenes) -> None:
    replies: list[Response] = []
    visit.page.goto("about:blank")
    visit.page.on("response", lambda reply: replies.append(reply))  # noqa: PLW0108 - a bound method of list won't do
    visit.page.add_init_script(
        "window.shift = 0; new PerformanceObserver(list => { for (const entry of list.getEntries()) "
        "window.shift += entry.value; }).observe({type: 'layout-shift', buffered: true});"
    )
    visit.go(f"/jobs/{scenes.succeeded}")
    visit.page.locator("#charts[data-loaded]").wait_for()
    files = [reply for reply in replies if "/live" not in reply.url]
    assert 5 < len(files) <= 10, [reply.url for reply in files]
    assert sum(len(gzip.compress(reply.body())) for reply in files) <= 120_000
    assert visit.page.evaluate("window.shift") < 0.02


def shown_steps(page: Page) -> list[int]:
    """The steps of the loss chart, as its table lists them."""
    button = page.locator("[data-chart=loss] [data-table]")
    if button.get_attribute("aria-expanded") == "false":
        button.click()
    cells = page.locator("[data-chart=loss] tbody td:first-child").all_inner_texts()
    return [int(cell.replace(",", "")) for cell in cells]


def test_a_running_job_is_followed_over_a_reload_and_a_restart_of_the_service(visit: Visit, scenes: Scenes) -> None:
    stage, page, part = visit.stage, visit.page, scenes.part

    def train(steps: int) -> int:
        first = scenes.next_step
        scenes.next_step += steps
        stage.play_steps(part, scenes.schedule, first, scenes.next_step - 1, scenes.began_at)
        part.say("log", scenes.began_at, rank=0, level="info", text=f"now at {scenes.next_step - 1}")
        stage.send(part)
        return scenes.next_step - 1

    def is_whole(step: int) -> None:
        visit.wait_for_text("#job-tiles dd", f"{step}")
        visit.wait_for_text("#log", f"now at {step}")
        wait_until(lambda: shown_steps(page)[-1] == step, f"the chart shows step {step}")
        steps = shown_steps(page)
        assert len(steps) > 100 and steps == sorted(set(steps))
        strides = {later - earlier for earlier, later in pairwise(steps)}
        assert len(strides) == 1, "evenly spread, none missing and none twice"
        assert page.locator("#log div").filter(has_text=f"now at {step}").count() == 1

    visit.go(f"/jobs/{scenes.running}")
    visit.wait_for_text("#live", "live")
    is_whole(train(3))
    page.reload()
    visit.wait_for_text("#live", "live")
    is_whole(train(2))
    assert "step" in (page.locator("[data-chart=loss] .host").get_attribute("aria-label") or "")

    stage.server.end()
    visit.wait_for_text("#live", "reconnecting")
    stage.restart_server()
    last = train(4)
    visit.wait_for_text("#live", "live")
    is_whole(last)
    assert all("ERR_" in text or "sse" in text for text in visit.complaints), "of the cut alone"
    visit.complaints.clear()


def test_the_list_shows_what_happens_elsewhere(visit: Visit, scenes: Scenes) -> None:
    visit.go("/jobs")
    visit.wait_for_text("#live", "live")
    row = visit.page.locator(f"[id={scenes.waiting}]")
    assert "queued" in row.inner_text()
    visit.stage.beat()
    visit.wait_for_text(f"[id={scenes.waiting}]", "4 of 4 GPUs on ada are busy")

    new = visit.stage.launch("came later", tags=[HOSTILE[:60]], notes=HOSTILE)
    visit.page.locator(f"[id={new}]").wait_for()
    assert visit.stage.api.post(f"/jobs/{new}/cancel").status_code == 200
    visit.wait_for_text(f"[id={new}]", "cancelled")
    assert visit.page.locator("#job-rows tr").count() == visit.stage.num_jobs()


def test_what_a_trainer_writes_stays_text_while_it_comes_in(visit: Visit, scenes: Scenes) -> None:
    visit.go(f"/jobs/{scenes.running}")
    visit.wait_for_text("#live", "live")
    scenes.part.say("log", scenes.began_at, rank=0, level="error", text=HOSTILE)
    visit.stage.send(scenes.part)
    visit.wait_for_text("#log .error", "onerror")
    assert visit.page.locator("#log .error").last.inner_text().endswith(HOSTILE)
    assert visit.page.locator("#log img, #log [hx-get]").count() == 0
    assert visit.page.title() != "owned"


def test_the_form_says_as_one_types_what_will_happen_and_launches_once(visit: Visit, scenes: Scenes) -> None:
    page, before = visit.page, visit.stage.num_jobs()
    visit.go("/jobs/new?preset=demo")
    wait_until(lambda: visit.stage.beat()["profiles"] or page.locator("svg.curve").count(), "the data is wanted")
    visit.stage.measure()
    page.locator("svg.curve").wait_for()
    opened = page.locator("#preflight section.memory details")
    rate = page.locator("[id='schedule.learning_rate']")
    rate.fill("fast")
    visit.wait_for_text("#preflight", "fast is not one of")
    page.locator("#preflight a").first.click()
    assert page.evaluate("document.activeElement.id") == "schedule.learning_rate"
    rate.press("Control+a")
    rate.type("2e-3")
    visit.wait_for_text("#preflight svg text", "2e-3")
    assert rate.input_value() == "2e-3" and page.evaluate("document.activeElement.id") == "schedule.learning_rate"
    opened.last.locator("summary").click()
    # Writing into an alternative chooses it.
    page.fill("[id='schedule.max_steps']", "7")
    assert page.is_checked("[value=max_steps]")
    visit.wait_for_text("#preflight svg text", "step 7")
    # What a person opened stays open from one report to the next.
    assert opened.last.get_attribute("open") is not None and opened.first.get_attribute("open") is None

    page.locator("#launch").dblclick()
    page.wait_for_url("**/jobs/job_*")
    visit.wait_for_text("h1", "tiny demo")
    assert visit.stage.num_jobs() == before + 1


def test_a_file_is_uploaded_with_its_refused_rows_named(visit: Visit, tmp_path: Path) -> None:
    good = json.dumps({"instruction": "Add 1 and 1.", "output": "2"})
    file = tmp_path / "My Sums.jsonl"
    file.write_text("\n".join([good] * 50 + ["{broken"]), encoding="utf-8")
    visit.go("/datasets")
    visit.page.set_input_files("#file", file)
    assert visit.page.input_value("#name") == "my-sums"
    visit.page.click("#upload button >> text=Upload")
    visit.page.wait_for_url("**/datasets/my-sums")
    visit.wait_for_text("td", "51")
    visit.wait_for_text("h1", "my-sums")

    file.write_text("no data at all", encoding="utf-8")
    visit.go("/datasets")
    visit.page.set_input_files("#file", file)
    visit.page.click("#upload button >> text=Upload")
    visit.page.locator("#upload-status.bad-text").wait_for()
    assert "JSON" in visit.page.inner_text("#upload-status")
    assert all("422" in text for text in visit.complaints)
    visit.complaints.clear()


def test_the_slider_of_a_data_set_shows_each_limit_without_asking_again(visit: Visit, scenes: Scenes) -> None:
    def profile() -> Any:
        return visit.stage.api.get("/datasets/demo-dialogues/profile", params={"model": "demo/tiny-llama"})

    if profile().status_code == 202:
        visit.stage.measure()
    cuts = profile().json()["cuts"]
    visit.go("/datasets/demo-dialogues")
    page, asked = visit.page, []
    page.on("request", lambda request: asked.append(request.url))
    slider = page.locator("#cut")
    slider.focus()
    seen = []
    for key in ("Home", "ArrowRight", "End"):
        slider.press(key)
        seen.append([page.inner_text("[data-text=rows]"), page.locator(".cut").get_attribute("x1")])
    for (rows, _), cut in zip(seen, (cuts[0], cuts[1], cuts[-1]), strict=True):
        assert rows == f"{cut['rows']:,}"
    assert len({rows for rows, _ in seen}) == len({x for _, x in seen}) == 3
    assert page.input_value("#max_length") == str(cuts[-1]["max_length"])
    assert asked == []


@pytest.mark.parametrize(
    "visit",
    [
        {"color_scheme": "dark", "viewport": {"width": 1360, "height": 800}},
        {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
    ],
    indirect=True,
    ids=["dark and wide", "light and narrow"],
)
def test_a_samples_numbers_come_first_and_the_exact_ones_without_a_reload(visit: Visit) -> None:
    stage, page = visit.stage, visit.page
    axe = (VENDOR / "axe.js").read_text(encoding="utf-8")
    name = f"large-{page.viewport_size['width']}"  # type: ignore[index]

    def is_sound() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]
        page.evaluate(axe)
        result = page.evaluate("tags => axe.run(document, {runOnly: tags, resultTypes: ['violations']})", WCAG)
        assert result["passes"] and result["violations"] == []

    def post(path: str, body: Any = None) -> None:
        assert stage.worker.post(f"/profiles/{profile}/{path}", json=body).status_code == 200

    stage.upload(name, 9000 + page.viewport_size["width"])  # type: ignore[index]
    assert stage.api.get(f"/datasets/{name}/profile?model=demo/tiny-llama").status_code == 202
    (profile,) = stage.beat()["profiles"]
    post("claim")
    visit.go(f"/datasets/{name}")
    visit.wait_for_text("#progress", "Measuring")
    is_sound()
    sampled = make_profile(stage.random, "whole", 198).model_copy(update={"duplicates": None})
    post("progress", {"fraction": 0.0, "sampled": sampled.model_dump(mode="json")})
    visit.wait_for_text("#progress", "Estimated from a sample")
    assert page.locator("#tokens details[open]").count() == 3
    page.locator("#cut").press("Home")
    shortest = page.locator("[data-text=rows]").inner_text()
    is_sound()
    post("progress", {"fraction": 0.5})
    page.locator("#progress progress[value='0.5']").wait_for()
    assert page.locator("[data-text=rows]").inner_text() == shortest, "what stands there is not touched"
    page.evaluate("window.isSamePage = true")
    exact = make_profile(stage.random, "whole", 8998)
    post("result", {"profile": exact.model_dump(mode="json")})
    page.locator("#progress").wait_for(state="detached")
    visit.wait_for_text("#duplicates", "line 90 (about 93 % alike)")
    assert page.evaluate("window.isSamePage") is True
    page.locator("#cut").press("ArrowRight")
    assert page.locator("[data-text=rows]").inner_text() != shortest, "the slider works on"
    is_sound()


def test_the_theme_is_chosen_and_kept(visit: Visit, scenes: Scenes) -> None:
    visit.go(f"/jobs/{scenes.succeeded}")
    page = visit.page
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    page.click("#theme")
    assert page.locator("#theme").get_attribute("aria-label") == "Theme: dark"
    assert page.evaluate(background) != light
    page.reload()
    assert page.evaluate(background) != light
    page.click("#theme")
    assert page.evaluate(background) == light


def test_charts_are_walked_with_the_arrow_keys(visit: Visit, scenes: Scenes) -> None:
    visit.go(f"/jobs/{scenes.succeeded}")
    page = visit.page
    page.locator("#charts[data-loaded]").wait_for()
    host = page.locator("[data-chart=learning_rate] .host")
    host.focus()
    host.press("Home")
    host.press("ArrowRight")
    value = page.locator("[data-chart=learning_rate] [data-series=planned]")
    first = value.inner_text()
    host.press("End")
    assert first != value.inner_text() == "0"


def test_a_button_of_the_panel_writes_its_fix_into_the_form(visit: Visit, scenes: Scenes) -> None:
    page = visit.page
    visit.go("/jobs/new?preset=demo")
    wait_until(lambda: visit.stage.beat()["profiles"] or page.locator("svg.curve").count(), "the data is wanted")
    visit.stage.measure()
    page.locator("svg.curve").wait_for()
    page.check("#lock")
    page.fill("[id='batch.rows_per_step']", "4")
    visit.wait_for_text("#preflight .verdict", "The optimisation is locked")
    samples = page.input_value("[id='batch.samples_per_step']")
    page.locator("#preflight .verdict button").click()
    page.locator("#preflight .verdict li").filter(has_text="is locked").wait_for(state="detached")
    assert page.is_checked("[value=samples_per_step]")
    assert page.input_value("[id='batch.samples_per_step']") == samples == "32"
    assert page.is_checked("#lock") and page.url.endswith("?preset=demo"), "the page was not left"
    page.fill("[id='data.max_length']", "9000")
    visit.wait_for_text("#preflight .verdict", "above the model's context")
    page.locator("#preflight .verdict button").click()
    visit.wait_for_text("#preflight .tiles", "Steps")
    assert page.evaluate("document.activeElement.id") == "data.max_length"
    assert page.input_value("[id='data.max_length']") == "4096"


@pytest.mark.parametrize("visit", [{"java_script_enabled": False}], indirect=True)
def test_without_javascript_a_job_is_launched_and_cancelled(visit: Visit, scenes: Scenes) -> None:
    page = visit.page
    visit.go("/jobs/new?preset=demo")
    page.fill("[id='schedule.learning_rate']", "fast")
    page.click("#launch")
    assert "1 thing to correct" in page.inner_text("#error-summary")
    assert page.input_value("[id='schedule.learning_rate']") == "fast"
    page.fill("[id='schedule.learning_rate']", "1e-3")
    page.click("text=Show what will happen")
    assert "1e-3" in page.inner_text("#preflight") or "Measuring" in page.inner_text("#preflight")
    page.click("#launch")
    page.wait_for_url("**/jobs/job_*")
    page.click("main >> text=Cancel")
    assert "cancelled" in page.inner_text("#job-head")
    page.click("summary")
    page.click("text=Log out")
    assert page.url.endswith("/login")
    assert all("422" in text for text in visit.complaints)
    visit.complaints.clear()


def test_log_in_needs_no_script_and_says_what_is_wrong(stage: Stage, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{stage.url}/jobs?q=x")
    page.fill("#name", "admin")
    page.fill("#password", "not the password")
    page.click("text=Log in >> nth=-1")
    assert page.input_value("#name") == "admin" and page.inner_text("#password-error")
    reply = page.goto(f"{stage.url}/login/nonsense")
    assert reply is not None and reply.status == 410
    context.close()
