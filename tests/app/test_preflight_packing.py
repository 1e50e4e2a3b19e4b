"""The packing report in the API, in the panel and on a data set's page, against the plan that the trainer would run."""

import json
import re
from html import unescape
from typing import Any

import pytest

from app.pages.packing_drawing import MOST_SEGMENTS, _draw_row
from core.lengths import compare_cuts, cut_at, of_teaching
from core.packing import Segment, best_fit
from core.packing_report import RowReport, busiest_share, first_row, report_lengths
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile
from core.spec import parse_spec
from core.wire import Device, ProfileResult
from tests.app.conftest import House
from tests.app.scene import MODEL, SPEC, connect_host, put_data
from tests.app.test_pages import filled
from tests.app.test_profiles import facts, measure, preflight

DEVICE = Device(id="cpu0", kind="cpu", name="", memory_bytes=2**30)
LENGTHS = [10 + 7 * row % 400 for row in range(200)]


def long_facts() -> DataProfile:
    return facts(200, sample_length=LENGTHS, sample_trained=[0 if row % 20 == 0 else 5 for row in range(200)])


@pytest.fixture
def measured(house: House) -> House:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(profile=long_facts()))
    return house


def plan_of(**spec: Any) -> JobPlan:
    return plan_job(parse_spec(SPEC | spec), {"sums": long_facts()}, MODEL, DEVICE)


def panel(house: House, **changed: str) -> str:
    browser = house.browser("bob")
    sent = filled(browser, **{key.replace("__", "."): value for key, value in changed.items()})
    return unescape(browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text)


def test_the_api_tells_the_packing_as_the_trainer_plans_it(measured: House) -> None:
    spec = {
        "packing": {"mode": "grouped"},
        "batch": {"micro_batch_size": 4, "samples_per_step": 32},
        "parallel": {"devices": 2},
        "data": SPEC["data"] | {"max_length": 300, "overlong": "drop"},
    }
    got = preflight(measured, **spec).json()
    plan = plan_of(**spec)
    work = plan.step(1)
    row = first_row(plan)
    assert [(each["sample"], each["start"], each["end"]) for each in got["first_row"]["segments"]] == list(
        work.layout.ranks[0][0][0]
    )
    assert [each["targets"] for each in got["first_row"]["segments"]] == [work.targets[each] for each in row.segments]
    assert got["first_row"]["width"] == row.width and got["first_row"]["pads"] == list(row.pads)
    assert 0.5 <= got["busiest_rank_share"] == busiest_share(plan) < 0.6
    lengths = report_lengths(plan)
    assert lengths.samples_beyond > 0 and lengths.samples == 190
    assert (got["histogram"]["samples_beyond"], got["histogram"]["trained_tokens_beyond"]) == (
        plan.counts["samples_too_long"],
        plan.counts["targets_too_long"],
    )
    assert sum(each["samples"] for each in got["histogram"]["bins"]) == lengths.samples
    assert got["cost_basis"] == "slots" and got["baseline"]["relative_cost"] == 1
    for way in got["ways"]:
        assert way["relative_cost"] == way["slots"] / got["baseline"]["slots"]
    assert got["ways"][0]["passes"] == sum(
        len(plan.step(n).layout.ranks[0]) for n in range(1, plan.run.steps_per_epoch + 1)
    )


def test_the_panel_compares_the_ways_and_draws_the_first_row(measured: House) -> None:
    shown = panel(measured)
    plan = plan_of()
    mine, row = plan.packing.mine, first_row(plan)
    assert len(row.segments) > 1
    table = shown[shown.index('<table class="ways">') : shown.index("</table>")]
    rows = [re.sub(r"<[^>]+>|\s+", " ", each).split() for each in re.findall(r"<tr.*?</tr>", table, re.S)[1:]]
    assert [each[0] for each in rows] == ["plain", "padded", "padded,", "padding-free", "packed", "packed"]
    (chosen,) = [each for each in rows if "chosen" in each]
    assert chosen[:2] == ["packed", "chosen"]
    assert chosen[2:] == [str(mine.rows), str(mine.passes), "100", "%", chosen[-1]]
    mask = shown[shown.index('<svg class="mask"') : shown.index("</svg>", shown.index('<svg class="mask"'))]
    titles = re.findall(r"<title>(.*?)</title>", mask)
    assert titles == [
        f"sample {segment.sample}: {segment.length} tokens, {targets} of them trained"
        for segment, targets in zip(row.segments, row.targets, strict=True)
    ]
    assert f"Every way makes the same {mine.steps_per_epoch} steps" in shown and "Balance of the ranks" not in shown
    assert "No sample is longer than max_length" in shown
    assert "the model's sizes are not known" in shown


