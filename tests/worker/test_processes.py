import os
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.wire import AttemptRef
from tests.worker.conftest import kill
from tests.worker.ledger import wait_until
from worker.processes import (
    MARK,
    ProcessId,
    child_environment,
    dying_with_this_process,
    mark_of,
    marked,
    own_environment,
    ranks_below,
    secrets_in,
    sweep,
)

SLEEP = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


@contextmanager
def running(code: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_process_is_alive_until_it_ends() -> None:
    assert ProcessId.current().is_alive()
    with running(SLEEP) as process:
        current = ProcessId.current()
        found = current.model_copy(update={"pid": process.pid})
        assert not found.is_alive(), "the pid is taken, but by a process that started at another time"
        assert not found.send(signal.SIGKILL)
        assert process.poll() is None
        assert not current.model_copy(update={"boot_id": "another boot"}).is_alive()


def test_a_zombie_is_not_alive() -> None:
    with running("print(1)") as process:
        assert process.stdout is not None
        process.stdout.read()
        wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("Z"))
        start_time = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[19])
        found = ProcessId.current().model_copy(update={"pid": process.pid, "start_time": start_time})
        assert not found.is_alive()


def test_the_sweep_ends_what_a_group_kill_leaves() -> None:
    mark = f"test.{secrets.token_hex(8)}"
    # Three generations, each in a session of its own, none listening to TERM.
    code = textwrap.dedent(f"""
        import subprocess, sys, time
        for _ in range(2):
            subprocess.Popen([sys.executable, "-c", {DEAF!r}], start_new_session=True)
        print("ready", flush=True)
        time.sleep(600)
    """)
    with running(code, **{MARK: mark}) as process, running(SLEEP, **{MARK: mark + "1"}) as neighbour:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(wait_until(lambda: marked(mark) if len(marked(mark)) == 3 else [])) == 3
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(marked(mark)) == 2, "a group kill is not enough"
        assert sweep(mark, timeout_s=10) == []
        assert marked(mark) == []
        assert neighbour.poll() is None, "another mark that begins alike is another attempt"


def test_ranks_are_the_launchers_own_children_and_not_what_these_start() -> None:
    mark = f"test.{secrets.token_hex(8)}"
    rank = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); time.sleep(600)"
    code = textwrap.dedent(f"""
        import os, subprocess, sys, time
        for number in range(2):
            environment = {{**os.environ, "RANK": str(number)}}
            subprocess.Popen([sys.executable, "-c", {rank!r}], env=environment, start_new_session=True)
        time.sleep(600)
    """)
    with running(code, **{MARK: mark}) as launcher:
        try:
            wait_until(lambda: len(marked(mark)) == 5)
            wait_until(lambda: len(ranks_below(launcher.pid, mark)) == 2)
            ranks = ranks_below(launcher.pid, mark)
            assert sorted(ranks) == [0, 1]
            for number, process in ranks.items():
                assert f"RANK={number}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                assert process.is_alive() and os.getsid(process.pid) == process.pid, "in sessions of their own"
            assert ranks_below(launcher.pid, mark + "1") == {}
        finally:
            assert sweep(mark, timeout_s=10) == []


def test_a_child_dies_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = textwrap.dedent(f"""
        import subprocess, sys, time
        from worker.processes import dying_with_this_process
        subprocess.Popen(dying_with_this_process([sys.executable, "-c", {child!r}]), start_new_session=True)
        time.sleep(600)
    """)
    with running(code) as parent:
        pid = int(wait_until(lambda: pid_file.exists() and pid_file.read_text()))
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    kill(pid)


def test_a_child_whose_parent_is_gone_does_not_begin() -> None:
    argv = dying_with_this_process([sys.executable, "-c", "print('begun')"])
    argv[argv.index(str(os.getpid()))] = "1"
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "parent ended" in done.stderr


def test_a_child_sees_what_it_needs_and_no_secret_of_the_worker() -> None:
    environ = {
        "PATH": "/bin",
        "HF_TOKEN": "hf_0123456789",
        "NCCL_DEBUG": "INFO",
        "https_proxy": "http://proxy",
        "PEGBOX_WORKER_TOKEN": "secret",
        "PEGBOX_REDIS_URL": "redis://:password@host",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "LD_PRELOAD": "/evil.so",
    }
    child = child_environment(environ, "m", OMP_NUM_THREADS="2")
    assert {"PATH", "HF_TOKEN", "NCCL_DEBUG", "https_proxy", "OMP_NUM_THREADS"} < child.keys()
    assert not {"PEGBOX_WORKER_TOKEN", "PEGBOX_REDIS_URL", "AWS_SECRET_ACCESS_KEY", "LD_PRELOAD"} & child.keys()
    assert child[MARK] == "m"
    assert child["OMP_WAIT_POLICY"] == "PASSIVE"
    assert secrets_in(child) == ("hf_0123456789",)


def test_by_hand_a_person_keeps_what_they_set() -> None:
    child = own_environment({"LD_PRELOAD": "/mine.so", "PYTHONPATH": "/mine"}, "m", OMP_NUM_THREADS="2")
    assert (child["LD_PRELOAD"], child["OMP_NUM_THREADS"], child[MARK]) == ("/mine.so", "2", "m")
    assert child["PYTHONPATH"].endswith(f"{os.pathsep}/mine"), "behind this package"
    assert child["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_environment({"OMP_WAIT_POLICY": "ACTIVE"}, "m")["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_mark_names_job_attempt_and_fence() -> None:
    assert mark_of(AttemptRef(job="j", attempt=2, fence=3)) == "j.2.3"


@pytest.mark.parametrize("module", ["worker.supervisor", "worker.tasks", "worker.agent", "worker.celery_app"])
def test_what_outlives_a_training_does_not_load_its_libraries(module: str) -> None:
    code = (
        f"import sys, {module}; loaded = sorted(sys.modules);"
        "print([name for name in loaded if name.split('.')[0] in ('torch', 'transformers', 'peft', 'app', 'client')"
        " or name.startswith('worker.engine')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
