"""Trials in the real trainer: a dry run makes the job's own first steps, and each rate of a probe begins anew."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.trial import DIVERGED_FACTOR, DryRun, RateProbe, probe_schedule
from tests.engine import jobs
from tests.engine.test_ranks import STAGES, Ground, two_ranks
from worker.engine import trial as trials
from worker.engine.run import Ready, Run
from worker.engine.step import Made

LOW, HIGH = 1e-3, 3e-2
STEPS = 4
LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.3}
METHODS = {
    "lora with dropout": {"method": LORA},
    "qlora": {"method": {**LORA, "type": "qlora"}},
    "full": {"method": {"type": "full"}},
    "full, moments in 8 bits": {"method": {"type": "full"}, "optimizer": {"name": "adamw_8bit"}},
}


def probe(*rates: float) -> RateProbe:
    return RateProbe(rates=rates, steps=STEPS)


def curves(job: Path) -> dict[float, list[tuple]]:
    """(step, loss, norm) of each rate, as they were told."""
    found: dict[float, list[tuple]] = {}
    for event in jobs.events_of(job, "probe"):
        found.setdefault(event["learning_rate"], []).append((event["step"], event["loss"], event["grad_norm"]))
    return found


def assert_keeps_nothing(job: Path) -> None:
    assert not (job / "result").exists() and not (job / "beginning").exists()
    assert list((job / "checkpoints").iterdir()) == []
    assert {event["kind"] for event in jobs.events_of(job)}.isdisjoint({"checkpoint", "eval", "sample"})


def test_a_dry_run_makes_the_first_steps_of_the_job_and_keeps_nothing(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = jobs.make_job(tmp_path / "whole", model, data)
    dry = jobs.make_job(tmp_path / "dry", model, data, trial=DryRun(steps=4))
    assert jobs.run(whole, monkeypatch) == jobs.run(dry, monkeypatch) == 0
    names = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "slots", "sample_hash")
    made, mine = ([[step[name] for name in names] for step in jobs.events_of(job, "step")] for job in (whole, dry))
    assert mine == made[:4] and len(made) == 6
    assert jobs.events_of(dry, "plan")[0]["total_steps"] == 6, "the plan is that of the whole job"
    phases = list(dict.fromkeys(event["name"] for event in jobs.events_of(dry, "phase")))
    assert phases == ["tokenise", "plan", "load_model", "probe", "longest_batch", "train"]
    report = json.loads((dry / "report.json").read_bytes())
    assert report["measured"]["steps"] == 4 and report["outcome"]["code"] == 0
    assert jobs.events_of(dry)[-1]["kind"] == "end" and jobs.events_of(dry)[-1]["steps"] == 4
    assert_keeps_nothing(dry)


def test_a_dry_run_longer_than_the_job_ends_with_it(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, schedule={"max_steps": 2}, trial=DryRun())
    assert jobs.run(job, monkeypatch) == 0
    assert [step["step"] for step in jobs.events_of(job, "step")] == [1, 2]


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_makes_the_same_steps_whatever_was_tried_before(
    name: str, tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: dict[tuple[float, ...], dict[float, list[tuple]]] = {}
    for rates in ((LOW,), (HIGH, LOW), (LOW, HIGH)):
        job = jobs.make_job(tmp_path / str(len(tried)), model, data, **METHODS[name], trial=probe(*rates))
        assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
        assert_keeps_nothing(job)
        tried[rates] = curves(job)
    alone, after_another, before_it = (found[LOW] for found in tried.values())
    assert alone == after_another == before_it and len(alone) == STEPS
    other = tried[HIGH, LOW][HIGH]
    assert other == tried[LOW, HIGH][HIGH]
    assert other[0] == alone[0], "no update has touched the first step"
    assert all(one[1] != another[1] for one, another in zip(other[1:], alone[1:], strict=True))


def test_the_learning_rate_of_a_probe_rises_in_a_short_warm_up_and_stays(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    real = trials.make_step

    def make_step(ready: Ready, batch: object, learning_rate: float, *rest: object) -> Made:
        used.append(learning_rate)
        return real(ready, batch, learning_rate, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "make_step", make_step)
    job = jobs.make_job(
        tmp_path / "job", model, data, schedule={"max_steps": 30}, trial=RateProbe(rates=(HIGH,), steps=20)
    )
    assert jobs.run(job, monkeypatch) == 0
    assert used == pytest.approx([HIGH / 3, 2 * HIGH / 3, *[HIGH] * 18])
    assert probe_schedule(HIGH, 20).warmup_steps == 3


def test_a_rate_that_diverges_ends_alone(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, method={"type": "full"}, trial=probe(10.0, LOW))
    assert jobs.run(job, monkeypatch) == 0
    told = jobs.events_of(job, "probe")
    ended = [event for event in told if event["diverged"]]
    (end,) = ended
    assert end["learning_rate"] == 10.0 and end["step"] < STEPS
    first = told[0]["loss"]
    assert end["loss"] is None or end["loss"] > DIVERGED_FACTOR * first
    assert [step for step, *_ in curves(job)[LOW]] == [1, 2, 3, 4]
    assert jobs.events_of(job)[-1]["steps"] == end["step"] + STEPS


def test_a_stop_ends_a_trial_at_the_next_border_and_says_that_nothing_is_kept(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(tmp_path / "job", model, data, trial=probe(LOW, HIGH))

    def stop(event: dict) -> None:
        if event["kind"] == "probe" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert jobs.run(job, monkeypatch, stop) == 75
    outcome = jobs.outcome_of(job)
    assert "keeps nothing" in outcome.text and "resume" not in outcome.text + outcome.remedy
    assert list(curves(job)) == [LOW] and len(curves(job)[LOW]) == 3, "obeyed at the end of the step that was under way"
    assert_keeps_nothing(job)


def test_buffers_that_a_pass_changes_are_put_back_too(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies of positions that grow with the longest row seen, as some models have them."""
    found: list[list[Tensor]] = []
    real = trials._probe_rate

    def spoiling(run: Run, ready: Ready, *rest: object) -> None:
        buffers = list(ready.model.model.buffers())
        found.append([buffer.clone() for buffer in buffers])
        real(run, ready, *rest)  # type: ignore[arg-type]
        for buffer in buffers:
            buffer.add_(1)

    monkeypatch.setattr(trials, "_probe_rate", spoiling)
    job = jobs.make_job(tmp_path / "job", model, data, trial=probe(LOW, HIGH))
    assert jobs.run(job, monkeypatch) == 0
    first, second = found
    assert first and all(map(torch.equal, first, second))


