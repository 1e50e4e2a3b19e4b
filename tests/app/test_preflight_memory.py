"""The memory plan as programs and pages show it: the report's own bytes, in words, in numbers and as bars."""

import re
from typing import Any

import pytest
from markupsafe import escape

from app.pages import format
from app.pages.memory_bars import GAP, MOST_DEVICES, ROOM, WIDTH, Chart, draw_memory
from core.architecture import Architecture
from core.memory import TERM_FORMULAS, TERM_TITLES
from core.preflight import JobPlan, plan_job
from core.profile import ModelProfile
from core.spec import parse_spec
from core.wire import Device, HostReport, ProfileResult
from tests.app.conftest import House
from tests.app.scene import MODEL, SPEC, VERSIONS, FakeHost, connect_host, put_data, step, submit, wire
from tests.app.test_pages import filled
from tests.app.test_profiles import facts, measure, preflight
from tests.app.test_recorder import PLAN
from tests.core.shapes import LLAMA_7B


def gpu(gigabytes: float) -> Device:
    return Device(id="gpu0", kind="gpu", name="Large", memory_bytes=round(gigabytes * 1e9), has_bf16=True)


def model(shape: Architecture | None = LLAMA_7B) -> ModelProfile:
    return MODEL.model_copy(update={"shape": shape})


def plan(gigabytes: float = 80, shape: Architecture | None = LLAMA_7B, **spec: Any) -> JobPlan:
    return plan_job(parse_spec(SPEC | spec), {"sums": facts()}, model(shape), gpu(gigabytes))


def ready(house: House, device: Device, shape: Architecture | None = LLAMA_7B) -> FakeHost:
    """A host with this device and model, which has measured the data."""
    host = connect_host(house)
    report = HostReport(
        host=host.id,
        name="large",
        devices=tuple(device.model_copy(update={"id": f"gpu{number}"}) for number in range(8)),
        models=(model(shape),),
        versions=VERSIONS,
        num_cpus=2,
        memory_bytes=2**36,
    )
    assert host.post("/hosts/register", report).status_code == 200
    put_data(house)
    assert preflight(house).status_code == 202
    measure(host, ProfileResult(profile=facts()))
    return host


FULL = {"method": {"type": "full"}, "parallel": {"devices": 8}}


def test_a_preflight_tells_programs_each_ways_bytes(house: House) -> None:
    ready(house, gpu(48))
    got = preflight(house, **FULL).json()["memory"]
    report = plan(48, **FULL).memory
    assert report.chosen is not None and report.chosen.plan is not None
    (chosen,) = [way for way in got["ways"] if way["is_chosen"]]
    assert chosen["total_bytes"] == report.chosen.plan.total == sum(chosen["terms"].values())
    assert chosen["terms"].keys() == TERM_TITLES.keys()
    assert got["fits_from"] == report.fits_from == chosen["zero_stage"] == 3, "else the sentence is not tried"
    assert [way["fits"] for way in got["ways"][:4]] == [False, False, False, True]
    assert got["device_bytes"] == 48 * 10**9 and got["ranks"] == 8
    assert got["planned_peak_bytes"] == chosen["total_bytes"] - chosen["terms"]["process"]
    assert got["largest_micro_batch_size"] == report.largest_micro_batch_size >= 1
    assert got["largest_max_length"] == report.largest_max_length >= 64
    assert got["unknown"] is None


def test_programs_are_told_why_a_stage_cannot_run_and_which_sizes_are_missing(house: House) -> None:
    ready(house, gpu(48))
    ways = preflight(house, method={"type": "qlora"}, parallel={"devices": 2}).json()["memory"]["ways"]
    third = [way for way in ways if way["zero_stage"] == 3]
    assert third and all("QLoRA" in way["why_not"] and way["terms"] is None for way in third)
    given = {"method": {"type": "qlora"}, "parallel": {"devices": 2, "zero_stage": 3}}
    refused = preflight(house, **given)
    assert refused.status_code == 422
    (error,) = refused.json()["errors"]
    assert (error["code"], error["pointer"]) == ("zero.qlora", "/spec/parallel/zero_stage")
    assert error["fixes"] == [
        {"parallel.zero_stage": 2},
        {"parallel.zero_stage": "auto", "parallel.offload": "auto"},
    ]


def test_without_the_models_sizes_programs_get_the_reason(house: House) -> None:
    ready(house, gpu(48), None)
    memory = preflight(house).json()["memory"]
    assert memory["ways"] == [] and memory["fits_from"] is None and memory["planned_peak_bytes"] is None
    assert "sizes are not known (all)" in memory["unknown"]


def panel(house: House, **changed: str) -> str:
    browser = house.browser("bob")
    sent = filled(browser, **{key.replace("__", "."): value for key, value in changed.items()})
    text = browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text
    return re.sub(r"\s+", " ", text)


def test_the_panel_says_from_which_stage_it_fits_and_how_far_it_goes(house: House) -> None:
    ready(house, gpu(48))
    page = panel(house, method__type="full", parallel__devices="8")
    assert "<strong>Fits from ZeRO-3.</strong>" in page
    assert '<strong>ZeRO-3</strong> <span class="tag">chosen</span>' in page
    assert page.count("too large") >= 3
    assert re.search(r"All rows that a step can have on a device fit at once: a micro_batch_size up to 4\.", page)
    longest = plan(48, **FULL).memory.largest_max_length
    assert 64 <= longest < 4096 and f"A max_length up to {longest:,} tokens fits." in page
    assert "Large, 44.7 GiB" in page and "at 90 % of it" in page
    for title in ("weights", "optimizer states", "activations"):
        assert f"</svg>{title}</li>" in page
    assert "optimizer states and weights in CPU memory" in page
    assert "style=" not in page


