import os
import signal

import pytest

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


def test_who_asks_where_it_stands_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Signals().installed() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not (signals.stop_requested or signals.checkpoint_requested)
    assert "in test_who_asks_where_it_stands_is_told_at_once" in capfd.readouterr().err
