"""What `auto` takes for ZeRO, offload and checkpointing, and that its reason has the numbers."""

from typing import Any

import hypothesis
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core import placement
from core.architecture import Architecture
from core.bounds import LargestPass, largest_pass
from core.layout import num_slots
from core.packing import PlanSettings, SampleSet
from core.placement import Placement, place
from core.preflight import plan_job
from core.spec import parse_spec
from core.wire import Device
from tests.core.shapes import LLAMA_7B, LLAMA_70B
from tests.core.test_preflight import MODEL, plan_of
from tests.core.test_verdict import cut_anywhere

LARGEST = LargestPass(tokens=4096, longest_row=4096, longest_sample=1024)


def gpu(gigabytes: float) -> Device:
    return Device(id="gpu0", kind="gpu", name="G", memory_bytes=round(gigabytes * 1e9), has_bf16=True)


def placed(
    method: str, device: Device, shape: Architecture | None = LLAMA_7B, devices: int = 1, **parts: Any
) -> Placement:
    parallel = {"devices": devices, **parts.pop("parallel", {})}
    spec = parse_spec(
        {"data": {"train": [{"dataset": "d"}]}, "method": {"type": method}, "parallel": parallel, **parts}
    )
    return place(spec, shape, device, LARGEST, dtype="bf16", attention="flash")


def taken(placement: Placement) -> tuple[int, str, bool]:
    return placement.zero_stage, placement.offload, placement.gradient_checkpointing


def test_adapters_that_fit_are_not_sharded_and_recompute_only_where_they_must() -> None:
    assert taken(placed("lora", gpu(80))) == (0, "none", False)
    assert taken(placed("lora", gpu(24))) == (0, "none", True)
    assert taken(placed("lora", gpu(80), devices=4)) == (0, "none", False)


def test_a_full_fine_tune_takes_stage_two_then_three_then_the_host() -> None:
    assert taken(placed("full", gpu(141), devices=8)) == (2, "none", False)
    assert taken(placed("full", gpu(80), devices=8)) == (2, "none", True)
    assert taken(placed("full", gpu(48), devices=8))[:2] == (3, "none")
    assert taken(placed("full", gpu(80), LLAMA_70B, devices=8))[:2] == (3, "optimizer")


def test_one_device_offloads_only_what_does_not_fit() -> None:
    assert taken(placed("full", gpu(192)))[:2] == (0, "none")
    assert taken(placed("full", gpu(48)))[:2] == (2, "optimizer")
    assert taken(placed("full", gpu(80), optimizer={"name": "adamw_8bit"}))[:2] == (0, "none"), "moments of 8 bits"


def test_qlora_and_vision_models_never_come_to_stage_three() -> None:
    short = gpu(8)
    assert placed("qlora", short, LLAMA_70B, devices=2).zero_stage < 3
    with_tower = LLAMA_7B.model_copy(
        update={"parameters": LLAMA_7B.parameters.model_copy(update={"other": 400_000_000})}
    )
    assert placed("full", gpu(48), with_tower, devices=8).zero_stage < 3


def test_what_was_given_stands_and_only_the_rest_is_chosen() -> None:
    assert taken(placed("full", gpu(80), devices=8, parallel={"zero_stage": 3}))[0] == 3
    assert taken(placed("lora", gpu(80), devices=2, parallel={"zero_stage": 1}))[:2] == (1, "none")
    assert taken(placed("full", gpu(141), devices=8, parallel={"offload": "optimizer"}))[:2] == (3, "optimizer")
    assert taken(placed("lora", gpu(80), compute={"gradient_checkpointing": True}))[2] is True
    assert taken(placed("lora", gpu(24), compute={"gradient_checkpointing": False}))[2] is False


def test_a_cpu_never_offloads_and_its_ranks_share_the_memory() -> None:
    def cpu(gigabytes: float) -> Device:
        return Device(id="cpu0", kind="cpu", name="CPU", memory_bytes=round(gigabytes * 1e9))

    assert taken(placed("full", cpu(64)))[1] == "none"
    assert taken(placed("lora", cpu(60)))[2] is False
    assert taken(placed("lora", cpu(60), devices=2))[2] is True


@pytest.mark.parametrize("gigabytes", [24, 80])
def test_reasons_name_what_is_needed_and_what_there_is(gigabytes: int) -> None:
    chosen = placed("lora", gpu(gigabytes), devices=2)
    assert chosen.plan is not None
    for reason in chosen.reasons.values():
        assert f"{gigabytes} GB" in reason.text() and placement.size(chosen.plan.total) in reason.text()


def test_the_reason_for_more_names_what_less_would_have_needed() -> None:
    reasons = placed("full", gpu(48), devices=8).reasons
    zero = reasons["parallel.zero_stage"]
    assert zero.code == "auto.zero_needed" and zero.parameters["stage"] == 3
    otherwise = float(str(zero.parameters["otherwise"]).removesuffix(" GB"))
    assert otherwise > 0.9 * 48 > float(str(zero.parameters["needed"]).removesuffix(" GB"))


def test_where_nothing_fits_the_smallest_is_taken_and_said() -> None:
    chosen = placed("lora", gpu(8), LLAMA_70B)
    assert chosen.plan is not None and chosen.plan.total > 8e9
    assert {reason.code for reason in chosen.reasons.values()} == {"auto.memory_short"}


