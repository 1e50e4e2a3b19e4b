"""Bytes on a host's disk, by hand for a model of a well-known size; tests/engine holds them against real runs."""

from typing import Any

import pytest

from core.disk import DiskPlan, checkpoint_bytes, plan_disk, trained_tensors
from core.memory import count_adapter_parameters
from core.spec import Adapter, JobSpec, parse_spec
from tests.core.shapes import LLAMA_7B
from tests.core.test_preflight import MODEL

SEVEN = MODEL.model_copy(update={"shape": LLAMA_7B, "bytes": 13_476_835_328, "tokenizer_bytes": 2_000_000})
TOTAL = LLAMA_7B.parameters.total


def spec_of(**parts: Any) -> JobSpec:
    return parse_spec({"data": {"train": [{"dataset": "d"}]}, "parallel": {"zero_stage": 0}, **parts})


def plan_of(spec: JobSpec, num_checkpoints: int = 10) -> DiskPlan:
    plan = plan_disk(spec, SEVEN, num_checkpoints=num_checkpoints, num_tokens=1000, num_samples=10)
    assert plan is not None
    return plan


def test_a_full_checkpoint_is_twelve_bytes_a_parameter_and_the_result_as_large_as_the_base() -> None:
    plan = plan_of(spec_of(method={"type": "full"}))
    assert plan.checkpoint_bytes == pytest.approx(12 * TOTAL, rel=1e-4)
    assert plan.result_bytes == pytest.approx(SEVEN.bytes + 2_000_000, rel=1e-4)


def test_adapters_leave_the_base_where_it_is() -> None:
    spec = spec_of(method={"type": "lora", "rank": 16})
    assert isinstance(spec.method, Adapter)
    adapters = count_adapter_parameters(LLAMA_7B, spec.method)
    plan = plan_of(spec)
    assert plan.checkpoint_bytes == pytest.approx(12 * adapters, rel=2e-3)
    assert plan.result_bytes == pytest.approx(4 * adapters + 2_000_000, rel=1e-3)
    assert sum(each.num_values for each in trained_tensors(spec, LLAMA_7B)) == adapters


def test_moments_in_8_bits_are_a_quarter_and_sharded_ones_as_large_together() -> None:
    full = {"method": {"type": "full"}}
    eight = checkpoint_bytes(spec_of(**full, optimizer={"name": "adamw_8bit"}), LLAMA_7B)
    assert eight == pytest.approx((4 + 2 + 8 / 256) * TOTAL, rel=1e-3)
    paged = checkpoint_bytes(spec_of(**full, optimizer={"name": "paged_adamw_8bit"}), LLAMA_7B)
    assert paged == eight, "on a disk nothing is paged out"
    for stage in (1, 2, 3):
        sharded = spec_of(**full, parallel={"devices": 4, "zero_stage": stage})
        assert checkpoint_bytes(sharded, LLAMA_7B) == pytest.approx(12 * TOTAL, rel=1e-3)


def test_while_one_is_written_those_to_keep_still_stand() -> None:
    spec = spec_of(checkpoint={"keep_last": 2, "keep_best": 1})
    plan = plan_of(spec)
    assert (plan.kept_checkpoints, plan.most_checkpoints) == (3, 4)
    assert plan.kept_bytes == 3 * plan.checkpoint_bytes
    assert plan.cache_bytes == 5 * 1000 + 16 * 10
    assert plan.total_bytes == 4 * plan.checkpoint_bytes + plan.result_bytes + plan.cache_bytes
    few = plan_of(spec, num_checkpoints=2)
    assert (few.kept_checkpoints, few.most_checkpoints) == (2, 2)


def test_without_sizes_there_is_no_plan() -> None:
    assert plan_disk(spec_of(), MODEL, num_checkpoints=1, num_tokens=1, num_samples=1) is None
