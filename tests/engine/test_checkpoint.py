import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from tests.engine import tiny
from worker.engine import checkpoint
from worker.engine.checkpoint import Progress


class Run:
    """Some weights that AdamW has moved."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.weights = {"a": torch.nn.Parameter(torch.randn(3, width)), "b": torch.nn.Parameter(torch.randn(4))}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.1, weight_decay=0.3, fused=True)
        self.move()

    def move(self) -> None:
        for weight in self.weights.values():
            weight.grad = torch.randn_like(weight)
        self.optimizer.step()

    def save(self, folder: Path, step: int, loss: float | None = None) -> Path:
        progress = Progress(step=step, evaluated_step=step if loss is not None else 0, eval_loss=loss)
        return checkpoint.save(folder, self, progress, spec=tiny.spec_of(), threads=1)

    checkpoint_bytes = 3 * 4 * 19

    def write(self, folder: Path) -> list[Path]:
        return checkpoint.write_whole(folder, self.weights, self.optimizer)

    def load(self, path: Path) -> None:
        checkpoint.load_weights(path, 1, self.weights)
        checkpoint.load_optimizer(path / checkpoint.OPTIMIZER, self.optimizer)
        checkpoint.load_rng(path, rank=0)


def no_warning(code: str, text: str) -> None:
    raise AssertionError(text)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    run = Run()
    checkpoint.seed_all(3)
    path = run.save(tmp_path, 7)
    draws = [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]
    run.move()
    other = Run(seed=1)
    other.optimizer.param_groups[0]["weight_decay"] = 0.05
    other.load(path)
    assert [random.random(), float(np.random.standard_normal()), float(torch.rand(()))] == draws
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.05, "the spec's own numbers stay"
    other.optimizer.param_groups[0]["weight_decay"] = 0.3
    other.move()
    for name, weight in run.weights.items():
        assert torch.equal(weight, other.weights[name])


@pytest.mark.parametrize(
    "name", [checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.rng_name(0), checkpoint.MANIFEST]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_one_is_passed_over_for_an_older_one(tmp_path: Path, name: str, damage: str) -> None:
    run = Run()
    older, newer = run.save(tmp_path, 1), run.save(tmp_path, 2)
    assert checkpoint.checkpoints_in(tmp_path) == [newer, older]
    file = newer / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    warnings: list[str] = []
    found = checkpoint.newest_verified([newer, older], lambda code, text: warnings.append(text))
    assert found is not None and found[0] == older and found[1].step == 1
    assert len(warnings) == 1 and "step-2" in warnings[0]


def test_where_none_verifies_the_job_is_told_so_after_two_older_ones(tmp_path: Path) -> None:
    run = Run()
    paths = [run.save(tmp_path, step) for step in (4, 3, 2, 1)]
    for path in paths[:3]:
        (path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(UserError) as error:
        checkpoint.newest_verified(paths, lambda code, text: None)
    assert error.value.code == "engine.no_checkpoint" and "step-2" in str(error.value)
    assert checkpoint.newest_verified(paths[1:], lambda code, text: None) is not None
    assert checkpoint.newest_verified([], no_warning) is None


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    run = Run()
    for step, loss in enumerate((3.0, 1.0, None, 2.0, None), start=1):
        run.save(tmp_path, step, loss)
    checkpoint.prune(tmp_path, keep_last=2, keep_best=1)
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-5", "step-4", "step-2"]
    assert checkpoint.best_in(tmp_path) == tmp_path / "step-2"
    checkpoint.prune(tmp_path, keep_last=1, keep_best=0)
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-5"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("killed_at", range(7))
def test_a_kill_at_any_fsync_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    run = Run()
    run.save(tmp_path, 1)
    calls = 0
    real_sync = os.fsync

    class Killed(BaseException):
        pass

    def sync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > killed_at:
            raise Killed
        real_sync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # the dead clean nothing up
    if killed_at < 6:
        with pytest.raises(Killed):
            run.save(tmp_path, 2)
    else:
        run.save(tmp_path, 2)
    monkeypatch.undo()
    assert calls == min(killed_at + 1, 6), "three files, the manifest, its folder and the parent"
    found = checkpoint.newest_verified(checkpoint.checkpoints_in(tmp_path), no_warning)
    assert found is not None and found[1].step == (2 if killed_at >= 5 else 1)
    checkpoint.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"step-1", "step-2"}


def test_no_room_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(checkpoint.NoSpace, match="100 bytes are free"):
        run.save(tmp_path, 1)
    monkeypatch.undo()

    def full(*args: object, **named: object) -> None:
        raise RuntimeError("[enforce fail] No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.NoSpace):
        run.save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_another_models_checkpoint_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    path = Run().save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        Run(width=6).load(path)
    assert error.value.code == "engine.other_model" and "a is 3 x 5 there and 3 x 6 here" in str(error.value)


def test_a_checkpoint_of_a_step_that_stands_damaged_replaces_it(tmp_path: Path) -> None:
    run = Run()
    (run.save(tmp_path, 1) / checkpoint.WEIGHTS).write_bytes(b"")
    path = run.save(tmp_path, 1)
    assert checkpoint.verify(path).step == 1 and [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_it_says_which_libraries_made_it(tmp_path: Path) -> None:
    made_by = checkpoint.read_manifest(Run().save(tmp_path, 1)).versions
    assert made_by["torch"] == torch.__version__
    assert {"python", "numpy", "transformers", "peft", "bitsandbytes", "deepspeed"} <= made_by.keys()
