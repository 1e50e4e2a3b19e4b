"""Ten specs that would have failed on a host: each is refused where it was typed, with its field, its number and what
mends it; or, where it may run, is warned of."""

from typing import Any

import pytest

from core.wire import ProfileResult
from tests.app.conftest import House
from tests.app.scene import SPEC, put_data
from tests.app.test_preflight_memory import gpu
from tests.app.test_profiles import measure, preflight
from tests.app.test_prospects import join, large
from tests.core.test_verdict import cut_anywhere

DATA = SPEC["data"]
FULL = {"type": "full"}
# field, its parts of a spec, what the sentence has to hold, the first fix
REFUSED: list[tuple[str, dict[str, Any], list[str], dict[str, Any]]] = [
    ("parallel.devices", {"parallel": {"devices": 4}},
     ["more than 2 GPUs (large: 2)", "set at most 2"], {"parallel.devices": 2}),
    ("data.max_length", {"data": {**DATA, "max_length": 8192}},
     ["8192", "context of 4096 tokens", "set at most 4096"], {"data.max_length": 4096}),
    ("data.max_length", {"data": {**DATA, "max_length": 256}},
     ["30 of 330 samples", "256", "the longest sample has 3000 tokens"], {"data.max_length": 3000}),
    ("schedule.warmup_steps", {"schedule": {"max_steps": 40, "warmup_steps": 50}},
     ["50 steps", "40 steps", "below 40"], {"schedule.warmup_steps": 4}),
    ("parallel.zero_stage", {"method": {"type": "qlora"}, "parallel": {"devices": 2, "zero_stage": 3}},
     ["stage 3", "0, 1 or 2"], {"parallel.zero_stage": 2}),
    ("compute.dtype", {"compute": {"dtype": "fp16"}, "parallel": {"devices": 2, "zero_stage": 2}},
     ["fp16", "choose bf16 or fp32", "instead of 2"], {"compute.dtype": "auto"}),
    ("parallel.offload", {"method": FULL, "parallel": {"zero_stage": 2, "offload": "optimizer_and_params"}},
     ["only stage 3", "stage 2", "set it to optimizer"], {"parallel.offload": "optimizer"}),
    ("packing.row_length", {"data": {**DATA, "max_length": 3072}, "packing": {"row_length": 1024}},
     ["1024", "3072", "at least 3072"], {"packing.row_length": 3072}),
]  # fmt: skip
WARNED: list[tuple[str, dict[str, Any], list[str], dict[str, Any]]] = [
    ("schedule.warmup_ratio", {"schedule": {"epochs": 10, "warmup_ratio": 0.005}},
     ["a single step of 110", "schedule.warmup_steps to 10"],
     {"schedule.warmup_steps": 10, "schedule.warmup_ratio": None}),
    ("parallel.zero_stage",
     {"method": FULL, "parallel": {"devices": 2, "zero_stage": 0}, "compute": {"gradient_checkpointing": False}},
     ["of the 80 GB of Large"],
     {"parallel.zero_stage": "auto", "compute.gradient_checkpointing": "auto"}),
]  # fmt: skip


@pytest.fixture
def house_with_data(house: House) -> House:
    """One host of two GPUs of 80 GB, and 330 samples of which 30 are long."""
    host = join(house, "large", *large(2))
    put_data(house)
    assert preflight(house).status_code == 202
    measure(host, ProfileResult(profile=cut_anywhere([200] * 300 + [3000] * 30)))
    assert gpu(80).memory_bytes == 80 * 10**9
    return house


@pytest.mark.parametrize(("field", "parts", "words", "fix"), REFUSED)
def test_a_spec_that_cannot_run_is_refused_with_field_number_and_remedy(
    house_with_data: House, field: str, parts: dict[str, Any], words: list[str], fix: dict[str, Any]
) -> None:
    for path in ("/api/v1/jobs/preflight", "/api/v1/jobs"):
        reply = house_with_data.api("bob").post(path, json={"spec": SPEC | parts})
        assert reply.status_code == 422, reply.text
        (error,) = reply.json()["errors"]
        assert error["pointer"] == f"/spec/{field.replace('.', '/')}"
        assert all(word in error["detail"] for word in words), error["detail"]
        assert error["fixes"][0] == fix


@pytest.mark.parametrize(("field", "parts", "words", "fix"), WARNED)
def test_a_spec_that_may_run_badly_is_warned_of_with_field_number_and_remedy(
    house_with_data: House, field: str, parts: dict[str, Any], words: list[str], fix: dict[str, Any]
) -> None:
    reply = preflight(house_with_data, **parts)
    assert reply.status_code == 200, reply.text
    (remark,) = [each for each in reply.json()["verdict"] if each["level"] == "warning"]
    assert remark["field"] == field
    assert all(word in remark["text"] for word in words), remark["text"]
    assert remark["fixes"][0] == fix
