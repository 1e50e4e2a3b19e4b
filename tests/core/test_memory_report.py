"""The memory report: the chosen way is the one that was placed, and what it calls the largest is."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.architecture import Architecture
from core.bounds import LargestPass, StepBounds
from core.memory import estimate_memory
from core.memory_report import LENGTH_STEP, MemoryReport, report_memory
from core.placement import Placement, load_of, place
from core.spec import JobSpec, parse_spec
from core.wire import Device
from tests.core.shapes import LLAMA_7B, LLAMA_70B

MOST_ROWS = 64  # that a step has on a device here
BOUNDS = StepBounds(MOST_ROWS, 4096, 1024, None)


def device_of(kind: str, gigabytes: float) -> Device:
    return Device(id="d0", kind=kind, name="G", memory_bytes=round(gigabytes * 1e9), has_bf16=True)  # type: ignore[arg-type]


def spec_of(method: str = "full", devices: int = 8, **parts: Any) -> JobSpec:
    parallel = {"devices": devices, **parts.pop("parallel", {})}
    return parse_spec(
        {"data": {"train": [{"dataset": "d"}]}, "method": {"type": method}, "parallel": parallel, **parts}
    )


def report_of(
    spec: JobSpec,
    device: Device,
    shape: Architecture | None = LLAMA_7B,
    bounds: StepBounds = BOUNDS,
    *,
    context_length: int = 32_768,
    most_rows: int = 32,
) -> tuple[MemoryReport, Placement, JobSpec]:
    """The report of a spec that is resolved as a job's plan resolves it."""
    largest = bounds.largest_pass(spec.batch.micro_batch_size)
    placed = place(spec, shape, device, largest, dtype="bf16", attention="flash")
    parallel = {"zero_stage": placed.zero_stage, "offload": placed.offload}
    compute = {"dtype": "bf16", "attention": "flash", "gradient_checkpointing": placed.gradient_checkpointing}
    resolved = spec.model_copy(
        update={
            "parallel": spec.parallel.model_copy(update=parallel),
            "compute": spec.compute.model_copy(update=compute),
        }
    )
    report = report_memory(resolved, shape, device, bounds, context_length=context_length, most_rows=most_rows)
    return report, placed, resolved


@st.composite
def cases(draw: st.DrawFn) -> tuple[JobSpec, Device, Architecture, StepBounds]:
    micro_batch_size = draw(st.integers(1, 4))
    row = draw(st.integers(1, 8192))
    mode = draw(st.sampled_from(["packed", "padding_free"]))
    spec = spec_of(
        draw(st.sampled_from(["full", "lora", "qlora"])),
        draw(st.sampled_from([1, 2, 8])),
        packing={"mode": mode},
        batch={"micro_batch_size": micro_batch_size},
        optimizer={"name": draw(st.sampled_from(["adamw", "adamw_8bit"]))},
    )
    device = device_of(draw(st.sampled_from(["gpu", "cpu"])), draw(st.integers(8, 200)))
    side_by_side = row * np.arange(1, MOST_ROWS + 1) if mode == "padding_free" else None
    bounds = StepBounds(MOST_ROWS, row, draw(st.integers(1, row)), side_by_side)
    return spec, device, draw(st.sampled_from([LLAMA_7B, LLAMA_70B])), bounds


