"""A run's totals are the sums of what its steps are."""

import pytest

from core.run_totals import run_totals
from tests.core.test_preflight import lengths_of, plan_of, profile

LENGTHS = lengths_of(200)
WAYS = [
    {"packing": {"mode": "packed"}},
    {"packing": {"mode": "padded"}, "batch": {"samples_per_step": 16, "micro_batch_size": 4}},
    {"packing": {"mode": "grouped"}, "batch": {"samples_per_step": 16, "micro_batch_size": 4}},
    {"packing": {"mode": "packed"}, "batch": {"rows_per_step": 4}},
]


@pytest.mark.parametrize("parts", WAYS)
@pytest.mark.parametrize("schedule", [{"epochs": 1.0}, {"epochs": 2.5}, {"max_steps": 5}])
def test_totals_are_those_of_the_steps_one_by_one(parts: dict, schedule: dict) -> None:
    plan = plan_of(profile(LENGTHS), **parts, schedule=schedule)
    works = [plan.step(number) for number in range(1, plan.total_steps + 1)]
    totals = run_totals(plan)
    assert totals.is_exact and totals.steps == len(works)
    assert totals.rows == sum(work.layout.rows for work in works)
    assert totals.slots == sum(work.layout.slots for work in works)
    assert totals.tokens == sum(work.layout.tokens for work in works)
    assert totals.trained_tokens == sum(work.num_targets for work in works)
    assert totals.padding_efficiency == totals.tokens / totals.slots


def test_a_part_of_a_run_is_added_up_by_itself_and_of_totals_alone_it_is_an_estimate() -> None:
    plan = plan_of(profile(LENGTHS), schedule={"max_steps": 5})
    whole, part = run_totals(plan), run_totals(plan, 3, 4)
    assert part.steps == 2 and part.tokens == sum(plan.step(number).layout.tokens for number in (3, 4))
    assert whole.of_first(5) is whole
    assert not whole.of_first(2).is_exact and whole.of_first(2).tokens == round(whole.tokens * 2 / 5)
    assert run_totals(plan, 6).steps == 0


def test_of_a_long_run_the_first_epoch_stands_for_all() -> None:
    plan = plan_of(profile(LENGTHS), schedule={"epochs": 3.0})
    exact = run_totals(plan)
    estimate = run_totals(plan, most_samples=100)
    assert exact.is_exact and not estimate.is_exact
    assert (estimate.steps, estimate.tokens, estimate.trained_tokens) == (
        exact.steps,
        exact.tokens,
        exact.trained_tokens,
    )
    assert estimate.rows == pytest.approx(exact.rows, rel=0.05)
