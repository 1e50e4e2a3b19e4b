"""One web process a data directory: the recorder, the dispatcher and the wake-ups of live streams live in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError

LOCK_FILE = "web.lock"


@contextmanager
def hold_data_dir(data_dir: Path) -> Iterator[None]:
    """Keeps a second web process out for as long as this one lives, however it ends. Raises UserError."""
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            raise UserError("app.second_web", "", data_dir=str(data_dir), pid=owner or "?") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