def test_the_panel_says_what_max_length_cuts_and_how_ranks_share(measured: House) -> None:
    shown = panel(measured, data__max_length="300", data__overlong="drop", parallel__devices="2")
    lengths = report_lengths(plan_of(data=SPEC["data"] | {"max_length": 300, "overlong": "drop"}))
    said = f"{lengths.samples_beyond} of 190 samples"
    assert said in shown and f"They hold {lengths.trained_tokens_beyond} trained tokens" in shown
    assert "the busiest of 2 ranks computes" in shown and "an even share is 50.0 %" in shown
    by_rows = panel(measured, batch="rows_per_step", batch__rows_per_step="2")
    assert "Rows decide here which samples meet in a step." in by_rows


def test_a_row_of_very_many_samples_is_drawn_in_part() -> None:
    segments = tuple(Segment(number, 0, 2) for number in range(MOST_SEGMENTS + 7))
    width = 2 * len(segments) + 4
    drawing = _draw_row(RowReport(segments, (1,) * len(segments), (2, 2), width, None))
    assert len(drawing.triangles) == MOST_SEGMENTS and drawing.num_left_out == 7
    few = _draw_row(RowReport(segments[:3], (1,) * 3, (2, 2), 10, None))
    assert [each.kind for each in few.triangles] == ["even", "odd", "even", "pad", "pad"]
    assert few.triangles[-1].path == "M256 256V320H320Z"  # 8 to 10 of 10 positions, in a square of 320


def test_a_data_sets_page_has_exact_numbers_for_every_stop(measured: House) -> None:
    browser = measured.browser("victor")
    page = unescape(browser.get("/datasets/sums").text)
    stops = json.loads(re.findall(r"data-cuts='(.*?)'", page)[0])
    report = compare_cuts(long_facts(), MODEL.context_length)
    lengths, _ = of_teaching(long_facts())
    assert len(stops) == len(report.cuts) > 8
    for stop in stops:
        kept = lengths[lengths <= stop["length"]]
        rows = len(best_fit(kept, stop["length"]))
        beyond = len(lengths) - len(kept)
        assert stop["texts"]["rows"] == str(rows)
        assert stop["texts"]["samples_beyond"].startswith(f"{beyond} (")
        assert stop["texts"]["fill"] == f"{100 * kept.sum() / (rows * stop['length']):.1f} %"
    assert any(not stop["texts"]["samples_beyond"].startswith("0 ") for stop in stops)
    (auto,) = [stop for stop in stops if "as auto takes" in stop["texts"]["max_length"]]
    assert auto["length"] == report.auto == plan_of(data=SPEC["data"] | {"validation": None}).selection.max_length
    assert f'value="{stops.index(auto)}"' in page


def test_without_a_script_any_limit_can_be_asked_for(measured: House) -> None:
    browser = measured.browser("victor")
    page = unescape(browser.get("/datasets/sums?max_length=123").text)
    cut = cut_at(123, *of_teaching(long_facts()))
    assert 'value="123"' in page and f'<span data-text="rows">{cut.rows}</span>' in page
    too_long = browser.get("/datasets/sums?max_length=5000")
    assert too_long.status_code == 422 and "above the model's context of 4096" in unescape(too_long.text)
    assert browser.get("/datasets/sums?max_length=0").status_code == 422
    api = measured.api("victor").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama").json()
    assert [each["max_length"] for each in api["cuts"]] == [
        each.max_length for each in compare_cuts(long_facts(), MODEL.context_length).cuts
    ]


def test_a_data_set_without_a_trained_token_has_no_lengths_to_cut(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(profile=facts(3, sample_trained=[0, 0, 0])))
    page = house.browser("victor").get("/datasets/sums")
    assert page.status_code == 200 and "data-cuts" not in page.text
