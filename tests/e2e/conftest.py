"""One whole Pegbox and one browser for all end-to-end tests: starting them is what takes the time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.chromium import find
from tests.e2e.house import House, running_house

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


# Of this package alone: Playwright keeps an event loop in the thread, in which other tests then can't start theirs.
@pytest.fixture(scope="package")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder: Path = tmp_path_factory.mktemp("house")
    with running_house(folder / "data", folder / "models") as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = find()
    assert path, "chromium is missing: python -m tests.chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()
