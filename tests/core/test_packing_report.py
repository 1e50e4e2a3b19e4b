"""What the panel shows of a job's packing is what the trainer lays out."""

import random
from typing import Any

import pytest

from core.flops import step_flops
from core.lengths import candidate_lengths, cut_at, of_teaching
from core.memory import count_adapter_parameters
from core.packing_report import busiest_share, first_row, report_lengths
from core.preflight import JobPlan, plan_job
from core.spec import Adapter, parse_spec
from tests.core.shapes import LLAMA_7B, llama
from tests.core.test_preflight import CPU, MODEL, plan_of, profile

_DRAW = random.Random(4)
LENGTHS = [_DRAW.randint(20, 900) for _ in range(320)]
SMALL = llama(hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128, vocabulary=512)


def plan_with_shape(shape: Any, **parts: Any) -> JobPlan:
    spec = {"data": {"train": [{"dataset": "d"}], "validation": None}, **parts}
    model = MODEL.model_copy(update={"shape": shape})
    device = CPU.model_copy(update={"memory_bytes": 1 << 42})
    return plan_job(parse_spec(spec), {"d": profile(LENGTHS)}, model, device)


@pytest.mark.parametrize("mode", ["packed", "padding_free", "grouped", "padded"])
def test_the_first_row_is_the_one_that_rank_0_computes_first(mode: str) -> None:
    plan = plan_of(profile(LENGTHS), packing={"mode": mode}, batch={"micro_batch_size": 4})
    row = first_row(plan)
    work = plan.step(1)
    micro_batch = work.layout.ranks[0][0]
    assert row.segments == micro_batch[0]
    assert row.targets == tuple(work.targets[segment] for segment in row.segments)
    assert row.width == max(sum(segment.length for segment in other) for other in micro_batch)
    assert sum(row.pads) == row.width - sum(segment.length for segment in row.segments)
    assert (len(row.segments) > 1) == (mode in ("packed", "padding_free"))
    assert (row.row_length is None) == (mode != "packed")
    meeting = sum(1 for segment in row.segments for query in range(segment.length) for _ in range(query + 1))
    assert row.seen_share == pytest.approx(meeting / (row.width * (row.width + 1) / 2))


def test_a_padded_row_has_a_pad() -> None:
    rows = [
        first_row(plan_of(profile(LENGTHS), packing={"mode": "padded"}, batch={"micro_batch_size": 8}, seed=seed))
        for seed in range(3)
    ]
    assert any(row.pads for row in rows)


def test_the_busiest_rank_is_that_of_the_layouts() -> None:
    alone = plan_of(profile(LENGTHS))
    assert busiest_share(alone) is None
    plan = plan_of(profile(LENGTHS), parallel={"devices": 3}, packing={"mode": "padded"})
    layouts = [plan.step(number).layout for number in range(1, 11)]
    assert all(sum(layout.slots_of_ranks) == layout.slots for layout in layouts)
    assert len({layout.slots_of_ranks[0] for layout in layouts}) > 1
    share = busiest_share(plan)
    assert share == sum(max(layout.slots_of_ranks) for layout in layouts) / sum(layout.slots for layout in layouts)
    assert 1 / 3 < share < 0.5


def test_lengths_are_those_of_the_samples_that_teach() -> None:
    trained = [0 if length % 7 == 0 else length // 2 for length in LENGTHS]
    plan = plan_of(profile(LENGTHS, trained), data={"max_length": 600, "overlong": "drop"})
    shown = report_lengths(plan)
    counts = plan.counts
    assert counts["samples_without_trained_tokens"] > 0 and counts["samples_too_long"] > 0
    assert shown.samples == counts["samples"] - counts["samples_without_trained_tokens"]
    assert shown.samples_beyond == counts["samples_too_long"]
    assert (shown.trained_tokens, shown.trained_tokens_beyond) == (counts["targets"], counts["targets_too_long"])
    assert sum(each.samples for each in shown.bins) == shown.samples


def test_a_cut_is_what_a_job_makes_of_the_data_at_that_max_length() -> None:
    trained = [0 if length % 7 == 0 else length // 2 for length in LENGTHS]
    facts = profile(LENGTHS, trained)
    teaching = of_teaching(facts)
    candidates = candidate_lengths(teaching[0])
    assert len(candidates) > 8
    for max_length in candidates:
        cut = cut_at(max_length, *teaching)
        data = {"max_length": max_length, "overlong": "drop", "validation": None}
        plan = plan_of(facts, data=data, batch={"rows_per_step": 2})
        mine = plan.packing.mine
        assert (cut.rows, cut.tokens, cut.fill) == (mine.rows, mine.tokens, mine.fill)
        assert cut.all_padded_efficiency == plan.packing.all_padded_efficiency
        assert cut.samples_beyond == plan.counts["samples_too_long"]
        assert cut.trained_tokens == plan.counts["targets_trained"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_relative_cost_counts_every_position_that_a_pass_computes(method: str) -> None:
    packed_costs = {}
    for attention in ("flash", "sdpa"):
        packing = plan_with_shape(
            SMALL,
            method={"type": method},
            compute={"attention": attention},
            packing={"mode": "padded"},
            batch={"micro_batch_size": 8, "samples_per_step": 16},
            schedule={"learning_rate": 1e-4},
        ).packing
        assert packing.mine.is_exact and packing.baseline.flops is not None
        # The form's own padding is the baseline, where batches of 8 divide a step.
        assert packing.relative_cost(packing.mine) == 1
        assert packing.baseline.slots == packing.mine.padded_slots
        packed, grouped = packing.of("packed"), packing.of("grouped")
        assert packed.slots < grouped.slots < packing.baseline.slots
        assert packing.relative_cost(grouped) < 1
        packed_costs[attention] = packing.relative_cost(packed)
    # A dense mask costs attention the square of the row, which is longer than a padded sample.
    assert packed_costs["flash"] < packed_costs["sdpa"]


def test_where_nothing_is_padded_a_layout_computes_what_learning_takes() -> None:
    plan = plan_with_shape(SMALL.model_copy(update={"sliding_window": 100, "num_windowed_layers": 1}))
    packing, train = plan.packing, plan.selection.train
    assert packing.mine.padding_efficiency == 1 and packing.mine.rows < len(LENGTHS)
    assert isinstance(plan.spec.method, Adapter)
    adapters = count_adapter_parameters(SMALL, plan.spec.method)
    needed = step_flops(
        plan.model.shape, train.lengths.tolist(), int(train.targets.sum()), num_adapter_parameters=adapters
    )
    assert packing.mine.flops == pytest.approx(needed, rel=1e-9)


def test_without_the_models_sizes_cost_is_counted_in_positions() -> None:
    packing = plan_with_shape(None).packing
    assert packing.mine.flops is None
    assert packing.relative_cost(packing.mine) == packing.mine.slots / packing.baseline.slots < 1


def test_of_a_large_model_short_samples_cost_by_their_positions() -> None:
    packing = plan_with_shape(LLAMA_7B, compute={"attention": "flash"}).packing
    by_slots = packing.mine.slots / packing.baseline.slots
    assert packing.relative_cost(packing.mine) == pytest.approx(by_slots, rel=0.02)
