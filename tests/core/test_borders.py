"""Evaluations and checkpoints are counted at the borders where the trainer has them."""

from typing import Any

import pytest

from core.borders import checkpoint_steps, evaluation_steps
from tests.core.test_preflight import lengths_of, plan_of, profile

HELD_OUT = {"validation": {"fraction": 0.1}}
LENGTHS = lengths_of(230)


@pytest.mark.parametrize(
    "parts",
    [
        {"evaluation": {"per_epoch": 2}, "schedule": {"epochs": 3.0}},
        {"evaluation": {"per_epoch": 3}, "schedule": {"epochs": 2.5}},
        {"evaluation": {"per_epoch": 500}, "schedule": {"max_steps": 17}},
        {"evaluation": {"every_steps": 4}, "schedule": {"max_steps": 17}},
        {"evaluation": {"every_steps": 50}, "schedule": {"max_steps": 17}},
        {"evaluation": {"per_epoch": 2}, "batch": {"tokens_per_step": 900}, "schedule": {"max_steps": 90}},
        {"data": {"validation": None}},
        {"data": {"validation": None}, "evaluation": {"every_steps": 5, "sample_prompts": ["Hi"]}},
    ],
)
def test_all_evaluations_at_once_are_those_that_the_trainer_finds_one_by_one(parts: dict[str, Any]) -> None:
    plan = plan_of(profile(LENGTHS), **{"data": HELD_OUT, "batch": {"samples_per_step": 16}, **parts})
    found = [step for step in range(1, plan.total_steps + 1) if plan.evaluates_after(step)]
    assert evaluation_steps(plan) == found
    assert bool(found) == (parts.get("data") != {"validation": None} or "evaluation" in parts)


def test_an_epoch_that_is_cut_short_in_a_run_whose_epochs_differ_keeps_its_own_borders() -> None:
    plan = plan_of(
        profile(LENGTHS),
        data=HELD_OUT,
        batch={"tokens_per_step": 900},
        evaluation={"per_epoch": 2},
        schedule={"epochs": 1.5},
    )
    assert plan.settings.epochs_differ_in_steps and len(plan.run.steps_of_epoch) == 2
    found = [step for step in range(1, plan.total_steps + 1) if plan.evaluates_after(step)]
    assert evaluation_steps(plan) == found and len(found) == 3


def test_checkpoints_add_up_and_an_evaluation_may_be_the_best() -> None:
    parts = {"data": HELD_OUT, "batch": {"samples_per_step": 32}, "schedule": {"epochs": 2.5}}
    plain = {"every_steps": None, "every_epoch": False, "keep_best": 0}
    plan = plan_of(profile(LENGTHS), **parts, checkpoint=plain)
    per_epoch = plan.run.steps_per_epoch
    assert (per_epoch, plan.total_steps) == (7, 18)
    assert checkpoint_steps(plan) == [18]
    plan = plan_of(profile(LENGTHS), **parts, checkpoint={**plain, "every_epoch": True})
    assert checkpoint_steps(plan) == [7, 14, 18]
    plan = plan_of(profile(LENGTHS), **parts, checkpoint={**plain, "every_steps": 5})
    assert checkpoint_steps(plan) == [5, 10, 15, 18]
    plan = plan_of(profile(LENGTHS), **parts, checkpoint={**plain, "keep_best": 1}, evaluation={"every_steps": 6})
    assert checkpoint_steps(plan) == [6, 12, 18]
