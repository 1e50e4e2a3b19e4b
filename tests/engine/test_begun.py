"""Gradient checkpointing stands for all three: on one CPU it is what the memory decides."""

from pathlib import Path

import pytest

from tests.engine import jobs
from worker.engine import checkpoint, train
from worker.engine.device import find_device

FIELDS = ("parallel.zero_stage", "parallel.offload", "compute.gradient_checkpointing")


@pytest.fixture
def begun(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a person had compute activations twice, which memory did not ask for."""
    job = jobs.make_job(tmp_path / "begun", model, data, compute={"gradient_checkpointing": True})
    assert jobs.run(job, monkeypatch) == 0
    return job


def choices_of(job: Path) -> dict[str, tuple[object, str]]:
    (plan,) = jobs.events_of(job, "plan")
    found = {choice["field"]: (choice["value"], choice["code"]) for choice in plan["choices"]}
    return {field: found[field] for field in FIELDS if field in found}


def test_what_auto_chose_stands_and_the_resume_says_so(
    begun: Path, tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = jobs.make_job(tmp_path / "fresh", model, data)
    assert jobs.run(fresh, monkeypatch) == 0
    assert choices_of(fresh)["compute.gradient_checkpointing"] == (False, "auto.checkpointing_none")

    resumed = jobs.make_job(tmp_path / "resumed", model, data, resume=(begun / "checkpoints/step-4",))
    assert jobs.run(resumed, monkeypatch) == 0
    values = (0, "none", True)
    assert choices_of(resumed) == {field: (value, "auto.as_begun") for field, value in zip(FIELDS, values, strict=True)}
    last = checkpoint.read_manifest(resumed / "checkpoints/step-6")
    assert (last.zero_stage, last.offload, last.gradient_checkpointing) == values
    ours, theirs = (jobs.events_of(job, "step")[-1] for job in (begun, resumed))
    assert (ours["step"], ours["loss"], ours["grad_norm"]) == (theirs["step"], theirs["loss"], theirs["grad_norm"])


def test_what_a_person_sets_is_theirs(
    begun: Path, tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.make_job(
        tmp_path / "job",
        model,
        data,
        resume=(begun / "checkpoints/step-4",),
        compute={"gradient_checkpointing": False},
    )
    assert jobs.run(job, monkeypatch) == 0
    assert not checkpoint.read_manifest(job / "checkpoints/step-6").gradient_checkpointing
    assert "auto.as_begun" not in {code for _, code in choices_of(job).values()}


def test_what_does_not_fit_here_is_chosen_anew_and_said(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = jobs.make_job(tmp_path / "begun", model, data)
    assert jobs.run(begun, monkeypatch) == 0
    assert choices_of(begun)["compute.gradient_checkpointing"][0] is False

    def find_less(name: str, place: int, cpu_slots: int) -> tuple[object, object]:
        device, facts = find_device(name, place, cpu_slots)
        return device, facts.model_copy(update={"memory_bytes": 1 << 20})

    monkeypatch.setattr(train, "find_device", find_less)
    job = jobs.make_job(tmp_path / "job", model, data, resume=(begun / "checkpoints/step-4",))
    assert jobs.run(job, monkeypatch) == 0
    assert choices_of(job)["compute.gradient_checkpointing"] == (True, "auto.memory_short")
    (warning,) = (event for event in jobs.events_of(job, "warning") if event["code"] == "placement")
    assert "compute.gradient_checkpointing False" in warning["text"]
