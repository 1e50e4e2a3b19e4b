"""What a trial may ask for, and what its numbers are taken to say."""

import math

import pytest

from core.errors import USER_FAULTS
from core.presets import auto_learning_rate
from core.schedule import lr_at, rate_text
from core.spec import LARGEST_LEARNING_RATE, Lora
from core.trial import (
    DIVERGED_FACTOR,
    DryRun,
    DryStep,
    RateCurve,
    RateProbe,
    as_trial,
    has_diverged,
    parse_trial,
    probe_schedule,
    rates_around,
    report_dry_run,
    suggest,
)

# How hard each of 20 steps is, whatever the rate: larger than what rates differ by.
EFFORT = [0.3 * math.sin(7 * step) for step in range(1, 21)]


def curve(rate: float, gain: float, jitter: float = 0.0) -> RateCurve:
    """A loss that falls by `gain` over 20 steps, as hard as its samples; `jitter` is the rate's own."""
    losses = tuple(
        3 - gain * step / 20 + EFFORT[step - 1] + jitter * math.sin(rate * 1e6 + 3 * step) for step in range(1, 21)
    )
    return RateCurve(learning_rate=rate, losses=losses, grad_norms=(1.0,) * 20)


def diverged(rate: float, steps: int = 5) -> RateCurve:
    return RateCurve(
        learning_rate=rate, losses=(3.0,) * (steps - 1) + (None,), grad_norms=(1.0,) * steps, has_diverged=True
    )


# -- what is asked for -----------------------------------------------------------------------------------------------


def test_a_trial_is_read_from_json_and_stands_with_its_job() -> None:
    assert parse_trial({"kind": "dry_run"}) == DryRun(steps=10)
    probe = parse_trial({"kind": "lr_probe", "rates": ["2e-4", 1e-3], "steps": "8"})
    assert probe == RateProbe(rates=(2e-4, 1e-3), steps=8)
    assert as_trial(probe.model_dump(mode="json")) == probe
    assert as_trial(None) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (3, [("trial", "spec.kind")]),
        ({}, [("trial.kind", "spec.choice")]),
        ({"kind": ["dry_run"]}, [("trial.kind", "spec.choice")]),
        ({"kind": "dry_run", "stps": 3}, [("trial.stps", "trial.unknown_key")]),
        ({"kind": "dry_run", "rates": [1e-4]}, [("trial.rates", "trial.unknown_key")]),
        ({"kind": "dry_run", "steps": 0}, [("trial.steps", "spec.at_least")]),
        ({"kind": "lr_probe", "rates": [1e-4, 1e-4]}, [("trial.rates", "trial.rate_twice")]),
        (
            {"kind": "lr_probe", "rates": ["fast", -1, 1e-4], "steps": 1000},
            [("trial.rates.0", "spec.number"), ("trial.rates.1", "spec.above"), ("trial.steps", "spec.at_most")],
        ),
        ({"kind": "lr_probe", "rates": [math.nan]}, [("trial.rates.0", "spec.number")]),
    ],
)
def test_what_is_wrong_with_a_trial_is_told_with_its_place(given: object, told: list[tuple[str, str]]) -> None:
    with pytest.raises(USER_FAULTS) as raised:
        parse_trial(given)
    assert [(error.field, error.code) for error in raised.value.errors] == told
    assert all(error.text() for error in raised.value.errors)


def test_rates_lie_half_a_decade_apart_around_what_auto_comes_to() -> None:
    rate, _ = auto_learning_rate(Lora(), 2_000_000)
    assert rates_around(rate) == (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)
    assert rates_around(0.000123) == (1.2e-5, 3.7e-5, 1.2e-4, 3.7e-4, 1.2e-3)


def test_rates_stay_within_what_a_spec_takes() -> None:
    assert rates_around(5) == (0.5, 1.5, 5, LARGEST_LEARNING_RATE)
    assert RateProbe(rates=rates_around(LARGEST_LEARNING_RATE)).rates[-1] == LARGEST_LEARNING_RATE


@pytest.mark.parametrize("steps", [1, 2, 4, 20, 200])
def test_a_probe_reaches_its_rate_and_stays_there(steps: int) -> None:
    schedule = probe_schedule(1e-3, steps)
    rates = [lr_at(schedule, step) for step in range(1, steps + 1)]
    assert rates == sorted(rates) and rates[-1] == 1e-3
    assert rates.count(1e-3) >= 0.8 * steps


@pytest.mark.parametrize(
    ("loss", "grad_norm", "is_over"),
    [
        (2.0, 1.0, False),
        (DIVERGED_FACTOR * 2.0, 50.0, False),
        (DIVERGED_FACTOR * 2.0 + 0.01, 1.0, True),
        (math.nan, 1.0, True),
        (1.0, math.inf, True),
    ],
)
def test_a_rate_is_over_when_its_loss_has_grown_or_is_no_number(loss: float, grad_norm: float, is_over: bool) -> None:
    assert has_diverged(2.0, loss, grad_norm) is is_over


