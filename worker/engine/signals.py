"""What the outside may ask of a trainer while it works, and when it is heard.

TERM, INT and USR1 are noted, and obeyed at a border. USR2 is answered at once and from C, since who asks it has heard
nothing for long: the stack of every thread goes to standard error. That holds for the whole of a process, as it may
wait for its peers before there is a job to stop and after it has ended.
"""

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STANDARD_ERROR = 2  # the descriptor, whatever sys.stderr has become


@contextmanager
def stacks_on_demand() -> Iterator[None]:
    faulthandler.register(signal.SIGUSR2, file=STANDARD_ERROR)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR2)


class Stopped(Exception):
    """A stop signal has been obeyed: at a step border behind a checkpoint, or where there was nothing to save. A text
    says why nothing was saved behind a step."""


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
