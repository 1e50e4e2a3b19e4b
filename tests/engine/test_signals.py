import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.jobs import wait_until
from worker.engine.signals import Signals, Stopped


def test_a_stop_interrupts_once_where_it_may_and_is_noted_elsewhere() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals().installed() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_requested
        signals.interrupts = True
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the end that the first one set going is not disturbed
        with pytest.raises(Stopped):
            signals.obey()
        assert not signals.checkpoint_requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.checkpoint_requested
    assert signal.getsignal(signal.SIGTERM) == before


CHILD = (
    "from worker.engine.signals import die_with_parent as d; d(); print('up', flush=True); import time; time.sleep(60)"
)
PARENT = """
import os, subprocess, sys
env = {**os.environ, "PEGBOX_PARENT_DEATH": "1", "PEGBOX_PARENT_PID": str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=env, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_dies_with_the_parent_that_asked_for_it() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PARENT, CHILD], cwd=root, stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(int(done.stdout)))


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    env = {**os.environ, "PEGBOX_PARENT_DEATH": "1", "PEGBOX_PARENT_PID": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=root, env=env, capture_output=True, check=False)
    assert done.returncode == 1 and b"before the trainer began" in done.stderr and not done.stdout
