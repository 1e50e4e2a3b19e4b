import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.jobs import wait_until
from worker.engine.signals import Signals, Stopped, stacks_on_demand


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


def test_who_asks_where_it_stands_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with stacks_on_demand(), Signals().installed() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not (signals.stop_requested or signals.checkpoint_requested)
    assert "in test_who_asks_where_it_stands_is_told_at_once" in capfd.readouterr().err


def test_a_rank_that_waits_for_its_peers_can_be_asked_too(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    with socket.create_server(("127.0.0.1", 0)) as nobody:  # takes the call and never says a word
        place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        argv = [sys.executable, "-m", "worker.engine.train", str(tmp_path)]
        environment = {**os.environ, **place, "MASTER_PORT": str(nobody.getsockname()[1])}
        with subprocess.Popen(argv, env=environment, cwd=Path(__file__).parents[2]) as rank:
            try:
                wait_until(log.exists)
                rank.send_signal(signal.SIGUSR2)
                wait_until(lambda: "in joined" in log.read_text())
                assert rank.poll() is None
            finally:
                rank.kill()
