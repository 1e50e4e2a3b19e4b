"""DeepSpeed on a rank that is alone: nothing is cut, and the steps are those of stage 0. test_ranks.py has two."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.nn.functional as F

from core.certify import Curve
from tests.engine import jobs
from worker.job_directory import LayoutTrial


@pytest.fixture
def group_is_left() -> Iterator[None]:
    yield
    dist.destroy_process_group()
    os.environ.pop("LOCAL_RANK", None)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.usefixtures("group_is_left")
def test_a_stage_on_one_device_makes_the_steps_of_stage_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = jobs.make_model(tmp_path / "model"), jobs.make_data(tmp_path / "rows.jsonl")
    linear = F.linear
    curves = []
    for stage in (0, 2):
        job = jobs.make_job(
            tmp_path / str(stage),
            model,
            data,
            method={"type": "full"},
            schedule={"learning_rate": 1e-3, "max_steps": 3},
            parallel={"zero_stage": stage},
            trial=LayoutTrial(steps=3),
        )
        assert jobs.run(job, monkeypatch) == 0, jobs.outcome_of(job).text
        curves.append(Curve.model_validate_json((job / "trial.json").read_bytes()))
    assert curves[0].losses == pytest.approx(curves[1].losses, rel=1e-6)
    assert curves[0].grad_norms == pytest.approx(curves[1].grad_norms, rel=1e-6)
    assert F.linear is linear