def test_without_the_models_sizes_a_gpu_recomputes_and_the_reason_says_so() -> None:
    unknown = LLAMA_7B.model_copy(update={"head_dim": None})
    for shape in (None, unknown):
        chosen = placed("lora", gpu(80), shape)
        assert taken(chosen) == (0, "none", True) and chosen.plan is None
        assert {reason.code for reason in chosen.reasons.values()} == {"auto.memory_unknown"}
    assert "head_dim" in placed("lora", gpu(80), unknown).reasons["parallel.offload"].text()


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        (PlanSettings("packed", 4096, "samples", 2, 1), LargestPass(500, 500, 300)),
        (PlanSettings("packed", 400, "samples", 4, 2), LargestPass(800, 400, 300)),
        (PlanSettings("packed", 4096, "samples", 4, 8), LargestPass(650, 650, 300)),  # all in one row
        (PlanSettings("packed", 400, "samples", 4, 8), LargestPass(1200, 400, 300)),  # any two rows hold over 400
        (PlanSettings("packed", 400, "samples", 4, 8, num_ranks=3), LargestPass(400, 400, 300)),
        (PlanSettings("packed", 400, "rows", 3, 8), LargestPass(1200, 400, 300)),
        (PlanSettings("packed", 400, "rows", 3, 8, num_ranks=2), LargestPass(800, 400, 300)),
        (PlanSettings("packed", 4096, "tokens", 50, 4), LargestPass(349, 349, 300)),
        (PlanSettings("padded", 4096, "samples", 4, 2), LargestPass(600, 300, 300)),
        (PlanSettings("padded", 4096, "samples", 3, 8), LargestPass(900, 300, 300)),
        (PlanSettings("padded", 4096, "samples", 3, 8, num_ranks=2), LargestPass(600, 300, 300)),
        (PlanSettings("padding_free", 4096, "samples", 4, 2), LargestPass(500, 500, 300)),
        (PlanSettings("padding_free", 4096, "samples", 3, 8, num_ranks=2), LargestPass(500, 500, 300)),
        (PlanSettings("padding_free", 4096, "samples", 2, 2, sets=(SampleSet(4, 1.5),)), LargestPass(600, 600, 300)),
    ],
)  # fmt: skip
def test_a_pass_holds_no_more_than_its_rows_nor_than_a_step_has(settings: PlanSettings, largest: LargestPass) -> None:
    assert largest_pass(settings, [100, 300, 200, 50]) == largest


@hypothesis.settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.sampled_from(["packed", "padding_free", "grouped", "padded"]),
    st.sampled_from([("samples_per_step", 40), ("tokens_per_step", 2000), ("rows_per_step", 12)]),
    st.floats(0.02, 1.0),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(300, 900),
    st.sampled_from(["best_fit", "sequential", "wrapped"]),
    st.sampled_from([0.5, 1.0, 2.5]),
)
def test_no_pass_of_any_step_is_larger_than_planned(
    lengths: list[int],
    mode: str,
    batch: tuple[str, int],
    share: float,
    micro_batch_size: int,
    devices: int,
    row_length: int,
    algorithm: str,
    weight: float,
) -> None:
    assume(algorithm == "best_fit" or mode == "packed")
    assume(algorithm != "wrapped" or batch[0] == "rows_per_step")
    facts = cut_anywhere([length + 10 for length in lengths])
    spec = parse_spec(
        {
            "data": {"train": [{"dataset": "d", "weight": weight}], "max_length": 310, "validation": None},
            "packing": {"mode": mode, "algorithm": algorithm, "row_length": max(310, row_length)},
            "batch": {batch[0]: max(1, int(share * batch[1])), "micro_batch_size": micro_batch_size},
            "parallel": {"devices": devices},
            "schedule": {"epochs": 2},
        }
    )
    plan = plan_job(spec, {"d": facts}, MODEL, gpu(80))
    passes = [
        micro_batch
        for number in range(1, plan.total_steps + 1)
        for rank in plan.step(number).layout.ranks
        for micro_batch in rank
    ]
    segments = [segment.length for micro_batch in passes for row in micro_batch for segment in row]
    rows = [sum(segment.length for segment in row) for micro_batch in passes for row in micro_batch]
    assert max(map(num_slots, passes)) <= plan.largest.tokens
    assert max(rows) <= plan.largest.longest_row
    assert max(segments) <= plan.largest.longest_sample
    # And none that cannot occur: not more rows than a pass takes or a rank has, no wider than rows are.
    assert plan.largest.tokens <= min(micro_batch_size, plan.bounds.rows) * plan.bounds.row


def test_a_step_of_few_samples_is_not_planned_for_rows_that_it_cannot_have() -> None:
    """Sixteen rows a pass were planned for steps of four samples."""
    plan = plan_of(cut_anywhere([100] * 64), gpu(80), batch={"samples_per_step": 4, "micro_batch_size": 16})
    (real,) = {num_slots(passes[0]) for number in (1, 2) for passes in plan.step(number).layout.ranks}
    assert plan.settings.row_length * 16 > 4 * real
    assert plan.largest.tokens <= 2 * real
