"""What `pegbox up` starts runs while it lives, and is gone when it is gone, however it went."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launch.children
from launch.children import Child
from launch.up import free_port, is_free

ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_reads_its_standard_input_and_is_stopped(tmp_path: Path) -> None:
    child = Child("cat", ["sh", "-c", "cat; sleep 60"], os.environ, stdin=b"secret", log=tmp_path / "log")
    child.start()
    wait_until(lambda: (tmp_path / "log").read_bytes() == b"secret")
    assert child.pid is not None and os.getpgid(child.pid) == child.pid, "a group of its own"
    child.stop(grace_s=10)
    assert child.has_ended()


def test_a_child_that_ignores_term_is_killed() -> None:
    child = Child(
        "deaf", [sys.executable, "-c", "import signal,time; signal.signal(15, 1); time.sleep(60)"], os.environ
    )
    child.start()
    assert child.pid is not None
    child.stop(grace_s=0.5)
    assert child.has_ended()


def test_a_child_that_ends_is_started_again_after_a_pause_that_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(launch.children.time, "monotonic", lambda: now)
    child = Child("short", ["true"], os.environ)
    child.start()
    pauses = []
    for _ in range(3):
        first = child.pid
        assert child._process is not None
        child._process.wait()
        child.keep_running()
        begun = now
        while child.pid == first:
            now += 0.5
            child.keep_running()
        pauses.append(now - begun)
    assert pauses == [1.0, 2.0, 4.0]
    assert "it starts again in 1 s" in capsys.readouterr().err
    child._process.wait()


def test_children_die_with_a_parent_that_is_killed() -> None:
    code = (
        "import os, signal; from launch.children import Child\n"
        "child = Child('sleep', ['sleep', '60'], os.environ); child.start()\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(int(done.stdout)))


def test_a_busy_port_is_found_busy() -> None:
    import socket

    port = free_port()
    assert is_free("127.0.0.1", port)
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert not is_free("127.0.0.1", port)
