"""What a host offers is what it has: nothing is taken for a CPU host in silence, nothing is claimed that isn't there."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from core.needs import features_of
from core.wire import HostReport
from worker.engine import inventory
from worker.engine.demo_model import DEMO_MODEL
from worker.engine.inventory import (
    ListedGpu,
    gpu_devices,
    gpus_of_our_jobs,
    has_compiler,
    reaches_hub,
    take_inventory,
)
from worker.processes import MARK

needs_cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="torch here is built for CUDA")
ONE_GPU = [ListedGpu(0, "a card", 80 << 30, 0)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server where the hub would be."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command_prints_what_the_agent_reports(demo_model: Path, tmp_path: Path) -> None:
    root = demo_model.parents[1]
    command = [sys.executable, "-m", "worker.engine.inventory", "--model-root", str(root), "--cpu-slots", "2"]
    command += ["--gpus", "none", "--hash-cache", str(tmp_path / "hashes.json")]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True)
    report = HostReport(host="h", name="n", **json.loads(done.stdout))
    assert [device.id for device in report.devices] == ["cpu0", "cpu1"]
    assert [model.name for model in report.models] == [DEMO_MODEL]
    assert report.versions["torch"] == torch.__version__
    assert report.num_cpus >= 1
    assert not report.reaches_hub
    assert features_of(report) >= {"bitsandbytes", "deepspeed"} and "gpu" not in features_of(report)
    assert len(json.loads((tmp_path / "hashes.json").read_bytes())) > 3


def test_a_host_without_gpus_offers_one_cpu_slot(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "list_gpus", list)
    found = take_inventory([demo_model.parents[1]])
    assert [device.id for device in found.devices] == ["cpu0"]
    assert found.refused_devices == {}


@needs_cpu_torch
def test_a_gpu_that_torch_cannot_use_is_refused_aloud(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "list_gpus", lambda: ONE_GPU)
    found = take_inventory([demo_model.parents[1]])
    assert found.devices == ()  # not a CPU host
    assert "is built for CPUs only; install the CUDA build" in found.refused_devices["gpu0"]
    asked = take_inventory([demo_model.parents[1]], cpu_slots=1)
    assert [device.id for device in asked.devices] == ["cpu0"]
    assert asked.refused_devices == found.refused_devices


def test_a_gpu_that_the_driver_does_not_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "list_gpus", lambda: ONE_GPU)
    monkeypatch.setattr(inventory, "why_unusable", lambda index: None)
    monkeypatch.setattr(inventory, "_device", lambda gpu: gpu)
    assert gpu_devices("0,3") == (tuple(ONE_GPU), {"gpu3": "the driver lists no such GPU; see nvidia-smi -L"})
    assert gpu_devices("none") == ((), {})


def test_a_gpu_of_a_running_attempt_is_ours() -> None:
    program = "print('ready', flush=True); input()"
    environment = {**os.environ, MARK: "job.1.1", "CUDA_VISIBLE_DEVICES": "4,5"}
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert {4, 5} <= gpus_of_our_jobs()
    child.communicate("\n")
    assert not {4, 5} & gpus_of_our_jobs()


def test_the_hub_is_reached_only_where_it_answers(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    assert not reaches_hub()  # HF_HUB_OFFLINE: not even tried
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert reaches_hub()
    for nowhere in (f"{hub}/missing", "http://127.0.0.1:1", "file:///etc/passwd"):
        monkeypatch.setenv("HF_ENDPOINT", nowhere)
        assert not reaches_hub()


def test_the_cpu_adam_needs_a_compiler_and_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_compiler()
    for tool in ("c++", "ninja"):
        assert not has_compiler(), f"without {tool}"
        (tmp_path / tool).touch(mode=0o755)
    assert has_compiler()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_computes_is_offered() -> None:
    devices, refused = gpu_devices("all")
    assert devices
    assert not refused