@given(cases())
def test_the_chosen_way_is_the_placed_one_with_the_same_bytes(
    case: tuple[JobSpec, Device, Architecture, StepBounds],
) -> None:
    report, placed, _ = report_of(*case)
    (chosen,) = [way for way in report.ways if way.is_chosen]
    assert (chosen.zero_stage, chosen.offload) == (placed.zero_stage, placed.offload)
    assert chosen.gradient_checkpointing == placed.gradient_checkpointing
    assert chosen.plan == placed.plan
    assert report.chosen == chosen
    at_chosen = {way.gradient_checkpointing for way in report.ways[: len(report.ways) // 2]}
    assert at_chosen == {placed.gradient_checkpointing}, "the chosen checkpointing stands first"
    assert len({(way.zero_stage, way.offload, way.gradient_checkpointing) for way in report.ways}) == len(report.ways)


@given(cases(), st.integers(4, MOST_ROWS), st.sampled_from([100, 2048, 32_768, 131_072]))
def test_the_largest_fits_and_one_more_does_not(
    case: tuple[JobSpec, Device, Architecture, StepBounds], most_rows: int, context_length: int
) -> None:
    spec, device, shape, bounds = case
    report, placed, resolved = report_of(*case, context_length=context_length, most_rows=most_rows)
    rows = spec.batch.micro_batch_size
    is_padding_free = spec.packing.mode == "padding_free"

    def fits(rows: int, row: int, sample: int) -> bool:
        wide = LargestPass(rows * row, rows * row if is_padding_free else row, sample)
        way = (placed.zero_stage, placed.offload, placed.gradient_checkpointing)
        load = load_of(resolved, shape, device, wide, way, dtype="bf16", attention="flash")
        return estimate_memory(load).total <= report.usable_bytes

    found = report.largest_micro_batch_size
    assert 0 <= found <= most_rows
    assert found == 0 or fits(found, bounds.row, bounds.longest)
    assert found == most_rows or not fits(found + 1, bounds.row, bounds.longest)
    length = report.largest_max_length
    assert 0 <= length <= context_length
    assert length == 0 or fits(rows, length, length)
    if length < context_length:
        assert length % LENGTH_STEP == 0
        assert not fits(rows, min(length + LENGTH_STEP, context_length), min(length + LENGTH_STEP, context_length))


@given(cases(), st.integers(8, 400))
def test_more_memory_never_lets_less_fit(
    case: tuple[JobSpec, Device, Architecture, StepBounds], gigabytes: int
) -> None:
    spec, device, shape, bounds = case
    _, _, resolved = report_of(spec, device, shape, bounds)
    larger = replace_memory(device, device.memory_bytes + gigabytes * 10**9)
    small, large = (
        report_memory(resolved, shape, each, bounds, context_length=32_768, most_rows=32) for each in (device, larger)
    )
    assert small.largest_micro_batch_size <= large.largest_micro_batch_size
    assert small.largest_max_length <= large.largest_max_length
    assert [way.plan for way in small.ways] == [way.plan for way in large.ways]
    assert all(after.fits for before, after in zip(small.ways, large.ways, strict=True) if before.fits)
    assume(small.fits_from is not None)
    assert large.fits_from is not None and small.fits_from is not None and large.fits_from <= small.fits_from


def replace_memory(device: Device, memory_bytes: int) -> Device:
    return device.model_copy(update={"memory_bytes": memory_bytes})


def test_a_full_fine_tune_fits_from_stage_two_and_each_stage_needs_less() -> None:
    asked = spec_of(compute={"gradient_checkpointing": True})

    def totals(report: MemoryReport) -> list[int]:
        shown = report.ways[: len(report.ways) // 2]
        return [way.plan.total for way in shown if way.offload == "none" and way.plan is not None]

    wide, _, _ = report_of(asked, device_of("gpu", 200))
    alone, first, second, third = totals(wide)
    assert alone > first > second > third
    assert wide.fits_from == 0
    # Between what stages 1 and 2 need.
    report, placed, _ = report_of(asked, device_of("gpu", (first + second) / 2 / 0.9e9))
    assert totals(report) == totals(wide)
    assert report.fits_from == placed.zero_stage == 2
    assert {way.offload for way in report.ways} == {"none", "optimizer", "optimizer_and_params"}


def test_one_rank_shows_what_differs_and_a_cpu_only_checkpointing() -> None:
    def ways(kind: str) -> list[tuple[int, str, bool]]:
        report, _, _ = report_of(spec_of("lora", 1), device_of(kind, 80))
        return [(way.zero_stage, way.offload, way.gradient_checkpointing) for way in report.ways]

    assert ways("cpu") == [(0, "none", False), (0, "none", True)]
    assert [way[:2] for way in ways("gpu")[:3]] == [(0, "none"), (2, "optimizer"), (3, "optimizer_and_params")]


def test_a_stage_that_cannot_run_says_why_and_has_no_plan() -> None:
    report, _, _ = report_of(spec_of("qlora", 2), device_of("gpu", 80))
    third = [way for way in report.ways if way.zero_stage == 3]
    assert third and all(way.offload == "none" for way in third)
    for way in third:
        assert way.plan is None and not way.fits
        assert way.why_not is not None and "QLoRA under ZeRO stage 3" in way.why_not.text()


def test_a_way_that_nobody_would_choose_is_shown_where_it_was_asked_for() -> None:
    report, _, _ = report_of(spec_of("lora", 1, parallel={"zero_stage": 1}), device_of("gpu", 80))
    assert report.chosen is not None and (report.chosen.zero_stage, report.chosen.offload) == (1, "none")


@given(cases())
def test_of_each_attention_path_it_is_the_same_load_but_for_the_path(
    case: tuple[JobSpec, Device, Architecture, StepBounds],
) -> None:
    spec, device, shape, bounds = case
    report, placed, resolved = report_of(*case)
    way = (placed.zero_stage, placed.offload, placed.gradient_checkpointing)
    largest = bounds.largest_pass(spec.batch.micro_batch_size)
    for path, plan in report.by_attention.items():
        load = load_of(resolved, shape, device, largest, way, dtype="bf16", attention=path)
        assert plan == estimate_memory(load)
    assert list(report.by_attention) == ["flash", "sdpa", "eager"]
    assert report.by_attention["flash"] == placed.plan
    totals = [plan.total for plan in report.by_attention.values()]
    assert totals == sorted(totals)
    assert largest.longest_row < 2 or totals[0] < totals[1] < totals[2], "what is stored grows with the row's square"


def test_without_sizes_the_report_names_what_is_missing() -> None:
    unknown = LLAMA_7B.model_copy(update={"head_dim": None})
    report, _, _ = report_of(spec_of(), device_of("gpu", 80), unknown)
    assert report.unknown is not None and "head_dim" in report.unknown.text()
    assert report.ways == () and report.chosen is None and report.planned_peak_bytes is None


@pytest.mark.parametrize(("kind", "is_counted"), [("gpu", False), ("cpu", True)])
def test_the_planned_peak_counts_what_the_measured_one_counts(kind: str, is_counted: bool) -> None:
    report, placed, _ = report_of(spec_of("lora", 1), device_of(kind, 80))
    assert placed.plan is not None
    outside = 0 if is_counted else placed.plan.terms["process"]
    assert report.planned_peak_bytes == placed.plan.total - outside


def test_ranks_on_a_cpu_share_its_memory() -> None:
    alone, _, _ = report_of(spec_of("lora", 1), device_of("cpu", 80))
    shared, _, _ = report_of(spec_of("lora", 2), device_of("cpu", 80))
    assert shared.available_bytes * 2 == alone.available_bytes == 80 * 10**9


def test_where_nothing_fits_the_largest_are_none() -> None:
    report, _, _ = report_of(spec_of("lora", 1), device_of("gpu", 2), LLAMA_70B)
    assert report.fits_from is None
    assert report.largest_micro_batch_size == report.largest_max_length == 0


def test_stored_scores_make_longer_rows_cost_more_than_more_of_them() -> None:
    """The longest sample counts, where a model stores scores over it."""
    stores = LLAMA_7B.model_copy(update={"has_plain_scores": True})
    plain, _, _ = report_of(spec_of(), device_of("gpu", 80))
    capped, _, _ = report_of(spec_of(), device_of("gpu", 80), stores, replace(BOUNDS, longest=1))
    assert capped.largest_max_length < plain.largest_max_length
