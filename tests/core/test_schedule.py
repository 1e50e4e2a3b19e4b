import math
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.schedule import WSD_DECAY_SHARE, Decay, Schedule, ceil_share, curve, lr_at, resolve_warmup_steps

DECAYS = st.sampled_from(get_args(Decay))
TO_THE_FLOOR = ("cosine", "linear", "wsd")  # by the last step, whatever the run's length


@st.composite
def schedules(draw):
    total_steps = draw(st.integers(1, 400))
    return Schedule(
        peak=draw(st.floats(1e-7, 1.0)),
        total_steps=total_steps,
        warmup_steps=draw(st.integers(0, total_steps - 1)),
        decay=draw(DECAYS),
        min_lr_ratio=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    )


@given(schedules())
def test_warmup_rises_in_equal_parts_to_the_peak(schedule):
    for step in range(1, schedule.warmup_steps + 1):
        assert lr_at(schedule, step) == pytest.approx(schedule.peak * step / schedule.warmup_steps)
    assert lr_at(schedule, max(schedule.warmup_steps, 1)) == schedule.peak
    assert lr_at(schedule, 0) == (0.0 if schedule.warmup_steps else schedule.peak)


@given(schedules())
def test_after_the_peak_the_rate_only_falls_and_stays_above_the_floor(schedule):
    rates = curve(schedule)[max(schedule.warmup_steps, 1) :]
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert min(rates) >= schedule.min_lr_ratio * schedule.peak * (1 - 1e-12)


@given(schedules())
def test_the_last_step_is_where_its_family_says(schedule):
    last = lr_at(schedule, schedule.total_steps)
    floor = schedule.min_lr_ratio * schedule.peak
    if schedule.total_steps == max(schedule.warmup_steps, 1) or schedule.decay == "constant":
        assert last == schedule.peak
    elif schedule.decay in TO_THE_FLOOR:
        assert last == pytest.approx(floor)
    else:
        assert floor <= last < schedule.peak or floor == schedule.peak


@given(schedules())
def test_only_a_last_step_whose_floor_is_zero_learns_nothing(schedule):
    rates = curve(schedule)[1:]
    assert all(rate > 0 for rate in rates[:-1])
    assert rates[-1] > 0 or (schedule.min_lr_ratio == 0 and schedule.decay in TO_THE_FLOOR)


@given(schedules())
def test_the_curve_is_lr_at_of_every_step(schedule):
    assert curve(schedule) == [lr_at(schedule, step) for step in range(schedule.total_steps + 1)]


def test_half_way_down_cosine_and_linear_are_half_way_to_the_floor():
    for decay in ("cosine", "linear"):
        assert lr_at(Schedule(1.0, 110, 10, decay, 0.1), 60) == pytest.approx(0.55)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert lr_at(Schedule(1.0, 110, 10, "cosine", 0.1), 35) == pytest.approx(quarter)


def test_wsd_stays_at_the_peak_and_falls_as_one_minus_the_root_in_its_last_fifth():
    schedule = Schedule(1.0, 100, 10, "wsd", 0.1)
    rates = curve(schedule)
    assert set(rates[10:81]) == {1.0} and WSD_DECAY_SHARE == 0.2
    assert rates[85] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert all(later < earlier for earlier, later in pairwise(rates[80:]))


def test_a_warmup_that_reaches_into_wsds_decay_leaves_it_the_steps_behind():
    schedule = Schedule(1.0, 100, 90, "wsd", 0.0)
    assert lr_at(schedule, 90) == 1.0
    assert lr_at(schedule, 95) == pytest.approx(1 - math.sqrt(0.5))


def test_inverse_sqrt_halves_when_steps_quadruple_and_stops_at_the_floor():
    schedule = Schedule(1.0, 1000, 10, "inverse_sqrt", 0.2)
    assert [lr_at(schedule, step) for step in (10, 40, 160, 1000)] == pytest.approx([1.0, 0.5, 0.25, 0.2])
    without_warmup = Schedule(1.0, 1000, 0, "inverse_sqrt", 0.0)
    assert [lr_at(without_warmup, step) for step in (1, 4, 100)] == pytest.approx([1.0, 0.5, 0.1])


def test_a_single_step_runs_at_the_peak_and_not_at_a_floor_of_zero():
    assert lr_at(Schedule(2e-4, 1, 0, "cosine", 0.0), 1) == 2e-4


@pytest.mark.parametrize(
    ("total_steps", "expected"), [(1, 0), (2, 1), (10, 1), (30, 3), (100, 10), (333, 10), (334, 11), (1000, 30)]
)
def test_the_default_warmup_is_three_percent_and_a_few_steps_for_a_short_run(total_steps, expected):
    choice = resolve_warmup_steps(total_steps, steps_per_epoch=total_steps)
    assert choice.steps == expected
    assert choice.reason.text()


@given(st.integers(1, 10**6))
def test_the_default_warmup_is_never_refused(total_steps):
    assert resolve_warmup_steps(total_steps, 1).steps < total_steps


@given(st.integers(2, 10_000), st.integers(0, 99))
def test_a_ratio_is_rounded_up_as_the_decimal_that_was_written(total_steps, percent):
    expected = -(-total_steps * percent // 100)
    if expected < total_steps:
        assert resolve_warmup_steps(total_steps, 1, ratio=percent / 100).steps == expected


def test_seven_percent_of_a_hundred_is_seven_though_floats_say_more():
    assert math.ceil(0.07 * 100) == 8, "the trap is still there"
    assert ceil_share(0.07, 100) == 7


def test_steps_are_taken_as_given_and_epochs_by_the_epochs_real_steps():
    assert resolve_warmup_steps(100, 40, steps=7).steps == 7
    assert resolve_warmup_steps(100, 40, steps=0).steps == 0
    choice = resolve_warmup_steps(100, 41, epochs=0.5)
    assert choice.steps == 21
    assert str(choice.reason) == "0.5 epochs of 41 steps"


@pytest.mark.parametrize(
    ("given_as", "field"),
    [
        ({"steps": 20}, "schedule.warmup_steps"),
        ({"ratio": 1.0}, "schedule.warmup_ratio"),
        ({"epochs": 3.0}, "schedule.warmup_epochs"),
    ],
)
def test_a_warmup_that_does_not_end_within_the_run_is_refused_with_both_numbers(given_as, field):
    with pytest.raises(UserError) as refused:
        resolve_warmup_steps(20, 10, **given_as)
    assert refused.value.code == "spec.warmup_longer_than_run"
    assert refused.value.field == field
    assert refused.value.parameters["total_steps"] == 20
    assert refused.value.parameters["warmup_steps"] >= 20
