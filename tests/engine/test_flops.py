"""The formula against torch's own counter, over the passes that the engine makes, product for product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.architecture import Architecture, ParametersByKind
from core.flops import step_flops
from tests.engine import tiny
from worker.engine.loss import backward
from worker.engine.models import profile_model

SHAPE = tiny.SHAPE
SAMPLES = tiny.some_samples(6)


def addmm_flops(
    total: torch.Size, first: torch.Size, second: torch.Size, *, out_shape: torch.Size, **rest: object
) -> int:
    """Of the product that is added in place, which torch's counter leaves out."""
    assert total == out_shape
    return 2 * first[0] * first[1] * second[1]


def counted_and_planned(folder: Path, method: dict[str, Any]) -> tuple[int, int, Architecture]:
    model = tiny.load(folder, attention="eager", method=method)
    step = tiny.step_of(SAMPLES, mode="padded")  # one sample a row: nothing is padded
    in_place = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        for batch in step.batches:
            backward(model, batch, step.num_targets)
    adapters = None if method["type"] == "full" else sum(weight.numel() for weight in model.trainable().values())
    shape = profile_model(folder, "it").shape
    assert shape is not None
    planned = step_flops(shape, SAMPLES.lengths, sum(SAMPLES.num_targets), num_adapter_parameters=adapters)
    assert planned is not None
    return counter.get_total_flops(), planned, shape


def beyond_the_diagonal(shape: Architecture) -> int:
    """What eager attention computes for positions that are then masked out: two products, and four backward."""
    assert shape.num_layers is not None and shape.query_width is not None
    pairs = sum(length * length - length * (length + 1) // 2 for length in SAMPLES.lengths)
    return 2 * 6 * shape.query_width * pairs * shape.num_layers


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_full_fine_tune_takes_what_the_formula_says(family: str, tmp_path: Path) -> None:
    counted, planned, shape = counted_and_planned(tiny.save_base(tmp_path, family), {"type": "full"})
    assert planned == counted - beyond_the_diagonal(shape)


def test_lora_takes_no_weight_gradient_of_the_frozen_base(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path)
    counted, planned, shape = counted_and_planned(folder, {"type": "lora", "rank": 4})
    full, planned_full, _ = counted_and_planned(folder, {"type": "full"})
    assert planned < planned_full and counted < full
    # The lowest layer's input has no gradient, which the formula doesn't look at: q, k and v, and their adapters' A.
    assert shape.hidden_size and shape.query_width and shape.key_value_width
    lowest = shape.hidden_size * (shape.query_width + 2 * shape.key_value_width + 3 * 4)
    assert planned == counted - beyond_the_diagonal(shape) + 2 * sum(SAMPLES.lengths) * lowest


def flops(shape: Architecture, lengths: list[int], num_targets: int = 0) -> int | None:
    return step_flops(shape, lengths, num_targets, num_adapter_parameters=None)


def test_attention_grows_with_the_square_within_a_sample_and_not_across() -> None:
    assert flops(SHAPE, [100]) == 12 * 8 * 2 * 5050
    assert flops(SHAPE, [50, 50]) == 12 * 8 * 2 * 2 * 1275


def test_a_window_limits_what_a_position_sees() -> None:
    windowed = SHAPE.model_copy(update={"num_unlimited_layers": 1, "num_windowed_layers": 1, "sliding_window": 10})
    assert flops(windowed, [100]) == 12 * 8 * (5050 + 55 + 90 * 10)
    assert flops(windowed, [10]) == flops(SHAPE, [10])


def test_of_experts_those_count_that_a_token_is_sent_to_and_of_the_head_the_trained_positions() -> None:
    parameters = ParametersByKind(experts=800, mlp=5, attention=3)
    mixture = SHAPE.model_copy(
        update={"parameters": parameters, "num_experts": 8, "experts_per_token": 2, "expert_size": 4}
    )
    nothing = flops(SHAPE, [7])
    assert nothing is not None
    assert flops(mixture, [7]) == nothing + 6 * 7 * (200 + 5 + 3)
    assert flops(SHAPE, [7], num_targets=3) == nothing + 6 * 3 * 80


def test_without_the_sizes_there_is_no_number() -> None:
    assert flops(SHAPE.model_copy(update={"hidden_size": None}), [7]) is None
