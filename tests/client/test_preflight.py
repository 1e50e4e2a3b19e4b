"""`pegbox preflight` as a person runs it, against a real server on a port."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.auth import create_token
from launch.up import free_port
from tests.e2e.stage import Stage, raised

ROOT = Path(__file__).parents[2]
SPEC: dict[str, Any] = {"data": {"train": [{"dataset": "demo-dialogues"}]}, "schedule": {"learning_rate": 2e-4}}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with raised(tmp_path_factory.mktemp("stage"), free_port()) as stage:
        stage.open_host()
        stage.upload("demo-dialogues")
        yield stage


@contextmanager
def measuring(stage: Stage) -> Iterator[None]:
    """A host that is at its work meanwhile."""
    is_done = threading.Event()

    def work() -> None:
        while not is_done.is_set():
            stage.measure()
            time.sleep(0.3)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    is_done.set()
    thread.join()


def begin(
    stage: Stage, folder: Path, *more: str, spec: object = SPEC, token: str | None = None
) -> subprocess.Popen[str]:
    path = folder / "spec.yaml"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    token = create_token(stage.services.database, "client", "viewer") if token is None else token
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEGBOX_")}
    return subprocess.Popen(
        [sys.executable, "-m", "pegbox", "preflight", "-f", str(path), *more],
        env=environment | {"PEGBOX_URL": stage.url, "PEGBOX_TOKEN": token},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(stage: Stage, folder: Path, *more: str, **how: Any) -> subprocess.CompletedProcess[str]:
    with begin(stage, folder, *more, **how) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_it_waits_for_the_data_and_prints_what_the_api_says(stage: Stage, tmp_path: Path) -> None:
    spec = {**SPEC, "data": {**SPEC["data"], "train_on": "all"}}  # a policy that nothing has measured yet
    with begin(stage, tmp_path, "-o", "json", spec=spec) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "measuring the data: demo-dialogues wanted\n"
        with measuring(stage):
            out, _ = process.communicate()
    assert process.returncode == 0
    told, printed = stage.api.post("/jobs/preflight", json={"spec": spec}).json(), json.loads(out)
    # A forecast goes by the clock.
    assert printed | {"forecast": {}} == told | {"forecast": {}} and printed["total_steps"] > 10


def test_the_text_has_the_numbers_the_device_and_the_verdict(stage: Stage, tmp_path: Path) -> None:
    spec = {**SPEC, "schedule": {"learning_rate": 2e-4, "epochs": 10, "warmup_steps": 1}}
    with measuring(stage):
        done = run(stage, tmp_path, spec=spec)
    assert done.returncode == 0, done.stderr
    report = stage.api.post("/jobs/preflight", json={"spec": spec}).json()
    text = done.stdout
    assert f"Steps        {report['total_steps']}, {report['steps_per_epoch']} an epoch" in text
    assert "Warm-up      1 steps, up to a learning rate of 0.0002" in text
    assert f"{report['trained_tokens']:,} of them trained" in text
    assert f"{report['padding_efficiency']:.1%} of all positions are tokens" in text
    assert "of 48.0 GiB by estimate: it fits" in text and "Planned for  NVIDIA L40S (ada)" in text
    (remark,) = [each for each in report["verdict"] if each["code"] == "verdict.warmup_one_step"]
    assert "Warnings" in text and f"schedule.warmup_steps: {remark['text']}" in text
    assert "fix: schedule.warmup_steps 10" in text
    assert "2 of 640 rows are refused" in text


def test_what_cannot_run_ends_with_65_and_its_sentences(stage: Stage, tmp_path: Path) -> None:
    wrong = {**SPEC, "parallel": {"devices": 8, "zero_stage": 3}, "method": {"type": "qlora"}}
    done = run(stage, tmp_path, spec=wrong)
    assert done.returncode == 65 and done.stdout == ""
    assert "parallel.devices: parallel.devices 8: no host that has this model has more than 4 GPUs" in done.stderr
    assert "    fix: parallel.devices 4" in done.stderr
    assert "parallel.zero_stage: QLoRA under ZeRO stage 3" in done.stderr
    done = run(stage, tmp_path, spec={**SPEC, "bath": {}})
    assert done.returncode == 65 and done.stderr == "bath: bath is not a key of the job spec; did you mean batch?\n"


def test_a_file_that_is_no_spec_is_named(stage: Stage, tmp_path: Path) -> None:
    done = run(stage, tmp_path, spec="data: [")
    assert done.returncode == 65 and "not valid YAML" in done.stderr and "line" in done.stderr
    done = run(stage, tmp_path, spec="just words")
    assert done.returncode == 65 and "a mapping of keys to values, not str" in done.stderr
    missing = run(stage, tmp_path, "-f", str(tmp_path / "missing.yaml"))
    assert missing.returncode == 65 and "missing.yaml cannot be read" in missing.stderr


def test_no_server_a_wrong_one_and_a_wrong_token_are_told_apart(stage: Stage, tmp_path: Path) -> None:
    port = free_port()
    nobody = run(stage, tmp_path, "--server", f"http://127.0.0.1:{port}")
    assert nobody.returncode == 69
    assert f"no answer from http://127.0.0.1:{port}" in nobody.stderr and "--server or PEGBOX_URL" in nobody.stderr
    other = run(stage, tmp_path, "--server", f"{stage.url}/static/fix.js")
    assert other.returncode == 69, other.stderr
    stranger = run(stage, tmp_path, token="wrong")
    assert stranger.returncode == 77
    assert "this token is unknown or revoked" in stranger.stderr and "PEGBOX_TOKEN" in stranger.stderr
    nameless = run(stage, tmp_path, token="")
    assert nameless.returncode == 77 and "log in, or send a token" in nameless.stderr


def test_another_device_can_be_asked_for_by_name(stage: Stage, tmp_path: Path) -> None:
    with measuring(stage):
        assert run(stage, tmp_path, "--device", "ada").returncode == 0
    done = run(stage, tmp_path, "--device", "H200")
    assert done.returncode == 65 and "known are: NVIDIA L40S" in done.stderr