def test_the_panel_of_one_device_speaks_of_no_stage(house: House) -> None:
    ready(house, gpu(80))
    page = panel(house, method__type="lora")
    assert "ZeRO-" not in page and "<strong>It fits.</strong>" in page and "no offload" in page
    assert "Samples as long as the model's context, 4,096 tokens, fit." in page
    assert "If activations were recomputed" in page
    given = {"parallel.zero_stage": "2", "parallel.offload": "optimizer"}
    assert "<strong>It fits with offload.</strong>" in panel(house, method__type="lora", **given)


def test_the_panel_says_when_nothing_fits(house: House) -> None:
    ready(house, gpu(2))
    assert "<strong>It does not fit.</strong> In the chosen way not even one row" in panel(house, method__type="lora")
    page = panel(house, method__type="full", parallel__devices="2")
    assert "<strong>Without offload no stage fits.</strong> The chosen way does not." in page
    assert "No max_length is short enough." in page and "Bars end at twice the device." in page


def test_the_panel_names_what_cannot_run_and_what_is_not_known(house: House) -> None:
    host = ready(house, gpu(48))
    page = panel(house, method__type="qlora", parallel__devices="2")
    assert "cannot run" in page and "QLoRA under ZeRO stage 3" in page
    report = HostReport(
        host=host.id, name="large", devices=(gpu(48),), models=(model(None),),
        versions=VERSIONS, num_cpus=2, memory_bytes=2**36,
    )  # fmt: skip
    assert host.post("/hosts/register", report).status_code == 200
    assert "so memory cannot be planned" in panel(house)


@pytest.mark.parametrize(("gigabytes", "is_cut"), [(8, True), (80, False), (200, False)])
def test_bars_lie_on_one_scale_that_ends_at_twice_the_device(gigabytes: float, is_cut: bool) -> None:
    chart = draw_memory(plan(gigabytes, **FULL).memory)
    assert isinstance(chart, Chart)
    bars = chart.bars + chart.others
    available = chart.report.available_bytes
    assert chart.is_cut == is_cut == (max(bar.total for bar in bars) > ROOM * MOST_DEVICES * available)
    bytes_per_unit = available / chart.device_x
    for bar in bars:
        assert (bar.pieces[0].x == 0 and bar.pieces[0].term == "weights") or bar.host_bytes
        assert sum(bar.terms.values()) == bar.total
        ends = [piece.x + piece.width for piece in bar.pieces]
        assert all(end <= after.x + 0.11 for end, after in zip(ends, bar.pieces[1:], strict=False)), "none overlap"
        assert ends[-1] == pytest.approx(min(WIDTH, bar.total / bytes_per_unit), abs=GAP + 1)
    assert chart.usable_x < chart.device_x <= WIDTH


def test_a_jobs_page_puts_the_planned_peak_beside_the_measured_one(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    job = submit(house)
    launch = host.running()
    browser = house.browser("bob")
    assert "Peak memory" not in browser.get(f"/jobs/{job}").text, "an older trainer's plan says nothing of it"
    host.send(launch, [wire(2, "plan", **PLAN, planned_peak_bytes=3 * 2**29)])
    assert "planned 1.50 GiB" in browser.get(f"/jobs/{job}").text
    host.send(launch, [step(3, 2, memory_peak_bytes=5 * 2**28)])
    page = browser.get(f"/jobs/{job}").text
    assert "<dd>1.25 GiB</dd>" in page and "planned 1.50 GiB" in page


def test_the_panel_compares_the_paths_of_attention_and_explains_every_term(house: House) -> None:
    ready(house, gpu(80))
    page = panel(house, **{"method__type": "full", "compute.attention": "eager", "data__max_length": "4096"})
    report = plan(
        80, method={"type": "full"}, compute={"attention": "eager"}, data={**SPEC["data"], "max_length": 4096}
    )
    paths = report.memory.by_attention
    for path, total in ((path, format.size(each.total)) for path, each in paths.items()):
        assert re.search(
            rf'<th scope="row">{path}( <span class="tag">planned</span>)?</th><td class="num">{total}</td>', page
        )
    assert '<th scope="row">eager <span class="tag">planned</span></th>' in page
    assert paths["eager"].total == report.memory.chosen.plan.total > paths["sdpa"].total > paths["flash"].total  # type: ignore[union-attr]
    assert f"Here N is {report.largest.longest_row:,}." in page and f"(here {report.largest.tokens:,})" in page
    for term, formula in TERM_FORMULAS.items():
        assert f"<strong>{escape(TERM_TITLES[term])}</strong><br>{escape(formula)}</p>" in page, term
    told = preflight(
        house, method={"type": "full"}, compute={"attention": "eager"}, data={**SPEC["data"], "max_length": 4096}
    )
    assert told.json()["memory"]["attention_bytes"] == {path: each.total for path, each in paths.items()}
