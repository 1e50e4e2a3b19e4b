"""What `auto` takes for ZeRO, offload and checkpointing, and that its reason has the numbers."""

from typing import Any

import pytest

from core import placement
from core.architecture import Architecture
from core.packing import PlanSettings
from core.placement import LargestPass, Placement, largest_pass, place
from core.spec import parse_spec
from core.wire import Device
from tests.core.shapes import LLAMA_7B, LLAMA_70B

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


def test_a_pass_is_no_wider_than_its_row_and_a_step_holds_no_more_than_its_samples() -> None:
    lengths = [100, 300, 200, 50]
    assert largest_pass(PlanSettings("packed", 4096, "samples", 2, 1), lengths) == LargestPass(500, 500, 300)
    assert largest_pass(PlanSettings("packed", 400, "samples", 4, 2), lengths) == LargestPass(800, 400, 300)
    assert largest_pass(PlanSettings("padded", 4096, "samples", 4, 2), lengths) == LargestPass(600, 300, 300)
    assert largest_pass(PlanSettings("padding_free", 4096, "samples", 4, 2), lengths) == LargestPass(600, 600, 300)
