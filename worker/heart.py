"""The heartbeat of an attempt: every 2 s, from a thread of its own, whatever else the supervisor is doing.

It carries the last seq and the progress to the server and brings back what the server wants. It stops at nothing: a
server that is away costs a time-out of 5 s and nothing else. `Stale` is remembered for the main thread, which acts.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from core import wire
from worker.server import Away, Server, Stale


@dataclass
class Progress:
    """Written by the main thread, read by the heart."""

    last_seq: int = 0
    step: int = 0
    total_steps: int | None = None


class Heart(threading.Thread):
    def __init__(
        self,
        server: Server,
        attempt: wire.AttemptRef,
        progress: Progress,
        on_orders: Callable[[wire.AttemptOrders], None],
        interval_s: float,
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self._server, self._attempt, self._progress = server, attempt, progress
        self._on_orders = on_orders
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self.orders: wire.AttemptOrders | None = None  # the newest
        self.is_stale = False

    @property
    def desired(self) -> str:
        return self.orders.desired if self.orders else "run"

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.orders = self._server.heartbeat(
                    self._attempt,
                    wire.Heartbeat(
                        fence=self._attempt.fence,
                        last_seq=self._progress.last_seq,
                        step=self._progress.step,
                        total_steps=self._progress.total_steps,
                    ),
                )
                self._on_orders(self.orders)
            except Away:
                pass  # the server shows the attempt as unreachable by itself; the training does not care
            except Stale:
                self.is_stale = True
                return
            self._stopping.wait(self._interval_s)

    def stop(self) -> None:
        self._stopping.set()
        self.join()
