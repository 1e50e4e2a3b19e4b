"""Who a process is, which processes belong to an attempt, and how they are made to end.

A pid alone says nothing: it is reused, across a reboot at once. `ProcessId` is a pid with the kernel's start time and
boot id. What an attempt started, its grandchildren in sessions of their own included, is found by `PEGBOX_MARK` in the
environment, which is inherited and which nothing but a deliberate act takes off (measured: killing the process group
left 4 of 6 processes, the sweep none). Nothing is ever killed by name.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from core.wire import AttemptRef

MARK = "PEGBOX_MARK"
PR_SET_CHILD_SUBREAPER = 36
_STATE, _PARENT, _START_TIME = 0, 1, 19  # fields of /proc/<pid>/stat, counted after the command's name
_PROC = Path("/proc")


class ProcessId(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    start_time: int  # clock ticks since boot
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """None for a process that is gone."""
        start_time = _start_time(pid)
        return None if start_time is None else cls(pid=pid, start_time=start_time, boot_id=boot_id())

    @classmethod
    def current(cls) -> Self:
        this = cls.of(os.getpid())
        assert this is not None
        return this

    def is_alive(self) -> bool:
        return self.boot_id == boot_id() and _start_time(self.pid) == self.start_time

    def send(self, number: signal.Signals) -> bool:
        """False: it is gone. The handle is opened first, so that the signal cannot reach a successor of its pid."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(handle, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)


def boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """None for a process that is gone, or a zombie: it has ended and only waits to be reaped."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may itself hold brackets and spaces.
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[_STATE] in "ZX" else fields


def _start_time(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[_START_TIME])


def mark_of(attempt: AttemptRef) -> str:
    return f"{attempt.job}.{attempt.attempt}.{attempt.fence}"


def marked(mark: str) -> list[int]:
    """The pids that carry the mark, this process excepted."""
    entry = f"{MARK}={mark}".encode()
    return [
        int(folder.name)
        for folder in _PROC.iterdir()
        if folder.name.isdigit() and int(folder.name) != os.getpid() and entry in _environment(int(folder.name))
    ]


def _environment(pid: int) -> Sequence[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ()


def ranks_below(launcher: int, mark: str) -> dict[int, ProcessId]:
    """The ranks that the process `launcher` has started so far, by their number.

    RANK alone tells nothing: what a rank starts inherits it, so a rank is also a child of the launcher itself."""
    ranks: dict[int, ProcessId] = {}
    for pid in marked(mark):
        process, fields = ProcessId.of(pid), _stat(pid)
        number = next((entry for entry in _environment(pid) if entry.startswith(b"RANK=")), None)
        if process is not None and fields is not None and int(fields[_PARENT]) == launcher and number is not None:
            ranks[int(number.removeprefix(b"RANK="))] = process
    return ranks


def kill_marked(mark: str) -> list[int]:
    """Sends KILL to whatever carries the mark; returns the pids that did."""
    entry = f"{MARK}={mark}".encode()
    found = marked(mark)
    for pid in found:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                # Looked at again through the handle: the pid may have gone to someone else since.
                if entry in _environment(pid):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
    return found


def sweep(mark: str, *, timeout_s: float) -> list[int]:
    """Kills whatever carries the mark until nothing does; returns the pids that would not die in time."""
    deadline = time.monotonic() + timeout_s
    while left := kill_marked(mark):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def become_subreaper() -> None:
    """Orphaned grandchildren become children of this process instead of init's, so that it can reap them."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def reap() -> None:
    """Takes leave of every ended child. Only for a process that waits for none of them by itself any more."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def dying_with_this_process(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` as a child which does not outlive the thread that starts it."""
    script = Path(__file__).with_name("dies_with_parent.py")
    return [sys.executable, "-I", "-S", str(script), str(os.getpid()), *argv]


# What a trainer may see of the worker's environment. Everything of Pegbox's own (tokens, addresses) stays outside.
_PASSED_ON = {
    "HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "LOGNAME", "MODELSCOPE_CACHE", "PATH", "REQUESTS_CA_BUNDLE", "SHELL",
    "SSL_CERT_DIR", "SSL_CERT_FILE", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH",
}  # fmt: skip
_PASSED_ON_PREFIXES = (
    "GLOO_",
    "HF_",
    "LC_",
    "NCCL_",
    "NVIDIA_",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "TRITON_",
    "XDG_",
)
_PROXIES = {"http_proxy", "https_proxy", "no_proxy", "all_proxy"}


# OpenMP's threads otherwise spin while they wait for each other. Where anything else wants the cores, that cost 4.4
# times the CPU and 3.5 times the wall time of small matrix products (two threads on two shared cores), and where
# nothing does it gains little.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_FOR_EVERY_TRAINER = {
    # It runs in the job's directory and still finds this package, installed or not; nothing there is imported.
    "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
}


def child_environment(environ: Mapping[str, str], mark: str, **extra: str) -> dict[str, str]:
    passed = {
        name: value
        for name, value in environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES) or name.lower() in _PROXIES
    }
    return {**passed, **PATIENT_THREADS, **_FOR_EVERY_TRAINER, MARK: mark, **extra}


def own_environment(environ: Mapping[str, str], mark: str, **extra: str) -> dict[str, str]:
    """The same for a trainer that a person starts by hand, who may set whatever they like."""
    paths = [_FOR_EVERY_TRAINER["PYTHONPATH"], *filter(None, [environ.get("PYTHONPATH")])]
    ours = {**_FOR_EVERY_TRAINER, "PYTHONPATH": os.pathsep.join(paths), MARK: mark}
    return {**PATIENT_THREADS, **environ, **ours, **extra}


def secrets_in(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values that must not appear in a log: those of the passed-on variables that are named after a secret."""
    return tuple(value for name, value in environment.items() if len(value) >= 8 and name.endswith(("_TOKEN", "_KEY")))
