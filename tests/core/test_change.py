"""What a job changes: the optimisation is the same exactly where every step learns from the same at the same rate, and
what `keeps` names makes it so."""

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.change import Change, against_plain_padding, compare
from core.errors import USER_FAULTS
from core.fix import applied
from core.preflight import JobPlan, plan_job
from core.profile import DataProfile
from core.spec import parse_spec
from tests.core.test_preflight import CPU, MODEL, plan_of, profile

LAYOUTS = st.fixed_dictionaries(
    {
        "packing": st.fixed_dictionaries(
            {
                "mode": st.sampled_from(["packed", "padding_free", "grouped", "padded"]),
                "row_length": st.sampled_from([None, 300, 700]),
            }
        ),
        "parallel": st.fixed_dictionaries(
            {"devices": st.integers(1, 3), "zero_stage": st.sampled_from(["auto", 0, 2])}
        ),
        "compute": st.fixed_dictionaries(
            {
                "attention": st.sampled_from(["auto", "sdpa", "eager"]),
                "gradient_checkpointing": st.sampled_from(["auto", True, False]),
            }
        ),
    }
)
LENGTHS = st.lists(st.integers(2, 250), min_size=1, max_size=40)
BATCHES = st.one_of(
    st.integers(1, 12).map(lambda number: {"samples_per_step": number}),
    st.integers(50, 900).map(lambda number: {"tokens_per_step": number}),
    st.integers(1, 12).map(lambda number: {"rows_per_step": number}),
)
SCHEDULES = st.one_of(
    st.fixed_dictionaries({"epochs": st.sampled_from([0.5, 1, 2.5, 3])}),
    st.fixed_dictionaries({"max_steps": st.integers(1, 30)}),
    st.fixed_dictionaries({"warmup_ratio": st.sampled_from([0.0, 0.1, 0.3])}),
    st.fixed_dictionaries({"warmup_steps": st.integers(0, 2), "learning_rate": st.sampled_from(["auto", 1e-3])}),
    st.fixed_dictionaries(
        {"decay": st.sampled_from(["linear", "constant"]), "min_lr_ratio": st.sampled_from([0, 0.1])}
    ),
)
SPECS = st.builds(
    lambda layout, batch, schedule, micro, data, seed, method: {
        **layout,
        "batch": {**batch, "micro_batch_size": micro},
        "schedule": schedule,
        "data": data,
        "seed": seed,
        "method": method,
    },
    LAYOUTS,
    BATCHES,
    SCHEDULES,
    st.integers(1, 3),
    st.sampled_from([{}, {"max_length": 300}, {"max_length": 100, "overlong": "drop"}, {"max_samples": 5}]),
    st.sampled_from([1, 2]),
    st.sampled_from([{"type": "lora"}, {"type": "lora", "rank": 8}, {"type": "full"}]),
)


def planned(facts: DataProfile, spec: dict[str, Any]) -> JobPlan:
    try:
        return plan_of(
            facts, **{part: dict(value) if isinstance(value, dict) else value for part, value in spec.items()}
        )
    except USER_FAULTS:
        assume(False)
        raise AssertionError("unreachable") from None


def facts_of(lengths: list[int]) -> DataProfile:
    return profile(lengths)


def optimisation(plan: JobPlan) -> list[tuple[object, ...]]:
    """Each step's rate and what it learns from, without any of the shortcuts of core.change."""
    return [
        (rate, sorted(plan.step(number).segments), plan.step(number).num_targets)
        for number, rate in enumerate(plan.learning_rates()[1:], start=1)
    ]


def codes(change: Change | None) -> list[str]:
    assert change is not None
    return [line.code for line in change.lines]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, LAYOUTS, LAYOUTS, st.integers(1, 12), st.sampled_from(["samples_per_step", "tokens_per_step"]))
