"""The curve that the panel draws, its ticks and its warm-up in tokens are those of the steps that the trainer makes."""

import random
from typing import Any

import pytest

from core.curve_report import report_curve, tokens_up_to
from tests.core.test_preflight import plan_of, profile

_DRAW = random.Random(8)
LENGTHS = [_DRAW.randint(20, 900) for _ in range(320)]


@pytest.mark.parametrize(
    "parts",
    [
        {"schedule": {"epochs": 2.4}},
        {"schedule": {"max_steps": 25}, "evaluation": {"every_steps": 4}, "checkpoint": {"every_steps": 6}},
        {"schedule": {"epochs": 3}, "batch": {"tokens_per_step": 5000}, "checkpoint": {"every_epoch": False}},
        {"schedule": {"epochs": 2.5}, "batch": {"rows_per_step": 3}, "evaluation": {"per_epoch": 5}},
        {"schedule": {"epochs": 1.5}, "data": {"train": [{"dataset": "d", "weight": 1.3}], "validation": None}},
    ],
)
def test_ticks_stand_where_the_plan_looks_up(parts: dict[str, Any]) -> None:
    data = {"train": [{"dataset": "d"}], "validation": {"fraction": 0.1}}
    plan = plan_of(profile(LENGTHS), **{"data": data, **parts})
    report = report_curve(plan)
    steps = range(1, plan.total_steps + 1)
    assert report.evaluation_steps == tuple(step for step in steps if plan.evaluates_after(step))
    every = plan.spec.checkpoint.every_steps
    assert report.checkpoint_steps == tuple(
        step
        for step in steps
        if step == plan.total_steps
        or (every is not None and step % every == 0)
        or (plan.spec.checkpoint.every_epoch and plan.ends_epoch(step))
    )
    assert len(report.checkpoint_steps) >= 1 and bool(report.evaluation_steps) == bool(plan.validation_ids)


@pytest.mark.parametrize("batch", [{"samples_per_step": 16}, {"tokens_per_step": 4000}, {"rows_per_step": 2}])
def test_tokens_of_the_warm_up_are_those_of_its_steps(batch: dict[str, int]) -> None:
    plan = plan_of(profile(LENGTHS), batch=batch, schedule={"epochs": 3, "warmup_epochs": 1.2})
    report = report_curve(plan)
    assert report.warmup_steps > plan.run.steps_per_epoch, "it reaches into the second epoch"
    work = [plan.step(step) for step in range(1, report.warmup_steps + 1)]
    assert report.warmup_tokens == sum(step.layout.tokens for step in work)
    assert report.warmup_trained_tokens == sum(step.num_targets for step in work)
    assert tokens_up_to(plan, 0) == (0, 0)


def test_the_floor_is_what_the_decay_ends_at() -> None:
    schedule = {"learning_rate": 2e-4, "min_lr_ratio": 0.1, "epochs": 2}
    plan = plan_of(profile(LENGTHS), schedule=schedule)
    report = report_curve(plan)
    assert report.floor == pytest.approx(2e-5) == report.last
    constant = report_curve(plan_of(profile(LENGTHS), schedule=schedule | {"decay": "constant"}))
    assert constant.floor == constant.peak == constant.last == 2e-4
