"""What stands above a knob's page are the plan's own numbers."""

import random
from typing import Any

import pytest

from core.errors import Reason
from core.knob_figures import figures
from core.memory import count_adapter_parameters
from core.placement import size
from core.preflight import JobPlan, plan_job
from core.spec import Lora, parse_spec
from core.wire import Device
from tests.core.shapes import LLAMA_7B
from tests.core.test_preflight import MODEL, profile

_DRAW = random.Random(4)
LENGTHS = [_DRAW.randint(20, 900) for _ in range(320)]
SHAPED = MODEL.model_copy(update={"shape": LLAMA_7B, "num_parameters": LLAMA_7B.parameters.total})
KNOBS = ("packing", "zero", "warmup", "lora", "qlora", "full", "attention", "optimizer")
GPU = Device(id="gpu0", kind="gpu", name="A100", memory_bytes=80 * 10**9, has_bf16=True)


def plan_with(shape: Any = LLAMA_7B, **parts: Any) -> JobPlan:
    spec = {"data": {"train": [{"dataset": "d"}], "validation": None}, **parts}
    return plan_job(parse_spec(spec), {"d": profile(LENGTHS)}, SHAPED.model_copy(update={"shape": shape}), GPU)


def said(knob: str, plan: JobPlan) -> dict[str, Reason]:
    return {reason.code: reason for reason in figures(knob, plan)}


def test_packing_tells_the_slots_of_the_job_and_of_plain_padding() -> None:
    plan = plan_with()
    mine = plan.packing.mine
    text = said("packing", plan)["knob.packing"].text()
    assert f"{mine.slots:,}" in text and f"{mine.padded_slots:,}" in text and mine.padded_slots > mine.slots


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_stage_is_told_with_what_it_leaves_on_a_device(method: str) -> None:
    plan = plan_with(parallel={"devices": 8}, method={"type": method})
    told = figures("zero", plan)
    assert [reason.parameters["stage"] for reason in told] == [0, 1, 2, 3]
    assert [reason.parameters["communication"] for reason in told] == ["1.0", "1.0", "1.0", "1.5"]
    chosen = plan.memory.chosen
    assert chosen is not None and chosen.plan is not None
    assert told[chosen.zero_stage].parameters["size"] == size(chosen.plan.total)
    assert (told[0].code == "knob.zero_too_large") == (method == "full")


def test_with_one_device_there_is_nothing_to_share_out() -> None:
    assert [*said("zero", plan_with())] == ["knob.zero_one_device"]


def test_the_warm_up_is_that_of_the_schedule() -> None:
    plan = plan_with(schedule={"epochs": 4, "warmup_steps": 7})
    parameters = said("warmup", plan)["knob.warmup"].parameters
    assert (parameters["warmup_steps"], parameters["total_steps"]) == (7, plan.total_steps)
    assert figures("warmup", plan_with(schedule={"max_steps": 1})) == ()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_methods_are_held_against_each_other_whichever_is_chosen(method: str) -> None:
    plan = plan_with(method={"type": method})
    told = said("lora", plan)
    assert told["knob.adapter"].parameters["trained"] == count_adapter_parameters(LLAMA_7B, Lora())
    chosen = plan.memory.chosen
    assert chosen is not None and chosen.plan is not None
    assert told["knob.methods"].parameters[method] == size(chosen.plan.total)
    by_method = {name: told["knob.methods"].parameters[name] for name in ("lora", "qlora", "full")}
    assert len(set(by_method.values())) == 3


def test_attention_and_moments_are_those_of_the_memory_plan() -> None:
    plan = plan_with(method={"type": "full"}, optimizer={"name": "adamw_8bit"})
    chosen = plan.memory.chosen
    assert chosen is not None and chosen.plan is not None
    assert said("attention", plan)["knob.attention"].parameters["flash"] == size(chosen.plan.total)
    moments = said("optimizer", plan)["knob.moments"].parameters
    assert moments == {"moments": size(chosen.plan.terms["moments"]), "total": size(chosen.plan.total)}


@pytest.mark.parametrize("knob", KNOBS)
def test_where_the_models_sizes_are_not_known_nothing_is_made_up(knob: str) -> None:
    texts = [reason.text() for reason in figures(knob, plan_with(shape=None))]
    assert all(" GB" not in text for text in texts)
    assert bool(texts) == (knob in ("packing", "zero", "warmup"))