@pytest.mark.timeout(900)
def test_two_ranks_begin_anew_under_every_stage(tmp_path: Path) -> None:
    ground = Ground(tmp_path)
    parts = {"method": LORA, "schedule": {"max_steps": 6}}
    for stage in STAGES:
        ground.order(f"alone/{stage}", **parts, **two_ranks(stage), trial=probe(LOW))
        ground.order(f"after/{stage}", **parts, **two_ranks(stage), trial=probe(HIGH, LOW))
    ground.order("moments in 8 bits/alone", **parts, **eight_bits(), trial=probe(LOW))
    ground.order("moments in 8 bits/after", **parts, **eight_bits(), trial=probe(HIGH, LOW))
    ground.run()
    for stage in STAGES:
        alone, after = curves(tmp_path / f"alone/{stage}"), curves(tmp_path / f"after/{stage}")
        assert alone[LOW] == after[LOW] and len(alone[LOW]) == STEPS, f"stage {stage}"
        assert after[HIGH][1:] != after[LOW][1:]
        assert_keeps_nothing(tmp_path / f"after/{stage}")
    alone, after = (curves(tmp_path / "moments in 8 bits" / name) for name in ("alone", "after"))
    assert alone[LOW] == after[LOW] and len(alone[LOW]) == STEPS


def eight_bits() -> dict:
    return {**two_ranks(2), "optimizer": {"name": "adamw_8bit"}}
