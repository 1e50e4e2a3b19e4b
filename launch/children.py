"""The long-lived processes that `pegbox up` starts: kept running while it lives, gone when it is gone.

Each stands in a process group of its own, so that Ctrl-C in the terminal reaches `up` alone, which then stops them in
the right order. The kernel kills each when `up` ends, however it ends; that signal belongs to the thread that forked,
so children are started from the main thread only. A child that ends by itself is started again, after a pause that
doubles from one to thirty seconds.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from worker import dies_with_parent

LONGEST_PAUSE_S = 30.0
# A child that lived for so long had started well: its next pause is the shortest again.
STEADY_S = 60.0


class Child:
    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: bytes = b"",
        log: Path | None = None,
    ) -> None:
        self.name = name
        self._argv = [sys.executable, dies_with_parent.__file__, str(os.getpid()), *argv]
        self._environment = dict(environment)
        self._stdin = stdin
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause_s = 0.5
        self._restart_at: float | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        output: IO[bytes] | None = self._log.open("ab") if self._log else None
        self._process = subprocess.Popen(
            self._argv,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            process_group=0,
        )
        if output:
            output.close()
        assert self._process.stdin
        self._process.stdin.write(self._stdin)
        self._process.stdin.close()
        self._started_at = time.monotonic()
        self._restart_at = None

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def keep_running(self) -> None:
        """To be called now and then: starts it again when it has ended and its pause is over."""
        if not self.has_ended():
            return
        now = time.monotonic()
        if self._restart_at is None:
            self._pause_s = 1.0 if now - self._started_at > STEADY_S else min(LONGEST_PAUSE_S, self._pause_s * 2)
            self._restart_at = now + self._pause_s
            code = self._process.returncode if self._process else None
            print(
                f"{self.name} ended with {code}; it starts again in {self._pause_s:.0f} s", file=sys.stderr, flush=True
            )
        elif now >= self._restart_at:
            self.start()

    def stop(self, grace_s: float) -> None:
        """TERM, then KILL when the grace is over. Only this child's own group is signalled."""
        if self._process is None or self.has_ended():
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
