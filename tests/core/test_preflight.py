"""The plan of a job: every row accounted for, every `auto` explained, the same step whatever the layout."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError, UserErrors
from core.events import Plan
from core.layout import num_slots
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile, ModelProfile
from core.schedule import lr_at
from core.selection import select
from core.spec import parse_spec
from core.unbuilt import UNBUILT_VALUES
from core.wire import Device

MODEL = ModelProfile(
    name="demo/tiny-llama",
    content_hash="0" * 64,
    architecture="LlamaForCausalLM",
    num_parameters=2_000_000,
    context_length=4096,
    vocabulary=4096,
    dtype="float32",
    has_chat_template=True,
    bytes=8_000_000,
)
CPU = Device(id="cpu0", kind="cpu", name="CPU", memory_bytes=1 << 34)


def profile(
    lengths: Sequence[int],
    trained: Sequence[int] | None = None,
    *,
    rows: Sequence[int] | None = None,
    hashes: Sequence[str] | None = None,
    num_refused: int = 0,
) -> DataProfile:
    rows = list(range(len(lengths))) if rows is None else list(rows)
    return DataProfile(
        num_rows=len(set(rows)) + num_refused,
        format="messages",
        multi_turn="whole",
        multi_turn_reason="",
        num_refused=num_refused,
        refused=(),
        sample_row=rows,
        sample_length=list(lengths),
        sample_trained=list(trained) if trained is not None else [length // 2 for length in lengths],
        sample_turns=[1] * len(lengths),
        sample_hash=list(hashes) if hashes is not None else [f"{row * 7919 % 100_003:016x}" for row in rows],
    )


def plan_of(facts: DataProfile, device: Device = CPU, **parts: Any) -> JobPlan:
    spec = {"data": {"train": [{"dataset": "d"}], **parts.pop("data", {})}, **parts}
    return plan_job(parse_spec(spec), {"d": facts}, MODEL, device)


def lengths_of(count: int) -> list[int]:
    return [20 + (index * 37) % 400 for index in range(count)]


def test_every_row_and_sample_is_counted_under_what_became_of_it() -> None:
    lengths = [*lengths_of(900), 3000, 50]
    trained = [*(length // 2 for length in lengths[:-1]), 0]
    plan = plan_of(
        profile(lengths, trained, num_refused=3), data={"max_length": 1024, "overlong": "drop", "max_samples": 901}
    )
    counts = plan.counts
    assert counts["rows"] == 905 and counts["rows_refused"] == 3 and counts["rows_beyond_max_samples"] == 1
    assert counts["rows"] == sum(
        counts[key] for key in ("rows_refused", "rows_beyond_max_samples", "rows_held_out", "rows_taken")
    )
    assert counts["rows_held_out"] == 50
    assert counts["samples"] == sum(
        counts[key] for key in ("samples_without_trained_tokens", "samples_too_long", "samples_trained")
    )
    assert counts["samples_too_long"] + counts["samples_validation_dropped"] >= 1
    assert set(plan.selection.train.sample_ids.tolist()).isdisjoint(plan.validation_ids)
    assert plan.selection.max_length == 1024


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=60),
    st.sampled_from(["packed", "padding_free", "grouped", "padded"]),
    st.sampled_from([{"samples_per_step": 5}, {"tokens_per_step": 400}]),
    st.integers(1, 4),
    st.integers(300, 900),
)
def test_a_step_is_the_same_set_of_samples_whatever_the_layout(
    lengths: list[int], mode: str, batch: dict[str, int], micro_batch_size: int, row_length: int
) -> None:
    reference = plan_of(profile(lengths), batch=batch, data={"max_length": 300})
    other = plan_of(
        profile(lengths),
        batch={**batch, "micro_batch_size": micro_batch_size},
        packing={"mode": mode, "row_length": row_length},
        data={"max_length": 300},
    )
    assert other.total_steps == reference.total_steps
    for number in range(1, reference.total_steps + 1):
        work = other.step(number)
        assert work.segments == reference.step(number).segments
        assert work.num_targets == sum(lengths[sample] // 2 for sample in work.sample_ids)
        in_rows = [segment for rank in work.layout.ranks for batch_ in rank for row in batch_ for segment in row]
        assert sorted(in_rows) == sorted(work.segments)


def test_dropping_over_half_a_percent_of_the_trained_tokens_is_refused_with_the_numbers() -> None:
    data = profile([100] * 90 + [2000] * 10)
    with pytest.raises(UserError) as caught:
        plan_of(data, data={"max_length": 512})
    assert caught.value.field == "data.max_length"
    assert "10 of 100" in caught.value.text() and "2000" in caught.value.text()
    assert plan_of(data, data={"max_length": 512, "overlong": "drop"}).counts["samples_too_long"] == 10


def test_samples_longer_than_the_context_are_refused_with_what_helps() -> None:
    data = profile([100] * 90 + [5000] * 10)
    with pytest.raises(UserError, match="10 of 100 samples are longer than the model's context of 4096 tokens"):
        plan_of(data)
    assert plan_of(data, data={"overlong": "drop"}).selection.max_length == 4096


def test_max_length_auto_is_the_shortest_that_loses_at_most_half_a_percent() -> None:
    # 1,000 samples of 50 trained tokens; losing the 5 longest loses exactly 0.5 %.
    lengths = [100] * 995 + [700] * 5
    plan = plan_of(profile(lengths, [50] * 1000), data={"validation": None})
    assert plan.selection.max_length == 128 and plan.counts["samples_too_long"] == 5
    plan = plan_of(profile([100] * 994 + [700] * 6, [50] * 1000), data={"validation": None})
    assert plan.selection.max_length == 704 and plan.counts["samples_too_long"] == 0


def test_max_length_above_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="8192 is above the model's context of 4096 tokens; set at most 4096"):
        plan_of(profile([100]), data={"max_length": 8192})


def test_max_length_auto_stays_within_the_context_and_then_says_what_it_would_drop() -> None:
    with pytest.raises(UserError) as caught:
        plan_of(profile([6000] * 10))
    assert caught.value.code == "plan.no_samples" and "over 4096 tokens" in caught.value.text()


def test_no_row_is_held_out_under_500_rows_and_the_plan_says_so() -> None:
    plan = plan_of(profile(lengths_of(499)))
    assert plan.validation_ids == ()
    assert any(choice.code == "auto.validation_none" for choice in plan.choices)
    assert len(plan_of(profile(lengths_of(500))).validation_ids) == 50
    assert len(plan_of(profile(lengths_of(3000))).validation_ids) == 60


def test_equal_rows_fall_on_the_same_side_of_the_split() -> None:
    hashes = [f"{index // 2:016x}" for index in range(1000)]
    plan = plan_of(profile(lengths_of(1000), hashes=hashes))
    held_out = {hashes[sample] for sample in plan.validation_ids}
    assert held_out and held_out.isdisjoint(hashes[sample] for sample in plan.selection.train.sample_ids)


def test_samples_of_one_row_stay_together() -> None:
    rows = [index // 3 for index in range(1800)]
    plan = plan_of(profile(lengths_of(1800), rows=rows))
    assert {rows[s] for s in plan.validation_ids}.isdisjoint(rows[s] for s in plan.selection.train.sample_ids)
    assert plan.counts["rows_held_out"] == 50 and plan.counts["samples_validation"] == 150


def test_a_validation_set_of_its_own_is_numbered_after_the_training_sets() -> None:
    spec = parse_spec(
        {"data": {"train": [{"dataset": "a"}, {"dataset": "b", "weight": 2}], "validation": {"dataset": "v"}}}
    )
    data = {"a": profile([10] * 20), "b": profile([20] * 30), "v": profile([30] * 5)}
    plan = plan_job(spec, data, MODEL, CPU)
    assert plan.validation_ids == tuple(range(50, 55))
    assert plan.run.steps_per_epoch == -(-(20 + 60) // 32)


def test_every_auto_is_resolved_and_explained() -> None:
    plan = plan_of(profile(lengths_of(600)))
    text = plan.spec.model_dump_json()
    assert '"validation":"auto"' in text and text.count('"auto"') == 3  # source, format and validation are no numbers
    explained = {choice.field: choice.text() for choice in plan.choices}
    for field in ("schedule.learning_rate", "compute.dtype", "compute.attention", "data.max_length", "data.validation"):
        assert explained[field], field
    assert plan.spec.compute.dtype == "fp32"
    gpu = Device(id="gpu0", kind="gpu", name="H100", memory_bytes=1 << 36, has_bf16=True)
    assert plan_of(profile([10]), gpu).spec.compute.dtype == "bf16"


def test_the_planned_curve_is_the_schedule_at_the_real_step_count() -> None:
    plan = plan_of(profile(lengths_of(640)), data={"validation": None}, schedule={"epochs": 2, "warmup_ratio": 0.1})
    assert plan.total_steps == 40 and plan.schedule.warmup_steps == 4
    assert plan.learning_rates() == [lr_at(plan.schedule, step) for step in range(41)]


def test_a_warmup_longer_than_the_real_run_is_refused() -> None:
    with pytest.raises(UserError, match="warm-up of 50 steps does not end within the run of 20 steps"):
        plan_of(profile(lengths_of(640)), data={"validation": None}, schedule={"epochs": 1, "warmup_steps": 50})


def test_evaluations_fall_evenly_in_an_epoch_and_on_the_last_step() -> None:
    plan = plan_of(profile(lengths_of(690)), batch={"samples_per_step": 64}, schedule={"epochs": 2})
    assert plan.run.steps_per_epoch == 10
    assert [n for n in range(1, 21) if plan.evaluates_after(n)] == [5, 10, 15, 20]
    plan = plan_of(profile(lengths_of(690)), schedule={"max_steps": 7}, evaluation={"every_steps": 3})
    assert [n for n in range(1, 8) if plan.evaluates_after(n)] == [3, 6, 7]
    plan = plan_of(profile(lengths_of(69)), schedule={"max_steps": 3})
    assert not any(plan.evaluates_after(n) for n in range(1, 4)), "nothing is held out, so there is nothing to measure"


def test_the_largest_micro_batch_is_as_large_as_any() -> None:
    plan = plan_of(profile(lengths_of(300)), batch={"samples_per_step": 8, "micro_batch_size": 2})
    every = [
        num_slots(micro_batch)
        for number in range(1, plan.run.steps_per_epoch + 1)
        for micro_batch in plan.step(number).layout.ranks[0]
    ]
    assert num_slots(plan.largest_micro_batch()) == max(every) > min(every)


def test_validation_layouts_hold_each_sample_once() -> None:
    plan = plan_of(profile(lengths_of(3000)))
    rows = [row for layout in plan.validation_layouts() for batch in layout.ranks[0] for row in batch]
    assert sorted(segment.sample for row in rows for segment in row) == sorted(plan.validation_ids)
    assert len(rows) < len(plan.validation_ids), "several share a row"


def test_the_plan_event_is_complete_but_for_what_the_model_tells() -> None:
    plan = plan_of(profile(lengths_of(600)))
    event = Plan(seq=1, ts=0.0, trainable_parameters=1, total_parameters=2, attention="flash", **plan.plan_event())  # type: ignore[arg-type]
    assert event.total_steps == plan.total_steps and event.padding_efficiency > event.padded_efficiency


@pytest.mark.parametrize(
    ("field", "lacking"), [(field, value) for field, all_ in UNBUILT_VALUES.items() for value in sorted(all_, key=str)]
)
def test_what_this_release_lacks_is_refused_with_what_to_choose(field: str, lacking: object) -> None:
    part, key = field.split(".")
    with pytest.raises(UserErrors) as caught:
        plan_of(profile([10]), **{part: {key: lacking}})
    (error,) = caught.value.errors
    assert error.field == field and "not built yet" in error.text()


def test_max_samples_draws_by_the_seed() -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        spec = parse_spec({"data": {"train": [{"dataset": "d"}], "max_samples": 10}, "seed": seed})
        return tuple(select(spec, {"d": profile(lengths_of(100))}, 4096).train.sample_ids.tolist())

    assert len(drawn(1)) == 10 and drawn(1) == drawn(1) != drawn(2)
