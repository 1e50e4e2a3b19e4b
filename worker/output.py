"""What a trainer prints, made fit for a log: whole lines, no control characters, no secrets, no flood.

Progress bars redraw a line with carriage returns; what stood last on the line is kept. trainer.log keeps every line;
the journal gets at most `LINES_A_SECOND` over time, and is told how many it was spared.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

MAX_LINE = 4000  # characters
LINES_A_SECOND = 100
BURST_LINES = 1000
_MAX_PENDING_BYTES = 1 << 16
# CSI (colours, cursor), OSC (titles, links), and two-character escapes.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class LineReader:
    """Bytes in whatever pieces they come -> clean lines."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._pending = b""
        self._secrets = secrets
        self.tail: deque[str] = deque(maxlen=50)

    def feed(self, data: bytes) -> Iterator[str]:
        *complete, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > _MAX_PENDING_BYTES:
            complete.append(self._pending)
            self._pending = b""
        for raw in complete:
            yield from self._clean(raw)

    def finish(self) -> Iterator[str]:
        rest, self._pending = self._pending, b""
        yield from self._clean(rest)

    def _clean(self, raw: bytes) -> Iterator[str]:
        text = raw.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
        text = _CONTROL.sub("", _ANSI.sub("", text)).rstrip()
        for secret in self._secrets:
            text = text.replace(secret, "[hidden]")
        if not text:
            return
        if len(text) > MAX_LINE:
            text = f"{text[:MAX_LINE]} … [cut, {len(text)} characters]"
        self.tail.append(text)
        yield text


class Throttle:
    """A token bucket that counts what it turned away."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = float(BURST_LINES)
        self._refilled_at = clock()
        self.num_dropped = 0

    def admits(self) -> bool:
        self._refill()
        if self._tokens < 1:
            self.num_dropped += 1
            return False
        self._tokens -= 1
        return True

    def take_dropped(self, *, is_last: bool = False) -> int:
        """How many were dropped since they were last asked for; 0 while lines are still being turned away."""
        self._refill()
        if self._tokens < 1 and not is_last:
            return 0
        num_dropped, self.num_dropped = self.num_dropped, 0
        return num_dropped

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(BURST_LINES, self._tokens + (now - self._refilled_at) * LINES_A_SECOND)
        self._refilled_at = now
