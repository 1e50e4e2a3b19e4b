"""What the outside may ask of a trainer while it works, and when it is heard.

TERM, INT and USR1 are noted, and obeyed at a border. USR2 is answered at once and from C, since who asks it has heard
nothing for long: the stack of every thread goes to standard error.
"""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STANDARD_ERROR = 2  # the descriptor, whatever sys.stderr has become


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
        faulthandler.register(signal.SIGUSR2, file=STANDARD_ERROR)
        try:
            yield self
        finally:
            faulthandler.unregister(signal.SIGUSR2)
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
