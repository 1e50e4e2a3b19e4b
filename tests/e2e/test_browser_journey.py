"""The whole way in a real chromium over a real house: log in, upload, launch, watch, come back, stop, download."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.e2e.house import House, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]

SLOW_MS = 60_000
WHOLE_JOB_MS = 240_000  # on cores that other tests share


@pytest.fixture
def page(house: House, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SLOW_MS)
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    log_in(house, page)
    yield page
    context.close()
    assert complaints == []


def log_in(house: House, page: Page) -> None:
    page.goto(house.login_link())
    page.click("main button")
    page.wait_for_url("**/jobs")


def steps_drawn(page: Page) -> list[int]:
    """The steps in the loss chart's table of what it draws."""
    page.locator("#charts[data-loaded]").wait_for()
    card = page.locator("[data-chart=loss]")
    if not card.locator("table").count():
        card.locator("[data-table]").click()
    cells = card.locator("tbody tr th, tbody tr td:first-child").all_inner_texts()
    return sorted(int(re.sub(r"\D", "", cell)) for cell in dict.fromkeys(cells))


def wait_for_more(page: Page, than: int) -> list[int]:
    deadline = time.monotonic() + 60
    while max(steps := steps_drawn(page), default=0) <= than:
        assert time.monotonic() < deadline, f"the curve stands still at {steps[-3:]}"
        page.wait_for_timeout(200)
    return steps


def test_from_log_in_to_download(house: House, browser: Browser, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    rows = [
        {"instruction": f"What is {n} plus {n % 9}?", "output": f"{n} plus {n % 9} is {n + n % 9}. " * (1 + n % 6)}
        for n in range(700)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n", encoding="utf-8")
    page.goto(f"{house.url}/datasets")
    page.set_input_files("#file", file)
    page.click("#upload button >> text=Upload")
    page.wait_for_url("**/datasets/sums")
    page.locator("td", has_text="701").first.wait_for()

    page.goto(f"{house.url}/jobs/new?preset=lora")
    page.select_option("select[name='data.train.dataset'] >> nth=0", "sums")
    page.fill("[id='schedule.learning_rate']", "2e-3")
    page.locator("#preflight svg.curve").wait_for()
    planned = int(page.inner_text("#preflight .tiles dd >> nth=0").replace(",", ""))
    page.click("#launch")
    page.wait_for_url("**/jobs/job_*")
    job = page.url.rsplit("/", 1)[-1].split("?")[0]

    moved = wait_for_more(page, 3)
    assert moved == list(range(1, moved[-1] + 1)), "each step once, none missing"

    page.reload()
    after_reload = wait_for_more(page, moved[-1])
    assert after_reload == list(range(1, after_reload[-1] + 1))

    second = browser.new_context()
    other = second.new_page()
    other.set_default_timeout(SLOW_MS)
    log_in(house, other)
    other.goto(f"{house.url}/jobs/{job}")
    seen = wait_for_more(other, after_reload[-1])
    assert seen == list(range(1, seen[-1] + 1))
    second.close()

    page.locator("#job-head", has_text="succeeded").wait_for(timeout=WHOLE_JOB_MS)
    assert steps_drawn(page) == list(range(1, planned + 1)), "as many steps as the form foretold"
    page.goto(f"{house.url}/jobs/{job}?tab=files")
    with page.expect_download() as download:
        page.click("a:has-text('adapter_model.safetensors')")
    content = Path(download.value.path()).read_bytes()
    stored = {entry["name"]: entry for entry in house.get(f"/jobs/{job}/artifacts")["data"]}
    assert len(content) == stored["adapter_model.safetensors"]["bytes"]


def test_a_running_job_is_cancelled_from_its_page_and_leaves_no_process(house: House, page: Page) -> None:
    job = house.launch(
        {
            "data": {"train": [{"dataset": "demo-dialogues"}]},
            "schedule": {"max_steps": 2000, "learning_rate": 1e-3},
        }
    )
    page.goto(f"{house.url}/jobs/{job}")
    wait_for_more(page, 1)
    page.click("main >> text=Cancel >> nth=0")
    page.locator("#job-head", has_text="cancelled").wait_for()
    assert house.job(job)["state"] == "cancelled"
    wait_until(
        lambda: not [p for p in house.matching(r"worker\.engine\.train") if job in p.cwd()], "the trainer is gone"
    )
    page.goto(f"{house.url}/jobs")
    page.locator(f"[id='{job}']", has_text="cancelled").wait_for()
