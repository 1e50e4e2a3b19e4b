"""Whole jobs in every way to lay samples out, and with samples that are cut."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.layout import lay_out
from core.packing import IntArray, PlanSettings, Step, as_lengths, plan_epoch
from core.preflight import StepWork
from tests.engine import jobs, tiny
from worker.engine.batches import make_step
from worker.engine.records import SAMPLE_RECORD

BATCH = {"samples_per_step": 6, "micro_batch_size": 3}


@pytest.fixture(scope="module")
def run_job(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Any:
    """A finished job's plan, its steps and the records of its samples."""

    def run(**parts: Any) -> tuple[dict, list[dict], np.ndarray]:
        parts = {"method": {**jobs.SPEC["method"], "dropout": 0.0}, "schedule": {"learning_rate": 0.01}, **parts}
        parts["schedule"] |= {"max_steps": None, "epochs": 1}
        job = jobs.make_job(tmp_path_factory.mktemp("job"), model, data, **parts)
        with pytest.MonkeyPatch.context() as patch:
            assert jobs.run(job, patch) == 0, jobs.outcome_of(job)
        (plan,) = jobs.events_of(job, "plan")
        return plan, jobs.events_of(job, "step"), np.fromfile(job / "step_samples.bin", SAMPLE_RECORD)

    return run


def assert_all_that_was_planned_was_trained(plan: dict, steps: list[dict], records: np.ndarray) -> None:
    counts = plan["counts"]
    assert len(steps) == plan["total_steps"] > 1
    for name, planned in (("tokens", "num_tokens"), ("trained_tokens", "num_trained_tokens"), ("rows", "num_rows")):
        assert sum(step[name] for step in steps) == plan[planned]
    efficiency = sum(step["tokens"] for step in steps) / sum(step["slots"] for step in steps)
    assert efficiency == pytest.approx(plan["padding_efficiency"])
    assert counts["targets"] == sum(counts[f"targets_{name}"] for name in ("too_long", "lost", "trained"))
    lost_at_row_ends = counts.get("targets_lost_at_row_ends", 0)
    assert records["targets"].sum() == plan["num_trained_tokens"] == counts["targets_trained"] - lost_at_row_ends
    assert np.isfinite(records["loss_sum"]).all()
    for step in steps:
        own = records[records["step"] == step["step"]]
        assert own["loss_sum"].sum() / own["targets"].sum() == pytest.approx(step["loss"], rel=1e-5)


def test_every_mode_makes_the_same_steps_and_the_same_curve(run_job: Any) -> None:
    ways = [("packed", "best_fit"), ("packed", "sequential")]
    ways += [(mode, "best_fit") for mode in ("padding_free", "grouped", "padded")]
    told = {}
    for mode, algorithm in ways:
        plan, steps, records = run_job(packing={"mode": mode, "algorithm": algorithm}, batch=BATCH)
        assert_all_that_was_planned_was_trained(plan, steps, records)
        told[mode, algorithm] = steps
    reference = told["padded", "best_fit"]
    slots = {way: sum(step["slots"] for step in steps) for way, steps in told.items()}
    assert slots["padding_free", "best_fit"] < slots["grouped", "best_fit"] < slots["padded", "best_fit"]
    for steps in told.values():
        for mine, other in zip(steps, reference, strict=True):
            assert mine["sample_hash"] == other["sample_hash"] and mine["trained_tokens"] == other["trained_tokens"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert steps[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)
        assert steps[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_cut_samples_teach_what_their_pieces_teach_alone(tmp_path: Path, family: str) -> None:
    samples = tiny.some_samples(20)

    def count_targets(positions: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
        pieces = zip(positions.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return as_lengths(int(samples.contents[sample][1][start + 1 : end].sum()) for sample, start, end in pieces)

    wrapped = PlanSettings("packed", 64, "rows", 4, micro_batch_size=2, algorithm="wrapped")
    plan = plan_epoch(as_lengths(samples.lengths), wrapped, 1, 1, count_targets)
    step = plan.step(0)
    assert plan.num_cuts > 2 and any(start > 0 for _, start, _ in step.segments)
    targets = dict(zip(step.segments, count_targets(*np.array(step.segments).T).tolist(), strict=True))

    def gradients(settings: PlanSettings, step: Step) -> tuple[float, dict]:
        work = StepWork(1, 1.0, step.segments, targets, lay_out(step, settings))
        return tiny.gradients(model, make_step(work, samples))

    model = tiny.load(tiny.save_base(tmp_path, family), method={"type": "full"})
    loss, gradient = gradients(wrapped, step)
    alone_loss, alone_gradient = gradients(
        replace(wrapped, mode="padded", algorithm="best_fit", micro_batch_size=1), replace(step, rows=None)
    )
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert tiny.difference(alone_gradient, gradient) < 1e-5


def test_wrapped_rows_are_full_and_what_they_cut_is_counted(run_job: Any) -> None:
    plan, steps, records = run_job(
        packing={"algorithm": "wrapped", "row_length": 256}, batch={"rows_per_step": 2, "micro_batch_size": 2}
    )
    assert_all_that_was_planned_was_trained(plan, steps, records)
    assert plan["counts"]["cuts"] > 0 and plan["counts"]["targets_lost_at_row_ends"] > 0
    assert all(step["tokens"] == 512 for step in steps[:-1])
    assert len(records) == plan["num_samples"] + plan["counts"]["cuts"], "each piece has a record"


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_overlong_samples_are_cut_and_nothing_vanishes(run_job: Any, overlong: str) -> None:
    given = json.loads(json.dumps(jobs.SPEC["data"])) | {"max_length": 80, "overlong": overlong}
    plan, steps, records = run_job(data=given, batch=BATCH)
    assert_all_that_was_planned_was_trained(plan, steps, records)
    counts = plan["counts"]
    assert counts["samples_truncated" if overlong == "truncate" else "samples_split"] > 0
    assert plan["num_samples"] == counts["pieces"] and plan["max_length"] == 80
    if overlong == "split":
        assert counts["pieces"] > counts["samples_trained"] and len(records) > len(np.unique(records["sample"]))
