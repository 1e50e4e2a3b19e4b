"""A whole Pegbox for end-to-end tests: `pegbox up` with real Valkey, Celery, worker and trainer, in a temporary folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from app.auth import mint_login_link
from app.services import build_services
from app.settings import Settings, load_settings
from launch.tokens import make_token
from launch.up import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
TERMINAL = {"succeeded", "failed", "cancelled"}


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 90.0, every_s: float = 0.1) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain until {what}"
        time.sleep(every_s)


@dataclass
class House:
    data_dir: Path
    model_root: Path
    port: int = field(default_factory=free_port)
    cpu_slots: int = 2
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> Settings:
        return load_settings(
            {"PEGBOX_DATA_DIR": str(self.data_dir), "PEGBOX_PORT": str(self.port)}, Path("/nonexistent")
        )

    def start(self) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PEGBOX_")},
            "PEGBOX_MODEL_ROOTS": str(self.model_root),
            "PYTHONUNBUFFERED": "1",
        }
        self.data_dir.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "pegbox", "up", "--port", str(self.port), "--data-dir", str(self.data_dir)]
        with (self.data_dir / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, "--cpu-slots", str(self.cpu_slots), "--gpus", "none"],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until_ready()
        self.token = self.make_token()

    def make_token(self, role: str = "admin") -> str:
        return make_token(self.settings, "e2e", role)

    def login_link(self) -> str:
        services = build_services(self.settings)
        try:
            return mint_login_link(services)
        finally:
            services.database.close()

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process is None or self.process.poll() is None, self.log()
            try:
                return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready, "the web service is ready")

    def wait_for_host(self) -> None:
        wait_until(
            lambda: any(model["name"] == "demo/tiny-llama" for model in self.get("/models")["data"]),
            "the worker has registered",
            timeout_s=180,
        )

    def log(self) -> str:
        return (self.data_dir / "up.log").read_text(errors="replace")[-8000:]

    def stop(self) -> int:
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def kill_leftovers(self) -> None:
        """For a test that failed: nothing of this house stays behind."""
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """All that belongs to this house: its data directory stands in their environment or command line."""
        mine = str(self.data_dir)
        found = []
        for process in psutil.process_iter():
            try:
                belongs = mine in " ".join(process.cmdline()) or process.environ().get("PEGBOX_DATA_DIR") == mine
                belongs = belongs or process.cwd().startswith(mine)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if belongs and process.pid != os.getpid():
                found.append(process)
        return found

    def matching(self, pattern: str) -> list[psutil.Process]:
        return [process for process in self.processes() if re.search(pattern, " ".join(process.cmdline()))]

    # -- REST ------------------------------------------------------------------------------------------------------

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, path: str, **parameters: Any) -> Any:
        reply = httpx.get(f"{self.url}/api/v1{path}", params=parameters, headers=self.headers, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}/api/v1{path}", json=body, headers={**self.headers, **headers}, timeout=30)

    def put_dataset(self, name: str, content: bytes) -> Any:
        reply = httpx.put(f"{self.url}/api/v1/datasets/{name}", content=content, headers=self.headers, timeout=60)
        assert reply.status_code in (200, 201), reply.text
        return reply.json()

    def launch(self, spec: dict[str, Any]) -> str:
        reply = self.post("/jobs", {"spec": spec})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    def job(self, job: str) -> Any:
        return self.get(f"/jobs/{job}")

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 120.0) -> Any:
        def reached() -> Any:
            current = self.job(job)
            assert current["state"] in states or current["state"] not in TERMINAL, json.dumps(current)[:3000]
            return current if current["state"] in states else None

        return wait_until(reached, f"{job} is {' or '.join(states)}", timeout_s=timeout_s)

    def wait_for_step(self, job: str, step: int) -> None:
        wait_until(
            lambda: ((self.job(job).get("summary") or {}).get("step") or 0) >= step,
            f"{job} has made step {step}",
            timeout_s=120,
        )

    def losses(self, job: str) -> list[list[float]]:
        series = self.get(f"/jobs/{job}/metrics", names="loss", x="step", max_points=100_000)["series"]
        return list(series["loss"])


@contextmanager
def running_house(data_dir: Path, model_root: Path, **settings: Any) -> Iterator[House]:
    house = House(data_dir, model_root, **settings)
    try:
        house.start()
        house.wait_for_host()
        yield house
        house.stop()
    finally:
        house.kill_leftovers()
