"""What the outside may ask of a trainer while it works, and when it is heard."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A stop signal has been obeyed: at a step border behind a checkpoint, or where there was nothing to save."""


class Signals:
    """What the outside has asked for. `interrupts` is on where a stop may end the work at any line."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.checkpoint_requested = False
        self.interrupts = False

    @contextmanager
    def installed(self) -> Iterator["Signals"]:
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._checkpoint}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        if self.interrupts:
            self.interrupts = False  # once: a second one must not end what the first has set going
            raise Stopped

    def _checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoint_requested = True

    def obey(self) -> None:
        """At a border between two phases: a stop whose exception was swallowed by a library's callback."""
        if self.stop_requested:
            raise Stopped
