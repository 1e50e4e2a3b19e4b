"""What a job that ended says of the next one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.history import read_history
from app.jobs.attempts import finish
from app.tables import Attempt, Job
from core.past_run import PastRun
from core.wire import AttemptRef, Finish, WireEvent
from tests.app.ledger import HOST, Ledger, open_ledger
from tests.app.scene import step, wire
from tests.app.test_recorder import PLAN

COUNTED = {"num_slots": 1000, "num_flops": 5_000_000, "planned_peak_bytes": 800}
CHOICES = [
    {"field": field, "value": value, "code": "auto.row_length", "parameters": {}}
    for field, value in (
        ("compute.dtype", "fp32"),
        ("compute.gradient_checkpointing", False),
        ("parallel.zero_stage", 0),
        ("parallel.offload", "none"),
    )
]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path)
    yield ledger
    ledger.services.database.close()


def told(ledger: Ledger) -> list[PastRun]:
    with ledger.services.database.read() as session:
        return read_history(session)


def begin(ledger: Ledger, **job: Any) -> AttemptRef:
    """Claimed, planned and, 7 s later, at its first step."""
    job_id = ledger.add_job()
    with ledger.services.database.write() as session:
        stored = session.get_one(Job, job_id)
        for name, value in job.items():
            setattr(stored, name, value)
        session.add(stored)
    launch = ledger.claimed(job_id)
    ledger.record(launch, wire(1, "plan", **PLAN, **COUNTED, choices=CHOICES))
    ledger.clock.now += 7
    ledger.record(launch, make(2, 1))
    return launch


def make(seq: int, number: int) -> WireEvent:
    return step(seq, number, slots=100, tokens=90, rows=3, step_s=2.0, memory_peak_bytes=1000)


def end(ledger: Ledger, launch: AttemptRef, outcome: str = "succeeded") -> None:
    with ledger.services.database.write() as session:
        attempt = session.get_one(Attempt, (launch.job, launch.attempt))
        message = Finish.model_validate({"fence": launch.fence, "outcome": outcome, "final_seq": attempt.acked_seq})
        finish(session, session.get_one(Job, launch.job), attempt, message, ledger.clock())


def test_a_job_that_ended_tells_its_pace_its_start_and_what_was_forecast_for_it(ledger: Ledger) -> None:
    forecast = {"time": {"seconds": 60.0, "correction": 1.5, "basis": "history"}}
    launch = begin(ledger, forecast=forecast)
    ledger.record(launch, make(3, 2), make(4, 3))
    ledger.clock.now += 23
    end(ledger, launch)
    (run,) = told(ledger)
    assert (run.job, run.host, run.steps, run.slots, run.step_s) == (launch.job, HOST, 3, 300, 6.0)
    assert run.flops == 5_000_000 * 300 / 1000
    assert run.startup_s == 7 and run.seconds == 30 and run.has_succeeded
    assert (run.basis, run.told_s, run.planned_s, run.time_ratio) == ("history", 60.0, 40.0, 0.5)
    assert run.memory_ratio == 1.25
    likeness = run.likeness
    assert (likeness.device, likeness.num_ranks, likeness.model) == ("CPU slot", 1, "demo/tiny-llama")
    assert (likeness.method, likeness.attention, likeness.dtype) == ("lora", "dense", "fp32")
    summary = ledger.job(launch.job).summary or {}
    assert (summary["tokens"], summary["rows"], summary["busy_s"]) == (270, 9, 30)


def test_a_job_that_runs_tells_as_far_as_it_is(ledger: Ledger) -> None:
    launch = begin(ledger)
    (run,) = told(ledger)
    assert run.steps == 1 and run.seconds is run.memory_ratio is None and not run.has_succeeded and not run.tells_pace
    ledger.record(launch, *(make(seq, seq - 1) for seq in range(3, 22)))
    assert told(ledger)[0].steps == 20 and told(ledger)[0].tells_pace


def test_a_step_made_again_counts_once_and_the_time_of_two_attempts_is_no_time_in_one_go(ledger: Ledger) -> None:
    launch = begin(ledger)
    ledger.record(launch, make(3, 2))
    end(ledger, launch, "lost")
    ledger.clock.now += 100
    again = ledger.claimed(launch.job)
    ledger.record(again, make(1, 2), make(2, 3))
    ledger.clock.now += 9
    end(ledger, again)
    (run,) = told(ledger)
    assert (run.steps, run.slots, run.step_s) == (3, 300, 6.0)
    assert run.has_succeeded and run.seconds is None
    assert (ledger.job(launch.job).summary or {})["busy_s"] == 7 + 9


def test_a_dry_run_is_told_as_one_and_a_probe_of_rates_not_at_all(ledger: Ledger) -> None:
    end(ledger, begin(ledger, trial={"kind": "dry_run", "steps": 10}))
    (run,) = told(ledger)
    assert run.is_trial and run.tells_pace and run.seconds is None
    end(ledger, begin(ledger, trial={"kind": "lr_probe", "rates": [1e-4], "steps": 4}))
    assert told(ledger) == [run]


def test_a_job_that_goes_on_from_another_or_made_no_step_tells_nothing(ledger: Ledger) -> None:
    end(ledger, begin(ledger, resume_jobs=["job_x"]))
    launch = ledger.claimed(ledger.add_job())
    end(ledger, launch, "failed")
    assert told(ledger) == []


def test_the_newest_come_first(ledger: Ledger) -> None:
    launches = [begin(ledger) for _ in range(3)]
    for launch in launches:
        end(ledger, launch)
    assert [run.job for run in told(ledger)] == [launch.job for launch in reversed(launches)]


@pytest.mark.parametrize("choices", [[], [{"field": "parallel.zero_stage", "value": 7}], [{"value": 0}]])
def test_a_plan_that_another_release_told_otherwise_ends_its_job_all_the_same(
    ledger: Ledger, choices: list[dict[str, Any]]
) -> None:
    launch = begin(ledger)
    ledger.record(launch, make(3, 2))
    with ledger.services.database.write() as session:
        job = session.get_one(Job, launch.job)
        job.plan = {**(job.plan or {}), "choices": choices}
        session.add(job)
    assert told(ledger) == []
    end(ledger, launch)
    assert ledger.job(launch.job).state == "succeeded"
    assert told(ledger) == []