def test_how_a_step_is_computed_never_changes_the_optimisation(
    lengths: list[int], one: dict[str, Any], other: dict[str, Any], number: int, unit: str
) -> None:
    batch = {unit: number if unit == "samples_per_step" else 100 * number}
    plan, baseline = (planned(facts_of(lengths), {**layout, "batch": batch}) for layout in (one, other))

    change = compare(plan, baseline)

    assert change.is_same_optimisation and not change.keeps
    assert optimisation(plan) == optimisation(baseline)
    padded = against_plain_padding(plan)
    assert (padded is None) == (plan.settings.mode == "padded")
    assert padded is None or padded.is_same_optimisation


@settings(deadline=None, max_examples=150)
@given(LENGTHS, SPECS, SPECS)
def test_the_optimisation_is_the_same_exactly_where_every_step_is_and_what_keeps_it_does(
    lengths: list[int], one: dict[str, Any], other: dict[str, Any]
) -> None:
    plan, baseline = (planned(facts_of(lengths), spec) for spec in (one, other))
    change = compare(plan, baseline)

    is_same = optimisation(plan) == optimisation(baseline)
    has_same_method = plan.spec.method == baseline.spec.method and plan.spec.seed == baseline.spec.seed
    # Decay and floor are what the optimisation is set to, even where a run is too short to show them.
    has_same_decay = (plan.spec.schedule.decay, plan.schedule.min_lr_ratio) == (
        baseline.spec.schedule.decay,
        baseline.schedule.min_lr_ratio,
    )
    if change.is_same_optimisation:
        assert is_same and has_same_method
    elif has_same_method and has_same_decay:
        assert not is_same
    assert change.lines
    if not change.is_same_optimisation:
        assert change.keeps
        kept = plan_job(
            parse_spec(applied(parse_spec(given_spec(one)), change.keeps)), {"d": facts_of(lengths)}, MODEL, CPU
        )
        again = compare(kept, baseline)
        assert again.is_same_optimisation, (change.keeps, [line.text() for line in again.lines])
        for part in ("parallel", "compute"):
            assert getattr(kept.spec, part).model_dump(include={"devices", "attention"}) == getattr(
                plan.spec, part
            ).model_dump(include={"devices", "attention"}), "how it is computed stays as it was"


def given_spec(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "data": {"train": [{"dataset": "d"}], **spec.get("data", {})}}


def test_packing_by_samples_says_how_many_slots_it_spares() -> None:
    plan = plan_of(profile([100, 20, 20, 20, 20, 20, 20, 20] * 40))
    change = against_plain_padding(plan)
    assert change is not None
    ratio = plan.packing.mine.padded_slots / plan.packing.mine.slots
    assert ratio > 2
    assert [line.text() for line in change.lines] == [
        f"the same 30 steps on the same samples, {ratio:.1f}x fewer slots"
    ]


def test_packing_by_rows_says_what_becomes_of_steps_and_warmup_and_what_keeps_them() -> None:
    plan = plan_of(profile([64] * 3200), data={"max_length": 256, "validation": None}, batch={"rows_per_step": 8})
    change = against_plain_padding(plan)
    assert change is not None and not change.is_same_optimisation
    assert [line.text() for line in change.lines] == [
        "1,200 steps become 300, the warm-up 10 steps instead of 36",
        "an epoch has 100 steps instead of 400",
        "a step learns from 32 samples on average instead of 8",
        "to keep the optimisation set batch.samples_per_step 8",
    ]
    assert change.keeps == {"batch.samples_per_step": 8, "batch.rows_per_step": None}


def test_rows_that_each_hold_one_sample_are_samples() -> None:
    lengths = [200] * 30
    one = plan_of(profile(lengths), batch={"rows_per_step": 30}, data={"max_length": 256})
    assert one.settings.rows_are_planned
    same = compare(one, plan_of(profile(lengths), batch={"samples_per_step": 30}, data={"max_length": 256}))
    assert same.is_same_optimisation, "one step an epoch that holds all"
    other = compare(one, plan_of(profile(lengths), batch={"samples_per_step": 29}, data={"max_length": 256}))
    assert not other.is_same_optimisation
    padded = plan_of(profile(lengths), batch={"rows_per_step": 7}, packing={"mode": "padded"})
    assert compare(padded, plan_of(profile(lengths), batch={"samples_per_step": 7})).is_same_optimisation


