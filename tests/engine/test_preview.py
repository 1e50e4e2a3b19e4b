"""What the form draws before launch is what the trainer then does, planned from the facts that it posts back."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.curve_report import report_curve
from core.preflight import JobPlan, plan_job
from core.spec import parse_spec
from core.wire import MeasuredProfile
from tests.engine import jobs
from worker.engine.device import find_device
from worker.engine.models import profile_with_hashes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_data(tmp_path_factory.mktemp("data") / "data.jsonl", num_rows=40)


def plan_before_launch(job: Path, model: Path) -> JobPlan:
    """As the web service makes it."""
    measured = TypeAdapter(list[MeasuredProfile]).validate_json((job / "profiles.json").read_bytes())
    _, device = find_device("cpu0", 0)
    return plan_job(
        parse_spec(json.loads((job / "spec.json").read_text())),
        {each.dataset: each.profile for each in measured},
        profile_with_hashes(model, "tests/tiny", job / "cache"),
        device,
    )


# PEFT 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("schedule", "batch"),
    [
        ({"decay": "cosine", "epochs": 2.5, "min_lr_ratio": 0.1}, {"samples_per_step": 4}),
        ({"decay": "wsd", "max_steps": 13, "warmup_steps": 4}, {"tokens_per_step": 300}),
        ({"decay": "inverse_sqrt", "epochs": 2, "warmup_epochs": 0.5}, {"rows_per_step": 2}),
        ({"decay": "constant", "epochs": 1, "warmup_ratio": 0.3}, {"samples_per_step": 4}),
    ],
)
def test_rates_evaluations_checkpoints_and_tokens_are_those_that_were_drawn(
    tmp_path: Path,
    model: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: dict[str, Any],
    batch: dict[str, int],
) -> None:
    job = jobs.make_job(
        tmp_path / "job",
        model,
        data,
        schedule={"learning_rate": 0.003, **schedule},
        batch=batch,
        evaluation={"per_epoch": 3},
        checkpoint={"every_steps": 4, "every_epoch": True, "every_minutes": None, "keep_best": 0},
    )
    assert jobs.run(job, monkeypatch) == 0
    plan = plan_before_launch(job, model)
    steps = jobs.events_of(job, "step")
    drawn = plan.learning_rates()
    assert [event["step"] for event in steps] == list(range(1, plan.total_steps + 1))
    assert [event["learning_rate"] for event in steps] == drawn[1:]
    assert len(set(drawn)) > 2, "there is a curve"
    curve = report_curve(plan)
    assert [event["step"] for event in jobs.events_of(job, "eval")] == list(curve.evaluation_steps)
    assert [event["step"] for event in jobs.events_of(job, "checkpoint")] == list(curve.checkpoint_steps)
    warmup = steps[: curve.warmup_steps]
    assert warmup and curve.warmup_tokens == sum(event["tokens"] for event in warmup)
    assert curve.warmup_trained_tokens == sum(event["trained_tokens"] for event in warmup)
