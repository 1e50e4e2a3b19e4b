"""What a run was planned to be is what it was: steps, rows, positions and tokens to the last one, bytes to 2 %."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.kept import prune
from app.tables import CheckpointRow
from tests.engine.jobs import events_of, make_data, make_job, make_model, run
from worker.engine.checkpoint import checkpoints_in, read_manifest

EXACT = ("steps", "rows", "slots", "padding_efficiency", "trained_tokens")
CLOSE = ("checkpoint_bytes", "result_bytes")
NEVER = {"every_steps": None, "every_minutes": None, "every_epoch": False, "keep_best": 0}
AN_EPOCH = {"learning_rate": 0.01, "epochs": 1.0}
WITHIN = {"learning_rate": 0.01, "max_steps": 7}  # ends within the second epoch or a later one

WAYS: dict[str, dict[str, Any]] = {
    "packed": {"packing": {"mode": "packed"}},
    "padded": {"packing": {"mode": "padded"}, "batch": {"samples_per_step": 4, "micro_batch_size": 2}},
    "grouped": {"packing": {"mode": "grouped"}, "batch": {"samples_per_step": 4, "micro_batch_size": 2}},
    "wrapped": {
        "packing": {"mode": "packed", "algorithm": "wrapped", "row_length": 256},
        "batch": {"rows_per_step": 2},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


def lines_of(job: Path) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in json.loads((job / "report.json").read_bytes())["held_to"]}


@pytest.mark.parametrize("schedule", [AN_EPOCH, WITHIN], ids=["an epoch", "within an epoch"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_what_was_planned_to_the_last_token(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, way: str, schedule: dict[str, Any]
) -> None:
    job = make_job(tmp_path / "job", model, data, **WAYS[way], schedule=schedule, checkpoint=NEVER)
    assert run(job, monkeypatch) == 0
    lines, report = lines_of(job), json.loads((job / "report.json").read_bytes())
    for name in EXACT:
        assert lines[name]["actual"] == lines[name]["predicted"] is not None, name
        assert lines[name]["deviation"] == 0
    totals, steps = report["plan"]["totals"], report["plan"]["steps_per_epoch"]
    assert totals["is_exact"] and totals["slots"] == report["measured"]["slots"]
    assert (totals["steps"] % steps == 0) == (schedule is AN_EPOCH), "else a run within an epoch is not tried"
    assert (lines["padding_efficiency"]["actual"] < 1) == (way in ("padded", "grouped")), "else pads are not tried"


def test_a_run_that_is_resumed_is_held_to_the_steps_that_are_left(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_job(tmp_path / "first", model, data, schedule={"learning_rate": 0.01, "max_steps": 3})
    assert run(first, monkeypatch) == 0
    resume = tuple(checkpoints_in(first / "checkpoints")[:1])
    job = make_job(tmp_path / "job", model, data, schedule=WITHIN, resume=resume)
    assert run(job, monkeypatch) == 0
    lines = lines_of(job)
    assert lines["steps"]["actual"] == lines["steps"]["predicted"] == 4
    assert all(lines[name]["deviation"] == 0 for name in EXACT)
    assert lines["seconds"]["predicted"] is None and lines["seconds"]["actual"] > 0
    assert lines["steps_s"]["predicted"] > 0


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"method": {"type": "lora", "rank": 64, "alpha": 8}},
        {"method": {"type": "full"}},
        {"method": {"type": "full"}, "optimizer": {"name": "adamw_8bit"}},
        {"method": {"type": "lora", "rank": 8, "alpha": 8, "target_modules": ["q_proj", "down_proj"]}},
    ],
)
def test_bytes_are_what_was_planned(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    parts = {"schedule": {"learning_rate": 0.001, "max_steps": 6}, **parts}
    keep = {"every_steps": 1, "every_epoch": False, "keep_last": 2, "keep_best": 1}
    job = make_job(tmp_path / "job", model, data, **parts, checkpoint=keep)
    assert run(job, monkeypatch) == 0
    lines = lines_of(job)
    for name in CLOSE:
        assert lines[name]["actual"] == pytest.approx(lines[name]["predicted"], rel=0.02), name
    kept = [read_manifest(path).bytes for path in checkpoints_in(job / "checkpoints")]
    assert 2 <= len(kept) <= 3 and lines["kept_bytes"]["actual"] == sum(kept)
    assert {path.name for path in checkpoints_in(job / "checkpoints")} == known_to_lie_there(job, keep_last=2)
    assert lines["kept_bytes"]["predicted"] == 3 * lines["checkpoint_bytes"]["predicted"]


def known_to_lie_there(job: Path, keep_last: int) -> set[str]:
    """What the web service makes of the events."""
    standing: list[CheckpointRow] = []
    losses = {event["step"]: event["eval_loss"] for event in events_of(job, "eval")}
    for event in events_of(job, "checkpoint"):
        row = CheckpointRow(job="j", attempt=1, step=event["step"], path=event["path"], bytes=1, created_at=0.0)
        standing = prune([*standing, row], losses, keep_last=keep_last, keep_best=1)
    return {Path(row.path).name for row in standing}


def test_a_run_that_ends_before_its_first_step_is_held_to_nothing(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path / "job", model, data, schedule={**AN_EPOCH, "warmup_steps": 99})
    assert run(job, monkeypatch) == 65
    assert json.loads((job / "report.json").read_bytes())["held_to"] is None