def test_a_longer_limit_changes_nothing_and_a_shorter_one_the_samples() -> None:
    data = profile([100] * 300 + [200] * 20)
    plan = plan_of(data, data={"max_length": 256})
    assert compare(plan_of(data, data={"max_length": 2048}), plan).is_same_optimisation
    shorter = compare(plan_of(data, data={"max_length": 128, "overlong": "drop"}), plan)
    assert "300 samples are trained instead of 320" in [line.text() for line in shorter.lines]
    assert shorter.keeps == {"data.max_length": 256, "data.overlong": None}


@pytest.mark.parametrize(
    ("parts", "said", "keeps"),
    [
        ({"schedule": {"learning_rate": 1e-3}}, "the learning rate rises to 0.001 instead of 0.0002",
         {"schedule.learning_rate": 2e-4}),
        ({"schedule": {"warmup_steps": 3}}, "the warm-up is 3 steps instead of 2", {"schedule.warmup_steps": 2}),
        ({"schedule": {"warmup_ratio": 0.5}}, "the warm-up is 10 steps instead of 2",
         {"schedule.warmup_steps": 2, "schedule.warmup_ratio": None}),
        ({"schedule": {"epochs": 1}}, "20 steps become 10, the warm-up 1 steps instead of 2", {"schedule.epochs": 2.0}),
        ({"schedule": {"max_steps": 7}}, "20 steps become 7, the warm-up 1 steps instead of 2",
         {"schedule.epochs": 2.0, "schedule.max_steps": None}),
        ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay is 0.1 instead of 0",
         {"optimizer.weight_decay": 0.0}),
        ({"method": {"rank": 8}}, "method.rank is 8 instead of 16", {"method.rank": 16}),
        ({"seed": 7}, "seed is 7 instead of 42", {"seed": 42}),
        ({"compute": {"dtype": "bf16"}}, "compute.dtype is bf16 instead of fp32", {"compute.dtype": "fp32"}),
    ],
)  # fmt: skip
def test_each_setting_of_the_optimisation_is_named_with_its_numbers(
    parts: dict[str, Any], said: str, keeps: dict[str, Any]
) -> None:
    def plan(**more: Any) -> JobPlan:
        schedule = {"epochs": 2, **more.pop("schedule", {})}
        if "max_steps" in schedule:
            del schedule["epochs"]
        return plan_of(profile([100] * 320), schedule=schedule, data={"max_length": 256}, **more)

    change = compare(plan(**parts), plan())
    assert not change.is_same_optimisation
    assert said in [line.text() for line in change.lines]
    assert change.keeps == keeps


def test_another_method_is_kept_as_a_whole() -> None:
    data = profile([100] * 64)
    change = compare(plan_of(data, method={"type": "full"}), plan_of(data, method={"rank": 8}))
    assert change.keeps["method"] == plan_of(data, method={"rank": 8}).spec.method.model_dump(mode="json")
    assert "method.type is full instead of lora" in [line.text() for line in change.lines]


def test_other_data_leave_nothing_to_keep() -> None:
    plan, other = plan_of(profile([100] * 64)), plan_of(profile([90] * 64))
    change = compare(plan, other)
    assert not change.is_same_optimisation and not change.keeps
    assert "change.data" in codes(change)
    weighted = plan_of(profile([100] * 64), data={"train": [{"dataset": "d", "weight": 2}]})
    assert compare(weighted, plan).keeps == {"data.train.0.weight": 1.0}


def test_dropout_is_said_to_fall_otherwise_in_another_layout() -> None:
    data = profile([100, 30] * 40)
    packed, padded = (plan_of(data, method={"dropout": 0.1}, packing={"mode": mode}) for mode in ("packed", "padded"))
    change = compare(packed, padded)
    assert change.is_same_optimisation and codes(change)[-1] == "change.dropout"
    assert "change.dropout" not in codes(compare(packed, packed))