# -- what it says ----------------------------------------------------------------------------------------------------


def test_the_lowest_smoothed_loss_wins_though_steps_differ_more_than_rates() -> None:
    curves = [curve(1e-5, 0.01), curve(1e-4, 0.05), curve(1e-3, 0.1), curve(1e-2, 0.02), diverged(0.1)]
    found = suggest(curves)
    assert (found.learning_rate, found.is_settled, found.code) == (1e-3, True, "trial.best_lies_between")
    assert max(EFFORT) - min(EFFORT) > 0.1, "a single step says nothing"
    assert "1e-3 has the lowest loss over the last 5 steps" in found.why.text()
    assert suggest(curves[::-1]) == found


def test_of_rates_within_the_noise_the_smallest_is_taken() -> None:
    curves = [curve(1e-5, 0.0), curve(1e-4, 0.099, 0.05), curve(1e-3, 0.1, 0.05), curve(1e-2, 0.101, 0.05)]
    best = min(curves, key=lambda each: each.last_loss or math.inf).learning_rate
    found = suggest(curves)
    assert (found.learning_rate, found.is_settled, found.code) == (1e-4, True, "trial.smaller_within_noise")
    assert best > 1e-4 and f"{rate_text(best)} has the lowest loss" in found.why.text()


def test_a_smaller_rate_beyond_a_worse_one_is_not_reached() -> None:
    alike, best = curve(1e-4, 0.095, 0.02), curve(1e-2, 0.1)
    assert (alike.last_loss or 0) > (best.last_loss or 0)
    assert suggest([alike, best]).learning_rate == 1e-4
    found = suggest([alike, curve(1e-3, 0.0), best, curve(1e-1, 0.02)])
    assert found.learning_rate == 1e-2, "with a worse one between them they are no plateau"


@pytest.mark.parametrize(
    ("gains", "code", "rate"),
    [((0.1, 0.2, 0.4), "trial.best_is_largest", 1e-2), ((0.4, 0.2, 0.1), "trial.best_is_smallest", 1e-4)],
)
def test_a_best_rate_at_the_edge_asks_for_another_probe(gains: tuple[float, ...], code: str, rate: float) -> None:
    found = suggest([curve(each, gain) for each, gain in zip((1e-4, 1e-3, 1e-2), gains, strict=True)])
    assert (found.learning_rate, found.is_settled, found.code) == (rate, False, code)
    assert "probe again" in found.why.text()


def test_the_largest_that_held_is_no_edge_when_a_larger_one_diverged() -> None:
    found = suggest([curve(1e-4, 0.1), curve(1e-3, 0.4), diverged(1e-2)])
    assert (found.learning_rate, found.is_settled) == (1e-3, True)


def test_where_all_diverged_a_lower_one_is_named() -> None:
    found = suggest([diverged(1e-2), diverged(3e-3)])
    assert (found.learning_rate, found.is_settled, found.code) == (3e-4, False, "trial.all_diverged")
    assert "3e-3" in found.why.text() and "3e-4" in found.why.text()


def test_a_job_of_few_steps_is_judged_by_those() -> None:
    short = [
        RateCurve(learning_rate=rate, losses=(3.0, last), grad_norms=(1.0, 1.0))
        for rate, last in ((1e-4, 2.9), (1e-3, 0.0))
    ]
    found = suggest(short)
    assert found.learning_rate == 1e-3 and found.parameters["steps"] == 1


def test_a_rate_is_through_when_it_made_its_steps_or_diverged() -> None:
    assert curve(1e-3, 0.1).is_through(20) and not curve(1e-3, 0.1).is_through(21)
    assert diverged(1e-3).is_through(20) and diverged(1e-3).last_loss is None


def test_a_dry_runs_times_are_those_of_its_settled_steps() -> None:
    seconds = [9.0, 4.0, 1.0, 2.0, 1.5, 1.0]
    made = [
        DryStep(loss=3.0 - number, step_s=step_s, tokens=1000, memory_peak_bytes=100 + number)
        for number, step_s in enumerate(seconds)
    ]
    report = report_dry_run(made, total_steps=400, planned_peak_bytes=90)
    assert report.seconds_per_step == 1.25 and report.seconds_in_all == 500.0
    assert report.tokens_per_s == 4000 / 5.5
    assert (report.memory_peak_bytes, report.planned_peak_bytes) == (105, 90)
    assert (report.steps, report.first_loss, report.last_loss) == (6, 3.0, -2.0)


def test_a_dry_run_of_two_steps_has_no_others() -> None:
    report = report_dry_run([DryStep(loss=1.0, step_s=2.0, tokens=10)] * 2, total_steps=2, planned_peak_bytes=None)
    assert report.seconds_in_all == 4.0 and report.memory_peak_bytes is None
