"""The configuration for DeepSpeed, and what a stage refuses."""

from pathlib import Path
from typing import Any, get_args

import pytest

from core.errors import UserError
from core.spec import JobSpec, parse_spec
from core.zero import Loaded, Stage, deepspeed_config, fault, refuse_unproven, uses_deepspeed


def spec_of(stage: int = 2, offload: str = "none", method: str = "full", **parts: Any) -> JobSpec:
    parallel = {"devices": 2, "zero_stage": stage, "offload": offload}
    return parse_spec(
        {"data": {"train": [{"dataset": "d"}]}, "method": {"type": method}, "parallel": parallel, **parts}
    )


def test_stage_0_is_not_deepspeeds() -> None:
    assert [uses_deepspeed(spec_of(stage)) for stage in get_args(Stage)] == [False, True, True, True]


def test_precision_and_accumulation_stay_ours() -> None:
    for stage in (1, 2, 3):
        config = deepspeed_config(spec_of(stage, compute={"dtype": "bf16"}), "gpu")
        assert not {"bf16", "fp16", "torch_autocast", "data_types"} & config.keys()
        assert config["gradient_accumulation_steps"] == 1
        assert config["zero_optimization"]["stage"] == stage


def test_clipping_is_the_specs_and_none_is_none() -> None:
    assert deepspeed_config(spec_of(), "cpu")["gradient_clipping"] == 1.0
    assert deepspeed_config(spec_of(optimizer={"max_grad_norm": None}), "cpu")["gradient_clipping"] == 0.0


def test_gradients_go_to_their_owner_alone_where_that_was_measured_to_be_cheaper() -> None:
    assert deepspeed_config(spec_of(2), "cpu")["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False
    assert deepspeed_config(spec_of(2), "gpu")["zero_optimization"]["use_multi_rank_bucket_allreduce"] is True


@pytest.mark.parametrize(
    ("stage", "offload", "places"),
    [
        (2, "none", set()),
        (2, "optimizer", {"offload_optimizer"}),
        (3, "optimizer_and_params", {"offload_optimizer", "offload_param"}),
    ],
)
def test_what_is_offloaded(stage: int, offload: str, places: set[str]) -> None:
    zero = deepspeed_config(spec_of(stage, offload), "gpu")["zero_optimization"]
    assert {key for key in zero if key.startswith("offload")} == places


@pytest.mark.parametrize(
    ("spec", "model", "code"),
    [
        (spec_of(0, "optimizer"), Loaded(), "zero.offload_stage"),
        (spec_of(2, "optimizer_and_params"), Loaded(), "zero.offload_params"),
        (spec_of(1, compute={"dtype": "fp16"}), Loaded(), "zero.fp16"),
        (spec_of(3, method="qlora"), Loaded(), "zero.qlora"),
        (spec_of(3, method="lora"), Loaded(has_experts=True), "zero.experts"),
        (spec_of(3), Loaded(has_tower=True), "zero.vision"),
        (spec_of(3), Loaded(num_new_tokens=2), "zero.new_tokens"),
    ],
)
def test_what_cannot_be_shown_to_be_exact_is_refused_with_the_way_out(spec: JobSpec, model: Loaded, code: str) -> None:
    with pytest.raises(UserError, match=r"choose|set it") as caught:
        refuse_unproven(spec, model)
    assert caught.value.code == code


def test_what_is_proven_is_not_refused() -> None:
    tower = Loaded(has_tower=True, has_experts=True, num_new_tokens=2)
    for stage in (0, 1, 2):
        assert fault(spec_of(stage, method="qlora"), stage, "none", tower) is None  # type: ignore[arg-type]
    assert fault(spec_of(3), 3, "optimizer_and_params", Loaded(has_experts=True)) is None
    assert fault(spec_of(0, compute={"dtype": "fp16"}), 0, "none", Loaded()) is None


def test_every_line_of_the_configuration_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs/zero.md").read_text()
    for spec in (spec_of(1), spec_of(2, "optimizer"), spec_of(3, "optimizer_and_params")):
        config = deepspeed_config(spec, "gpu")
        for key in (config.keys() | config["zero_optimization"].keys()) - {"zero_optimization"}:
            assert f"`{key}" in page, key
