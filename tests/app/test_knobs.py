"""The knobs explained: each page is served as a page and, with figures of the form's job, as a fragment beside it."""

import re
from html import unescape

import pytest

from app.forms import ALTERNATIVES, CONTROLS
from app.knobs import FOLDER, OF_INPUT, TITLES
from core.wire import ProfileResult
from tests.app.conftest import House
from tests.app.scene import connect_host, put_data
from tests.app.test_pages import filled
from tests.app.test_profiles import facts, measure, preflight

ASKED = {"hx-request": "true"}


def test_every_page_of_a_knob_has_a_title_and_every_question_mark_an_input() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == set(TITLES)
    assert set(OF_INPUT) <= {*CONTROLS, *(choice.key for choice in ALTERNATIVES)}
    assert set(OF_INPUT.values()) <= set(TITLES)


@pytest.mark.parametrize("name", TITLES)
def test_a_page_is_whole_and_keeps_to_the_policy(house: House, name: str) -> None:
    page = house.browser("victor").get(f"/knobs/{name}")
    assert page.status_code == 200
    article = page.text.partition("<article")[2].partition("</article>")[0]
    source = (FOLDER / f"{name}.md").read_text()
    assert [re.sub("<.*?>", "", heading) for heading in re.findall(r"<h2>(.*?)</h2>", article)] == [
        heading.replace("`", "") for heading in re.findall(r"^## (.*)$", source, re.MULTILINE)
    ]
    assert "style=" not in article and "<script" not in article
    assert article.count("<table>") == len(re.findall(r"^\|---", source, re.MULTILINE))
    for target in re.findall(r'href="([^"]*)"', article):
        assert target.startswith("/knobs/") and target.removeprefix("/knobs/") in TITLES


def test_a_knob_that_is_none_is_not_found(house: House) -> None:
    assert house.browser("alice").get("/knobs/luck").status_code == 404


def test_beside_the_form_stand_figures_of_its_job(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    browser = house.browser("bob")

    def beside(name: str) -> str:
        return unescape(browser.post(f"/knobs/{name}", data=filled(browser), headers=ASKED).text)

    before = beside("packing")
    assert "once a model and measured data are chosen" in before and "<html" not in before
    preflight(house)
    measure(host, ProfileResult(profile=facts(200)))
    assert "plain padding, 8 to a batch" in beside("packing") and "<h2>What it does</h2>" in before
    assert "The rate rises for" in beside("warmup")


def test_a_viewer_may_ask_too_and_a_question_mark_stands_beside_its_input(house: House) -> None:
    page = house.browser("victor").get("/jobs/new").text
    for key in OF_INPUT:
        field = page.partition(f'data-knob="{key}"')[2][:2500]
        assert f'/knobs/{OF_INPUT[key]}"' in field, key
