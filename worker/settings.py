"""What a worker is told by its environment, kept in its data directory for the processes that it starts.

The host agent writes `worker/settings.json` (readable by its user alone: it holds the worker token) at every start;
Celery consumers and supervisors read it from there. A supervisor outlives the agent that started it: `ServerAddress`
is read again whenever the file has changed, so that a restart with another port or token reaches what still runs.

The times are settings so that tests can shorten them; nobody else should need to.
"""

import json
import os
import re
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from core import wire
from worker.job_directory import write_atomically

TRAINER_ARGV = (sys.executable, "-m", "worker.engine.train")
CERTIFIER_ARGV = (sys.executable, "-m", "worker.certifier")  # the trainer's follows
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WorkerSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path
    server: str
    token: str
    model_roots: tuple[Path, ...]
    gpus: str = "all"  # all | none | 0,1
    cpu_slots: int | None = None  # None: the inventory decides
    num_devices: int | None = None  # of this host; the agent fills it in from the inventory

    heartbeat_s: float = wire.HEARTBEAT_S
    host_beat_s: float = wire.HOST_BEAT_S
    http_timeout_s: float = 5.0
    upload_timeout_s: float = 120.0  # of one read or write, not of the whole file
    longest_back_off_s: float = 15.0
    relay_patience_s: float = wire.RELAY_PATIENCE_S
    stop_grace_s: float = wire.STOP_GRACE_S
    sweep_s: float = 30.0
    handshake_s: float = 5.0
    poll_s: float = 0.05  # how often a supervisor looks for new events: the floor of their way to the browser
    journal_sync_s: float = 1.0
    gpu_sample_s: float = 10.0
    # No event for this long while steps are made is a hang; slow steps stretch it to 20 of their median.
    hang_s: float = 600.0
    # Neither event nor output for this long is one in every other phase. What may take its time there (a model read
    # from a slow disk, a compiler, an evaluation) says nothing on the way; downloads and tokenising report progress.
    quiet_hang_s: float = 3600.0
    stack_wait_s: float = 3.0  # for the stacks of a hung trainer, before it is killed
    prepare_limit_s: float = 1800.0
    prepare_tell_s: float = 2.0  # how often the server hears of it, also when nothing is new: silence costs the claim
    inventory_limit_s: float = 1800.0  # the first one hashes every model below the roots

    trainer_argv: tuple[str, ...] = TRAINER_ARGV
    prepare_argv: tuple[str, ...] = (sys.executable, "-m", "worker.engine.prepare")
    inventory_argv: tuple[str, ...] = (sys.executable, "-m", "worker.engine.inventory")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """An empty variable counts as not set. PEGBOX_MODEL_ROOTS is a list like PATH."""
        data_dir = Path(environ.get("PEGBOX_DATA_DIR") or "data").expanduser().resolve()
        roots = [root for root in environ.get("PEGBOX_MODEL_ROOTS", "").split(os.pathsep) if root]
        return cls(
            data_dir=data_dir,
            server=environ.get("PEGBOX_URL") or "http://127.0.0.1:8000",
            token=environ.get("PEGBOX_WORKER_TOKEN", ""),
            model_roots=tuple(Path(root).expanduser().resolve() for root in roots) or (data_dir / "models",),
        )

    @classmethod
    def load(cls, data_dir: Path) -> Self:
        return cls.model_validate_json(settings_path(data_dir).read_bytes())

    def save(self) -> None:
        path = settings_path(self.data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp's mode, 0600, survives the rename.
        write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=1).encode())

    @property
    def worker_dir(self) -> Path:
        return self.data_dir / "worker"

    @property
    def blobs_dir(self) -> Path:
        return self.worker_dir / "blobs"

    @property
    def cache_dir(self) -> Path:
        """What one job works out and the next can use: tokenised data, by content."""
        return self.worker_dir / "cache"

    def host_id(self) -> str:
        """A random id that stays with the data directory: checkpoints lie there, so that is what a host is."""
        path = self.worker_dir / "host.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"host": uuid.uuid4().hex}).encode())
        return str(json.loads(path.read_bytes())["host"])

    def attempt_dir(self, attempt: wire.AttemptRef) -> Path:
        """Job ids come over the network and become a path here: anything but a plain word is refused."""
        if not JOB_ID.fullmatch(attempt.job):
            raise ValueError(f"{attempt.job!r} is not a job id")
        return self.worker_dir / "jobs" / attempt.job / f"a{attempt.attempt}"


def settings_path(data_dir: Path) -> Path:
    return data_dir / "worker" / "settings.json"


class ServerAddress:
    """Server and token as they stand now; `url_and_token` looks whether the file has changed."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._data_dir = settings.data_dir
        self._current = (settings.server, settings.token)
        self._read_at_ns = 0

    def url_and_token(self) -> tuple[str, str]:
        try:
            changed_at_ns = settings_path(self._data_dir).stat().st_mtime_ns
        except FileNotFoundError:
            return self._current
        if changed_at_ns != self._read_at_ns:
            settings = WorkerSettings.load(self._data_dir)
            self._current, self._read_at_ns = (settings.server, settings.token), changed_at_ns
        return self._current
